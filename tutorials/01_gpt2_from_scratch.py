# %% [markdown]
# # 1. GPT-2 from scratch
# Prefix-tuning teaches a language model a task without changing the model. This first tutorial
# shows what that means, and then builds the model: GPT-2, from one attention score to the whole
# network. It loads real weights, and its logits equal those of the library and of Hugging Face to
# the last digits.
#
# **What you will learn.** What prefix-tuning is for. How attention, a layer and the model are
# computed, and why the past does not depend on the future. What a token leaves behind once it has
# been read: its keys and values, which are what 02_equation_3 trains.
#
# **What to know first.** PyTorch tensors and modules. No knowledge of transformers.
#
# **Running time.** Some seconds on two CPU cores with the embedded model. Another `MODEL`, such as
# `gpt2`, is downloaded first and takes longer.
#
# **Sources.** Prefix-tuning: Li & Liang [1]; attention: Vaswani et al. [2]; GPT-2: Radford et
# al. [3], with the names of the official checkpoints [4].

# %%
import math
import re

import figure  # tutorials/figure.py: all that only draws
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from short_training import TRAINED  # a folder of trained prefixes
from torch import nn

import minprefix
from minprefix.models.weights import find

MODEL = "mini"  # embedded; or gpt2, gpt2-medium, a folder
torch.set_default_dtype(torch.float64)  # equal then means to 15 digits
torch.set_grad_enabled(False)  # nothing is trained here


def check(name, a, b):
    """Print how far a is from b; fail if it is more than fp64 rounding."""
    gap, size = (a - b).abs().max().item(), b.abs().max().item()
    print(f"{name}: largest |difference| {gap:.0e}, largest value {size:.3g}")
    assert gap <= 1e-12 * max(1, size)  # a few thousand roundings of 1e-16


# %% [markdown]
# ## 1. The problem
# A language model continues a text: it gives a probability to every token that could come next. We
# want it to do one task, here to write a sentence about a table of facts. Here are three ways.
#
# - **Ask for it in words** (a prompt). Nothing is trained, and a small model hardly understands the
#   request.
# - **Fine-tune** it: adjust all its weights on examples of the task. This works well, but each task
#   then has its own copy of the whole model. A service with ten thousand users, each with a style
#   of their own, would store ten thousand models, and could not answer two users in one batch.
# - **Prefix-tuning** [1]: leave the weights alone ("frozen"). Put a few positions before the text,
#   in each layer, which hold no tokens but trained numbers. The text reads these numbers by
#   attention, just as it reads its own earlier tokens. A task is then a small file.
#
# (*LoRA* and *adapters* freeze the weights, too, and their files are about as small. LoRA adds a
# trained matrix of low rank to some of the weights; adapters are small trained layers between the
# model's own. A prefix is no change of the layers but data that they read. So one batch can hold
# rows with different prefixes (07_many_users), but a prefix takes positions and is read again for
# each token, whereas LoRA can be added to the weights once and then costs nothing. 06_low_data and
# 07_many_users say when a prefix is the wrong choice.)
#
# In the picture each square is what one layer computes at one position. Green squares are computed
# with weights that were trained for the task, blue ones with the frozen weights. The orange ones
# are not computed at all: they are the trained numbers, the *prefix*, and later squares of the same
# layer read them.

# %%
figure.two_ways()

# %% [markdown]
# The model of these tutorials is `mini`, a small GPT-2 that is part of this repository. It was
# trained from scratch on English text (articles, novels, textbooks, dialogues, and many tables with
# prose), never on the tables that we use; see [its card](../minprefix/assets/mini/MODEL_CARD.md).
# The repository also holds a prefix of ten positions, trained for 2,500 steps on the restaurant
# tables of the E2E data (by `docs/train_prefixes.py`).
#
# **Predict.** The same frozen weights read the same table, once with a request in words after it
# and once with the prefix before it. How different can the two texts be?

# %%
model, tokenizer = minprefix.load(MODEL, dtype=torch.float64)
table = (
    "name : The Eagle | type : coffee shop | food : Chinese | price : cheap | "
    "area : riverside | family friendly : no | near : Burger King"
)
if MODEL == "mini":  # a prefix belongs to one model
    trained = minprefix.Prefix.load(TRAINED / "e2e-P10.safetensors").double()
    values = [fact.split(" : ")[1] for fact in table.split(" | ")]
    kept = {}
    for way, asked, prefix in (
        ("in words", table + "\n\nDescription:", None),
        ("with the prefix", table, trained),
    ):
        (text,) = minprefix.generate(
            model, tokenizer, [asked], prefix=prefix, max_new_tokens=40
        )
        kept[way] = [v for v in values if re.search(rf"\b{v}\b", text)]
        print(f"{way}: {text!r}\n  values that are kept: {kept[way]}")
    assert kept["in words"] == ["The Eagle"]
    assert kept["with the prefix"] == [
        v for v in values if v not in ("Chinese", "no")
    ]

# %% [markdown]
# **Answer.** Completely different. Asked in words, the model picks up the name and drifts off. With
# the prefix it describes the table: it says the "no" in other words, and leaves out one value, the
# food (05_table_to_text looks at such losses). No weight has changed. And this is what the task
# costs on disk:

# %%
config = model.config
L, H, C, D = config.n_layer, config.n_head, config.n_embd, config.head_dim
P = 10
in_prefix = P * 2 * L * C  # a key and a value of C numbers, in each layer
in_model = sum(weight.numel() for weight in model.parameters())
print(f"{MODEL}: {L} layers, {H} heads of {D}, width {C}")
print(f"vocabulary {config.vocab_size:,}, {config.n_positions} positions")
print(f"a tuned copy: {in_model:,} numbers, {4 * in_model / 2**20:.0f} MiB")
print(f"a prefix:     {in_prefix:,} numbers, {4 * in_prefix / 2**10:.0f} KiB")
print(f"ratio {in_model / in_prefix:.0f} (4 bytes a number, fp32)")
if MODEL == "mini":
    assert sum(weight.numel() for weight in trained.parameters()) == in_prefix

# %% [markdown]
# To understand what these numbers are, and why the model can read them, we build the model. Section
# 8 lists the letters that all tutorials use.
#
# ## 2. Attention, by hand
# Attention lets a position read from others. Each position $i$ has three vectors of $D$ numbers: a
# query $q_i$ ("what I look for"), a key $k_i$ ("what I am"), and a value $v_i$ ("what I say").
# How much $i$ looks at $j$ begins with the score
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt{D}} .$$
#
# The factor $1/\sqrt{D}$ makes up for the number of terms: a sum of $D$ independent products grows
# like $\sqrt D$. With three positions and $D = 2$, here are the scores of the last position:

# %%
q = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 1.0]])  # (T, D)
k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # (T, D)
v = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])  # (T, D)

products = (2 * 1 + 1 * 0, 2 * 0 + 1 * 1, 2 * 1 + 1 * 1)  # q_2 . k_j
s_2 = [product / math.sqrt(2) for product in products]

# %% [markdown]
# The softmax turns scores into weights, which are positive and have the sum 1. The output is the
# mean of the values with these weights:
#
# $$Z_i = \sum_{j \le i} e^{s_{ij}}, \qquad p_{ij} = \frac{e^{s_{ij}}}{Z_i}, \qquad
# o_i = \sum_{j \le i} p_{ij}\, v_j .$$
#
# All sums stop at $j = i$. This is what *causal* means: a position reads itself and what stands
# before it, never what comes later.

# %%
Z = sum(math.exp(s) for s in s_2)
p_20, p_21, p_22 = p_2 = [math.exp(s) / Z for s in s_2]
by_hand = [p_20 * 10 + p_21 * 0 + p_22 * 5, p_20 * 0 + p_21 * 10 + p_22 * 5]
for name, y in (("scores", s_2), ("weights", p_2), ("output", by_hand)):
    print(f"{name:7} of position 2:", *(f"{number:.3f}" for number in y))


def attention_loop(q, k, v):
    """q, k, v (T, D) -> o (T, D), one position after the other."""
    T, D = q.shape
    o = torch.zeros(T, D)
    for i in range(T):
        s = [float(q[i] @ k[j]) / math.sqrt(D) for j in range(i + 1)]
        e = [math.exp(score) for score in s]
        for j in range(i + 1):
            o[i] += e[j] / sum(e) * v[j]
    return o


check("loop and hand", attention_loop(q, k, v)[2], torch.tensor(by_hand))


# %% [markdown]
# Now the same with matrices. All scores at once are $Q K^T / \sqrt{D}$. The mask puts $-\infty$
# where $j > i$, and $e^{-\infty} = 0$ does the rest. The dots in the shapes stand for further
# dimensions, such as rows and heads. There may be more keys (S) than queries (T): the first S - T
# keys are then older than all queries.


# %%
def attention_weights(q, k):
    """q (..., T, D), k (..., S, D) -> p (..., T, S).

    Query i stands at position S - T + i, and reads the keys up to there.
    """
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    s = q @ k.mT / math.sqrt(D)  # (..., T, S)
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return s.masked_fill(~seen, -math.inf).softmax(-1)


def attention(q, k, v):
    """As above, with v (..., S, D) -> o (..., T, D)."""
    return attention_weights(q, k) @ v


check("matrix and loop", attention(q, k, v), attention_loop(q, k, v))

# %% [markdown]
# ## 3. From text to vectors
# Now with real weights. A checkpoint is a file of named tensors. Text becomes token ids $z_t$, and
# each token begins as the sum of two vectors of $C$ numbers, one for what it is (`wte`, the
# word-token embedding) and one for where it stands (`wpe`, the word-position embedding):
# $x_t = \mathrm{wte}[z_t] + \mathrm{wpe}[t]$. Attention alone knows no order, since a sum has none;
# `wpe` brings it in.

# %%
weights = {
    name.removeprefix("transformer."): tensor.double()
    for name, tensor in load_file(find(MODEL) / "model.safetensors").items()
}
sentence = "The Eagle is a pub near the river. The food at the Eagle"
ids = torch.tensor(tokenizer.encode(sentence))
tokens = [tokenizer.decode([int(z)]) for z in ids]
x = weights["wte.weight"][ids] + weights["wpe.weight"][: len(ids)]  # (T, C)
print(f"T = {len(ids)} tokens: {tokens}")

# %% [markdown]
# ## 4. LayerNorm and heads
# Before each of its parts a layer brings every vector to mean 0 and variance 1, then stretches and
# shifts each entry by learned numbers $g$ and $b$. A small $\epsilon$ guards the division:
#
# $$\mathrm{LN}(x) = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\, g + b, \qquad
# \mu = \frac1C \sum_c x_c, \quad \sigma^2 = \frac1C \sum_c (x_c - \mu)^2 .$$

# %%
g, b = weights["h.0.ln_1.weight"], weights["h.0.ln_1.bias"]
eps = config.layer_norm_epsilon
mu = x.mean(-1, keepdim=True)  # (T, 1)
var = ((x - mu) ** 2).mean(-1, keepdim=True)  # divided by C, not by C - 1
n = (x - mu) / (var + eps).sqrt() * g + b  # (T, C)
check("LayerNorm and PyTorch's", n, F.layer_norm(x, (C,), g, b, eps))

# %% [markdown]
# Queries, keys and values are three linear maps of the same vector, kept as one matrix `c_attn`
# of shape (C, 3C). Their $C$ numbers are cut into $H$ heads of $D = C / H$. Each head attends on
# its own, and their outputs are put side by side and mixed by one more matrix, `c_proj`. The heads
# are one more dimension in front; here is head 2 alone beside all of them:

# %%
qkv = n @ weights["h.0.attn.c_attn.weight"] + weights["h.0.attn.c_attn.bias"]
q, k, v = qkv.split(C, dim=-1)  # (T, C) each

part = slice(2 * D, 3 * D)  # the numbers of head 2
o_head = attention_loop(q[:, part], k[:, part], v[:, part])  # (T, D)

q, k, v = (y.view(-1, H, D).transpose(0, 1) for y in (q, k, v))  # (H, T, D)
o = attention(q, k, v).transpose(0, 1).reshape(-1, C)  # (T, C)
check("head 2, alone and among all", o[:, part], o_head)

# %% [markdown]
# ## 5. The MLP, the residual stream and the model
# The second part of a layer sees each position alone: a linear map to $4C$ numbers, the function
# GELU of each of them (in the form with tanh that GPT-2 was trained with), and a linear map back to
# $C$.
#
# Neither part replaces $x$. Each *adds* to it: $x \leftarrow x + \mathrm{attn}(\mathrm{LN}_1 x)$,
# then $x \leftarrow x + \mathrm{mlp}(\mathrm{LN}_2 x)$. The sum that runs through all layers is
# called the residual stream. Positions meet in attention only; everything else happens position by
# position.
#
# After the last layer comes one more LayerNorm, and the logit of token $w$ is $\mathrm{wte}[w]
# \cdot x$: the matrix that reads tokens in also writes them out (*tied* weights). The softmax of a
# position's $V$ logits gives the probability of each token to be the next one. Here is all of it as
# modules, with the names of the official checkpoint, so that its tensors load by name.


# %%
def gelu(u):
    cubic = math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
    return 0.5 * u * (1 + torch.tanh(cubic))


class Linear(nn.Module):
    """x W + b, with W stored as [in, out]: GPT-2's files have it so."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = Linear(C, 3 * C), Linear(C, C)

    def forward(self, x, past=None):
        """x (B, T, C), past: keys and values of older positions."""
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        if past is not None:
            k = torch.cat([past[0], k], dim=2)  # (B, H, S, D)
            v = torch.cat([past[1], v], dim=2)
        o = attention(q, k, v)  # (B, H, T, D)
        return self.c_proj(o.transpose(1, 2).reshape(B, T, C)), (k, v)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = Linear(C, 4 * C), Linear(4 * C, C)

    def forward(self, x):
        return self.c_proj(gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(C, eps=eps) for _ in range(2))
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, x, past=None):
        a, kv = self.attn(self.ln_1(x), past)
        x = x + a
        return x + self.mlp(self.ln_2(x)), kv


class TinyGPT2(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.n_positions, C)
        self.h = nn.ModuleList(Block() for _ in range(L))
        self.ln_f = nn.LayerNorm(C, eps=eps)

    def forward(self, ids, cache=None):
        """ids (B, T), cache: L pairs k, v -> logits (B, T, V), new cache."""
        cache = [None] * L if cache is None else cache
        older = 0 if cache[0] is None else cache[0][0].shape[2]
        at = torch.arange(older, older + ids.shape[1])  # positions
        x, kvs = self.wte(ids) + self.wpe(at), []
        for block, past in zip(self.h, cache, strict=True):
            x, kv = block(x, past)
            kvs.append(kv)
        return self.ln_f(x) @ self.wte.weight.T, kvs


# %% [markdown]
# Loading is strict: a missing or an extra tensor is an error. (Some official files also hold the
# causal mask, or the tied head once more; both are left out.) Then we compare the logits with those
# of the library, which is this model with more arguments, and of Hugging Face, if it is installed.

# %%
tiny = TinyGPT2()
drop = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
tiny.load_state_dict({n: w for n, w in weights.items() if not n.endswith(drop)})
logits, cache = tiny(ids[None])  # (1, T, V), L pairs
check("logits, minprefix", logits, model(ids[None]))

try:
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar
except ImportError:
    print("transformers is not installed (see requirements-dev.txt)")
else:
    disable_progress_bar()
    official = GPT2LMHeadModel.from_pretrained(find(MODEL), dtype=torch.float64)
    check("logits, transformers", logits, official.eval()(ids[None]).logits)

# %% [markdown]
# ## 6. What a head has learned
# With a whole model we can look at its attention weights. A token that has occurred before was
# followed by some token then; a head that looks at that follower helps to copy a name. It is called
# an *induction head*. Of all $L \times H$ heads we take the one that does this most.
#
# **Predict.** In the text, " Eagle" occurs twice, as three tokens. What will this head read when it
# stands at the second " E"? And where does a head look that finds nothing?

# %%
x, layers = tiny.wte(ids[None]) + tiny.wpe(torch.arange(len(ids))), []
for block in tiny.h:
    qkv = block.attn.c_attn(block.ln_1(x))[0]  # (T, 3 C)
    q, k, _ = qkv.view(-1, 3, H, D).permute(1, 2, 0, 3)  # (H, T, D)
    layers.append(attention_weights(q, k))  # (H, T, T)
    x = block(x)[0]
p = torch.stack(layers)  # (L, H, T, T)

# 1 where token j follows an earlier occurrence of token i: z_(j-1) = z_i, j < i
follows = (ids[:, None] == ids.roll(1)).tril(-1).double()  # (T, T)
follows[:, 0] = 0  # nothing stands before the first token
layer, head = divmod(int((p * follows).sum((2, 3)).argmax()), H)
copying = p[layer, head]  # (T, T)
figure.shares(
    "01_heads", {f"layer {layer}, head {head}": copying},
    "attention weight $p_{ij}$",
    xticks=range(len(ids)), xticklabels=tokens, xlabel="token that is read (j)",
    yticks=range(len(ids)), yticklabels=tokens, ylabel="token that reads (i)",
)  # fmt: skip
if MODEL == "mini":
    first, second = (i for i, token in enumerate(tokens) if token == " E")
    found = copying[second, first + 1].item()
    print(f"from the second ' E': {found:.2f} to {tokens[first + 1]!r}")
    repeats = next(i for i in range(len(ids)) if ids[i] in ids[:i])
    parked = copying[1:repeats, 0].mean().item()  # token 0 has no choice
    print(f"before a token is repeated: {parked:.2f} to the first token")
    assert found > 0.5 and parked > 0.8

# %% [markdown]
# **Answer.** It reads "ag", the token that came after " E" the first time, and so can predict it.
# As long as nothing is repeated, this head has nothing to find. Its weights must still add up to 1,
# and it puts them on the first token. Such an *attention sink* is a way to do nothing.
# 02_equation_3 shows heads that use a prefix as their sink.
#
# ## 7. What a token leaves behind: $h_i$
# To write a text, the model appends one token, here the likeliest (*greedy* decoding), reads
# everything again, and so on. Most of that work is repeated, because nothing at position $i$
# depends on later tokens. What can a later position still need from position $i$? Positions meet
# in attention only, and there a later query reads $k_i$ and $v_i$ of its layer, and nothing else of
# position $i$. The paper calls these keys and values of all layers $h_i$, and writes the model as
#
# $$h_i = \mathrm{LM}(z_i, h_{<i}) . \qquad (1)$$
#
# Programs call the stored $h_{<i}$ a *KV cache*.
#
# **Predict.** The model reads the first 6 tokens alone, or all of them. In which layers do
# $h_0 \dots h_5$ differ?

# %%
cut = 6
_, alone = tiny(ids[None, :cut])  # the first tokens alone
gap = max(
    (whole[:, :, :cut] - part).abs().max().item()
    for pair, pair_alone in zip(cache, alone, strict=True)
    for whole, part in zip(pair, pair_alone, strict=True)
)
print(f"h_0 ... h_{cut - 1}, alone and in the text: they differ by {gap:.0e}")
assert gap < 1e-12
rest, _ = tiny(ids[None, cut:], alone)  # the other tokens, by equation (1)
check("logits from tokens and h", rest, logits[:, cut:])
h_i = sum(y[0, :, 0].numel() for pair in alone for y in pair)
print(f"one h_i: {L} layers x 2 x {H} heads x {D} = {h_i:,} numbers")
assert P * h_i == in_prefix

# %% [markdown]
# **Answer.** In none; what is left is rounding. And equation (1) is enough to go on: the other
# tokens and $h_0 \dots h_5$ give the logits of the whole text. Everything that the model knows of
# its past is in $h$.
#
# Here is the idea behind prefix-tuning. The model cannot tell where an $h_i$ comes from. A token
# may have been read, or someone may have *written numbers there*. Ten such $h_i$ are the prefix of
# section 1. 02_equation_3 writes them, and derives how they are learned.
#
# ## 8. The table of letters
# The tutorials use these letters, with these meanings unless they say otherwise.
#
# | letter | shape | meaning |
# |---|---|---|
# | B | | rows of a batch. A *row* is one example |
# | T | | tokens that are read in one call |
# | P | | positions of the prefix |
# | S | | keys of the text that are at hand: cached and new ones, never those of the prefix |
# | L, H | | layers; heads |
# | C, D | | width; width of a head, D = C / H |
# | V, N | | tokens in the vocabulary; prefixes in a bank |
# | z | (T,) | token ids: the *source* (a table), its end, the *target* (a text) |
# | x | (B, T, C) | the residual stream (in the paper's $[x; y]$: the source) |
# | q | (B, H, T, D) | queries |
# | k, v | (B, H, S, D) | keys and values |
# | s, p | (B, H, T, S) | scores and attention weights; $p(\dots)$ is a probability |
# | Z | (B, H, T) | a sum of $e^s$; programs keep its logarithm (`lse`) |
# | o | (B, H, T, D) | the output of attention |
# | $\lambda$ (`lam`) | (B, H, T) | the part of the attention that goes to the prefix |
# | $h_i$ | (L, 2, H, D) | keys (0) and values (1) of position i (but `model.h`: the layers) |
# | $P_\theta$ | (L, 2, H, P, D) | the prefix, `prefix_table` in the code |
# | d (`do`) | (B, H, T, D) | the gradient of the loss with respect to o |
# | n | (B, T, C) | the output of a LayerNorm |
# | $\ell$ | | the loss: the mean of $-\log p$ over target tokens, in nats |
#
# ## Common mistakes
# > - **The mask of a cache, aligned at the wrong corner.** With S > T the diagonal begins at S - T.
# >   `tril()` without it hides a token from itself, and no error is raised (exercise 2). The
# >   library `adapters` shipped this fault with its prefixes (04_fused_attention).
# > - **The wrong GELU, or $\epsilon$ = 1e-6 for 1e-5.** The logits move so little that a loose
# >   test in fp32 passes. Compare models in fp64 (exercise 4).
# > - **`nn.Linear` for GPT-2's weights.** The files hold W as [in, out]. `c_proj` of the attention
# >   is square, so it loads without an error and gives nonsense.
# > - **Positions that start again at 0 after a cache.** The next token stands at the number of the
# >   positions that the cache holds, not at 0.
#
# ## Recap
# - A score is $q_i \cdot k_j / \sqrt D$, a weight its softmax over $j \le i$, an output the mean of
#   the values with these weights. A layer adds attention, then an MLP, to the residual stream.
# - Positions meet in attention only. So a position leaves behind its keys and values, $2 L C$
#   numbers, and $h_{<i}$ and $z_i$ determine everything else: equation (1).
# - A prefix is a few $h_i$ that come from no token: kilobytes for a task, not megabytes.
#
# ## Exercises
# 1. *Easy.* Count the parameters of GPT-2 by a formula in $V$, $C$, $L$ and `n_positions`. Compare
#    with the official sizes in `minprefix.models.config.MODELS`. *Hint:* the head is `wte` again.
# 2. *Easy.* Leave out the causal mask. Which logits change when the last token changes, and what
#    would training a model without it teach? Then keep the mask, but align it as `tril()` does when
#    S > T. What can a new token no longer read? *Hint:* write the masks down for T = 1, S = 4.
# 3. *Medium.* Put two texts of different lengths into one batch, padded on the right. Why do the
#    real positions need no other mask than the causal one? *Hint:* who reads the padding?
# 4. *Medium.* Make the LayerNorm's $\epsilon$ a thousandth larger. By how much do logits move, and
#    by how much does fp32 move them? What follows for tests of equality? *Hint:* load the model
#    once in fp32 and once in fp64.
# 5. *Hard.* Read "The Tiger" into a cache and "The Raven" into another. Make a third one of the
#    first's keys and the second's values. Continue it with " is a pub near the river. The food at
#    the". Whose first token is likelier, and what does that say about keys and values? *Hint:* both
#    names have as many tokens.
#
# Solutions: `tutorials/solutions/01_gpt2_from_scratch.py`.
#
# ## References
# - [1] Li & Liang 2021, Prefix-tuning: https://arxiv.org/abs/2101.00190
# - [2] Vaswani et al. 2017, Attention is all you need: https://arxiv.org/abs/1706.03762
# - [3] Radford et al. 2019, Language models are unsupervised multitask learners:
#   https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
# - [4] The official checkpoints: https://huggingface.co/openai-community/gpt2
# - GELU: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415; LayerNorm: Ba et al. 2016,
#   https://arxiv.org/abs/1607.06450; attention sinks: Xiao et al. 2023,
#   https://arxiv.org/abs/2309.17453; induction heads: Olsson et al. 2022,
#   https://arxiv.org/abs/2209.11895
