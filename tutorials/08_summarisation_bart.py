# %% [markdown]
# # 8. Summarisation with BART
#
# GPT-2 reads and writes with one stack of layers. BART reads with one and writes with another, so
# there are three places where a prefix can be read, and the paper uses all three. We write them
# out, and then train a prefix that sums up a note of a local newspaper in one sentence.
#
# **What you will learn.** How an encoder-decoder reads a source. Where its three attentions read a
# prefix. Why its positions are not shifted, and why no instruction is exactly a prefix here. How
# summaries are scored, and which faults ROUGE does not see.
#
# **What to know first.** 02_equation_3 (what a prefix is) and 05_table_to_text (how one is
# trained). The letters are those of [the table in tutorial 01](01_gpt2_from_scratch.py); S counts
# the source's tokens.
#
# **Running time.** About a minute on two CPU cores; most of it is training.
#
# **Sources.** Li & Liang 2021, <https://arxiv.org/abs/2101.00190> (section 4.1, tables 2 and 3)
# and their code; BART: Lewis et al. 2020; the notes: `minprefix/assets/notes`.

# %%
import copy
import re
from collections import Counter
from dataclasses import replace

import pictures_results as pictures
import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer
from short_training import for_training, loss_on, train

import minprefix
from minprefix import Prefix
from minprefix.cli.report import format_rows
from minprefix.data.batches import encode_examples, encode_prompt
from minprefix.data.load import load_examples
from minprefix.generation.config import GenerationConfig
from minprefix.methods.evaluate import evaluate_method
from minprefix.models.config import SITES
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.parametrisations import Recorder
from tools.notes.measure import baselines

model, tokenizer = minprefix.load("mini-bart")
model.requires_grad_(False)
frozen = for_training(model)  # a copy in bf16 where this is faster
config = model.config
L, H, D, C = config.n_layer, config.n_head, config.head_dim, config.n_embd

# %% [markdown]
# ## 1. A note and its sentence
#
# The summary is not in the note. It says what matters in other words, and some of its numbers
# have to be worked out. That is the task of XSum, whose articles are the BBC's; these notes are
# invented.

# %%
train_set, dev, test = (
    load_examples("notes", split) for split in ("train", "dev", "test")
)
print(f"{len(train_set):,} notes to train on, {len(dev)} dev, {len(test)} test")
note, summary = test[0].source, test[0].targets[0]
print("\nnote:   ", note)
print("summary:", summary)

# %% [markdown]
# *ROUGE* counts what a summary and its reference share, from 0 to 100. R-1 is the F1 of their
# words, R-2 that of pairs of words, R-L that of the longest common subsequence; words are stemmed
# first. A summariser has to do better than to repeat a sentence of its source, so such sentences
# are the baselines. The oracle takes the best sentence of each note, which needs the reference.

# %%
lead = baselines(test)
print(format_rows([{"summary": way} | scores for way, scores in lead.items()]))

# %% [markdown]
# ## 2. Two stacks, three attentions
#
# The encoder reads the source $x$, and every token sees all others. The decoder writes: it reads
# the summary so far, $y_{<t}$, causally, and after each of these attentions it reads the
# encoder's last layer by *cross attention*. The paper writes $[\text{PREFIX}; x; \text{PREFIX}';
# y]$, and its code has a table for each of the three attentions:
#
# | site | queries | read |
# |---|---|---|
# | encoder | source tokens | $P$ prefix positions, all source tokens |
# | decoder | summary tokens | $P$ prefix positions, summary tokens up to their own |
# | cross | summary tokens | $P$ prefix positions, all encoded source tokens |
#
# In the picture p is a prefix position, x a token of the source, y one of the summary. A light
# field is not seen: only the decoder's own attention is causal.

# %%
pictures.three_attentions(SITES, P=2, S=6, T=4)

# %% [markdown]
# The encoder runs before a word is written. So only its prefix can change the encoded source; the
# other two change what the decoder makes of it. (PEFT gives a BART a prefix for the decoder's own
# attention alone.)
#
# The encoder reads `bos, note, eos`. The decoder reads `eos, bos, summary` and predicts `bos,
# summary, eos`. So the bos has a loss, too, but a small one, because BART was pretrained with this
# eos and bos at the start.

# %%
row = encode_examples(tokenizer, test[:1])[0]
source, target = torch.tensor(row.source), torch.tensor(row.ids[:-1])
bos, eos = tokenizer.bos_id, tokenizer.eos_id
assert row.source == [bos, *tokenizer.encode(note), eos]
assert row.ids == [eos, bos, *tokenizer.encode(summary), eos]
print(f"{len(source)} tokens in the encoder, {len(target)} in the decoder")
with torch.no_grad():
    log_p = model(source[None], target[None])[0].log_softmax(-1)  # (T, V)
loss_of_bos = -log_p[0, bos].item()
print(f"loss of the bos {loss_of_bos:.4f} nats")
assert loss_of_bos < 0.1

# %% [markdown]
# ## 3. Equation (3), three times
#
# Equation (3) of 02_equation_3 is for a model that reads from left to right. BART's encoder reads
# all positions, not only those before, and its decoder also reads the encoder's states. But inside
# an attention the equation is the same concatenation each time: the keys and values of the prefix
# stand before those that the model computes. One function does it at all three sites, in fp64, for
# one row. The model's weights are used as they are; everything else is written out.


# %%
def heads(x: torch.Tensor) -> torch.Tensor:
    """(n, C) -> (H, n, D)."""
    return x.view(len(x), H, D).transpose(0, 1)


def attend(q, k, v, table, mask):
    """q (n, C), k, v (m, C), table (2, H, P, D), mask (n, P + m) -> (n, C)."""
    k = torch.cat([table[0], heads(k)], dim=1)  # (H, P + m, D), eq. (3)
    v = torch.cat([table[1], heads(v)], dim=1)
    scores = heads(q) @ k.transpose(1, 2) / D**0.5 + mask  # (H, n, P + m)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(-1, C)


def bart(model, source, target, tables):
    """Encoder states (S, C), logits (T, V); tables (L, 2, H, P, D) by site."""
    S, T = len(source), len(target)
    P = tables["encoder"].shape[3]
    sees_all = torch.zeros(1, 1, dtype=torch.float64)
    hidden = torch.full((T, P + T), float("-inf"), dtype=torch.float64)
    causal = hidden.triu(P + 1)

    # BART counts positions from 2; the first 2 entries of wpe are not used
    x = model.wte(source) + model.encoder.wpe(2 + torch.arange(S))
    x = model.encoder.ln_embd(x)
    for layer, block in enumerate(model.encoder.h):
        q, k, v = block.attn.c_attn(x).split(C, dim=-1)
        o = attend(q, k, v, tables["encoder"][layer], sees_all)
        # the norm comes after the sum, and GELU is exact (GPT-2's has a tanh)
        x = block.ln_1(x + block.attn.c_proj(o))
        x = block.ln_2(x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(x))))
    states = x

    y = model.wte(target) + model.decoder.wpe(2 + torch.arange(T))
    y = model.decoder.ln_embd(y)
    for layer, block in enumerate(model.decoder.h):
        q, k, v = block.attn.c_attn(y).split(C, dim=-1)
        o = attend(q, k, v, tables["decoder"][layer], causal)
        y = block.ln_1(y + block.attn.c_proj(o))
        k, v = block.cross.c_kv(states).split(C, dim=-1)  # of the source
        o = attend(block.cross.c_q(y), k, v, tables["cross"][layer], sees_all)
        y = block.ln_2(y + block.cross.c_proj(o))
        y = block.ln_3(y + block.mlp.c_proj(F.gelu(block.mlp.c_fc(y))))
    return states, y @ model.wte.weight.T + model.head_bias


exact = minprefix.load("mini-bart")[0].double().eval()
prefix = BARTPrefix.random(config, 5, seed=0).double()
with torch.no_grad():
    states, logits = bart(exact, source, target, prefix.tables())
    library = exact(source[None], target[None], prefix=prefix)[0]
    encoded = exact.encode(source[None], prefix=prefix).states[0]
for name, ours, theirs in (
    ("states", states, encoded),
    ("logits", logits, library),
):
    gap = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{name}: relative difference from the library {gap:.1e}")
    assert gap < 1e-12

# %% [markdown]
# ## 4. Why the positions are not shifted
#
# In GPT-2, token t stands at position t + P when there is a prefix (02_equation_3). Above, BART's
# tokens stand at t, prefix or not, as in the authors' code. Why?
#
# For GPT-2 the shift has a reason: a table can hold a prompt, whose tokens stood at 0 to P - 1,
# so the text has to go on at P. No table of a BART is a prompt (section 5). And for BART the shift
# is costly. To measure the shift alone, we switch the prefix off by its gate (02, section 7):
# `gate=True` begins with $g = 0$ in every head. GPT-2 continues a note and BART restores one, which
# is what each was pretrained for.
#
# **Predict.** All positions move by 10. Which of the two models gets worse?

# %%
gpt2, gpt2_tokenizer = minprefix.load("mini")
restored = [replace(e, targets=(e.source,)) for e in dev[:8]]
continued = [
    replace(e, source=e.source[:40], targets=(e.source[40:],)) for e in dev[:8]
]
tasks = {
    "GPT-2": (Prefix, gpt2, gpt2_tokenizer, continued),
    "BART": (BARTPrefix, model, tokenizer, restored),
}
shifted = {}
for name, (kind, *pair, examples) in tasks.items():
    for offset in (0, 10):
        off = {"gate": True, "position_offset": offset}
        silent = kind.random(pair[0].config, 1, seed=0, **off)
        loss = loss_on(*pair, examples, silent, pairs=8)
        print(f"{name:5} offset {offset:2}: {loss:.2f} nats per token")
        shifted[name, offset] = loss
assert shifted["GPT-2", 10] < 1.1 * shifted["GPT-2", 0]
assert shifted["BART", 10] > 3 * shifted["BART", 0]

# %% [markdown]
# **Answer.** BART. Shifted by 10, its loss is several times as large, and a prefix would first have
# to make up for this. So BART's positions stay where they were in pretraining. The reason is
# probably that all of its texts began with the bos at position 0, while GPT-2 was pretrained on
# windows cut out of running text, with every kind of text at every position.
#
# ## 5. No instruction is exactly a prefix here
#
# In GPT-2 the keys and values of an instruction do not depend on what follows, so a table can
# hold them (03_discrete_to_continuous). BART's encoder reads in both directions, so they depend on
# the note that follows. Here are the keys and values of the same words before two notes.

# %%
WORDS = "Summarise the note:"


def keys_and_values(model, tokenizer, text: str) -> torch.Tensor:
    """Of the words, with the text after them: (L, 2, H, n, D)."""
    recorder, words = Recorder(torch.device("cpu")), tokenizer.encode(WORDS)
    ids = torch.tensor([words + tokenizer.encode(f" {text}")])
    with torch.no_grad():
        if isinstance(model, minprefix.GPT2):
            model.hidden_states(ids, cache=recorder)
        else:
            model.encode(ids, recorder=recorder)
    return recorder.table()[..., : len(words), :]


exact_gpt2 = copy.deepcopy(gpt2).double()
pairs = {"GPT-2": (exact_gpt2, gpt2_tokenizer), "BART": (exact, tokenizer)}
for name, pair in pairs.items():
    one, other = (keys_and_values(*pair, test[i].source) for i in (0, 1))
    by_layer = (one - other).flatten(1).norm(dim=1) / one.flatten(1).norm(dim=1)
    print(f"{name:8} relative difference by layer:", end=" ")
    print(", ".join(f"{x:.1e}" for x in by_layer))
    assert (by_layer.max() < 1e-12) == (name == "GPT-2")

# %% [markdown]
# In layer 0 the keys come from embeddings alone, so both notes give the same. In the layers above,
# the encoder's differ. A prefix that starts from words (`init="words"`) takes what the model makes
# of the words alone: it is not equal to an instruction.
#
# ## 6. Training one
#
# The loop is that of 05_table_to_text. All three sites have a prefix, each with an MLP of its own
# during training.

# %%
STEPS = 300
made = BARTPrefix.random(config, 10, seed=0, parametrisation="mlp")
settings = {"steps": STEPS, "lr": 2e-3, "warmup": 30}
curve = list(train(frozen, tokenizer, train_set, made, **settings))
dev_loss = loss_on(frozen, tokenizer, dev, made)
print(f"training loss from {curve[0]:.2f} to {sum(curve[-10:]) / 10:.2f}")
print(f"dev loss after {STEPS} steps {dev_loss:.2f}")
assert dev_loss < curve[0] - 1
tuned = made.export()

# %% [markdown]
# The paper decodes summaries with 6 beams and a length penalty of 0.8: the score of a text of n
# tokens is $\sum \log p / n^{0.8}$, which favours shorter texts than the mean of $\log p$ does.
# BART's own settings for summaries also forbid that three tokens in a row occur twice.

# %%
some = test[:40]
ways = {
    "greedy": GenerationConfig(max_new_tokens=60),
    "6 beams": GenerationConfig(
        max_new_tokens=60, num_beams=6, length_penalty=0.8,
        no_repeat_ngram_size=3,
    ),
}  # fmt: skip
scores, written = {"first sentence": baselines(some)["first sentence"]}, {}
for name, way in ways.items():
    scores[name], written[name] = evaluate_method(
        model, tokenizer, some, prefix=tuned, config=way, metrics="xsum"
    )
print(format_rows([{"summary": way} | found for way, found in scores.items()]))
untuned = minprefix.generate(
    model, tokenizer, [encode_prompt(tokenizer, note)], config=ways["greedy"]
)[0]
print("\nwithout a prefix:", untuned)
for name in ("R-1", "R-2", "R-L"):
    assert scores["6 beams"][name] > scores["first sentence"][name] + 2
of_note, of_summary = (
    RougeScorer(["rouge1"]).score(text, untuned)["rouge1"].fmeasure
    for text in (note, summary)
)
assert of_note > of_summary  # it restores the note
for example, text in zip(some[:3], written["6 beams"], strict=False):
    print("\nnote:     ", example.source)
    print("reference:", example.targets[0])
    print("written:  ", text)

# %% [markdown]
# Without a prefix, BART writes the note again, as it was pretrained to do. After 300 steps of 8
# rows the summaries have the form of the references, and those of the beam search beat the first
# sentence in each ROUGE. But compare what they say with the notes.
#
# ## 7. What ROUGE does not see
#
# A summary can have many right words and still be wrong: a town that is not in the note, a wrong
# total. Towns and surnames of the test notes occur nowhere in training, so a model has to copy
# them. Of the names (capitalised words after the first) and the numbers that a text states, how
# many are in the note? A number may have been worked out, so numbers are also compared with those
# of the reference.
#
# **Predict.** Which does the model get right, the names or the numbers?


# %%
def stated(text: str) -> tuple[set[str], set[str]]:
    """Names and numbers of a text."""
    words = re.findall(r"[A-Za-z]+|\d[\d,.]*\d|\d", text)
    names = {word for word in words[1:] if word[0].isupper()}
    return names, {word for word in words if word[0].isdigit()}


def count(texts: list[str]) -> dict[str, int]:
    """How many names and numbers there are, and how many are in the note."""
    found = Counter()
    for example, text in zip(some, texts, strict=True):
        right = stated(example.targets[0])[1]
        for kind, words in zip(("names", "numbers"), stated(text), strict=True):
            noted = [re.search(rf"\b{w}\b", example.source) for w in words]
            found[kind] += len(words)
            found[f"{kind} in the note"] += sum(map(bool, noted))
        found["numbers in the reference"] += len(stated(text)[1] & right)
    return dict(found)


texts = {"reference": [e.targets[0] for e in some]} | written
counts = {name: count(found) for name, found in texts.items()}
print(format_rows([{"text": name} | n for name, n in counts.items()]))
true, ours = counts["reference"], counts["6 beams"]
assert true["names"] == true["names in the note"]  # nobody is invented
assert ours["names in the note"] > 0.8 * ours["names"]
assert ours["numbers in the reference"] < 0.5 * true["numbers"]
assert ours["numbers in the reference"] < 0.5 * ours["numbers"]

# %% [markdown]
# **Answer.** The names: nearly all are in the note. Copying is part of what the model was
# pretrained for. The numbers are mostly wrong: the summaries state few of those in the reference,
# many of which had to be worked out, and copy others that do not belong there. ROUGE counts a wrong
# number like any other wrong word.
#
# The notes come from rules, so a model that learns the rules does well on them and knows nothing
# about news. In the paper's tables 2 and 3 (bart-large, XSum), fine-tuning is ahead on all of XSum,
# and the prefix on topics that were not trained on. Neither XSum nor the official weights are part
# of this repository; [the guide](../docs/guides/bart.md) has the command for the paper's setting.
#
# ## Common mistakes
# > - **Shifted positions, or shifted in one stack only.** PEFT moves the decoder's positions by P
# >   and leaves the encoder's; the authors' code moves none. A prefix of one is wrong in the
# >   other (exercise 4).
# > - **One prefix for all layers' attentions.** In the PEFT version that we ran, half of a BART's
# >   prefix got no gradient, and pairs of layers shared the rest. Look at the gradient of every
# >   part after one step.
# > - **Padding that the encoder sees.** There is no causal mask to hide it (exercise 1).
# > - **Dropout left on in the frozen model.** The authors' BART trained with it, without meaning
# >   to: their option for it is never read.
# > - **ROUGE without lead-1, and without a look at names and numbers.**
#
# ## Recap
#
# - An encoder-decoder has three attentions, and a prefix for each is a table of its own. Equation
#   (3) is the same concatenation three times.
# - Only the encoder's prefix can change the encoded source.
# - BART's positions are not shifted: a shift alone raises its loss several times.
# - In a bidirectional encoder, keys and values of words depend on the text that follows. So no
#   instruction is exactly a prefix.
# - From here: `python -m minprefix train --model mini-bart --data notes`, or your own
#   `{"document": ..., "summary": ...}` lines.
#
# ## Exercises
#
# 1. *Easy.* A batch pads sources to one length. Let the encoder see the padding. How much do the
#    logits of the shorter rows change, and why does a decoder-only model not have this problem?
#    *Hint:* leave out `source_lens`.
# 2. *Medium.* Put embeddings of virtual tokens before the source instead. Count its parameters,
#    train both for 30 steps, and compare. *Hint:* `parametrisation="embedding-mlp"`.
# 3. *Medium.* Train on news only and write about sports. What is lost against a prefix that saw
#    sports? *Hint:* `choose(..., "news-to-sports", ...)`.
# 4. *Hard.* Use a prefix that was trained with positions from 0 at positions from P. By how much
#    does its loss rise? *Hint:* `BARTPrefix.from_tables(tables, position_offset=10)`.
#
# Solutions: `tutorials/solutions/08_summarisation_bart.py`.
#
# ## References
#
# Li & Liang 2021, <https://arxiv.org/abs/2101.00190>, code
# <https://github.com/XiangLi1999/PrefixTuning>; Lewis et al. 2020 (BART),
# <https://arxiv.org/abs/1910.13461>; Narayan et al. 2018 (XSum),
# <https://arxiv.org/abs/1808.08745>; Lin 2004 (ROUGE), <https://aclanthology.org/W04-1013>.
