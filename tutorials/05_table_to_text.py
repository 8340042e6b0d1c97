# %% [markdown]
# # 5. Table to text: the main job, step by step
#
# We train a prefix of a few hundred kilobytes that makes a frozen model write sentences about
# restaurant tables. The whole training is a loop of 15 lines, and it is shown in full.
#
# **What you will learn.** Which tokens the loss sees. How to train a prefix, and why its first
# steps are the dangerous ones. How to count the facts that a text leaves out or invents, and how to
# find out why one fact is nearly always missing. What the file holds.
#
# **What to know first.** 02_equation_3 and 03_discrete_to_continuous. The letters are those of
# [the table in tutorial 01](01_gpt2_from_scratch.py).
#
# **Running time.** About a minute on two CPU cores.
#
# **Sources.** Li & Liang 2021, <https://arxiv.org/abs/2101.00190> (eq. (2), sections 4.3, 5 to
# 7); the E2E challenge, <https://github.com/tuetschek/e2e-metrics>.

# %%
import inspect
import tempfile
from dataclasses import replace
from pathlib import Path

import figure  # tutorials/figure.py: all that only draws
import short_training
import torch
from short_training import TRAINED, for_training, loss_on

import minprefix
from minprefix import Prefix
from minprefix.cli.report import format_rows
from minprefix.data.batches import BatchOrder, collate, encode_examples
from minprefix.data.load import load_examples
from minprefix.metrics.quick import facts, known_values
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix

model, tokenizer = minprefix.load("mini")
frozen = for_training(model)  # for the training: in bf16 if this CPU has it

# %% [markdown]
# ## 1. A table and its texts
#
# A table is a few fields with their values. It is written as text as in the paper's appendix A.1:
# `field : value | field : value`. Each table has several reference texts. Each is a training pair
# of its own; a score compares a text with all of them.

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
# A row is `source, bos, target, eos`, where bos and eos are GPT-2's one special token. The model
# predicts every next token, but equation (2) sums only over the target's tokens and the eos,
# $i \in Y$ (02_equation_3 computes it):
#
# $$\ell = -\frac{1}{|Y|} \sum_{i \in Y} \log p(z_i \mid h_{<i}).$$
#
# The source is always given, so the prefix need not learn how tables look. `labels[t]` is the token
# that has to be predicted where token t is read; -100 means no loss. The padding after the shorter
# rows of a batch has this label, too.
#
# **Predict.** The bos is an input. Is there a loss where it is *read*, or where it would have to
# be *predicted*?

# %%
rows = encode_examples(tokenizer, [example])  # one for each reference text
batch = collate(rows, tokenizer.eos_id)
for row, labels in zip(rows, batch.labels.tolist(), strict=True):
    n, padding = len(row.ids) - row.prompt_len, len(labels) + 1 - len(row.ids)
    print(f"source {row.prompt_len - 1} tokens, bos,", end=" ")
    print(f"target with eos {n}, padding {padding}")
    bos = row.prompt_len - 1  # its position
    wanted = row.ids[row.prompt_len :]  # the target and the eos
    assert labels == [-100] * bos + wanted + [-100] * padding

# %% [markdown]
# **Answer.** Where it is read: there the first word of the target has to be predicted. The last
# table token, which would have to predict the bos, has no loss.
#
# ## 3. The loop
#
# This is all of it. Only two lines are special to prefix-tuning: `weights` are the prefix's, and
# `told` hands the prefix to the model. (Without a prefix the weights are the model's, and the same
# loop is fine-tuning, as in 06_low_data.) `BatchOrder` shuffles the rows and puts rows of similar
# length together, so that there is little padding. `batch.model_kwargs()` is empty for GPT-2; for
# BART it holds the source (08_summarisation_bart).


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


# the other tutorials import this same loop
assert inspect.getsource(train) == inspect.getsource(short_training.train)

# %% [markdown]
# What is trained is not the table itself but an MLP that makes it (section 4.3 of the paper). Its
# last layer is fitted so that the table starts as the activations of some words, here
# `table-to-text:`.
#
# ## 4. The first steps
#
# **Predict.** A good start (real words) and a bad one (random numbers) take one step at the same
# learning rate. Which of the two can it make worse?
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


colours = (figure.PREFIX, figure.FAINT, figure.PALE)
after, curves = {}, {}
for (name, config), colour in zip(STARTS.items(), colours, strict=True):
    points = first_step(make_prefix(model, tokenizer, config, seed=0))
    print(f"{name}: loss at the start {points[0][1]:.2f}")
    for rate, (moved, loss) in zip(RATES, points[1:], strict=True):
        print(f"  rate {rate:.0e}: table moves {moved:7.2%}, loss {loss:5.2f}")
    after[name] = dict(zip((0, *RATES), points, strict=True))
    losses = [loss for _, loss in points[1:]]
    curves[f"{name}, at first {points[0][1]:.1f}"] = RATES, losses, colour, "o-"
figure.lines(
    "05_first_step", curves, xscale="log",
    xlabel="learning rate of the one step (no unit)",
    ylabel="dev loss after it (nats per target token)",
)  # fmt: skip
moved, loss = after["words"][1e-3]
assert moved > 0.3 and loss > after["random"][0][1] + 2  # thrown away
assert after["words"][1e-4][1] < after["words"][0][1]  # a safe first step
assert after["random"][1e-3][1] < after["random"][0][1]
assert moved > 50 * after["words, no MLP"][1e-3][0]

# %% [markdown]
# **Answer.** The good one. At a rate of 1e-3, which longer trainings of this model use, the first
# step moves the table that began as words by a third of its size, and the loss rises far above that
# of the random start: the words are gone. The random start improves by the same step.
#
# The table moves so far because of the MLP. Each entry of the table is a sum over the MLP's 512
# hidden numbers (`mid_dim`), and all of their weights move together. Without the MLP an entry moves
# by the rate itself, so a table alone can be trained at a far higher rate:
# 03_discrete_to_continuous uses 0.06, 07_many_users 0.1. Neither shows which of the two ways is
# better in the end. The paper and the command line train with the MLP.
#
# Two cures are a lower rate and a *warm-up*: the rate begins near 0 and rises to its full size.
# Here are runs from words at 1e-3, without and with a warm-up of 30 steps, and at half that rate.
# The last run begins with random numbers.

# %%
STEPS, WARM = 60, 30
RECIPE = "words, 5e-4, warm-up"
RUNS = {
    "words, 1e-3": ("words", 1e-3, 1, figure.PALE, ":"),
    "words, 1e-3, warm-up": ("words", 1e-3, WARM, figure.PALE, "-"),
    RECIPE: ("words", 5e-4, WARM, figure.PREFIX, "-"),
    "random, 5e-4, warm-up": ("random", 5e-4, WARM, figure.FAINT, "-"),
}
prefixes, ends, curves = {}, {}, {}
for name, (start, lr, warmup, colour, style) in RUNS.items():
    prefix = make_prefix(model, tokenizer, STARTS[start], seed=0)
    settings = {"steps": STEPS, "lr": lr, "warmup": warmup}
    losses = list(train(frozen, tokenizer, train_set, prefix, **settings))
    prefixes[name], ends[name] = prefix, loss_on(frozen, tokenizer, dev, prefix)
    curves[name] = range(1, STEPS + 1), losses, colour, style
    print(f"{name:21} dev loss {ends[name]:.2f}")
assert ends["words, 1e-3, warm-up"] < ends["words, 1e-3"] - 0.2
assert (
    ends[RECIPE] < min(ends["words, 1e-3"], ends["random, 5e-4, warm-up"]) - 0.5
)
figure.lines(
    "05_choices", curves, xlabel="step of 8 rows",
    ylabel="training loss (nats per target token)",
)  # fmt: skip

# %% [markdown]
# At 1e-3 without a warm-up the words are lost in the first steps, and 60 steps do not make up for
# it. The warm-up helps, and so does half the rate. (Whether half the rate still needs the warm-up
# is not shown here: [a single run](../docs/log.md) without it ended at about the same loss.) The
# random start is far behind after so few steps; 06_low_data compares starts with more of them.
#
# **Which settings for your own data?** The command line chooses the rate by the number of pairs;
# the rule, and what it was compared with, are in [the guide](../docs/guides/your_data.md). P, the
# prefix length, is 10 unless you say otherwise: the paper found the best P to be 10 for tables and
# 200 for summaries (its Figure 4). With `mini` there are two runs for each length
# ([figure4-mini.csv](../benchmarks/paper/figure4-mini.csv)), too few for an order. The longer the
# prefix, the fewer positions are left for the text.
#
# ## 5. Texts, and the facts in them
#
# A fluent text can still be wrong. A fact is *missing* if the text does not state a value of its
# table, and *invented* if it states another value that the field has in the training tables.
# `facts` looks for each value word for word. For `family friendly`, which is yes or no, it knows
# patterns such as "kids are welcome" or "adults only".
#
# BLEU, the usual score, does not see this. It is the share of a text's runs of one to four words
# that also stand in a reference (a mean of four shares, from 0 to 100, lowered for texts that are
# too short), so one wrong word costs little, whatever it means.
#
# **Predict.** What does a prefix get wrong after 60 steps: the grammar, the names or the facts?
# Which field will it get wrong most: name, type, food, price, customer rating, area, family
# friendly or near?

# %%
short = prefixes[RECIPE].export()  # the table alone, without the MLP
short.linearisation = "paper"  # how a table is framed: `generate` adds the bos
some = test[:16]
sources = [e.source for e in some]
written = minprefix.generate(
    model, tokenizer, sources, prefix=short, max_new_tokens=50
)
for e, text in list(zip(some, written, strict=True))[:3]:
    print(f"{e.source}\n  {text.strip()}\n")

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
n_facts, n_missing = (
    sum(row[x] for row in rows) for x in ("in tables", "missing")
)
human = [facts(e.targets[0], e.table, known) for e in some]
wrong_by_human = sum(len(one.missing) + len(one.wrong) for one in human)
print(f"{n_missing} of {n_facts} facts are missing,", end=" ")
print(f"in the first references {wrong_by_human} missing or invented")
friendly = next(row for row in rows if row["field"] == "family friendly")
assert friendly is rows[-1]  # the largest share
assert friendly["missing"] > 0.8 * friendly["in tables"]
assert 0.3 < n_missing / n_facts < 0.7 and wrong_by_human < 0.05 * n_facts

# %% [markdown]
# **Answer.** Mostly the facts. The sentences have the form of the references, but about half of the
# values are missing, and some sentences make no sense. (The count finds few faults in references
# written for these tables, so it can be trusted.) The prefix hardly ever states `family friendly`.
# Why this field?
#
# All other values can be copied: "Thai" is said as "Thai". But "family friendly : no" is said as
# "adults only" or "children are not welcome". This translation has to be learned. Whether it has
# been can be measured: exchange one value in the table, and see by how much the loss of the
# reference rises. Where it does not rise, the value is not read.


# %%
def with_another(field: str, e):
    """The example with another value of the field in its source."""
    value = dict(e.table)[field]
    other = next(v for v in known[field] if v != value)
    source = e.source.replace(f"{field} : {value}", f"{field} : {other}")
    return replace(e, source=source)


rise = {}
for name, prefix in (("no prefix", None), ("60 steps", short)):
    for field in ("food", "family friendly"):
        right = [e for e in test if field in dict(e.table)]
        wrong = [with_another(field, e) for e in right]
        before, after = (
            loss_on(frozen, tokenizer, part, prefix, pairs=16)
            for part in (right, wrong)
        )
        rise[name, field] = after - before
        print(f"{name:9} wrong {field:15} loss {after - before:+.3f}")
assert rise["60 steps", "food"] > 5 * abs(rise["60 steps", "family friendly"])
assert rise["60 steps", "food"] > rise["no prefix", "food"] > 0.02

# %% [markdown]
# With the prefix of 60 steps a wrong `food` raises the loss clearly, and a wrong `family friendly`
# hardly: that value is not read yet. (Without a prefix a wrong `food` raises it a little, too.)
#
# Here is a prefix that was trained to the end: 2,500 steps of 32 rows on E2E's own tables, by
# `python -m docs.train_prefixes`. E2E's data is not part of this repository, so the tables here are
# invented, with E2E's fields and values. Each is asked twice, with `family friendly` once yes and
# once no. Look for this field in the texts.

# %%
TABLES = (
    "name : The Blue Heron | type : pub | food : Italian | price : cheap | "
    "area : riverside | family friendly : {} | near : Burger King",
    "name : Casa Alma | type : restaurant | food : French | price : high | "
    "area : city centre | family friendly : {}",
    "name : The Idle Fox | type : coffee shop | food : Japanese | "
    "customer rating : high | family friendly : {} | near : Café Sicilia",
    "name : Basil Loft | type : pub | price : moderate | family friendly : {}",
)
trained = Prefix.load(TRAINED / "e2e-P10.safetensors")
asked = [table.format(value) for table in TABLES for value in ("yes", "no")]
answers = minprefix.generate(model, tokenizer, asked, prefix=trained)
stated = {"right": 0, "not said": 0, "wrong": 0}
for source, text in zip(asked, answers, strict=True):
    table = tuple(tuple(pair.split(" : ")) for pair in source.split(" | "))
    one = facts(text, table, known)
    fields = [[f for f, _ in part] for part in (one.wrong, one.missing)]
    wrong, missing = ("family friendly" in part for part in fields)
    stated["wrong" if wrong else "not said" if missing else "right"] += 1
    print(f"{source}\n  {text.strip()}\n")
print(f"family friendly in {len(asked)} texts of the trained prefix: {stated}")
assert stated["right"] > max(len(asked) / 2, 4 * stated["wrong"])

# %% [markdown]
# The same model with the prefix that was trained to the end states the field in most texts. Missing
# facts stay the main fault of a prefix for a model as small as this. Beam search (`num_beams=5`)
# repairs some: [copying.csv](../benchmarks/copying.csv) has the counts.
#
# ## 6. The file
#
# The file holds one table, $(L, 2, H, P, D)$, and the fingerprint of the model that it belongs to.
# A prefix means nothing to another model: its keys fit the queries that it was trained with.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "restaurants.safetensors"
    short.save(path)
    again, size = Prefix.load(path), path.stat().st_size
assert torch.equal(again.table(), short.table())
n_trained = sum(p.numel() for p in prefixes[RECIPE].parameters())
print(f"trained, with the MLP: {n_trained:,} numbers")
print(f"kept: {short.table().numel():,} numbers, {size / 1024:.0f} KiB")

other = minprefix.GPT2(model.config).init_weights(seed=0)
try:
    minprefix.generate(other, tokenizer, sources[:1], prefix=again)
    raise AssertionError("a prefix of another model was taken")
except ValueError as error:
    print("refused:", str(error)[:60])

# %% [markdown]
# ## Common mistakes
# > - **First steps that are too large.** The loss still falls, only later and less far, so nobody
# >   notices that the start was thrown away (section 4).
# > - **Labels that are shifted twice, or not at all.** Here `labels[t]` is the token after
# >   `input_ids[t]`. Check one row by eye.
# > - **Another frame in use than in training:** a missing bos, or an extra blank at the end of the
# >   table. The authors' code trains with a blank that it strips when it writes. No error is
# >   raised; the texts are only worse.
# > - **The MLP in the file.** The authors' checkpoints hold it, at a hundred times the size.
# >   `export` keeps the table.
# > - **A prefix for other tables than it was trained on.** E2E has three types of places. Ask its
# >   prefix about a bistro, and read what comes.
# > - **BLEU alone.** It hardly sees that one fact is nearly always missing. Count facts beside it.
#
# ## Recap
#
# - A row is `source, bos, target, eos`; the loss is on the target and the eos alone.
# - An MLP and the P vectors that it reads are trained; the table that they make is kept.
# - At too high a rate the first steps move the table so far that a good start is lost. Start from
#   words, at a lower rate or with a warm-up, and watch the loss of the first steps.
# - Values that can be copied are learned before those that must be rephrased. Count facts, field by
#   field.
# - From here: `make demo` trains longer on the same tables; `python -m minprefix train --data
#   FOLDER` takes your own.
#
# ## Exercises
#
# 1. *Easy.* How would the loss of a row divide between source and target if all tokens had one?
#    Why does that matter for a prefix? *Hint:* take $\log p$ of every next token.
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
