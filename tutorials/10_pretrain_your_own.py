# %% [markdown]
# # 10. Pretrain your own model
# A prefix is worth what the frozen model behind it has learned. Every tutorial so far took that
# model as given. This one makes one: tokenizer, weights, loss curve, and the folder of files that
# `minprefix.load` and Hugging Face read. At the end a prefix is tuned on it.
#
# **What you will learn.** How byte-level BPE chooses its tokens; why a new model's loss is nearly
# $\log V$; how documents become windows without padding; what Muon does to a gradient; and by
# which line in a loss curve you see that a model has begun to use the context.
#
# **What to know first.** The model of 01_gpt2_from_scratch; for the last section the prefix of
# 02_equation_3.
#
# **Running time.** About a minute on two CPU cores.
#
# The text: the sentences about invented restaurants that other tutorials write. The model here is
# trained on them, without their tables, and on nothing else; so it will know restaurants and
# nothing else.
#
# **Sources.** BPE: Sennrich et al. [1]; on bytes, and the first weights: GPT-2 [2]; packed
# documents: GPT-3 [3]; Muon: [4]; the recipe of `mini`: its model card in `minprefix/assets/mini`.

# %%
import math
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex  # tiktoken brings it
import torch
import torch.nn.functional as F
from figure import FAINT, OTHER, PREFIX, TEXT, new, show

import minprefix
from minprefix.data.load import load_examples
from minprefix.generation.texts import generate
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.tokenizer import BYTE_CHARS, WORD, Tokenizer
from minprefix.training.config import PretrainConfig, TrainConfig
from minprefix.training.corpus import Windows, load_corpus
from minprefix.training.pretrain import Pretrainer, make_optimizers, schedule
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer

SEED, V, T, C = 0, 1024, 160, 96  # tokens, positions, width
train_set, dev_set = (load_examples("restaurants", split) for split in ("train", "dev"))
train_texts, dev_texts = ([t for e in part for t in e.targets] for part in (train_set, dev_set))
n_bytes = len("".join(train_texts).encode())
print(f"{len(train_texts):,} texts to train on, {n_bytes:,} bytes; {len(dev_texts)} held out")
print(f"the first: {train_texts[0]}")

# %% [markdown]
# ## 1. One merge, by hand
# Byte-pair encoding begins with single bytes. It counts which two tokens stand side by side most
# often, makes them one new token, and begins again. Text is first cut into words, each with the
# blank before it (written `Ġ`), and no token crosses a cut. Four words with their counts:

# %%
words = {("Ġ", "p", "u", "b"): 5, ("Ġ", "p", "a", "r", "k"): 3, ("p", "u", "b"): 2, ("u", "p"): 1}


def count_pairs(words: dict[tuple[str, ...], int]) -> Counter:
    """How often each two neighbours occur."""
    pairs = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with each occurrence of the pair, from the left, as one token."""
    tokens, i = [], 0
    while i < len(word):
        joined = word[i : i + 2] == pair
        tokens.append("".join(pair) if joined else word[i])
        i += 2 if joined else 1
    return tuple(tokens)


pairs = count_pairs(words)
print("pairs:", dict(pairs.most_common(4)))
assert pairs["Ġ", "p"] == 5 + 3 and pairs["p", "u"] == pairs["u", "b"] == 5 + 2
best = max(pairs, key=pairs.get)
print("after the first merge:", [merged(word, best) for word in words])
assert merged(("Ġ", "p", "u", "b"), best) == ("Ġp", "u", "b")
assert count_pairs({merged(w, best): n for w, n in words.items()})["p", "u"] == 2  # 5 are gone

# %% [markdown]
# ## 2. The same in a loop, then in the library
# $V$ tokens are 256 bytes, $V - 257$ merges and `<|endoftext|>`. So nothing is ever unknown: what
# no merge covers stays bytes. Equal counts are decided by the ids, smaller ones first.

# %%
counts = Counter(word for text in train_texts for word in regex.findall(WORD, text))
words = {tuple(BYTE_CHARS[b] for b in word.encode()): n for word, n in counts.items()}
ids = {char: number for number, char in enumerate(sorted(BYTE_CHARS))}
merges, lengths = [], []
while len(ids) < V - 1:
    pairs = count_pairs(words)
    pair = max(pairs, key=lambda p: (pairs[p], -ids[p[0]], -ids[p[1]]))
    merges.append(pair)
    ids["".join(pair)] = len(ids)
    words = {merged(word, pair): count for word, count in words.items()}
    lengths.append(sum(len(word) * count for word, count in words.items()))

tokenizer = Tokenizer.train(train_texts, V)
lines = tokenizer.files()["merges.txt"].splitlines()[1:]
assert [tuple(line.split(" ")) for line in lines] == merges
print("first merges:", *("".join(pair) for pair in merges[:12]))
print("last merges: ", *("".join(pair) for pair in merges[-6:]))

# %% [markdown]
# To encode a word, replay the merges in the order in which they were found. That is the whole
# tokenizer: vocab.json is the table `ids`, merges.txt the list `merges`.

# %%
word = tuple(BYTE_CHARS[b] for b in b" restaurant")
for pair in merges:
    word = merged(word, pair)
assert [ids[token] for token in word] == tokenizer.encode(" restaurant")
assert lengths[-1] == sum(len(tokenizer.encode(text)) for text in train_texts)
print(" restaurant ->", *word, "| bytestring ->", *(tokenizer.decode([i]) for i in
      tokenizer.encode(" bytestring")), sep=" · ")  # fmt: skip
mini = minprefix.load("mini")[1]
n_dev = len("".join(dev_texts).encode())
for name, one in (("this one", tokenizer), ("that of mini", mini)):
    n = sum(len(one.encode(text)) for text in dev_texts)
    print(f"{name:12} V = {one.vocab_size:,}: {n_dev / n:.2f} bytes per token, held-out texts")

# %% [markdown]
# ## 3. Packing
# All documents become one stream, `<|endoftext|>` behind each. A window is $T + 1$ neighbouring
# ids: the first $T$ are read, the last $T$ are the labels. Nothing is padded; a window may hold the
# end of one text and the beginning of another, and learns from `<|endoftext|>` that it may.

# %%
END = tokenizer.eos_id
stream = np.array([5, 6, 7, END, 8, 9, END])
batch = Windows(stream, seq_len=3, batch_size=2, seed=SEED).batch(0)  # (B, T + 1)
inputs, labels = batch[:, :-1], batch[:, 1:]  # (B, T) each
print("inputs", inputs.tolist(), "labels", labels.tolist())
ring = {a: b for a, b in pairwise([5, 6, 7])} | {8: 9, 9: END}
assert all(ring[a] == b for a, b in zip(inputs.flatten().tolist(), labels.flatten().tolist(),
           strict=True) if a in ring)  # fmt: skip
assert inputs[:, 1:].equal(labels[:, :-1])

folder = tempfile.TemporaryDirectory()
text_folder, model_folder = (Path(folder.name) / name for name in ("text", "model"))
text_folder.mkdir()
for name, texts in (("train.txt", train_texts), ("val.txt", dev_texts)):
    (text_folder / name).write_text("<|endoftext|>".join(texts), encoding="utf-8")
config = PretrainConfig(
    vocab_size=V, n_positions=T, n_embd=C, n_layer=3, n_head=3, batch_tokens=16 * T, steps=300,
    warmup_steps=10, seed=SEED, precision="fp32", log_every=1, eval_every=50,
)  # fmt: skip
corpus = load_corpus(text_folder, None, V, config.val_share)
assert corpus.tokenizer.files() == tokenizer.files()
by_hand = [i for text in train_texts for i in (*tokenizer.encode(text), END)]
assert corpus.train.tolist() == by_hand
print(f"{len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out")

# %% [markdown]
# ## 4. The first weights, the first loss
# GPT-2 draws its weights from $\mathcal N(0, 0.02^2)$; what a layer adds to the residual stream
# starts smaller by $1/\sqrt{2L}$. The last layer norm gives $h$ with $\|h\|^2 = C$, so a logit
# $w_v \cdot h$ has variance $\sigma^2 = 0.02^2\, C$. With $\log \mathbb E\, e^{s} = \sigma^2 / 2$,
#
# $$\mathcal L_0 \approx \log V + \tfrac12 \sigma^2 .$$
#
# A first loss that is clearly higher than $\log V$ says that something is wrong with the start.

# %%
model = GPT2(
    GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=3, n_head=3, bos_token_id=END,
        eos_token_id=END, embd_pdrop=0.0, resid_pdrop=0.0,
    )
).init_weights(SEED)  # fmt: skip
windows = Windows(corpus.train, seq_len=T, batch_size=16, seed=SEED)


def loss_of(model: GPT2, batch: torch.Tensor) -> torch.Tensor:
    """Mean of -log p over all labels, in nats per token."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


first = loss_of(model, windows.batch(0)).item()
print(f"first loss {first:.3f}, log V {math.log(V):.3f}, with the variance "
      f"{math.log(V) + 0.02**2 * C / 2:.3f} nats per token")  # fmt: skip
# the sample of labels, and the tied head's preference for the token just read, remain
assert abs(first - math.log(V) - 0.02**2 * C / 2) < 0.05

# %% [markdown]
# ## 5. Muon: the same step in all directions
# The gradient of a matrix is dominated by a few directions. With $G = U S V^\top$, Muon moves the
# matrix along $U V^\top$, all singular values 1. No decomposition is needed: five rounds of
#
# $$X \leftarrow a X + b\,(X X^\top) X + c\,(X X^\top)^2 X , \qquad X_0 = G / \|G\| ,$$
#
# push each singular value near 1. Embeddings, biases and norms are no such maps; AdamW has them.

# %%
muon, adamw = make_optimizers(model, config)
loss_of(model, windows.batch(0)).backward()
weight = model.h[0].mlp.c_fc.weight  # [in, out] = (C, 4C)
G, before = weight.grad.clone(), weight.detach().clone()
a, b, c = 3.4445, -4.7750, 2.0315  # from [4]
X = (G / G.norm()).bfloat16()
for _ in range(5):
    A = X @ X.T
    X = a * X + (b * A + c * A @ A) @ X
for group in muon.param_groups:
    group["lr"] = group["peak"]
muon.step()
lr, decay = config.muon_lr, config.weight_decay
by_hand = before * (1 - lr * decay) - lr * math.sqrt(4) * X.float()  # sqrt(n_out / n_in)
change = weight.detach() - before
gap = ((by_hand - before - change).norm() / change.norm()).item()
print(f"by hand and torch.optim.Muon: {gap:.1%} apart, both compute in bf16")
assert gap < 0.15  # eps of bf16 is 0.8 %; five rounds enlarge it where the gradient is small
s_before, s_after = torch.linalg.svdvals(G), torch.linalg.svdvals(X.float())
print(f"largest / median singular value: gradient {s_before[0] / s_before.median():.1f}, "
      f"update {s_after[0] / s_after.median():.1f}")  # fmt: skip
assert s_after.max() < 1.3 < s_before[0] / s_before.median()

# %% [markdown]
# ## 6. The training loop
# Forward, backward, clip, set the rates, step. The rates rise for `warmup_steps`, stay, then fall
# linearly. Three steps in the open must give what `Pretrainer` logs for its first three.

# %%
model.init_weights(SEED).train()
optimizers, by_hand = make_optimizers(model, config), []
for step in range(3):
    loss = loss_of(model, windows.batch(step))
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, step / config.steps, config)
        optimizer.step()
    by_hand.append(loss.item())

# %% [markdown]
# The same as one call, with log, held-out loss, resuming, and files that survive a power cut.
# From the command line: `python -m minprefix pretrain TEXT_FOLDER --out MODEL_FOLDER`.

# %%
result = Pretrainer(corpus, config, model_folder).run(progress=False)
log = [entry for entry in read_log(model_folder) if "loss" in entry]
held_out = [entry for entry in read_log(model_folder) if "dev_loss" in entry]
print("by hand   ", *(f"{loss:.4f}" for loss in by_hand))
print("Pretrainer", *(f"{entry['loss']:.4f}" for entry in log[:3]))
assert max(abs(x - e["loss"]) for x, e in zip(by_hand, log, strict=False)) < 1e-4  # fp32 sums
print({name: round(value, 3) for name, value in result.items()})

# %% [markdown]
# ## 7. Reading the curve
# Two levels say what a loss means. $\log V$ is a guess among all tokens. The *unigram entropy*
# $H = -\sum_v p_v \log p_v$, with $p_v$ the share of token $v$, is the best that is possible
# without looking at the context. A curve that stays there has learned a frequency table. What lies
# below it was learned from the tokens before.

# %%
p = np.bincount(corpus.val) / len(corpus.val)
entropy = -sum(x * math.log(x) for x in p if x)
assert abs(entropy - result["unigram_entropy"]) < 1e-9
assert result["val_loss"] < 0.6 * entropy

figure, (left, right) = new(columns=2)
left.plot(range(257, V), [n_bytes / length for length in lengths], color=TEXT)
left.set(
    xlabel="bytes + merges (tokens)", ylabel="bytes per token", title="Merges shorten the text"
)
right.plot([e["step"] for e in log], [e["loss"] for e in log], color=FAINT, label="training")
right.plot([e["step"] for e in held_out], [e["dev_loss"] for e in held_out], "o-", color=PREFIX,
           ms=4, label="held out")  # fmt: skip
right.axhline(math.log(V), color=TEXT, ls=":", label="log V")
right.axhline(entropy, color=OTHER, ls="--", label="unigram entropy")
right.set(xlabel="optimiser step", ylabel="loss (nats per token)", ylim=(0, None),
          title="The context is used below the dashed line")  # fmt: skip
right.legend(frameon=False)
show(figure, "10_pretrain_your_own")

# %% [markdown]
# ## 8. A model like any other
# The folder holds config.json, model.safetensors, vocab.json and merges.txt. A text begins behind
# `<|endoftext|>`, as every document did.

# %%
print("files:", *sorted(path.name for path in model_folder.iterdir()))
model, tokenizer = minprefix.load(model_folder)
options = {"max_new_tokens": 60, "do_sample": True, "top_p": 0.9}
for text in generate(model, tokenizer, [[END]] * 3, **options):
    print(" -", text)

# %% [markdown]
# It writes about restaurants that it makes up: it has never seen a table. A prefix of 5 positions
# is now tuned to make the frozen model write from one, on the embedded tables. Few steps and a
# small model: the loss falls, but do not expect each value of the table in the text. That takes
# a model that has learned to copy, as `mini` has (05_table_to_text).

# %%
prefix = minprefix.Prefix.random(model.config, 5, SEED, parametrisation="mlp", mid_dim=64)
settings = TrainConfig(steps=40, batch_size=12, lr=5e-3, eval_every=20, eval_pairs=60, seed=SEED,
                       log_every=20, samples=1)  # fmt: skip
run_folder = Path(folder.name) / "run"
trainer = Trainer(model, tokenizer, settings, train_set, dev_set, run_folder, prefix)
trainer.run(progress=False)
tuned = [entry for entry in read_log(run_folder) if "dev_loss" in entry]
for entry in tuned:
    print(f"step {entry['step']:3}: {entry['dev_loss']:.3f} nats per target token, held-out tables")
assert tuned[-1]["dev_loss"] < tuned[0]["dev_loss"]
print("table: ", tuned[-1]["samples"][0]["source"])
print("writes:", tuned[-1]["samples"][0]["text"])
folder.cleanup()

# %% [markdown]
# ## Recap
# - BPE merges the most frequent pair, again and again; encoding replays the merges.
# - A new model's loss is $\log V$ and a little; the unigram entropy is the line to get below.
# - Documents are packed into windows; `<|endoftext|>` is the only border.
# - Muon moves a matrix equally far in all directions; AdamW trains what is no matrix of a layer.
# - The recipe of `mini` is `--preset mini`: the same loop, with more of everything.
#
# ## Exercises
# 1. Train tokenizers with $V$ = 300, 512 and 1024. How many held-out bytes does a token hold?
# 2. Losses per token of two tokenizers cannot be compared. Convert the unigram entropies of the
#    three into bits per byte. Which is lowest, and why?
# 3. Start with token embeddings five times as large. The first loss is then far above
#    $\log V + \sigma^2 / 2$. Which token does the model predict, and why does a tied head do that?
# 4. Held-out windows are read alone, so their first tokens have little context. With `mini`, how
#    much worse are the first 8 tokens of windows of 128 than the last 64?
#
# Solutions: `tutorials/solutions/10_pretrain_your_own.py`.
#
# ## References
# [1] https://arxiv.org/abs/1508.07909
# [2] https://cdn.openai.com/better-language-models/language_models.pdf
# [3] https://arxiv.org/abs/2005.14165
# [4] https://kellerjordan.github.io/posts/muon/
