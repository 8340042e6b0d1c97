# %% [markdown]
# # 10. Pretrain your own model
# A prefix can only use what the frozen model has learned, and every tutorial so far took that model
# as given. This one makes one: tokenizer, weights, loss curve, and the folder of files that
# `minprefix.load` and Hugging Face read. It is trained on the sentences about invented restaurants
# that other tutorials write, without their tables. At the end we tune a prefix on it.
#
# **What you will learn.** How byte-level BPE chooses its tokens; why a new model's loss is nearly
# $\log V$; how texts become windows without padding; what Muon does to a gradient; which line in a
# loss curve shows that a model has begun to use the context; and what a prefix cannot add to a
# model.
#
# **What to know first.** The model of 01_gpt2_from_scratch and
# [its table of letters](01_gpt2_from_scratch.py); for the last section the prefix of 02_equation_3.
#
# **Running time.** About a minute on two CPU cores.
#
# **Sources.** BPE: Sennrich et al. [1]; on bytes, and the first weights: GPT-2 [2]; packed texts:
# GPT-3 [3]; Muon [4] and why it works [5]; the recipe of `mini`: its model card in
# `minprefix/assets/mini`.

# %%
import math
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pictures_results as pictures
import regex  # tiktoken brings it
import torch
import torch.nn.functional as F

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
train_set, dev_set = (load_examples("restaurants", x) for x in ("train", "dev"))
train_texts = [text for example in train_set for text in example.targets]
dev_texts = [text for example in dev_set for text in example.targets]
n_bytes = len("".join(train_texts).encode())
print(f"{len(train_texts):,} texts, {n_bytes:,} bytes")
print(f"the first: {train_texts[0]}")

# %% [markdown]
# ## 1. One merge, by hand
# Byte-pair encoding begins with single bytes. It finds the two tokens that most often stand side by
# side, makes them one new token, and repeats this. Text is first cut into words, each with the
# space before it (written `Ġ`), and no token crosses a cut.
#
# **Predict.** Here are four words with their counts. Which pair is merged first? How
# often does the pair (p, u) occur before and after?

# %%
words = {tuple("Ġpub"): 5, tuple("Ġpark"): 3, tuple("pub"): 2, tuple("up"): 1}


def count_pairs(words: dict[tuple[str, ...], int]) -> Counter:
    """How often each two neighbours occur."""
    pairs = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with each occurrence of the pair, from the left, as one."""
    tokens, i = [], 0
    while i < len(word):
        joined = word[i : i + 2] == pair
        tokens.append("".join(pair) if joined else word[i])
        i += 2 if joined else 1
    return tuple(tokens)


pairs = count_pairs(words)
print("pairs:", dict(pairs.most_common(4)))
best = max(pairs, key=pairs.get)
words = {merged(word, best): n for word, n in words.items()}
print("after the first merge:", *words)
assert best == ("Ġ", "p") and pairs[best] == 5 + 3
assert pairs["p", "u"] == 5 + 2 and count_pairs(words)["p", "u"] == 2

# %% [markdown]
# **Answer.** The space and the p are merged, and five of the seven pairs (p, u) disappear. So the
# pairs must be counted anew after each merge.
#
# ## 2. The same in a loop, then in the library
# The $V$ tokens are 256 bytes, $V - 257$ merges and `<|endoftext|>`. Every text can be encoded,
# because what no merge covers stays bytes. Of two equally frequent pairs the one with the smaller
# ids is merged.

# %%
counts = Counter(w for text in train_texts for w in regex.findall(WORD, text))
words = {tuple(BYTE_CHARS[b] for b in w.encode()): n for w, n in counts.items()}
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
#
# **Predict.** The vocabulary of `mini` is eight times as large. Which of the two
# tokenizers needs fewer tokens for the held-out sentences about restaurants?

# %%
word = tuple(BYTE_CHARS[b] for b in b" restaurant")
for pair in merges:
    word = merged(word, pair)
assert [ids[token] for token in word] == tokenizer.encode(" restaurant")
rare = [tokenizer.decode([i]) for i in tokenizer.encode(" bytestring")]
print(" restaurant ->", *word, "| bytestring ->", *rare, sep=" · ")
n_dev, per_token = len("".join(dev_texts).encode()), {}
for name, one in (("ours", tokenizer), ("mini", minprefix.load("mini")[1])):
    encoded = [one.encode(text) for text in dev_texts]
    per_token[name] = n_dev / sum(len(x) for x in encoded)
    used = len(set().union(*encoded))
    print(f"{name}: {per_token[name]:.2f} bytes per token, "
          f"{used} of {one.vocab_size:,} tokens are used")  # fmt: skip
assert per_token["ours"] > per_token["mini"] and used < one.vocab_size / 2

# %% [markdown]
# **Answer.** Ours does: it spends its few tokens on the words of these texts. `mini` has learned
# from texts of many kinds, and most of its tokens never occur here.
#
# ## 3. Packing
# All texts become one stream, with `<|endoftext|>` after each. A window is $T + 1$ neighbouring
# ids: the first $T$ are read, the last $T$ are the labels. Nothing is padded; a window may hold the
# end of one text and the beginning of another, and `<|endoftext|>` tells the model so.

# %%
END = tokenizer.eos_id
stream = np.array([5, 6, 7, END, 8, 9, END])
batch = Windows(stream, seq_len=3, batch_size=2, seed=SEED).batch(0)  # (2, 4)
inputs, labels = batch[:, :-1], batch[:, 1:]  # (B, T) each
print("inputs", inputs.tolist(), "labels", labels.tolist())
after = {5: 6, 6: 7, 7: END, 8: 9, 9: END}
for a, b in torch.stack([inputs, labels], -1).flatten(0, 1).tolist():
    assert a == END or after[a] == b

folder = tempfile.TemporaryDirectory()
text_folder, model_folder = (Path(folder.name) / x for x in ("text", "model"))
text_folder.mkdir()
for name, texts in (("train.txt", train_texts), ("val.txt", dev_texts)):
    joined = "<|endoftext|>".join(texts)
    (text_folder / name).write_text(joined, encoding="utf-8")
config = PretrainConfig(
    vocab_size=V, n_positions=T, n_embd=C, n_layer=3, n_head=3,
    batch_tokens=16 * T, steps=200, warmup_steps=10, seed=SEED,
    precision="fp32", log_every=1, eval_every=50,
)  # fmt: skip
corpus = load_corpus(text_folder, None, V, config.val_share)
assert corpus.tokenizer.files() == tokenizer.files()
by_hand = [i for text in train_texts for i in (*tokenizer.encode(text), END)]
assert corpus.train.tolist() == by_hand
print(f"{len(corpus.train):,} tokens, {len(corpus.val):,} held out")

# %% [markdown]
# ## 4. The first weights, the first loss
# GPT-2 draws its weights from $\mathcal N(0, 0.02^2)$; what a layer adds to the residual stream
# starts smaller by $1/\sqrt{2L}$. The last LayerNorm gives $n$ with $\|n\|^2 = C$, so a logit
# $u_v = w_v \cdot n$ has variance $\sigma^2 = 0.02^2\, C$. The loss of a label $v$ is
# $\log Z - u_v$ with $Z = \sum_v e^{u_v}$. With $\mathbb E\, e^{u} = e^{\sigma^2 / 2}$ and labels
# whose logits are 0 on average,
#
# $$\mathcal L_0 \approx \log Z \approx \log V + \tfrac12 \sigma^2 .$$

# %%
model = GPT2(GPT2Config(
    vocab_size=V, n_positions=T, n_embd=C, n_layer=3, n_head=3,
    bos_token_id=END, eos_token_id=END, embd_pdrop=0.0, resid_pdrop=0.0,
))  # fmt: skip
model.init_weights(SEED)
windows = Windows(corpus.train, seq_len=T, batch_size=16, seed=SEED)


def loss_of(model: GPT2, batch: torch.Tensor) -> torch.Tensor:
    """Mean of -log p over all labels, in nats per token."""
    logits = model(batch[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


with torch.no_grad():
    log_Z = model(windows.batch(0)[:, :-1]).logsumexp(-1).mean().item()
    first = loss_of(model, windows.batch(0)).item()
formula = math.log(V) + 0.02**2 * C / 2
print(f"log V {math.log(V):.3f}, formula {formula:.3f}; "
      f"mean log Z {log_Z:.3f}, loss {first:.3f} nats per token")  # fmt: skip
assert abs(log_Z - formula) < 0.005 < abs(log_Z - math.log(V))
assert abs(first - log_Z) < 0.05  # minus the mean logit of the labels

# %% [markdown]
# A new model guesses among V tokens, so its loss is about $\log V$. If a first loss is clearly
# higher, look for a mistake in the first weights before you train.
#
# ## 5. Muon: the same step in all directions
# The gradient of a matrix is a sum over tokens of outer products, an activation times a gradient.
# Tokens resemble each other, so a few directions dominate: with $G = U S V^\top$, the first
# singular values are far larger than the others, and a step along $G$ moves the matrix almost only
# in those directions. AdamW divides each *entry* by its usual size (its first step is
# $\mathrm{sign}(G)$), but a direction consists of many entries.
#
# Muon asks: which step lowers the loss most, if no output $\Delta W x$ may change by more than
# $\eta \|x\|$? This limits the largest singular value of $\Delta W$. To first order the loss
# falls by $-\langle G, \Delta W \rangle$, which is at most $\eta \sum_k s_k$, with $s_k$ the
# singular values of G. The step $\Delta W = -\eta\, U V^\top$, whose singular values are all equal,
# reaches this [5]. It needs no decomposition: five rounds of
#
# $$X \leftarrow a X + b\,(X X^\top) X + c\,(X X^\top)^2 X , \qquad X_0 = G / \|G\| ,$$
#
# bring each singular value near 1 [4].
#
# **Predict.** Each step is scaled to the same largest singular value. What share of the best
# possible decrease do the gradient itself, its sign and Muon's step reach?

# %%
loss_of(model, windows.batch(0)).backward()
G = model.h[0].mlp.c_fc.weight.grad  # [in, out] = (C, 4C)
X = (G / G.norm()).bfloat16()
for _ in range(5):
    A = X @ X.T
    X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
s = torch.linalg.svdvals(G)
spread, drop = {}, {}
for name, step in (("gradient", G), ("sign", G.sign()), ("Muon", X.float())):
    values = torch.linalg.svdvals(step)
    spread[name] = (values[0] / values.median()).item()
    drop[name] = ((G * step).sum() / values[0] / s.sum()).item()
    print(f"{name:8} largest / median singular value {spread[name]:5.1f}; "
          f"decrease {drop[name]:.0%} of the best possible")  # fmt: skip
assert spread["gradient"] > spread["sign"] > spread["Muon"]
assert drop["Muon"] > 1.5 * max(drop["gradient"], drop["sign"])

# %% [markdown]
# **Answer.** Muon's step lowers the loss by far the most. It is not the best possible one, since
# five rounds bring the singular values near 1 and not to 1. Embeddings, biases and norms do not map
# activations to activations, so AdamW trains them. This is one step; [4] compares whole trainings.
#
# ## 6. The training loop
# Forward, backward, clip, set the rates, step. The rates rise for `warmup_steps`, stay, then fall
# linearly. Here are the first steps, which must give the losses that `Pretrainer` logs.


# %%
def train(steps: int) -> list[float]:
    """Losses of the first steps."""
    model.init_weights(SEED).train()
    optimizers = make_optimizers(model, config)  # Muon, AdamW
    losses = []
    for step in range(steps):
        loss = loss_of(model, windows.batch(step))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                share = schedule(step, step / config.steps, config)
                group["lr"] = group["peak"] * share
            optimizer.step()
        losses.append(loss.item())
    return losses


by_hand = train(3)
result = Pretrainer(corpus, config, model_folder).run(progress=False)
log = [entry for entry in read_log(model_folder) if "loss" in entry]
held_out = [entry for entry in read_log(model_folder) if "dev_loss" in entry]
for mine, entry in zip(by_hand, log, strict=False):
    print(f"by hand {mine:.4f}, Pretrainer {entry['loss']:.4f}")
    assert abs(mine - entry["loss"]) < 1e-4  # fp32 sums
print({name: round(value, 3) for name, value in result.items()})

# %% [markdown]
# `Pretrainer` is the same loop with a log, held-out loss, resuming, and files that survive a power
# cut. From the command line: `python -m minprefix pretrain TEXT_FOLDER --out MODEL_FOLDER`.
#
# ## 7. Reading the curve
# Two levels say what a loss means. $\log V$ is a guess among all tokens. The *unigram entropy*
# $-\sum_v p_v \log p_v$, with $p_v$ the share of token $v$, is the best that is possible without
# looking at the context. A model that stays there has learned a table of frequencies.
#
# **Predict.** How many of the 200 steps does it take to get below each of the two?

# %%
p = np.bincount(corpus.val) / len(corpus.val)
entropy = -sum(x * math.log(x) for x in p if x)
assert abs(entropy - result["unigram_entropy"]) < 1e-9
for name, level in (("log V", math.log(V)), ("unigram entropy", entropy)):
    below = next(entry["step"] for entry in log if entry["loss"] < level)
    print(f"{name:15} {level:.2f} nats per token, passed at step {below}")
    assert below < config.steps / 4
assert result["val_loss"] < 0.6 * entropy
sizes = [n_bytes / length for length in lengths]
assert sizes[100] - sizes[0] > sizes[-1] - sizes[-101]  # more by early merges
pictures.pretraining(sizes, log, held_out, math.log(V), entropy)

# %% [markdown]
# **Answer.** Few. In the right panel most of the curve is below the dashed line: most of what the
# model learns is to use the context. (The left panel belongs to section 2: each merge makes the
# tokens longer, the first ones most.)
#
# ## 8. A model like any other
# The folder holds the four files of an official model, and the log and the state of the run. A text
# begins after `<|endoftext|>`, as every text of the stream did.

# %%
print("files:", *sorted(path.name for path in model_folder.iterdir()))
model, tokenizer = minprefix.load(model_folder)
options = {"max_new_tokens": 60, "do_sample": True, "top_p": 0.9, "seed": 0}
for text in generate(model, tokenizer, [[END]] * 3, **options):
    print(" -", text)

# %% [markdown]
# It writes about restaurants that it makes up: it has never seen a table. Now we tune a prefix of 5
# positions to make the frozen model write from one.

# %%
prefix = minprefix.Prefix.random(
    model.config, 5, SEED, parametrisation="mlp", mid_dim=64
)  # fmt: skip
settings = TrainConfig(
    steps=40, batch_size=12, lr=5e-3, seed=SEED,
    eval_every=20, eval_pairs=60, log_every=20, samples=1,
)  # fmt: skip
run_folder = Path(folder.name) / "run"
parts = train_set, dev_set, run_folder, prefix
Trainer(model, tokenizer, settings, *parts).run(progress=False)
tuned = [entry for entry in read_log(run_folder) if "dev_loss" in entry]
for entry in tuned:
    print(f"step {entry['step']:2}: {entry['dev_loss']:.3f} nats per token")
assert tuned[-1]["dev_loss"] < tuned[0]["dev_loss"]
table, text = (tuned[-1]["samples"][0][x] for x in ("source", "text"))
print(f"table:  {table}\nwrites: {text}")
values = [slot.split(" : ")[1].strip() for slot in table.split(" | ")]
kept = sum(value.lower() in text.lower() for value in values)
print(f"{kept} of the {len(values)} values of the table are in the text")
assert kept <= len(values) / 2
folder.cleanup()

# %% [markdown]
# The loss on held-out tables falls, but the text does not follow its table. Forty steps are few,
# but more would probably not help: a prefix can only use what the frozen model can do, and this
# model never had a table to copy from. `mini` was pretrained on tables beside text, too, and with a
# prefix it writes texts that follow their tables (05_table_to_text).
#
# ## Common mistakes
# > - **Comparing losses per token of two tokenizers.** A tokenizer with longer tokens has the
# >   larger loss. Compare bits per byte (exercise 2).
# > - **Judging an optimizer by one learning rate and one seed**, or Muon at AdamW's rate: Muon's
# >   are larger, since they say how far a whole matrix moves.
# > - **Muon for everything.** Embeddings, biases and norms are for AdamW.
# > - **[in, out] for [out, in].** `torch.optim.Muon` scales a step by the shape of `nn.Linear`
# >   weights. GPT-2's are transposed (`Conv1D`), so `make_optimizers` corrects the factor.
# > - **No end of text between texts.** The model then learns that one restaurant's text continues
# >   with the next.
# > - **Measuring on windows that overlap the training text.** Hold whole texts out.
#
# ## Recap
# - BPE merges the most frequent pair, again and again; encoding replays the merges.
# - A new model's loss is $\log V$ and a little; the unigram entropy is the line to get below.
# - Texts are packed into windows; `<|endoftext|>` is the only border.
# - Muon moves a matrix equally far in all directions; AdamW trains what is not a matrix of a layer.
# - A prefix adds nothing that the frozen model cannot do. (`--preset mini` is the recipe of
#   `mini`.)
#
# ## Exercises
# 1. *Easy.* Train tokenizers with $V$ = 300, 512 and 1024. How many held-out bytes does a token
#    hold? *Hint:* `Tokenizer.train`.
# 2. *Medium.* Losses per token of two tokenizers cannot be compared. Convert the unigram entropies
#    of the three into bits per byte. Which is lowest, and why? *Hint:* a nat is $1 / \log 2$ bits.
# 3. *Medium.* Held-out windows are read alone, so their first tokens have little context. With
#    `mini`, how much worse are the first 8 tokens of windows of 128 than the last 64? *Hint:*
#    `F.cross_entropy(..., reduction="none")` gives a loss for each position.
# 4. *Hard.* Start with token embeddings five times as large. The first loss is then far above
#    $\log V + \sigma^2 / 2$. Which token does the model predict, and why does a tied head do that?
#    *Hint:* the residual stream begins as the embedding of the token just read.
#
# Solutions: `tutorials/solutions/10_pretrain_your_own.py`.
#
# ## References
# 1. Sennrich et al. 2016, BPE: <https://arxiv.org/abs/1508.07909>
# 2. Radford et al. 2019, GPT-2: <https://cdn.openai.com/better-language-models/language_models.pdf>
# 3. Brown et al. 2020, GPT-3: <https://arxiv.org/abs/2005.14165>
# 4. Jordan et al. 2024, Muon: <https://kellerjordan.github.io/posts/muon/>
# 5. Bernstein & Newhouse 2024, Old Optimizer, New Norm: <https://arxiv.org/abs/2409.20325>
