# %% [markdown]
# # Solutions: 8. Summarisation with BART
#
# The exercises stand at the end of `tutorials/08_summarisation_bart.py`.

# %%
import tempfile
from pathlib import Path

import torch

import minprefix
from minprefix.cli.demo import BF16
from minprefix.cli.report import format_rows
from minprefix.data.batches import collate, encode_examples
from minprefix.data.load import load_examples
from minprefix.data.splits import choose
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.training.config import TrainConfig
from minprefix.training.trainer import Trainer

model, tokenizer = minprefix.load("mini-bart")
model.requires_grad_(False)
train, dev, test = (load_examples("notes", split) for split in ("train", "dev", "test"))
dev = dev[:40]  # enough to tell the losses here apart
folder = Path(tempfile.mkdtemp(prefix="minprefix-"))
STEPS = 30


def tune(name: str, config: PrefixConfig, examples: list) -> BARTPrefix:
    """A prefix after STEPS steps of 8 rows, as in section 6."""
    prefix = make_prefix(model, tokenizer, config, seed=0)
    settings = TrainConfig(
        steps=STEPS, batch_size=8, lr=2e-3, warmup_steps=3, samples=0,
        precision="bf16" if BF16 else "fp32",
    )  # fmt: skip
    Trainer(model, tokenizer, settings, examples, [], folder / name, prefix).run(progress=False)
    return prefix


@torch.no_grad()
def loss(prefix, examples: list) -> float:
    """Mean per target token of one batch, nats."""
    batch = collate(encode_examples(tokenizer, examples), tokenizer.pad_id)
    here = {"source_ids": batch.source_ids, "source_lens": batch.source_lens, "at": batch.at}
    return model.token_losses(batch.input_ids, batch.labels, prefix=prefix, **here).mean().item()


# %% [markdown]
# ## 1. Padding that is seen
#
# The encoder has no causal mask, so only `source_lens` hides the padding after a row. In a
# decoder-only model with padding on the right, the causal mask hides it already.

# %%
batch = collate(encode_examples(tokenizer, test[:4]), tokenizer.pad_id)
with torch.no_grad():
    masked = model(batch.source_ids, batch.input_ids, source_lens=batch.source_lens)
    seen = model(batch.source_ids, batch.input_ids)
longest = batch.source_lens.max()
for n, gap in zip(batch.source_lens, (masked - seen).abs().amax((1, 2)), strict=True):
    print(f"{n} tokens and {longest - n} of padding: logits move by up to {gap:.2f}")
    assert (gap > 0.01) == (n < longest)

# %% [markdown]
# ## 2. Virtual tokens before the source
#
# One set of embeddings, which the encoder reads with the note. These are far fewer numbers to keep,
# and the frozen layers decide what becomes of them. A prefix has a key and a value of its own in
# every layer.

# %%
choices = {
    "prefix at three sites": PrefixConfig(prefix_len=10, init="random"),
    "virtual tokens": PrefixConfig(prefix_len=10, init="random", parametrisation="embedding-mlp"),
}
rows, tuned = [], {}
for name, config in choices.items():
    prefix = tuned[name] = tune(name.replace(" ", "-"), config, train)
    kept = sum(p.numel() for p in prefix.export().parameters())
    row = {"method": name, "trained": prefix.n_trained, "kept": kept}
    rows.append(row | {"dev loss": loss(prefix, dev)})
print(format_rows(rows))
config = model.config
assert rows[0]["kept"] == 10 * 3 * 2 * config.n_layer * config.n_embd
assert rows[1]["kept"] == 10 * config.n_embd
# The same rate for both is no fair comparison; each wants a rate of its own, chosen on dev.

# %% [markdown]
# ## 3. News to sports

# %%
news = choose(train, "news-to-sports", "train")
sports = choose(test, "news-to-sports", "test")[:40]
mixed = train[:: max(1, len(train) // len(news))][: len(news)]  # as many notes, all topics
rows = []
for name, examples in (("news", news), ("all topics", mixed)):
    prefix = tune(name.replace(" ", "-"), PrefixConfig(prefix_len=10, init="random"), examples)
    losses = {"test loss on sports": loss(prefix, sports), "dev loss, all": loss(prefix, dev)}
    rows.append({"trained on": name, "notes": len(examples)} | losses)
print(format_rows(rows))

# %% [markdown]
# ## 4. From 0 or from P
#
# The tables are the same, but all embeddings move, and the model was pretrained with every text at
# position 0 (section 4 of the tutorial). So the loss rises.

# %%
tables = tuned["prefix at three sites"].tables()
from_0, from_p = (BARTPrefix.from_tables(tables, position_offset=offset) for offset in (0, 10))
batch = collate(encode_examples(tokenizer, test[:1]), tokenizer.pad_id)
with torch.no_grad():
    gap = model(batch.source_ids, batch.input_ids, prefix=from_0) - model(
        batch.source_ids, batch.input_ids, prefix=from_p
    )
own, moved = loss(from_0, dev), loss(from_p, dev)
print(f"logits differ by {gap.abs().max():.2f}; loss from 0: {own:.3f}, from P: {moved:.3f}")
assert gap.abs().max() > 0.01 and moved > own
