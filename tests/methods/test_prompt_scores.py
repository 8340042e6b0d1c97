"""Scores of discrete prompts: the loss and the one-hot gradient against plain formulas."""

import pytest
import torch
from conftest import byte_model, byte_tokenizer, pairs, random_ids, small_model, tiny_gpt2
from torch.nn.functional import cross_entropy, one_hot

from minprefix.data.batches import collate, encode_examples
from minprefix.methods.hard_prompt import HardPrompt, template_rows
from minprefix.methods.search.scores import (
    one_hot_gradient,
    prompt_nats,
    prompt_tables,
    target_tokens,
)
from minprefix.models.activations import PrefixActivations
from minprefix.prefix.parametrisations import token_activations


def rows_of(tokenizer, n: int = 5):
    return encode_examples(tokenizer, pairs(n))


def plain_nats(model, prompt: list[int], rows, A: int = 0) -> float:
    """The loss with the prompt's tokens around each source, one row at a time."""
    nats, (before, after) = 0.0, (prompt[: len(prompt) - A], prompt[len(prompt) - A :])
    for row in rows:
        source, bos, target = row.ids[: row.prompt_len - 1], *_bos_and_target(row)
        asked = before + source + (after if A else [bos])
        ids = torch.tensor(asked + target)
        logits = model(ids[None, :-1])[0]
        first = len(asked)  # the first target token
        nats += cross_entropy(logits[first - 1 :], ids[first:], reduction="sum").item()
    return nats


def _bos_and_target(row) -> tuple[int, list[int]]:
    return row.ids[row.prompt_len - 1], row.ids[row.prompt_len :]


@pytest.mark.parametrize("prompt_len, A", [(0, 0), (1, 0), (7, 0), (7, 3), (7, 6), (2, 2)])
def test_a_score_is_the_loss_with_the_tokens_in_the_text(tokenizer, monkeypatch, prompt_len, A):
    model, rows = small_model(torch.float64).requires_grad_(False), rows_of(tokenizer)
    prompts = random_ids(model, 5, prompt_len)
    expected = [plain_nats(model, prompt.tolist(), rows, A) for prompt in prompts]
    for at_once in (1, 100, 8192):  # tokens in a pass: how the work is cut does not matter
        monkeypatch.setattr("minprefix.methods.search.scores.PASS_TOKENS", at_once)
        nats = prompt_nats(model, prompts, rows, tokenizer.eos_id, A)
        # fp64, sums of some hundred nats
        assert nats.tolist() == pytest.approx(expected, rel=1e-12)
    assert target_tokens(rows) == sum(
        len(tokenizer.encode(f" {e.targets[0]}")) + 1 for e in pairs(5)
    )


def test_tables_of_embeddings_are_the_tokens_activations():
    model = tiny_gpt2().requires_grad_(False)
    prompts = random_ids(model, 3, 6)
    tables = prompt_tables(model, model.wte(prompts))
    for n, prompt in enumerate(prompts):
        exact = token_activations(model, prompt.tolist())
        assert (tables[:, :, n] - exact).abs().max() < 1e-12


def test_a_bos_behind_the_source_is_the_frame_of_the_prefix(tokenizer):
    model, rows = small_model(torch.float64).requires_grad_(False), rows_of(tokenizer)
    prompts = random_ids(model, 3, 4)
    with_bos = torch.cat([prompts, torch.full((3, 1), tokenizer.bos_id)], 1)
    nats = [
        prompt_nats(model, ids, rows, tokenizer.eos_id, A)
        for ids, A in ((prompts, 0), (with_bos, 1))
    ]
    assert nats[0].tolist() == pytest.approx(nats[1].tolist(), rel=1e-12)


@pytest.mark.parametrize("A", [0, 2, 4])
def test_the_gradient_is_that_of_one_hot_choices_in_the_text(monkeypatch, A):
    model, rows = byte_model(), rows_of(byte_tokenizer(), 4)
    prompt = random_ids(model, 4)
    choices = one_hot(prompt, 257).double().requires_grad_()  # (P, V)
    nats = 0.0
    for row in rows:  # the whole text as one-hot rows, their embeddings put into wte's place
        _, target = _bos_and_target(row)
        text = one_hot(torch.tensor(row.ids), 257).double()
        after = choices[4 - A :] if A else text[row.prompt_len - 1 : row.prompt_len]
        asked = torch.cat([choices[: 4 - A], text[: row.prompt_len - 1], after])
        x = torch.cat([asked, text[row.prompt_len : -1]]) @ model.wte.weight
        hook = model.wte.register_forward_hook(lambda *_, x=x: x[None])
        logits = model(torch.zeros(1, len(x), dtype=torch.long))[0, len(asked) - 1 :]
        hook.remove()
        nats = nats + cross_entropy(logits, torch.tensor(target), reduction="sum")
    (exact,) = torch.autograd.grad(nats / target_tokens(rows), choices)
    for at_once in (1, 8192):
        monkeypatch.setattr("minprefix.methods.search.scores.PASS_TOKENS", at_once)
        gradient = one_hot_gradient(model, prompt, rows, 256, A)
        assert (gradient - exact).abs().max() < 1e-12 * max(1, exact.abs().max())
    assert not model.wte._forward_hooks  # the model is left as it was


def test_the_gradient_predicts_a_small_step_towards_a_token():
    """(1 - h) x_p + h W_v in the place of x_p: central difference with h = 1e-5."""
    model, rows, h = byte_model(), rows_of(byte_tokenizer(), 3), 1e-5
    prompt, place, token = [5, 80, 33], 1, 120
    gradient = one_hot_gradient(model, torch.tensor(prompt), rows, 256)
    batch = collate(rows, 256)
    losses = []
    for sign in (1, -1):
        x = model.wte.weight[prompt].clone()
        x[place] += sign * h * (model.wte.weight[token] - model.wte.weight[prompt[place]])
        acts = PrefixActivations(prompt_tables(model, x[None])[:, :, 0], 3, 3)
        losses.append(model.token_losses(batch.input_ids, batch.labels, prefix=acts).mean())
    difference = ((losses[0] - losses[1]) / (2 * h)).item()
    predicted = (gradient[place, token] - gradient[place, prompt[place]]).item()
    # truncation error h^2 and rounding error eps / h are 1e-10 each, for derivatives of order 1
    assert predicted == pytest.approx(difference, abs=1e-8)


def test_a_template_row_has_the_targets_of_a_framed_row(tokenizer):
    prompt, examples = HardPrompt("Say {table}:"), pairs(3)
    for asked, framed, example in zip(
        template_rows(tokenizer, prompt, examples), rows_of(tokenizer, 3), examples, strict=True
    ):
        assert asked.ids[: asked.prompt_len] == tokenizer.encode(f"Say {example.source}:")
        assert asked.ids[asked.prompt_len :] == framed.ids[framed.prompt_len :]
