"""Scores of discrete prompts: the loss on framed rows, and its first-order change.

A text reads the P tokens before it only through their keys and values, which by causality do not
depend on the text: h_0 ... h_{P-1} of eq. (1) of Li & Liang 2021 [1] are a prefix table
(`Prefix.from_prompt`). N prompts are therefore a bank of tables, and one forward pass over N copies
of the rows scores them all (`prompt_nats`).

For the one-hot vector o_p (V,) at place p, the model reads x_p = W^T o_p, where W (V, C) is the
embedding. Therefore

    d loss / d o_p = W d loss / d x_p,

and to first order the loss changes by (d loss / d o_p)[v] - (d loss / d o_p)[z_p] when token z_p is
replaced by v. HotFlip [2], AutoPrompt [3] and greedy coordinate gradient [4] choose candidates by
this number (`one_hot_gradient`).

The last A of the P tokens may instead replace the bos after the source (`with_free_positions`).
This is the form of a written instruction: prompt_1 ... prompt_{P-A}, source, prompt_{P-A+1} ...
prompt_P, target, eos. A = 0 is the frame of prefix-tuning; A = 1 includes it, as the case in which
the token is a bos. Shapes use the letters of `models/gpt2.py`, and A.

[1] https://arxiv.org/abs/2101.00190   [2] https://arxiv.org/abs/1712.06751
[3] https://arxiv.org/abs/2010.15980   [4] https://arxiv.org/abs/2307.15043
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minprefix.data.batches import Batch, Encoded, collate
from minprefix.models.activations import PrefixActivations
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.parametrisations import Recorder

PASS_TOKENS = 8192  # approximate number of tokens in a forward pass; limits memory
GRADIENT_COST = 2  # in forward passes: with frozen weights, a backward pass costs as much as one


def prompt_tables(model: GPT2, x: Tensor) -> Tensor:
    """Keys and values of N prompts given as embeddings x (N, P, C): (L, 2, N, H, P, D).

    Differentiable in x. For embeddings of tokens, it equals `parametrisations.token_activations`.
    """
    recorder: Any = Recorder(x.device)
    model.hidden_states(x, cache=recorder)
    return torch.stack(list(recorder.kv.values()))


def prompt_bank(table: Tensor, rows: int) -> PrefixActivations:
    """N prompts (L, 2, N, H, P, D), each before `rows` rows of its own; those of prompt 0 first."""
    N, P = table.shape[2], table.shape[4]
    index = torch.arange(N, device=table.device).repeat_interleave(rows)  # (N rows,)
    lens = torch.full((N,), P, device=table.device)
    return PrefixActivations(table, torch.full_like(index, P), P, index=index, lens=lens)


def repeat_batch(batch: Batch, N: int) -> Batch:
    """N copies of the batch's rows, one copy after the other."""
    start = torch.arange(N, device=batch.at.device)[:, None] * batch.labels.numel()  # (N, 1)
    return Batch(
        batch.input_ids.repeat(N, 1),
        batch.labels.repeat(N, 1),
        batch.lengths.repeat(N),
        (start + batch.at).flatten(),
        batch.starts.repeat(N),
    )


def split_by_tokens(rows: Sequence[Encoded], most: int) -> list[list[Encoded]]:
    """The rows sorted by length and divided into passes of about `most` tokens (at least 1 row)."""
    runs: list[list[Encoded]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if not runs or (len(runs[-1]) + 1) * len(row.ids) > most:
            runs.append([])
        runs[-1].append(row)
    return runs


def with_free_positions(rows: Sequence[Encoded], A: int) -> list[Encoded]:
    """The rows with A free places instead of the bos before the target; unchanged if A = 0."""
    if A == 0:
        return list(rows)
    return [
        Encoded(
            row.ids[: row.prompt_len - 1] + [0] * A + row.ids[row.prompt_len :],
            row.prompt_len - 1 + A,
            row.where,
        )
        for row in rows
    ]


def free_positions(rows: Sequence[Encoded], A: int, device: torch.device) -> Tensor:
    """The A free places in the rows of `with_free_positions`: (B, A)."""
    ends = torch.tensor([row.prompt_len for row in rows], device=device)
    return ends[:, None] + torch.arange(-A, 0, device=device)


@torch.no_grad()
def prompt_nats(
    model: GPT2, prompts: Tensor, rows: Sequence[Encoded], pad_id: int, A: int = 0
) -> Tensor:
    """Sum over the rows' target tokens of -log p, in nats, with each prompt: (N,), fp64.

    Args:
        prompts: (N, P) int; P = 0 means no prompt.
        rows: from `batches.encode_examples`; each is read with each prompt.
        A: how many of the P tokens are after the source.
    """
    (N, P), device = prompts.shape, prompts.device
    nats = torch.zeros(N, dtype=torch.float64, device=device)
    for run in split_by_tokens(with_free_positions(rows, A), PASS_TOKENS):
        batch = collate(run, pad_id).to(device)
        at_once = max(1, PASS_TOKENS // batch.input_ids.numel())  # prompts
        for first in range(0, N, at_once):
            some = prompts[first : first + at_once]
            n, copies, acts = len(some), repeat_batch(batch, len(some)), None
            if P > A:
                acts = prompt_bank(prompt_tables(model, model.wte(some[:, : P - A])), len(run))
            if A:
                inner = some[:, None, P - A :].expand(-1, len(run), -1).reshape(-1, A)
                copies.input_ids.scatter_(1, free_positions(run, A, device).repeat(n, 1), inner)
            losses = model.token_losses(copies.input_ids, copies.labels, copies.at, prefix=acts)
            nats[first : first + at_once] += losses.view(n, -1).double().sum(1)
    return nats


def target_tokens(rows: Sequence[Encoded]) -> int:
    """The number of tokens with a loss in the rows."""
    return sum(len(row.ids) - row.prompt_len for row in rows)


@contextmanager
def embeddings_at(model: GPT2, places: Tensor, x: Tensor) -> Iterator[None]:
    """Within the block the model reads the embeddings x (A, C) at `places` (B, A) of each row."""

    def put(module, args, out: Tensor) -> Tensor:  # (B, T, C)
        B, A = places.shape
        return out.scatter(1, places[..., None].expand(B, A, len(x[0])), x.expand(B, A, -1))

    hook = model.wte.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def one_hot_gradient(
    model: GPT2, prompt: Tensor, rows: Sequence[Encoded], pad_id: int, A: int = 0
) -> Tensor:
    """Gradient of the mean loss per target token in the one-hot vector of each place: (P, V).

    Args:
        prompt: (P,) int. The model must be frozen.
        rows, A: as in `prompt_nats`.
    """
    x = model.wte.weight[prompt].detach().requires_grad_()  # (P, C)
    before, after = x[: len(x) - A], x[len(x) - A :]
    dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for run in split_by_tokens(with_free_positions(rows, A), PASS_TOKENS):
        batch, acts = collate(run, pad_id).to(prompt.device), None
        if len(before):
            table = prompt_tables(model, before[None])[:, :, 0]
            acts = PrefixActivations(table, len(before), len(before))
        call = partial(model.token_losses, batch.input_ids, batch.labels, batch.at, prefix=acts)
        if A:
            with embeddings_at(model, free_positions(run, A, prompt.device), after):
                losses = call()
        else:
            losses = call()
        dx += torch.autograd.grad(losses.sum(), x)[0]
    return (dx / target_tokens(rows)) @ model.wte.weight.to(dx.dtype).T
