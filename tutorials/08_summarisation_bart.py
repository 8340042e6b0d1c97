# %% [markdown]
# # 8. Summarisation with BART
#
# GPT-2 reads and writes with one stack of layers. BART reads with one and writes with another, so
# there are three places where a prefix can be read, and the paper uses all three. Here they are
# written out, then tuned to say in one sentence what a note in a local newspaper says in seven.
#
# **What you will learn.** How an encoder-decoder reads a source; where its three attentions take a
# prefix, with equation (3) at each of them by hand; which states each one can change; why no
# instruction is exactly a prefix here; how summaries are scored, and which faults ROUGE does not
# see; what to expect of bart-large on XSum.
#
# **What to know first.** 02_equation_3 (what a prefix is) and 05_table_to_text (how one is tuned).
#
# **Running time.** A little over a minute on two CPU cores; training, in sections 6 and 7, is most
# of it.
#
# **Sources.** Li & Liang 2021, <https://arxiv.org/abs/2101.00190> (section 4.1, tables 2 and 3) and
# their code; BART: Lewis et al. 2020; the notes: `minprefix/assets/notes`.

# %%
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from figure import FAINT, OTHER, PREFIX, TEXT, new, show
from matplotlib.colors import ListedColormap
from rouge_score.rouge_scorer import RougeScorer

import minprefix
from benchmarks.paper.published import XSUM, XSUM_TOPICS
from minprefix.cli.demo import BF16
from minprefix.cli.report import format_rows
from minprefix.data.batches import encode_examples, encode_prompt
from minprefix.data.load import load_examples
from minprefix.generation.config import GenerationConfig
from minprefix.methods.counts import method_rows
from minprefix.methods.evaluate import evaluate_method
from minprefix.models.config import OFFICIAL, SITES
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.prefix.parametrisations import Recorder
from minprefix.training.config import TrainConfig
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer
from tools.notes.measure import baselines

SHORT, LONG = (30, 210) if BF16 else (15, 90)  # steps; fewer where bf16 is slow
model, tokenizer = minprefix.load("mini-bart")
model.requires_grad_(False)
config = model.config
L, H, D, C = config.n_layer, config.n_head, config.head_dim, config.n_embd
folder = Path(tempfile.mkdtemp(prefix="minprefix-"))

# %% [markdown]
# ## 1. A note and its sentence
#
# The summary is not in the note: it says what matters in other words, and its numbers may have to
# be worked out. That is XSum's task; its articles are the BBC's, these are invented.

# %%
train, dev, test = (load_examples("notes", split) for split in ("train", "dev", "test"))
print(f"{len(train):,} notes to train on, {len(dev)} for dev, {len(test)} for test")
note, summary = test[0].source, test[0].targets[0]
print("\nnote:   ", note)
print("summary:", summary)

# %% [markdown]
# ROUGE counts what a summary and its reference share. ROUGE-1 is the F1 of their words: first for
# one pair by hand, then as the package has it.


# %%
def rouge_1(text: str, reference: str) -> float:
    """F1 of the words, each counted as often as both have it."""
    a, b = (Counter(re.findall(r"[a-z0-9]+", x.lower())) for x in (text, reference))
    shared = sum((a & b).values())
    precision, recall = shared / sum(a.values()), shared / sum(b.values())
    return 2 * precision * recall / (precision + recall) if shared else 0.0


first_sentence = re.split(r"(?<=\.) ", note)[0]
by_hand = rouge_1(first_sentence, summary)
package = RougeScorer(["rouge1"]).score(summary, first_sentence)["rouge1"].fmeasure
print(f"first sentence against the summary: {by_hand:.4f} by hand, {package:.4f} (rouge-score)")
assert abs(by_hand - package) < 1e-12

# %% [markdown]
# As the paper reports it, words are stemmed first; ROUGE-2 counts pairs of words and ROUGE-L the
# longest common subsequence. A model has to do better than to repeat a sentence. "Lead-1", the
# first one, is what newspapers make hard to beat; the oracle picks each note's best sentence:

# %%
lead = baselines(test)
print(format_rows([{"summary": way} | scores for way, scores in lead.items()]))
LEAD_1 = lead["first sentence"]

# %% [markdown]
# ## 2. Two stacks, three attentions
#
# The encoder reads the source $x$, every token seeing all others. The decoder reads the summary so
# far, $y_{<t}$, causally; after each of these attentions it reads the encoder's last layer, by
# *cross attention*. The paper writes $[\text{PREFIX}; x; \text{PREFIX}'; y]$. Keys and values of a
# prefix differ by the attention that reads them, so its code has three tables:
#
# | site | queries | read |
# |---|---|---|
# | encoder | source tokens | $P$ prefix positions, all source tokens |
# | decoder | summary tokens | $P$ prefix positions, summary tokens up to their own |
# | cross | summary tokens | $P$ prefix positions, all encoded source tokens |
#
# In the picture p stands for a prefix position, x for a token of the source, y for one of the
# summary; a light field is not seen.

# %%
P, S, T = 2, 6, 4  # small, to be seen
figure, axes = new(columns=3, width=3.4, height=3.3)
for axis, site in zip(axes, SITES, strict=True):
    rows, columns = (S if site == "encoder" else T), (T if site == "decoder" else S)
    sees = torch.ones(rows, columns)
    sees = sees.tril() if site == "decoder" else sees
    grid = torch.cat([torch.full((rows, P), 2.0), sees], dim=1)
    colours = ListedColormap(["#f4f4f4", TEXT, PREFIX])
    axis.pcolormesh(grid, cmap=colours, vmin=0, vmax=2, edgecolors="white", linewidth=1.5)
    axis.set(aspect="equal", ylim=(S, 0), xlim=(0, P + S))  # one size of cell in all three
    axis.set_xticks(
        torch.arange(P + columns) + 0.5, [*"pp", *("y" if site == "decoder" else "x") * columns]
    )
    axis.set_yticks(torch.arange(rows) + 0.5, [*("x" if site == "encoder" else "y") * rows])
    axis.set(title=site, xlabel="keys and values", ylabel="queries" if site == "encoder" else "")
show(figure, "08_three_attentions")

# %% [markdown]
# What enters the encoder is `bos, note, eos`; the decoder reads `eos, bos, summary` and its labels
# are the same, moved by one. (That the decoder starts with an end is how BART was pretrained.)

# %%
row = encode_examples(tokenizer, test[:1])[0]
source, target = torch.tensor(row.source), torch.tensor(row.ids[:-1])
assert row.source == [tokenizer.bos_id, *tokenizer.encode(note), tokenizer.eos_id]
assert row.ids[:2] == [tokenizer.eos_id, tokenizer.bos_id] and row.ids[-1] == tokenizer.eos_id
print(f"{len(source)} tokens in the encoder, {len(target)} in the decoder")

# %% [markdown]
# ## 3. Equation (3), three times
#
# $$h_i = \begin{cases} P_\theta[i] & i \in P_\text{idx} \\
#   \mathrm{LM}(z_i, h_{<i}) & \text{otherwise} \end{cases}$$
#
# In an attention this is a concatenation: the prefix's keys and values stand in front of those
# that the model computes. One function does it for all three sites, in fp64, for one row. The
# model's weights are used as they are, the rest is written out.


# %%
def heads(x: torch.Tensor) -> torch.Tensor:
    """(n, C) -> (H, n, D)."""
    return x.view(len(x), H, D).transpose(0, 1)


def attend(q, k, v, table, mask):
    """q (n, C), k and v (m, C), table (2, H, P, D), mask (n, P + m) of 0 and -inf -> (n, C)."""
    k = torch.cat([table[0], heads(k)], dim=1)  # (H, P + m, D): eq. (3), keys
    v = torch.cat([table[1], heads(v)], dim=1)  # (H, P + m, D): eq. (3), values
    scores = heads(q) @ k.transpose(1, 2) / D**0.5 + mask  # (H, n, P + m)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(-1, C)


def bart(model, source, target, tables):
    """Encoder states (S, C) and logits (T, V); tables by site, (L, 2, H, P, D)."""
    S, T = len(source), len(target)
    P = tables["encoder"].shape[3]
    sees_all = torch.zeros(1, 1, dtype=torch.float64)
    causal = torch.full((T, P + T), float("-inf"), dtype=torch.float64).triu(P + 1)

    x = model.wte(source) + model.encoder.wpe(2 + torch.arange(S))  # positions begin in row 2
    x = model.encoder.ln_embd(x)
    for layer, block in enumerate(model.encoder.h):
        q, k, v = block.attn.c_attn(x).split(C, dim=-1)
        o = attend(q, k, v, tables["encoder"][layer], sees_all)
        x = block.ln_1(x + block.attn.c_proj(o))  # post-LN: the norm stands behind the sum
        x = block.ln_2(x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(x))))
    states = x

    y = model.wte(target) + model.decoder.wpe(2 + torch.arange(T))
    y = model.decoder.ln_embd(y)
    for layer, block in enumerate(model.decoder.h):
        q, k, v = block.attn.c_attn(y).split(C, dim=-1)
        o = attend(q, k, v, tables["decoder"][layer], causal)
        y = block.ln_1(y + block.attn.c_proj(o))
        k, v = block.cross.c_kv(states).split(C, dim=-1)  # of the source, once for all y
        o = attend(block.cross.c_q(y), k, v, tables["cross"][layer], sees_all)
        y = block.ln_2(y + block.cross.c_proj(o))
        y = block.ln_3(y + block.mlp.c_proj(F.gelu(block.mlp.c_fc(y))))
    return states, y @ model.wte.weight.T + model.head_bias


exact = minprefix.load("mini-bart")[0].double().eval()
prefix = BARTPrefix.random(config, 5, seed=0).double()
with torch.no_grad():
    for part in prefix.sites.values():
        part.prefix_table.mul_(20)  # keys and values as large as the model's own
    states, logits = bart(exact, source, target, prefix.tables())
    library = exact(source[None], target[None], prefix=prefix)[0]
    encoded = exact.encode(source[None], prefix=prefix).states[0]
for name, ours, theirs in (("states", states, encoded), ("logits", logits, library)):
    gap = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{name}: largest difference from the library {gap:.1e} of the largest entry")
    assert gap < 1e-12

# %% [markdown]
# Nothing else of the model knows of a prefix: positions begin at 0 with and without, as in the
# authors' code, and there is no mask for the prefix, since everyone sees it.
#
# ## 4. What each site can change
#
# The encoder runs before a word is written. A prefix that only the decoder reads, which is what
# PEFT gives a BART, cannot change how the source is read:

# %%
with torch.no_grad():
    plain_states = exact.encode(source[None]).states
    plain_logits = exact(source[None], target[None])
    rows = []
    for site in SITES:
        only = BARTPrefix.from_tables({site: prefix.tables()[site]})
        moved_states = exact.encode(source[None], prefix=only).states - plain_states
        moved_logits = exact(source[None], target[None], prefix=only) - plain_logits
        rows.append({
            "prefix at": site,
            "encoder states move by": moved_states.abs().mean().item(),
            "logits move by": moved_logits.abs().mean().item(),
        })  # fmt: skip
        assert (moved_states.abs().max() == 0) == (site != "encoder")  # not by one bit
        assert moved_logits.abs().max() > 0
print(format_rows(rows))

# %% [markdown]
# ## 5. No instruction is exactly a prefix here
#
# In GPT-2 the keys and values of an instruction do not depend on what follows, so a table can hold
# them, and the prefix *is* the instruction (03_discrete_to_continuous). The encoder reads in both
# directions: what the words of an instruction become depends on the note behind them. Here are
# their keys and values in front of two notes, in both models.

# %%
WORDS = "Summarise the note:"
gpt2, gpt2_tokenizer = minprefix.load("mini")


def keys_and_values(model, tokenizer, text: str) -> torch.Tensor:
    """Of the words, with the text behind them: (L, 2, H, n, D)."""
    recorder, words = Recorder(torch.device("cpu")), tokenizer.encode(WORDS)
    ids = torch.tensor([words + tokenizer.encode(f" {text}")])
    with torch.no_grad():
        if isinstance(model, minprefix.GPT2):
            model.hidden_states(ids, cache=recorder)
        else:
            model.encode(ids, recorder=recorder)
    return recorder.table()[..., : len(words), :]


for name, *pair in (("GPT-2", gpt2.double(), gpt2_tokenizer), ("encoder", exact, tokenizer)):
    one, other = (keys_and_values(*pair, test[i].source) for i in (0, 1))
    by_layer = (one - other).flatten(1).norm(dim=1) / one.flatten(1).norm(dim=1)
    print(f"{name:8} relative difference by layer:", ", ".join(f"{x:.1e}" for x in by_layer))
    assert (by_layer.max() < 1e-12) == (name == "GPT-2")

# %% [markdown]
# In layer 0 both agree, because its keys come from embeddings alone. Above it they differ, and so
# do the keys of cross attention, which come from the encoder's result. Initialising from words
# (`init="words"`) therefore takes what the model makes of the words alone. It is a start, not an
# equality.
#
# ## 6. Tuning one
#
# As in 05: the trainer, the loss, the files are the same. Each site has its own MLP while it is
# trained. First a choice: which sites? Four short runs on the same rows.


# %%
def tune(name: str, choice: PrefixConfig, steps: int) -> dict:
    """Train on the notes; dev losses, and where the prefix of the lowest is."""
    made = make_prefix(model, tokenizer, choice, seed=0)
    settings = TrainConfig(
        steps=steps, batch_size=16, lr=2e-3, warmup_steps=10, log_every=5, eval_pairs=60,
        eval_every=SHORT, samples=0, precision="bf16" if BF16 else "fp32",
    )  # fmt: skip
    out = folder / name
    result = Trainer(model, tokenizer, settings, train, dev, out, made).run(progress=False)
    log = read_log(out)
    return {
        "out": out,
        "dev loss": result["best_dev_loss"],
        "train": [(e["step"], e["loss"]) for e in log if "loss" in e],
        "dev": [(e["step"], e["dev_loss"]) for e in log if "dev_loss" in e],
    }


ALL = PrefixConfig(prefix_len=10, init="random")
short = {
    site: tune(site, PrefixConfig(prefix_len=10, init="random", sites=(site,)), SHORT)
    for site in SITES
}
short["all three"] = tune("all", ALL, SHORT)
for name, run in short.items():
    print(f"{name:10} dev loss {run['dev loss']:.3f} nats per token after {SHORT} steps of 16")

# %%
figure, axes = new(width=5.6)
for (name, run), colour in zip(short.items(), (TEXT, OTHER, FAINT, PREFIX), strict=True):
    axes.plot(*zip(*run["train"], strict=True), "o-", color=colour, label=name)
axes.set(xlabel="optimiser step (16 rows each)", ylabel="training loss (nats per target token)")
axes.legend(frameon=False, title="prefix at")
show(figure, "08_sites")

# %% [markdown]
# Each run has the same number of steps, not of parameters: all three are three times one. A short
# run shows how each starts.
#
# ## 7. Writing
#
# The longer run has all three. The paper decodes summaries with 6 beams and a length penalty of
# 0.8 (the score of a text of n tokens is $\sum \log p / n^{0.8}$, which favours shorter texts than
# the mean does); BART's own config for summaries adds that no three tokens come twice.

# %%
long = tune("long", ALL, LONG)
print("dev loss:", ", ".join(f"{loss:.3f} after {step}" for step, loss in long["dev"]))
assert long["dev loss"] < short["all three"]["dev loss"]  # more steps of the same

# %%
some = test[:60]
tuned = BARTPrefix.load(long["out"] / "prefix.safetensors")
ways = {
    "greedy": GenerationConfig(max_new_tokens=60),
    "6 beams": GenerationConfig(
        max_new_tokens=60, num_beams=6, length_penalty=0.8, no_repeat_ngram_size=3
    ),
}
scores, written = {"first sentence": baselines(some)["first sentence"]}, {}
for name, way in ways.items():
    scores[name], written[name] = evaluate_method(
        model, tokenizer, some, prefix=tuned, config=way, metrics="xsum"
    )
untuned = minprefix.generate(
    model, tokenizer, [encode_prompt(tokenizer, note)], config=ways["greedy"]
)[0]
print(format_rows([{"on 60 test notes": name} | score for name, score in scores.items()]))
print("\nthe model without a prefix, which was pretrained to restore its source:")
print(untuned)
assert rouge_1(untuned, note) > rouge_1(untuned, summary)
for example, text in zip(some[:3], written["6 beams"], strict=False):
    print("\nnote:     ", example.source)
    print("reference:", example.targets[0])
    print("written:  ", text)

# %% [markdown]
# ## 8. What ROUGE does not see
#
# A summary can have the right words and be wrong: a town that is not in the note, a total that was
# added up wrongly. Towns and surnames of the test notes occur nowhere in training, so a model has
# to copy them. Of the names (capitalised words behind the first) and the numbers that a text
# states, how many are in the note? A number may have been worked out: the references show how
# many are.


# %%
def stated(text: str) -> tuple[set[str], set[str]]:
    """Names and numbers of a text."""
    words = re.findall(r"[A-Za-z]+|\d[\d,.]*\d|\d", text)
    return {w for w in words[1:] if w[0].isupper()}, {w for w in words if w[0].isdigit()}


references = [e.targets[0] for e in some]
rows = []
for name, texts in (("reference", references), *written.items()):
    names, numbers, noted, right = 0, 0, [0, 0], 0
    for example, text, reference in zip(some, texts, references, strict=True):
        for kind, words in enumerate(stated(text)):
            noted[kind] += sum(bool(re.search(rf"\b{w}\b", example.source)) for w in words)
        names, numbers = names + len(stated(text)[0]), numbers + len(stated(text)[1])
        right += len(stated(text)[1] & stated(reference)[1])
    rows.append({
        "text": name, "names": names, "names in the note": noted[0], "numbers": numbers,
        "numbers in the note": noted[1], "numbers in the reference": right,
    })  # fmt: skip
print(format_rows(rows))
assert rows[0]["names"] == rows[0]["names in the note"]  # references invent nobody

# %% [markdown]
# Names are copied early in training. A number has to be copied from the right place, or worked out
# from two others, and ROUGE counts it like any other word.
#
# ## 9. With bart-large, on XSum
#
# What the paper reports, R-1, R-2, R-L on the test set, and on topics that were not trained on:

# %%
print(format_rows([{"XSum": m} | dict(zip(LEAD_1, x, strict=True)) for m, x in XSUM.items()]))
for split, methods in XSUM_TOPICS.items():
    print()
    print(format_rows([{split: m} | dict(zip(LEAD_1, x, strict=True)) for m, x in methods.items()]))

# %% [markdown]
# On all of XSum, with 225,000 articles, fine-tuning is ahead; on new topics the prefix is. (These
# are the paper's figures. They were not measured here: neither XSum nor the official weights are
# part of this checkout.) What it costs, counted from shapes:

# %%
large = OFFICIAL["facebook/bart-large"][0]
print(format_rows(method_rows(large)))
table = 3 * 2 * large.n_layer * 100 * large.n_embd  # sites, keys and values, layers, P, C
assert table == next(r["kept"] for r in method_rows(large) if r["method"] == "prefix, P = 100")
print(f"P = 100: {table:,} numbers, {4 * table / 2**20:.0f} MiB in fp32, one file for each task")

# %% [markdown]
# The paper's setting is one command; `python -m benchmarks.bart` first tells what a step takes and
# how much memory it needs on your machine:
#
# ```
# python -m minprefix train --model facebook/bart-large --data xsum --max-source 512 --epochs 30 \
#     --batch-size 14 --lr 5e-5 --prefix-len 100 --mid-dim 800 --out runs/xsum
# ```
#
# Expect slower learning than here. The paper trains 30 epochs of 225,000 articles at a rate of
# 5e-5, a fortieth of the one above, since the model is wider and the articles are real. The notes
# come from rules: a model that learns the rules does well on them and knows nothing about news.
#
# ## Recap
#
# - An encoder-decoder has three attentions; a prefix for each is a table of its own. Equation (3)
#   is the same concatenation three times.
# - Only the encoder's prefix changes how the source is read; the other two change what is made of
#   it.
# - Keys and values of words in a bidirectional encoder depend on the text around them: no
#   instruction is exactly a prefix.
# - Beat lead-1 before you believe a summariser, and check names and numbers beside ROUGE.
# - From here: `python -m minprefix train --model mini-bart --data notes`, or your own `{"document":
#   ..., "summary": ...}` lines.
#
# ## Exercises
#
# 1. A batch pads sources to one length. Let the encoder see the padding (leave out `source_lens`):
#    how much do the logits of the shorter rows change, and why does a decoder-only model not have
#    this problem with right padding?
# 2. Put embeddings of virtual tokens before the source instead (`parametrisation="embedding-mlp"`).
#    Count its parameters, train it for as many steps as in section 6, and compare.
# 3. Train on news only and write about sports (`choose(..., "news-to-sports", ...)`). What is lost
#    against a prefix that saw sports?
# 4. Which positions should a source have behind a prefix, from 0 or from P? Show that the function
#    differs, and say which of the two a table of GPT-2 needs in order to be a hard prompt.
#
# Solutions: `tutorials/solutions/08_summarisation_bart.py`.
#
# ## References
#
# Li & Liang 2021, <https://arxiv.org/abs/2101.00190>, code
# <https://github.com/XiangLi1999/PrefixTuning>; Lewis et al. 2020 (BART),
# <https://arxiv.org/abs/1910.13461>; Narayan et al. 2018 (XSum), <https://arxiv.org/abs/1808.08745>;
# Lin 2004 (ROUGE), <https://aclanthology.org/W04-1013>.
