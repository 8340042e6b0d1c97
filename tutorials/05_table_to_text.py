# %% [markdown]
# # 5. Table to text: the main job, step by step
#
# From restaurant tables to a prefix of a few hundred kilobytes that makes a frozen model write
# sentences about them. The whole training is a loop of 15 lines, and it stands here in full.
#
# **What you will learn.** Which tokens the loss sees. How to train a prefix, and why its first
# steps are the dangerous ones. How to read what comes out, down to the facts that are missing or
# invented, and to find out why one fact is missing every time. What the file holds.
#
# **What to know first.** 02_equation_3 and 03_discrete_to_continuous. The letters are those of
# [the table in tutorial 01](01_gpt2_from_scratch.py).
#
# **Running time.** About a minute and a half on two CPU cores.
#
# **Sources.** Li & Liang 2021, <https://arxiv.org/abs/2101.00190> (eq. (2), sections 4.3, 5 to
# 7); the E2E challenge, <https://github.com/tuetschek/e2e-metrics>.

# %%
import inspect
import tempfile
from dataclasses import replace
from pathlib import Path

import short_training
import torch
import torch.nn.functional as F
from figure import FAINT, OTHER, PREFIX, TEXT, new, show
from short_training import TRAINED, for_training, loss_on

import minprefix
from benchmarks.paper.results import pick, read_rows
from minprefix import Prefix
from minprefix.cli.report import format_rows
from minprefix.data.batches import BatchOrder, collate, encode_examples
from minprefix.data.load import load_examples
from minprefix.metrics.quick import facts, known_values
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix

model, tokenizer = minprefix.load("mini")
frozen = for_training(model)  # nothing of the model is trained

# %% [markdown]
# ## 1. A table and its texts
#
# A table is a few fields with their values. The model reads text, so the table is written as in
# the paper's appendix A.1: `field : value | field : value`. Each table has several reference
# texts. Training takes them one by one; scoring takes the best match.

# %%
train_set, dev, test = (
    load_examples("restaurants", split) for split in ("train", "dev", "test")
)
for name, part in (("train", train_set), ("dev", dev), ("test", test)):
    n_pairs = sum(len(e.targets) for e in part)
    print(f"{name:5} {len(part):3} tables, {n_pairs:4} pairs")
example = dev[1]
print("\nsource:", example.source)
for target in example.targets[:2]:
    print("target:", target)
names = [{dict(e.table)["name"] for e in part} for part in (train_set, test)]
assert not names[0] & names[1]  # a test name was never seen: copy it

# %% [markdown]
# ## 2. What the loss sees
#
# A row is `source, bos, target, eos`. The model predicts every next token, but equation (2) sums
# only over the target's tokens and the eos, $i \in Y$:
#
# $$\ell = -\frac{1}{|Y|} \sum_{i \in Y} \log p(z_i \mid h_{<i}).$$
#
# The source is always given, so nothing has to be learned about how tables look.
#
# **Predict.** The bos is an input. Is there a loss where it is *read*, or where it would have to
# be *predicted*?

# %%
row = encode_examples(tokenizer, [example])[0]
batch = collate([row], tokenizer.eos_id)
print("  reads           must predict")
for t in range(row.prompt_len - 4, row.prompt_len + 3):
    seen, label = batch.input_ids[0, t].item(), batch.labels[0, t].item()
    said = "-, no loss" if label == -100 else repr(tokenizer.decode([label]))
    word = "bos" if seen == tokenizer.bos_id else repr(tokenizer.decode([seen]))
    print(f"  {word:15} {said}")
n = len(row.ids) - row.prompt_len
print(f"{len(row.ids)} tokens, {n} of them with a loss")

with torch.no_grad():
    log_p = model(batch.input_ids)[0].log_softmax(-1)  # (T, V)
    targets = range(row.prompt_len, len(row.ids))
    loop = sum(-log_p[i - 1, row.ids[i]] for i in targets) / n
    matrix = F.nll_loss(log_p, batch.labels[0], ignore_index=-100)
    library = model.token_losses(batch.input_ids, batch.labels).mean()
print(f"{loop:.4f} (loop), {matrix:.4f} (matrix), {library:.4f} (library)")
assert abs(loop - matrix) < 1e-4 and abs(matrix - library) < 1e-4  # fp32

# %% [markdown]
# **Answer.** Where it is read: there the first word of the target has to be predicted. The last
# table token, which would have to predict the bos, has no loss.
#
# ## 3. The loop
#
# This is all of it. Nothing in it is special to prefix-tuning but one line: `weights` are the
# prefix's. (Without a prefix they are the model's, and the same loop is fine-tuning. 06_low_data
# uses this.) `batch.beside()` is what a model reads beside the target; for BART this is the
# source.


# %%
def train(model, tokenizer, examples, prefix=None, *, steps, lr, warmup):
    """Train `prefix`, or without one the whole model, in steps of 8 rows.

    A generator: a step is made when its loss (nats per target token) is read.
    """
    rows = encode_examples(tokenizer, examples)
    order = BatchOrder([row.length for row in rows], 8, seed=0)
    weights = list((model if prefix is None else prefix).parameters())
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    for step in range(steps):
        share = min((step + 1) / warmup, (steps - step) / (steps - warmup))
        optimizer.param_groups[0]["lr"] = lr * share
        batch = collate([rows[i] for i in order.batch(step)], tokenizer.eos_id)
        told = {"prefix": prefix} | batch.beside()
        loss = model.token_losses(batch.input_ids, batch.labels, **told).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        yield loss.item()


assert inspect.getsource(train) == inspect.getsource(short_training.train)

# %% [markdown]
# What is trained is not the table itself but an MLP that makes it (section 4.3 of the paper). Its
# last layer is fitted so that the table starts as the activations of some words, here
# `table-to-text:`.
#
# ## 4. The first steps
#
# **Predict.** A good start (real words) and a bad one (random numbers) take one step at the same
# learning rate. Which of the two can get worse by it?
#
# In its first step, Adam moves every number by the rate, whatever its gradient: $w - \eta\,
# \mathrm{sign}(g)$. So one gradient is enough to see what the first step would do at every rate.
# How far it moves the *table* is printed beside the loss, relative to the table's own norm.

# %%
RATES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3)
STARTS = {
    "words": PrefixConfig(prefix_len=10),
    "random": PrefixConfig(prefix_len=10, init="random"),
    "words, no MLP": PrefixConfig(prefix_len=10, parametrisation="table"),
}
first = collate(encode_examples(tokenizer, train_set[:3]), tokenizer.eos_id)


def first_step(prefix):
    """For each rate: how far the table moves, and the dev loss after it."""
    before, points = prefix.table().detach().clone(), []
    losses = frozen.token_losses(first.input_ids, first.labels, prefix=prefix)
    losses.mean().backward()
    start = [(w, w.detach().clone()) for w in prefix.parameters()]
    with torch.no_grad():
        for rate in (0, *RATES):
            for w, w0 in start:
                w.copy_(w0 - rate * w.grad.sign())
            moved = ((prefix.table() - before).norm() / before.norm()).item()
            loss = loss_on(frozen, tokenizer, dev, prefix, pairs=10)
            points.append((moved, loss))
    return points


steps = {}
for name, config in STARTS.items():
    steps[name] = first_step(make_prefix(model, tokenizer, config, seed=0))
    print(f"{name}: loss at the start {steps[name][0][1]:.2f}")
    for rate, (moved, loss) in zip(RATES, steps[name][1:], strict=True):
        print(f"  rate {rate:.0e}: table moves {moved:7.2%}, loss {loss:5.2f}")
after = {n: dict(zip((0, *RATES), x, strict=True)) for n, x in steps.items()}
assert after["words"][1e-3][1] > after["words"][0][1] + 2  # thrown away
assert after["words"][1e-4][1] < after["words"][0][1]  # a safe first step
assert after["random"][1e-3][1] < after["random"][0][1]
assert after["words"][1e-3][0] > 50 * after["words, no MLP"][1e-3][0]

# %%
figure, ax = new(width=5.6)
colours = (PREFIX, FAINT, OTHER)
for (name, points), colour in zip(steps.items(), colours, strict=True):
    ends = [loss for _, loss in points[1:]]
    ax.plot(RATES, ends, "o-", color=colour, label=name)
    ax.axhline(points[0][1], color=colour, lw=1, ls=":")
ax.set(xscale="log", xlabel="learning rate of the one step (no unit)")
ax.set(ylabel="dev loss after it (nats per target token)")
ax.legend(frameon=False, title="start (dotted: its loss)")
show(figure, "05_first_step")

# %% [markdown]
# **Answer.** The good one. At a rate of 1e-3, a usual one for this model, the first step moves
# the table that began as words by a third of its size, and the loss rises far above that of the
# random start: the words are gone. The random start has nothing to lose, and gets better by the
# same step.
#
# The MLP is the reason why the table moves so far. Each of its entries is a sum over 512 hidden
# numbers, and all of their weights move together. Without the MLP an entry moves by the rate
# itself, so a table alone bears rates a hundred times as high (07_many_users trains one at 0.1).
#
# The cure is a *warm-up*: the rate begins near 0 and reaches its full size after some dozens of
# steps, when Adam has averaged over many gradients and its steps no longer all point the same
# way. The trainer's default is 30 steps or more. Five runs on the same rows show what it does,
# and what a lower rate does:

# %%
STEPS, WARM = 60, 30
RUNS = {
    "words, 1e-3": ("words", 1e-3, 1, TEXT),
    "words, 1e-3, warm-up": ("words", 1e-3, WARM, OTHER),
    "words, 5e-4": ("words", 5e-4, 1, "#7a4b1e"),
    "words, 5e-4, warm-up": ("words", 5e-4, WARM, PREFIX),
    "random, 5e-4, warm-up": ("random", 5e-4, WARM, FAINT),
}
BEST = "words, 5e-4, warm-up"
prefixes, losses, ends = {}, {}, {}
for name, (start, lr, warmup, _) in RUNS.items():
    prefix = make_prefix(model, tokenizer, STARTS[start], seed=0)
    settings = {"steps": STEPS, "lr": lr, "warmup": warmup}
    losses[name] = list(train(frozen, tokenizer, train_set, prefix, **settings))
    ends[name] = loss_on(frozen, tokenizer, dev, prefix)
    prefixes[name] = prefix
    highest = max(losses[name][:WARM])
    print(f"{name:22} dev loss {ends[name]:.2f}, before up to {highest:.1f}")
assert ends["words, 1e-3, warm-up"] < ends["words, 1e-3"] - 0.2
assert max(ends["words, 5e-4"], ends[BEST]) < ends["words, 1e-3"] - 0.2
assert ends[BEST] < ends["random, 5e-4, warm-up"] - 0.5
assert max(losses[BEST][:WARM]) < max(losses["words, 5e-4"][:WARM]) - 0.5

# %%
figure, ax = new(width=6.4)
for name, (*_, colour) in RUNS.items():
    ax.plot(range(1, STEPS + 1), losses[name], color=colour, label=name)
ax.axvline(WARM, color=FAINT, lw=1, ls=":")
ax.set(xlabel="step of 8 rows (dotted: end of the warm-up)")
ax.set(ylabel="training loss (nats per target token)")
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
show(figure, "05_choices")

# %% [markdown]
# At 1e-3 without a warm-up the words are lost in the first three steps, and after 60 steps the
# run is no better than the random start. With a warm-up the words survive longer, but this rate
# is too high for steps of 8 rows: the loss jumps again at step 40. At half the rate the run
# recovers either way, and the warm-up makes the early climb lower. The random start, by the same
# recipe, is far behind. (With all of E2E the start makes no difference in the end: 06_low_data.)
#
# So the recipe is: start from words, with a warm-up of some dozens of steps, so that the first of
# them move the table by a few percent only. The command line then takes 5e-4 for few pairs, and
# 1e-3 for many, where steps of 16 rows and longer runs profit from it.
#
# The third choice is the prefix length P: a prefix has $2 L P C$ numbers. What it is worth cannot
# be seen in 60 steps, so here are runs of 500 on E2E, two for each length, read from a CSV of
# this repository:

# %%
ROOT = Path(minprefix.__file__).parents[1]
rows = read_rows(ROOT / "benchmarks" / "paper" / "figure4-mini.csv")
spans = {}
for length in ("1", "5", "10", "20", "40"):
    found = pick(rows, x=length)
    spans[length] = [float(row["BLEU"]) for row in found]
    numbers = int(found[0]["kept"])
    low, high = min(spans[length]), max(spans[length])
    print(f"P {length:>2}: {numbers:7,} numbers, BLEU {low:.1f} and {high:.1f}")
assert min(spans["40"]) > max(max(spans[n]) for n in ("5", "10", "20"))
assert max(spans["1"]) - min(spans["1"]) > 20

# %% [markdown]
# P = 1 can work and can fail. From 5 to 20, two runs show no order. 40 is best here; for a larger
# model, the paper's best is 10. P = 10 is a fair start.
#
# ## 5. Texts
#
# **Predict.** What does a prefix get wrong after 60 steps: the grammar, the names or the facts?

# %%
short = prefixes[BEST].export()  # the table alone, without the MLP
short.linearisation = "paper"  # the frame of section 2: `generate` adds the bos
some = test[:16]
sources = [e.source for e in some]
written = minprefix.generate(
    model, tokenizer, sources, prefix=short, max_new_tokens=50
)
for e, text in list(zip(some, written, strict=True))[:3]:
    print(f"{e.source}\n  {text.strip()}\n")

# %% [markdown]
# **Answer.** Mostly the facts. The sentences have the form of the references, but half of the
# values are missing, and some of what they say makes no sense. Here is one that was trained to
# the end: 2,500 steps of 32 rows on E2E's own tables, by `python -m docs.train_prefixes`. E2E's
# data is not part of this repository, so its tables here are invented, with E2E's fields and
# values. Each is asked twice, with `family friendly` once yes and once no.

# %%
TABLES = (
    "name : The Blue Heron | type : pub | food : Italian | price : cheap | "
    "area : riverside | family friendly : {} | near : Burger King",
    "name : Casa Alma | type : restaurant | food : French | price : high | "
    "area : city centre | family friendly : {}",
    "name : The Idle Fox | type : coffee shop | food : Japanese | "
    "customer rating : high | family friendly : {} | near : Café Sicilia",
    "name : Basil Loft | type : pub | price : moderate | family friendly : {}",
    "name : Hollis & Ashby | type : restaurant | food : Indian | "
    "customer rating : average | family friendly : {} | near : The Bakers",
    "name : The Silver Orchard | type : coffee shop | food : English | "
    "area : riverside | family friendly : {}",
)
trained = Prefix.load(TRAINED / "e2e-P10.safetensors")
asked = [table.format(value) for table in TABLES for value in ("yes", "no")]
answers = minprefix.generate(model, tokenizer, asked, prefix=trained)
for source, text in zip(asked[:6], answers, strict=False):
    print(f"{source}\n  {text.strip()}\n")

# %% [markdown]
# ## 6. Facts that are missing or invented
#
# A fluent text can still be wrong. A fact is *missing* if the text does not state a value of its
# table. It is *invented* if the text states a value that the table does not have, among all
# values that the field takes in the training tables.
#
# **Predict.** Which of the eight fields will the 60 steps get wrong most?

# %%
known = known_values(train_set)
found = [
    facts(text, e.table, known) for text, e in zip(written, some, strict=True)
]
rows = []
for field in known:
    n = sum(field in dict(e.table) for e in some)
    missing = sum(field == f for one in found for f, _ in one.missing)
    invented = sum(field == f for one in found for f, _ in one.wrong)
    row = {"field": field, "in tables": n, "missing": missing}
    rows.append(row | {"share missing": missing / n, "invented": invented})
rows.sort(key=lambda row: row["share missing"])
print(format_rows(rows))
human = [facts(e.targets[0], e.table, known) for e in some]
n_missing, n_wrong = (
    sum(len(getattr(f, x)) for f in human) for x in ("missing", "wrong")
)
print(f"in the first references: {n_missing} missing, {n_wrong} invented")
friendly = next(row for row in rows if row["field"] == "family friendly")
assert friendly["missing"] == friendly["in tables"]  # not once

# %% [markdown]
# **Answer.** The references state every fact and nothing else, so the count itself makes few
# errors. The prefix leaves out `family friendly` *every time*. Why this field?
#
# All other values can be copied: "Thai" is said as "Thai", and a frozen model can copy a little
# even before any training. But "family friendly : no" is said as "adults only" or "children are
# not welcome". This translation has to be learned. Whether it has been can be measured: exchange
# one value in the table, and see by how much the loss of the reference rises. Where it does not
# rise, the value is not read.

# %%


def effect(field: str, prefix) -> float:
    """Rise of the loss when the table has another value of the field."""
    right = [e for e in test if field in dict(e.table)]
    wrong = []
    for e in right:
        value = dict(e.table)[field]
        other = next(v for v in known[field] if v != value)
        old, new_one = f"{field} : {value}", f"{field} : {other}"
        wrong.append(replace(e, source=e.source.replace(old, new_one)))
    before, after = (
        loss_on(frozen, tokenizer, part, prefix, pairs=16)
        for part in (right, wrong)
    )
    return after - before


effects = {}
for name, prefix in (("no prefix", None), ("60 steps", short)):
    for field in ("food", "family friendly"):
        effects[name, field] = effect(field, prefix)
        rise = effects[name, field]
        print(f"{name:9} wrong {field:15} loss {rise:+.3f} nats per token")
small = abs(effects["60 steps", "family friendly"])
assert effects["60 steps", "food"] > 5 * small

# %% [markdown]
# A wrong `food` costs the prefix of 60 steps a lot, a wrong `family friendly` next to nothing: it
# does not read that value yet. With the prefix that was trained to the end, the same model does:

# %%
stated = {"right": 0, "not said": 0, "wrong": 0}
for source, text in zip(asked, answers, strict=True):
    table = tuple(tuple(pair.split(" : ")) for pair in source.split(" | "))
    one = facts(text, table, known)
    fields = [[f for f, _ in part] for part in (one.wrong, one.missing)]
    wrong, missing = ("family friendly" in part for part in fields)
    stated["wrong" if wrong else "not said" if missing else "right"] += 1
print(f"family friendly in {len(asked)} texts of the trained prefix: {stated}")
assert stated["right"] > max(len(asked) / 2, 4 * stated["wrong"])

# %% [markdown]
# Missing facts stay the main fault of a prefix for a model as small as this. Beam search
# (`num_beams=5`) repairs some: [copying.csv](../benchmarks/copying.csv) has the counts. BLEU
# hardly sees such faults, so count facts beside it.
#
# ## 7. The file
#
# What is shipped is one table, $(L, 2, H, P, D)$, and the fingerprint of the model that it
# belongs to. A prefix means nothing to another model: its keys fit the queries that it was
# trained with.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "restaurants.safetensors"
    short.save(path)
    again, size = Prefix.load(path), path.stat().st_size
assert torch.equal(again.table(), short.table())
n_model = sum(p.numel() for p in model.parameters())
n_trained = sum(p.numel() for p in prefixes[BEST].parameters())
print(f"trained, with the MLP: {n_trained:10,} numbers")
table = short.table()
print(f"kept: {table.numel():,} numbers, a table {tuple(table.shape)}")
print(f"file {size / 1024:.0f} KiB, the model {4 * n_model / 2**20:.0f} MiB")

other = minprefix.GPT2(model.config).init_weights(seed=0)
try:
    minprefix.generate(other, tokenizer, sources[:1], prefix=again)
    raise AssertionError("a prefix of another model was taken")
except ValueError as error:
    print("refused:", str(error)[:60])

# %% [markdown]
# ## Common mistakes
# > - **No warm-up.** The loss falls in the end, only later and less far, and nobody sees that the
# >   start was thrown away in the first steps (section 4).
# > - **Labels that are shifted twice, or not at all.** Here `labels[t]` is the token after
# >   `input_ids[t]`. Check one row by eye, as in section 2.
# > - **Another frame in use than in training:** a missing bos, or a blank more at the end of the
# >   table. The authors' code trains with a blank that it strips when it writes. No error is
# >   raised; the texts are only worse.
# > - **The MLP in the file.** The authors' checkpoints hold it, at a hundred times the size.
# >   `export` keeps the table.
# > - **A prefix for other tables than it was trained on.** E2E has three types of places. Ask its
# >   prefix about a bistro, and read what comes.
# > - **BLEU alone.** It hardly sees that one fact is missing every time.
#
# ## Recap
#
# - A row is `source, bos, target, eos`; the loss is on the target and the eos alone.
# - Trained: an MLP and the P embeddings that it reads. Shipped: the table that they make.
# - The first steps at full rate move the table so far that a good start is lost. Start from
#   words, warm up, and watch the loss of the first steps.
# - Copying comes first, translation late: count facts, field by field.
# - From here: `make demo` trains longer on the same tables; `python -m minprefix train --data
#   FOLDER` takes your own.
#
# ## Exercises
#
# 1. *Easy.* How would the loss of a row divide between source and target if all tokens had one?
#    Why does that matter for a prefix? *Hint:* `log_p` of section 2 has it.
# 2. *Easy.* Use a prefix with another `position_offset` than it was trained with. Do the logits
#    change? *Hint:* `Prefix.from_table(table, position_offset)`.
# 3. *Medium.* Round the table to bf16, half of the file. By how much do the logits change?
#    *Hint:* bf16 keeps 8 bits.
# 4. *Hard.* Stop a run of `Trainer` after half of its steps and go on with `load_state`. Is the
#    result, bit for bit, that of an unbroken run? *Hint:* use `step()` and `save_state()`, and
#    compare tables.
#
# Solutions: `tutorials/solutions/05_table_to_text.py`.
#
# ## References
#
# Li & Liang 2021, <https://arxiv.org/abs/2101.00190>; Novikova et al. 2017 (E2E),
# <https://arxiv.org/abs/1706.09254>; Papineni et al. 2002 (BLEU),
# <https://aclanthology.org/P02-1040>.
