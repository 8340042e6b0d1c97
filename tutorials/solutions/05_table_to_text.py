# %% [markdown]
# # Solutions: 5. Table to text
#
# The exercises stand at the end of `tutorials/05_table_to_text.py`.

# %%
import tempfile
from pathlib import Path

import torch

import minprefix
from minprefix.data.batches import collate, encode_examples
from minprefix.data.load import load_examples
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.trainer import Trainer

model, tokenizer = minprefix.load("mini")
model.requires_grad_(False)
train, dev = load_examples("restaurants", "train"), load_examples("restaurants", "dev")
row = encode_examples(tokenizer, dev[:1])[0]
batch = collate([row], tokenizer.eos_id)

# %% [markdown]
# ## 1. A loss on all tokens
#
# The source's tokens are about half of the row, and names and values are hard to guess. A prefix
# has few numbers. It would spend them on how tables look, although it is always given the table.

# %%
with torch.no_grad():
    log_p = model(batch.input_ids)[0].log_softmax(-1)  # (T, V)
    every = -log_p.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]  # (T,)
    source, target = every[: row.prompt_len - 1], every[row.prompt_len - 1 :]
    ours = model.token_losses(batch.input_ids, batch.labels, batch.at)
print(f"source: {len(source)} tokens, {source.sum():.1f} nats; ", end="")
print(f"target: {len(target)} tokens, {target.sum():.1f} nats")
assert torch.allclose(target, ours, atol=1e-4)

# %% [markdown]
# ## 2. Another position offset
#
# The embeddings of the text's own tokens change with it, and so do all logits. The offset belongs
# to the prefix, and its file holds it.

# %%
words = Prefix.from_words(model, tokenizer, "table-to-text:", 10)
with torch.no_grad():
    there = model(batch.input_ids, prefix=words)
    moved = model(batch.input_ids, prefix=Prefix.from_table(words.table(), 0))
print(f"offset {words.position_offset} against 0: |difference| {(there - moved).abs().max():.2f}")
assert (there - moved).abs().max() > 0.01

# %% [markdown]
# ## 3. Half of the file

# %%
rounded = Prefix.from_table(words.table().bfloat16().float(), words.position_offset)
with torch.no_grad():
    gap = (there - model(batch.input_ids, prefix=rounded)).abs().max().item()
print(f"table in bf16: logits differ by {gap:.3f} at most, of {there.abs().max():.0f}")
assert 0 < gap < 0.05 * there.abs().max()  # bf16 keeps 8 bits: 0.4 % of each entry

# %% [markdown]
# ## 4. Stopped and resumed
#
# The rows of a step and its dropout follow from the seed and the step alone, and the saved state
# holds the weights and the optimizer. So the second half does the same as in an unbroken run.

# %%
folder = Path(tempfile.mkdtemp(prefix="minprefix-"))
config = TrainConfig(steps=4, batch_size=2, lr=1e-3, precision="fp32", samples=0)


def trainer(name: str) -> Trainer:
    prefix = Prefix.random(model.config, 5, seed=0, parametrisation="mlp")
    return Trainer(model, tokenizer, config, train, [], folder / name, prefix)


unbroken = trainer("unbroken")
unbroken.run(progress=False)
first_half = trainer("broken")
for _ in range(2):
    first_half.step()
first_half.save_state()
second_half = trainer("broken")
second_half.load_state()
print(f"continuing after step {second_half.step_done}")
second_half.run(progress=False)
assert torch.equal(unbroken.prefix.table(), second_half.prefix.table())
print("equal, bit for bit")
