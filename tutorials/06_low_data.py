# %% [markdown]
# # 6. Few examples: prefix against fine-tuning
#
# With a few dozen examples, which is better: to change all weights, or a prefix? The paper says the
# prefix, by 2.9 BLEU on average over its sizes (section 6.3, Figure 3), and that the prefix should
# then start from real words (section 7.4, Figure 5).
#
# **What you will learn.** How such an experiment is set up (subsets, dev sets, early stopping,
# spread); what comes out of a small one on your own machine; and how to read it, beside what the
# paper found.
#
# **What to know first.** 03_discrete_to_continuous, 05_table_to_text.
#
# **Running time.** About a minute on two CPU cores. With `MODEL = "gpt2"` every training takes much
# longer.
#
# **Sources.** Li & Liang 2021, ACL version, <https://aclanthology.org/2021.acl-long.353> (sections
# 6.3, 7.4, appendix A.2); <https://arxiv.org/abs/2101.00190>.

# %%
import statistics
import tempfile
from pathlib import Path

import torch
from figure import FAINT, PREFIX, TEXT, new, show
from scipy import stats

import minprefix
from benchmarks.paper.claims import judge
from benchmarks.paper.results import mean_sd, pick, read_rows
from minprefix.cli.demo import BF16
from minprefix.cli.report import format_rows
from minprefix.data.batches import collate, encode_examples
from minprefix.data.load import load_examples
from minprefix.data.splits import DEV_PART, low_data, subset
from minprefix.generation.config import GenerationConfig
from minprefix.methods.evaluate import evaluate_method
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer

MODEL = "mini"
BRIEF = GenerationConfig(max_new_tokens=50)
SIZES, SUBSETS = (20, 50, 200), (0, 1)
WORDS = "table-to-text:"
SHRINK = 1 if BF16 else 3  # where bf16 is slow: fewer steps, to stay within a minute
STEPS = 48 // SHRINK
LR = {"prefix": 6e-4, "fine-tuning": 3e-4}  # the best dev loss of three each, on other subsets
ROWS = 5  # a batch
model, tokenizer = minprefix.load(MODEL)
P = len(tokenizer.encode(WORDS))

# %% [markdown]
# ## 1. Subsets, and a dev set of their size
#
# The paper draws 5 subsets of each size, trains 2 seeds on each, and stops early by a dev set of
# 30 % of the training size: who has 50 examples does not have 500 to choose a step by. Here: 2
# subsets, 1 seed, tables with at most four fields (short rows are cheap). A subset is part of the
# larger one of the same seed, so a curve over sizes adds rows and swaps none.

# %%


def short(split: str) -> list:
    return [example for example in load_examples("restaurants", split) if len(example.table) <= 4]


train, dev, test = short("train"), short("dev"), short("test")[:10]
judged = encode_examples(tokenizer, short("test"))[::4][:30]  # pairs, for the loss
for size in SIZES:
    few, few_dev = low_data(train, dev, size, SUBSETS[0])
    n, n_dev = (sum(len(e.targets) for e in part) for part in (few, few_dev))
    print(f"size {size:3}: {n:3} training pairs, {n_dev:2} dev pairs")
    assert (n, n_dev) == (size, round(DEV_PART * size))
small, large = ({(e.source, t) for e in subset(train, n, 0) for t in e.targets} for n in SIZES[:2])
assert small < large

# %% [markdown]
# ## 2. One run
#
# Both methods minimise the same loss on the same rows. Fine-tuning starts from a fresh copy of
# the model and moves all its weights; the prefix moves its MLP and keeps a table. After each
# third of the steps the dev loss is taken, and the weights with the lowest one are kept: early
# stopping by selection.

# %%


@torch.no_grad()
def test_loss(model, prefix: Prefix | None) -> float:
    """Nats per target token on rows that no run sees: the same rows for all."""
    batch = collate(judged, tokenizer.eos_id)
    losses = model.token_losses(batch.input_ids, batch.labels, batch.at, prefix=prefix)
    return losses.mean().item()


def run(method: str, size: int, number: int, init: str = "words") -> dict:
    """Train on one subset, keep the best step, score it."""
    few, few_dev = low_data(train, dev, size, number)
    fresh, _ = minprefix.load(MODEL)
    prefix = None
    if method == "prefix" and init == "words":
        prefix = Prefix.from_words(fresh, tokenizer, WORDS, seed=number, parametrisation="mlp")
    elif method == "prefix":
        prefix = Prefix.random(fresh.config, P, seed=number, parametrisation="mlp")
    config = TrainConfig(
        method="prefix" if prefix else "finetune", steps=STEPS, lr=LR[method],
        batch_size=ROWS, warmup_steps=STEPS // 8, eval_every=STEPS // 3,
        eval_pairs=24, samples=0, seed=number, precision="bf16" if BF16 else "fp32",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:  # fine-tuning leaves a model and its optimiser there
        trainer = Trainer(fresh, tokenizer, config, few, few_dev, out, prefix)
        result = trainer.run(progress=False)
        best, kept = fresh, prefix and Prefix.load(trainer.kept)
        if prefix is None:
            best, _ = minprefix.load(trainer.kept)
        log = read_log(trainer.out)
    scores, texts = evaluate_method(best, tokenizer, test, prefix=kept, config=BRIEF)
    loss = test_loss(best, kept)
    at = min((e for e in log if "dev_loss" in e), key=lambda e: e["dev_loss"])["step"]
    return {
        "method": method, "init": init, "size": size, "subset": number, "best step": at,
        "dev loss": result["best_dev_loss"], "test loss": loss, "BLEU": scores["bleu"],
        "slots %": scores["slot_coverage"], "text": texts[0],
    }  # fmt: skip


results = [
    run(method, size, number) for size in SIZES for number in SUBSETS for method in LR
]  # every run of Figure 3, in small
shown = [{name: v for name, v in r.items() if name not in ("text", "init")} for r in results]
print(format_rows(shown))

# %% [markdown]
# ## 3. Mean and spread
#
# $$\bar{m} = \frac{1}{n} \sum_s m_s, \qquad s_m^2 = \frac{1}{n - 1} \sum_s (m_s - \bar{m})^2.$$
#
# What is compared are the two methods *on the same subset*, so the subset's luck cancels: the
# difference $d_s$ has its own mean and spread, and $\bar{d} \pm t\, s_d / \sqrt{n}$ is its 95 %
# interval, $t$ the quantile of Student's distribution with $n - 1$ degrees of freedom.


# %%
def values(column: str, **where) -> list[float]:
    return [r[column] for r in results if all(r[k] == v for k, v in where.items())]


def spread(found: list[float]) -> tuple[float, float]:
    return statistics.fmean(found), statistics.stdev(found)


wins = {"test loss": 0, "BLEU": 0}
for size in SIZES:
    for column, better in (("test loss", -1), ("BLEU", 1)):
        one, two = (values(column, size=size, method=m, init="words") for m in LR)
        for name, found in zip(LR, (one, two), strict=True):
            mean, sd = spread(found)
            print(f"  {size:3} pairs, {column:9} {name:11} {mean:6.2f} +- {sd:.2f}")
        gaps = [better * (a - b) for a, b in zip(one, two, strict=True)]
        mean, sd = spread(gaps)
        margin = stats.t.ppf(0.975, len(gaps) - 1) * sd / len(gaps) ** 0.5
        wins[column] += mean > 0
        print(f"    prefix is better by {mean:+.2f}, 95 % interval +-{margin:.2f}")
for column, n in wins.items():
    print(f"by {column}, the prefix is ahead at {n} of {len(SIZES)} sizes")

# %%
figure, axes = new(columns=2)
for axis, column, unit in (
    (axes[0], "BLEU", "BLEU (0 to 100)"),
    (axes[1], "test loss", "test loss (nats per target token)"),
):
    for method, colour in (("prefix", PREFIX), ("fine-tuning", TEXT)):
        found = [spread(values(column, size=n, method=method, init="words")) for n in SIZES]
        means, sds = zip(*found, strict=True)
        axis.errorbar(SIZES, means, yerr=sds, fmt="o-", capsize=3, color=colour, label=method)
        for n in SIZES:
            dots = values(column, size=n, method=method, init="words")
            axis.plot([n] * len(dots), dots, "x", color=colour, ms=5, alpha=0.6)
    axis.set_xscale("log")
    axis.set_xticks(SIZES, [str(n) for n in SIZES])
    axis.minorticks_off()
    axis.set(xlabel="training pairs", ylabel=unit)
    axis.legend(frameon=False)
figure.suptitle("crosses: runs; whiskers: 1 standard deviation", fontsize=9)
show(figure, "06_low_data")

# %% [markdown]
# The paper's Figure 3 has sizes 50 to 500 of E2E, GPT-2 medium, ten models a point, up to several
# hundred steps, and settings tuned for each size: the prefix is ahead everywhere and the gap
# narrows. Read your own numbers with three differences in mind.
#
# - **Steps.** The paper gives the prefix up to twice the steps of fine-tuning at the smallest
#   sizes. Here both have the same few, a few hundred rows in all. A prefix has to move a large
#   model from outside, and that takes steps.
# - **Model.** `mini` is small, and its own text is far from the task. What a frozen model cannot
#   do, a prefix cannot ask for; fine-tuning can teach it.
# - **Spread.** Two subsets give an interval of 12.7 standard errors. A difference inside of it says
#   nothing about the next subset.
#
# ## 4. What is left out
#
# The paper looks at texts, too: with few examples both methods drop fields, and fine-tuning
# sometimes states a wrong one. The first test table, at each size:

# %%
print("table:", test[0].source)
for r in results:
    if r["subset"] == SUBSETS[0]:
        print(f"  {r['size']:3} {r['method']:11} {r['text'][:110]!r}")
for method in LR:
    told = [f"{statistics.fmean(values('slots %', size=n, method=method)):.0f}" for n in SIZES]
    print(f"{method:11} values in the text, %, at {', '.join(map(str, SIZES))}: {', '.join(told)}")

# %% [markdown]
# ## 5. Real words or random numbers?
#
# Figure 5: at 100 pairs a prefix that starts from the activations of real words is clearly better
# than a random one, and varies less. Here at the smallest size, with the MLP in both cases.

# %%
results += [run("prefix", SIZES[0], number, "random") for number in SUBSETS]
starts = ("words", "random")
for init in starts:
    found = {c: values(c, size=SIZES[0], method="prefix", init=init) for c in ("test loss", "BLEU")}
    said = "; ".join(f"{c} {spread(v)[0]:.2f} +- {spread(v)[1]:.2f}" for c, v in found.items())
    print(f"  {init:7} {said}")

figure, axes = new(width=5, height=2.4)
for i, init in enumerate(starts):
    found = values("test loss", size=SIZES[0], method="prefix", init=init)
    mean, sd = spread(found)
    axes.barh(i, mean, 0.6, xerr=sd, capsize=3, color=(PREFIX, FAINT)[i])
    axes.plot(found, [i] * len(found), "x", color="#333333")
axes.set_yticks(range(2), [f"{WORDS!r}", "random"])
axes.set(xlabel=f"test loss at {SIZES[0]} pairs (nats per target token)", ylabel="start")
show(figure, "06_start")

# %% [markdown]
# ## 6. The same experiment on E2E
#
# `python -m benchmarks.paper figure3` and `figure5` run it on the real data with this model, as
# the paper does: 5 subsets, 2 seeds, unless told otherwise; settings chosen on dev sets. It takes
# hours, and leaves a CSV, which is read here if it is there. The lines under the table judge the
# paper's claims by its rows.

# %%
for experiment in ("figure3", "figure5"):
    paths = sorted(
        (Path(minprefix.__file__).parents[1] / "benchmarks/paper").glob(f"{experiment}*.csv")
    )
    if not paths:
        print(f"{experiment}: no benchmarks/paper/{experiment}*.csv in this checkout")
    for path in paths:
        rows = [row for row in read_rows(path) if not row.get("problem")]
        print(f"{path.name}: {rows[0]['model']}, {rows[0]['scale']}, {len(rows)} runs")
        for name, x in dict.fromkeys((row["name"], row["x"]) for row in rows):
            found = mean_sd(pick(rows, name=name, x=x), "BLEU")
            if found is not None:
                said = f"{found.mean:6.2f} +- {found.sd:.2f} BLEU, {found.n} runs"
                print(f"  {x:>4} pairs  {name:15} {said}")
        for line in judge(experiment, rows):
            print("  -", line)

# %% [markdown]
# ## Recap
#
# - A low-data result is a mean over subsets, with its spread, of runs that stopped by a dev set as
#   small as their training set. One run is an anecdote.
# - Compare on the same subsets, and take the interval of the difference.
# - The paper's claim, the prefix is ahead with few examples, is about GPT-2 medium on E2E and
#   BART-large on XSum. What you saw above is about `mini` in short runs. Both are worth knowing
#   before you choose.
# - Start from words. It costs nothing, and the first steps begin nearer to text.
# - When not to use a prefix: if you may store a copy of the model, have data, and the task is far
#   from what the model can do, fine-tuning is the stronger tool. The prefix is for many tasks or
#   users on one model (07_many_users) and for keeping the model as it is.
#
# ## Exercises
#
# 1. Show that subsets of one seed are nested for all sizes, and that two seeds share about as many
#    pairs as chance says.
# 2. With a spread of $s$ between subsets, how many subsets does it take until a difference of $d
#    = s$ lies outside of its own 95 % interval?
# 3. Fine-tune only the top two layers at the smallest size (`method="ft-top"`). How many parameters
#    is that, and is the start, step 0, the frozen model?
#
# Solutions: `tutorials/solutions/06_low_data.py`.
#
# ## References
#
# Li & Liang 2021, <https://aclanthology.org/2021.acl-long.353>; Student's $t$:
# <https://en.wikipedia.org/wiki/Student%27s_t-distribution>; the E2E data:
# <https://github.com/tuetschek/e2e-dataset>.
