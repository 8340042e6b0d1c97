# %% [markdown]
# # 5. Table to text: the main job, step by step
#
# `make demo` in slow motion: from restaurant tables to a prefix of a few hundred kilobytes that
# makes a frozen model write sentences about them. Every choice is made in the open.
#
# **What you will learn.** What a row looks like and which of its tokens the loss sees; how start,
# prefix length and learning rate change the first steps; how to train, score and read what comes
# out, with the slots that are lost or invented; and what the file holds.
#
# **What to know first.** 02_equation_3 and 03_discrete_to_continuous.
#
# **Running time.** About a minute on two CPU cores, half of it the longer training in section 4.
# `MODEL = "gpt2"` takes much longer.
#
# **Sources.** Li & Liang 2021, <https://arxiv.org/abs/2101.00190> (eq. (2), sections 4.3, 5 to 7);
# the E2E challenge, <https://github.com/tuetschek/e2e-metrics>.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from figure import OTHER, PREFIX, TEXT, new, show

import minprefix
from minprefix.cli.demo import BF16
from minprefix.cli.report import format_rows
from minprefix.data.batches import collate, encode_examples
from minprefix.data.load import load_examples
from minprefix.generation.config import GenerationConfig
from minprefix.methods.evaluate import evaluate_method, measure
from minprefix.metrics.quick import slot_coverage
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer

MODEL = "mini"
BRIEF = GenerationConfig(max_new_tokens=50)
SHORT, LONG = (40, 200) if BF16 else (16, 80)  # steps; fewer where bf16 is slow
model, tokenizer = minprefix.load(MODEL)
model.requires_grad_(False)
folder = Path(tempfile.mkdtemp(prefix="minprefix-"))

# %% [markdown]
# ## 1. A table and its texts
#
# A table is a few (field, value) pairs. The model reads text, so the table is written as the
# paper's appendix A.1 prints it: `field : value | field : value`. Each table has several
# reference texts; training takes them one by one, scoring takes the best match.

# %%
train, dev, test = (load_examples("restaurants", split) for split in ("train", "dev", "test"))
for name, part in (("train", train), ("dev", dev), ("test", test)):
    print(f"{name:5} {len(part):3} tables, {sum(len(e.targets) for e in part):4} pairs")
example = dev[1]
for field, value in example.table:
    print(f"  {field:16} {value}")
print("source:", example.source)
for target in example.targets[:2]:
    print("target:", target)
names = [{dict(e.table)["name"] for e in part} for part in (train, test)]
assert not names[0] & names[1]  # a test name was never seen: it has to be copied

# %% [markdown]
# ## 2. What the loss sees
#
# A row is `source, bos, target, eos`. The model predicts every next token, but eq. (2) sums only
# over the target's, so that nothing is learned about how tables look:
#
# $$\ell = -\frac{1}{|Y|} \sum_{i \in Y} \log p(z_i \mid h_{<i}).$$
#
# First one token of it, then the loop, then all at once, then the library's call.

# %%
row = encode_examples(tokenizer, [example])[0]
batch = collate([row], tokenizer.eos_id)
print("  input           label (what it must predict)")
for t in range(row.prompt_len - 4, row.prompt_len + 3):
    seen, label = batch.input_ids[0, t].item(), batch.labels[0, t].item()
    said = "-, no loss" if label == -100 else repr(tokenizer.decode([label]))
    word = "bos" if seen == tokenizer.bos_id else repr(tokenizer.decode([seen]))
    print(f"  {word:15} {said}")
n = len(row.ids) - row.prompt_len
print(f"{len(row.ids)} tokens, {n} of them with a loss")

with torch.no_grad():
    log_p = model(batch.input_ids)[0].log_softmax(-1)  # (T, V)
    first = -log_p[row.prompt_len - 1, row.ids[row.prompt_len]]
    print(f"-log p of the first word: {first:.2f} nats")
    loop = sum(-log_p[i - 1, row.ids[i]] for i in range(row.prompt_len, len(row.ids))) / n
    matrix = F.nll_loss(log_p, batch.labels[0], ignore_index=-100)
    module = model.token_losses(batch.input_ids, batch.labels, batch.at).mean()
print(f"mean per target token: {loop:.4f} (loop), {matrix:.4f} (matrix), {module:.4f} (library)")
assert abs(loop - matrix) < 1e-4 and abs(matrix - module) < 1e-4  # fp32, sums of n terms

# %% [markdown]
# ## 3. Three choices, seen in short runs
#
# All runs: the same rows in the same order, AdamW, a few steps of warm-up, then linear decay.
# They are short and their batches small. They show how training *starts*, which is all that can
# be shown in a minute; what is best after thousands of steps can be something else.
#
# - **Start.** From random numbers, or from the activations of task words. With an MLP the last
#   layer is fitted to them by least squares, so that the prefix at step 0 is those words.
# - **Length.** P positions: P times 2 L C numbers to ship.
# - **Learning rate.** The largest that does not overshoot.


# %%
def short_run(name: str, config: PrefixConfig, lr: float, steps: int = SHORT) -> dict:
    """Train a prefix; its training losses, and the dev loss at the end."""
    prefix = make_prefix(model, tokenizer, config, seed=0)
    settings = TrainConfig(
        steps=steps, batch_size=8, lr=lr, warmup_steps=steps // 10, log_every=max(1, steps // 10),
        eval_every=max(1, steps // 4) if steps == LONG else steps, eval_pairs=40, samples=0,
        precision="bf16" if BF16 else "fp32",
    )  # fmt: skip
    out = folder / name.replace(" ", "-")
    result = Trainer(model, tokenizer, settings, train, dev, out, prefix).run(progress=False)
    log = read_log(out)
    return {
        "name": name, "out": out, "prefix": prefix, "dev loss": result["best_dev_loss"],
        "train": [(e["step"], e["loss"]) for e in log if "loss" in e],
        "dev": [(e["step"], e["dev_loss"]) for e in log if "dev_loss" in e],
    }  # fmt: skip


CHOSEN, LR = PrefixConfig(prefix_len=10, init="words"), 1e-3
chosen = short_run("chosen", CHOSEN, LR)
groups = {
    "start": [("words", chosen), ("random", short_run("r", replace(CHOSEN, init="random"), LR))],
    "length P": [
        ("1", short_run("P 1", replace(CHOSEN, prefix_len=1), LR)),
        ("10", chosen),
        ("30", short_run("P 30", replace(CHOSEN, prefix_len=30), LR)),
    ],
    "learning rate": [
        ("0.0002", short_run("low", CHOSEN, 2e-4)),
        ("0.001", chosen),
        ("0.005", short_run("high", CHOSEN, 5e-3)),
    ],
}
rows = [
    {"choice": group, "value": value, "dev loss": run["dev loss"]}
    for group, runs in groups.items()
    for value, run in runs
]
print(f"after {SHORT} steps of 8 rows, nats per target token:")
print(format_rows(rows))

# %%
figure, axes = new(columns=3, width=3.8, height=3.3)
for axis, (group, runs) in zip(axes, groups.items(), strict=True):
    colours = dict(zip([v for v, run in runs if run is not chosen], (TEXT, OTHER), strict=False))
    for value, run in runs:
        axis.plot(*zip(*run["train"], strict=True), color=colours.get(value, PREFIX), label=value)
    axis.set(xlabel="optimiser step", title=group)
    axis.legend(frameon=False, fontsize=9)
axes[0].set(ylabel="training loss (nats per target token)")
show(figure, "05_choices")

# %% [markdown]
# The chosen values are those of `make demo`: words, P = 10, and the learning rate that E2E's dev
# set chose for `mini`. Where a short run prefers something else, it prefers a faster start.
#
# ## 4. The longer run

# %%
long = short_run("long", CHOSEN, LR, steps=LONG)
figure, axes = new(width=5.6)
axes.plot(*zip(*long["train"], strict=True), color=PREFIX, label="training")
axes.plot(*zip(*long["dev"], strict=True), "o", color=TEXT, label="dev")
axes.set(xlabel="optimiser step (8 rows each)", ylabel="loss (nats per target token)")
axes.legend(frameon=False)
show(figure, "05_loss")
steps, losses = zip(*long["dev"], strict=True)
print("dev loss:", ", ".join(f"{loss:.3f} after {s}" for s, loss in long["dev"]))
assert losses[-1] < chosen["dev loss"]  # more steps of the same: it went on learning

# %% [markdown]
# The trainer kept the step with the lowest dev loss in `prefix.safetensors`, without the MLP: after
# training the table is all that is needed (section 4.3 of the paper).
#
# ## 5. Texts beside references

# %%
kept = Prefix.load(long["out"] / "prefix.safetensors")
some = test[:32]
scores, texts = evaluate_method(model, tokenizer, some, prefix=kept, config=BRIEF)
for example, text in zip(some[:4], texts, strict=False):
    print("table:    ", example.source)
    print("reference:", example.targets[0])
    print("written:  ", text, "\n")

# %% [markdown]
# ## 6. Scores
#
# The quick scores, and the columns of the E2E challenge as its scripts compute them (METEOR needs
# Java and its package; without them a line says so). All are against every reference of a table.

# %%
official = measure(texts, some, metrics="e2e")
print("quick:   ", ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))
print("official:", ", ".join(f"{name} {value:.2f}" for name, value in official.items()))

# %% [markdown]
# ## 7. Slots lost and invented
#
# A fluent text can still be wrong. *Lost*: a value of the table that the text does not state.
# *Invented*: a value that the text states and the table does not have, looked for among all values
# that the field takes in the training tables.

# %%
fields = list(dict.fromkeys(f for e in train for f, _ in e.table))
known = {f: {v for e in train for g, v in e.table if g == f} for f in fields}
known["name"] = known["near"] = set()  # names are free: an invented one is not in a list


def states(text: str, field: str, value: str) -> bool:
    return slot_coverage([text], [[(field, value)]]) == 100


def invented(text: str, table: dict[str, str]) -> dict[str, str]:
    """Field -> a value that only the text has; words of the table's own values do not count."""
    there = " ".join(table.values()).lower()
    found = {}
    for field, values in known.items():
        for value in values - {table.get(field)}:
            free = value in ("yes", "no") or value.lower() not in there
            if free and states(text, field, value):
                found[field] = value
    return found


table_rows = []
wrong = [invented(text, dict(e.table)) for text, e in zip(texts, some, strict=True)]
for field in fields:
    pairs = [
        (text, value)
        for text, e in zip(texts, some, strict=True)
        for name, value in e.table
        if name == field
    ]
    lost = sum(not states(text, field, value) for text, value in pairs)
    made = sum(field in one for one in wrong)
    table_rows.append({"field": field, "in tables": len(pairs), "lost": lost, "invented": made})
print(format_rows(table_rows))
total = sum(r["in tables"] for r in table_rows)
lost = sum(r["lost"] for r in table_rows)
print(f"{lost} of {total} values lost: {100 - 100 * lost / total:.1f} % are there")
assert abs(100 - 100 * lost / total - scores["slot_coverage"]) < 1e-9  # the same count as above

human = [e.targets[0] for e in some]
human_lost = slot_coverage(human, [e.table for e in some])
human_wrong = sum(map(len, (invented(t, dict(e.table)) for t, e in zip(human, some, strict=True))))
print(f"the same for the first reference: {human_lost:.1f} % there, {human_wrong} invented")

# %% [markdown]
# The last line is the measure's own error: references state all and nothing else.
#
# ## 8. The file
#
# What is shipped is one table, $(L, 2, H, P, D)$, and the name of the model it belongs to.

# %%
path = folder / "restaurants.safetensors"
kept.save(path)
again = Prefix.load(path)
assert torch.equal(again.table(), kept.table())
new_text = minprefix.generate(model, tokenizer, [some[0].source], prefix=again)[0].strip()
print("written after loading:", new_text)
n_model, n_kept = sum(p.numel() for p in model.parameters()), kept.table().numel()
print(f"trained with the MLP: {kept.n_trained:12,} parameters")
print(f"kept:                 {n_kept:12,} parameters, table {tuple(kept.table().shape)}")
print(f"model:                {n_model:12,} parameters; kept / model = {n_kept / n_model:.2%}")
print(
    f"file: {path.stat().st_size / 1024:.0f} KiB; the model in fp32: {4 * n_model / 2**20:.0f} MiB"
)

# %% [markdown]
# A prefix means nothing to another model: its keys and values fit the queries that it was trained
# with. The file says which model that was, and using it with another one is an error.

# %%
other = minprefix.GPT2(model.config).init_weights(seed=0)
try:
    minprefix.generate(other, tokenizer, [some[0].source], prefix=again)
    raise AssertionError("a prefix of another model was taken")
except ValueError as error:
    print("refused:", str(error)[:90])

# %% [markdown]
# ## Recap
#
# - The row is `source, bos, target, eos`; the loss is on the target and the eos alone.
# - Trained: an MLP and its P rows. Shipped: the table that they make. Frozen: everything else.
# - Start from words, at the largest learning rate that does not overshoot, and look at the dev
#   loss.
# - BLEU does not see a lost slot well: count slots, and count the reference's, too.
# - From here: `make demo` trains more steps on more rows; `python -m minprefix train --data FOLDER`
#   takes your own tables; 06_low_data asks how few of them are enough.
#
# ## Exercises
#
# 1. How is the loss of a row divided between source and target, if all tokens had one? Why does
#    that matter for a prefix of few numbers?
# 2. Use a prefix with another `position_offset` than it was trained with: do the logits change?
# 3. Round the table to bf16, half of the file. By how much do logits change?
# 4. Stop a run after half of its steps and go on with `load_state`: is the result, bit for bit,
#    that of an unbroken run?
#
# Solutions: `tutorials/solutions/05_table_to_text.py`.
#
# ## References
#
# Li & Liang 2021, <https://arxiv.org/abs/2101.00190>; Novikova et al. 2017 (E2E),
# <https://arxiv.org/abs/1706.09254>; Papineni et al. 2002 (BLEU),
# <https://aclanthology.org/P02-1040>.
