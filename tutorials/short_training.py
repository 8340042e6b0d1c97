"""The short loop that trains a prefix: tutorial 05 explains it, 06, 07 and 08 import it.

A cell of 05 shows `train` as it stands here and asserts that the two are the same. `Trainer`, which
the command line uses, adds what a long run needs: a log, evaluations, saved states, early stopping.
"""

from pathlib import Path

import torch

from minprefix.data.batches import BatchOrder, collate, encode_examples, spread
from minprefix.training.precision import cpu_has_bf16, in_bf16

# trained for long by docs/train_prefixes.py, for the model `mini`
TRAINED = Path(__file__).parents[1] / "docs" / "prefixes"


def train(model, tokenizer, examples, prefix=None, *, steps, lr, warmup):
    """Train `prefix`, or without one the whole model, in steps of 8 rows.

    A generator: a step is made when its loss (nats per target token) is read.
    """
    rows = encode_examples(tokenizer, examples)
    order = BatchOrder([row.length for row in rows], 8, seed=0)
    weights = list((model if prefix is None else prefix).parameters())
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    for step in range(steps):
        # the rate rises during the warm-up, then falls to 0
        share = min((step + 1) / warmup, (steps - step) / (steps - warmup))
        optimizer.param_groups[0]["lr"] = lr * share
        batch = collate([rows[i] for i in order.batch(step)], tokenizer.eos_id)
        told = {"prefix": prefix} | batch.model_kwargs()
        loss = model.token_losses(batch.input_ids, batch.labels, **told).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def loss_on(model, tokenizer, examples, prefix=None, *, pairs=40):
    """Nats per target token on `pairs` pairs, evenly spread over the examples."""
    rows = spread(encode_examples(tokenizer, examples), pairs)
    batch = collate(rows, tokenizer.eos_id)
    told = {"prefix": prefix} | batch.model_kwargs()
    return (
        model.token_losses(batch.input_ids, batch.labels, **told).mean().item()
    )


def for_training(model):
    """The frozen model, in bf16 where this processor has it (a prefix stays fp32)."""
    model = in_bf16(model) if cpu_has_bf16() else model
    return model.requires_grad_(False)
