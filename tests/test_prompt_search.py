"""The searched prompt: scores and gradients written out, planted optima, resuming, files."""

import itertools

import pytest
import torch
from conftest import pairs, random_ids, small_model, tiny_gpt2
from torch.nn.functional import cross_entropy, one_hot

from minprefix.batches import encode_examples
from minprefix.data import Example
from minprefix.prefix import token_activations
from minprefix.prompt_scores import one_hot_gradient, prompt_nats, prompt_tables, target_tokens
from minprefix.prompt_search import PromptSearch, SearchConfig
from minprefix.prompting import HardPrompt, template_rows
from minprefix.tokenizer import BYTE_CHARS, ENDOFTEXT, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"candidates": 8, "batch_size": 4, "judge_rows": 4, "starts": 6, "eval_every": 2}


def frozen(**changes):
    return tiny_gpt2(**changes).requires_grad_(False)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and the end of text: 257."""
    return Tokenizer({c: i for i, c in enumerate([*BYTE_CHARS, ENDOFTEXT])}, [])


def byte_model(**changes):
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    sizes = {"vocab_size": 257, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 128}
    return frozen(**{**sizes, **ends, **changes})


def rows_of(tokenizer, n: int = 5):
    return encode_examples(tokenizer, pairs(n))


def plain_nats(model, prompt: list[int], rows) -> float:
    """The loss with the prompt's tokens in front of each row, one row at a time."""
    nats = 0.0
    for row in rows:
        ids = torch.tensor([*prompt, *row.ids])
        logits = model(ids[None, :-1])[0]  # (P + T, V)
        first = len(prompt) + row.prompt_len  # the first target token
        nats += cross_entropy(logits[first - 1 :], ids[first:], reduction="sum").item()
    return nats


# scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_len", [0, 1, 7])
def test_a_score_is_the_loss_with_the_tokens_in_front(tokenizer, monkeypatch, prompt_len):
    model, rows = small_model(torch.float64).requires_grad_(False), rows_of(tokenizer)
    prompts = random_ids(model, 5, prompt_len)
    expected = [plain_nats(model, prompt.tolist(), rows) for prompt in prompts]
    for at_once in (1, 100, 8192):  # tokens in a pass: how the work is cut does not matter
        monkeypatch.setattr("minprefix.prompt_scores.PASS_TOKENS", at_once)
        nats = prompt_nats(model, prompts, rows, tokenizer.eos_id)
        # fp64, sums of some hundred nats
        assert nats.tolist() == pytest.approx(expected, rel=1e-12)
    assert target_tokens(rows) == sum(len(tokenizer.encode(f" {e.targets[0]}")) + 1
                                      for e in pairs(5))  # fmt: skip


def test_tables_of_embeddings_are_the_tokens_activations():
    model = frozen()
    prompts = random_ids(model, 3, 6)
    tables = prompt_tables(model, model.wte(prompts))
    for n, prompt in enumerate(prompts):
        exact = token_activations(model, prompt.tolist())
        assert (tables[:, :, n] - exact).abs().max() < 1e-12


def test_the_gradient_is_that_of_one_hot_choices_in_front_of_the_text(tokenizer, monkeypatch):
    model, rows = byte_model(), rows_of(byte_tokenizer(), 4)
    prompt = random_ids(model, 3)
    choices = one_hot(prompt, 257).double().requires_grad_()  # (P, V)
    nats = 0.0
    for row in rows:  # the model written as the embedding of one-hot rows, hooked into wte
        ids = torch.tensor(row.ids)
        text = one_hot(ids[:-1], 257).double()
        x = torch.cat([choices, text]) @ model.wte.weight
        hook = model.wte.register_forward_hook(lambda *_, x=x: x[None])
        logits = model(torch.zeros(1, len(x), dtype=torch.long))[0]
        hook.remove()
        first = 3 + row.prompt_len
        nats = nats + cross_entropy(logits[first - 1 :], ids[row.prompt_len :], reduction="sum")
    (exact,) = torch.autograd.grad(nats / target_tokens(rows), choices)
    for at_once in (1, 8192):
        monkeypatch.setattr("minprefix.prompt_scores.PASS_TOKENS", at_once)
        gradient = one_hot_gradient(model, prompt, rows, 256)
        assert (gradient - exact).abs().max() < 1e-12 * max(1, exact.abs().max())


def test_the_gradient_predicts_a_small_step_towards_a_token():
    """(1 - h) x_p + h W_v in the place of x_p: central difference with h = 1e-5."""
    model, rows, h = byte_model(), rows_of(byte_tokenizer(), 3), 1e-5
    prompt, place, token = [5, 80, 33], 1, 120
    gradient = one_hot_gradient(model, torch.tensor(prompt), rows, 256)
    from minprefix.prompt_scores import PrefixActivations, collate

    losses = []
    for sign in (1, -1):
        x = model.wte.weight[prompt].clone()
        x[place] += sign * h * (model.wte.weight[token] - model.wte.weight[prompt[place]])
        acts = PrefixActivations(prompt_tables(model, x[None])[:, :, 0], 3, 3)
        batch = collate(rows, 256)
        losses.append(model.token_losses(batch.input_ids, batch.labels, prefix=acts).mean())
    difference = ((losses[0] - losses[1]) / (2 * h)).item()
    predicted = (gradient[place, token] - gradient[place, prompt[place]]).item()
    # h^2 of truncation, eps / h of rounding: 1e-10 each beside derivatives of order 1
    assert predicted == pytest.approx(difference, abs=1e-8)


def test_a_template_row_has_the_targets_of_a_framed_row(tokenizer):
    prompt, examples = HardPrompt("Say {table}:"), pairs(3)
    for asked, framed, example in zip(
        template_rows(tokenizer, prompt, examples), rows_of(tokenizer, 3), examples, strict=True
    ):
        assert asked.ids[: asked.prompt_len] == tokenizer.encode(f"Say {example.source}:")
        assert asked.ids[asked.prompt_len :] == framed.ids[framed.prompt_len :]


# the search ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt_len", "rank"), [(1, 1), (2, 16)])
def test_the_search_comes_to_the_best_of_all_prompts(tmp_path, prompt_len, rank):
    """Brute force over all printable prompts of bytes; `rank`: the place accepted, 1 = the best."""
    model, tokenizer = byte_model(), byte_tokenizer()
    examples = [Example(f"{word}", (f"{word} ok",)) for word in ("one", "two", "six", "ten")]
    config = SearchConfig(
        prompt_len=prompt_len, steps=24, candidates=48, top_k=48, batch_size=4, judge_rows=2,
        chains=2, starts=8, printable=True, eval_every=1,
    )  # fmt: skip
    # the same rows for all purposes: then the optimum is one and the same
    search = PromptSearch(model, tokenizer, config, examples * 2, examples, tmp_path)
    search.rows = search.judge_rows = search.dev_rows
    found = search.run(progress=False)
    usable = search.usable.nonzero()[:, 0].tolist()
    assert len(usable) == 96  # printable ASCII and the line break
    everything = list(itertools.product(usable, repeat=prompt_len))
    nats = prompt_nats(model, torch.tensor(everything), search.dev_rows, 256)
    losses = (nats / target_tokens(search.dev_rows)).sort().values
    assert found["dev_loss"] == pytest.approx(
        losses[everything_rank(losses, found)].item(), rel=1e-12
    )
    assert everything_rank(losses, found) < rank
    assert search.spent < 0.5 * len(everything) * len(search.dev_rows) or prompt_len == 1


def everything_rank(losses: torch.Tensor, found: dict) -> int:
    return int((losses < found["dev_loss"] * (1 - 1e-12)).sum())
