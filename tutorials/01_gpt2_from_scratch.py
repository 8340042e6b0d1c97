# %% [markdown]
# # 1. GPT-2 from scratch
# A prefix is read by attention, and only by attention. So this first tutorial takes GPT-2 apart,
# from one attention score to the whole model, and puts it together again in about sixty lines.
# These load the weights of the embedded model and give the logits of the library and of
# Hugging Face to the last digits.
#
# **What you will learn.** How a score becomes a weight and a weight becomes an output; why
# the mask makes the past independent of the future; what a block adds to the residual stream; what
# exactly is left of a token once it has been read: its keys and values, the $h_i$ that equation (1)
# of the prefix-tuning paper is about and that tutorial 02_equation_3 trains.
#
# **What to know first.** PyTorch tensors and modules. No knowledge of transformers.
#
# **Running time.** Some seconds on two CPU cores with the embedded model. Another `MODEL`, such
# as `gpt2`, is downloaded first, and all of it takes longer.
#
# **Sources.** Attention: Vaswani et al. [1]; the model: Radford et al. [2]; the names of its
# weights: the official checkpoints [3]; equation (1): Li & Liang [4]. The list is at the end.

# %%
import math

import torch
import torch.nn.functional as F
from figure import new, show
from safetensors.torch import load_file
from torch import nn

import minprefix
from minprefix.models.weights import find

MODEL = "mini"  # embedded; or gpt2, gpt2-medium, a folder with model.safetensors
torch.set_default_dtype(torch.float64)  # equal then means equal to about 15 digits
torch.set_grad_enabled(False)  # nothing is trained here


def check(name, a, b):
    """Print how far a is from b, and fail if that is more than rounding in fp64."""
    gap, size = (a - b).abs().max().item(), b.abs().max().item()
    print(f"{name}: largest |difference| {gap:.0e}, largest value {size:.3g}")
    assert gap <= 1e-12 * max(1, size)  # a few thousand roundings of 1e-16


# %% [markdown]
# ## 1. One score, by hand
# Attention lets a position read from others. Each position $i$ has three vectors of $D$ numbers: a
# query $q_i$ ("what I look for"), a key $k_i$ ("what I am"), a value $v_i$ ("what I say").
# How much $i$ looks at $j$ begins with the score
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt{D}} .$$
#
# Three positions and $D = 2$ can be done in the head. The scale $1/\sqrt{D}$ keeps scores of
# the same size, whatever $D$ is.

# %%
q = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 1.0]])  # (T, D)
k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # (T, D)
v = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])  # (T, D)

s_20 = (2 * 1 + 1 * 0) / math.sqrt(2)  # q_2 . k_0 / sqrt(D)
s_21 = (2 * 0 + 1 * 1) / math.sqrt(2)
s_22 = (2 * 1 + 1 * 1) / math.sqrt(2)
print(f"scores of position 2: {s_20:.3f} {s_21:.3f} {s_22:.3f}")

# %% [markdown]
# ## 2. From scores to an output
# The softmax makes weights of the scores: positive, with sum 1. The output is the weighted
# mean of the values:
#
# $$Z_i = \sum_{j \le i} e^{s_{ij}}, \qquad p_{ij} = \frac{e^{s_{ij}}}{Z_i}, \qquad
# o_i = \sum_{j \le i} p_{ij}\, v_j .$$
#
# All sums stop at $j = i$. This is what *causal* means: a position reads itself and what stands
# before it, never what comes later.

# %%
Z = math.exp(s_20) + math.exp(s_21) + math.exp(s_22)
p_20, p_21, p_22 = (math.exp(s) / Z for s in (s_20, s_21, s_22))
o_2 = [p_20 * 10 + p_21 * 0 + p_22 * 5, p_20 * 0 + p_21 * 10 + p_22 * 5]
print(f"weights of position 2: {p_20:.3f} {p_21:.3f} {p_22:.3f}")
print(f"output of position 2:  {o_2[0]:.3f} {o_2[1]:.3f}")


# %% [markdown]
# The same as a loop over the positions:


# %%
def attention_loop(q, k, v):
    """q, k, v (T, D) -> o (T, D), one position after the other."""
    T, D = q.shape
    o = torch.zeros(T, D)
    for i in range(T):
        e = [math.exp(float(q[i] @ k[j]) / math.sqrt(D)) for j in range(i + 1)]
        for j in range(i + 1):
            o[i] += e[j] / sum(e) * v[j]
    return o


check("loop and hand", attention_loop(q, k, v)[2], torch.tensor(o_2))


# %% [markdown]
# And as matrices. All scores at once are $Q K^T / \sqrt{D}$; the mask puts $-\infty$ where
# $j > i$, and $e^{-\infty} = 0$ does the rest. Leading dimensions, such as heads, go along. There
# may be more keys (S) than queries (T): the first S - T are then older than all queries.


# %%
def attention_weights(q, k):
    """q (..., T, D), k (..., S, D) -> p (..., T, S); query i stands at place S - T + i."""
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    s = q @ k.mT / math.sqrt(D)  # (..., T, S)
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)  # j <= S - T + i
    return s.masked_fill(~seen, -math.inf).softmax(-1)


def attention(q, k, v):
    """As above, with v (..., S, D) -> o (..., T, D)."""
    return attention_weights(q, k) @ v


check("matrix and loop", attention(q, k, v), attention_loop(q, k, v))

# %% [markdown]
# ## 3. From text to vectors
# Now the real weights. A checkpoint is a file of named tensors. Text becomes token ids, and
# each token begins as the sum of two vectors of $C$ numbers, one for what it is (`wte`) and one for
# where it stands (`wpe`): $x_t = \mathrm{wte}[z_t] + \mathrm{wpe}[t]$. A weighted mean has no order
# of its own; `wpe` brings it in.

# %%
model, tokenizer = minprefix.load(MODEL, dtype=torch.float64)  # the library's, to compare with
config = model.config
L, H, C, D = config.n_layer, config.n_head, config.n_embd, config.head_dim
weights = {
    name.removeprefix("transformer."): tensor.double()
    for name, tensor in load_file(find(MODEL) / "model.safetensors").items()
}
ids = torch.tensor(tokenizer.encode("The Eagle is a pub near the river. The food at the Eagle"))
tokens = [tokenizer.decode([int(z)]) for z in ids]
x = weights["wte.weight"][ids] + weights["wpe.weight"][: len(ids)]  # (T, C)

print(f"{MODEL}: L = {L} layers, H = {H} heads of D = {D}, C = {C}, {len(weights)} tensors")
print(f"T = {len(ids)} tokens: {tokens}")
print("names of layer 0:", *(n for n in weights if n.startswith("h.0.") and "weight" in n))

# %% [markdown]
# ## 4. LayerNorm, by hand
# Before each of its parts the model brings every vector to mean 0 and variance 1, then stretches
# and shifts each entry by learned numbers:
#
# $$\mathrm{LN}(x) = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\, g + b, \qquad
# \mu = \frac1C \sum_c x_c, \quad \sigma^2 = \frac1C \sum_c (x_c - \mu)^2 .$$

# %%
g, b, eps = weights["h.0.ln_1.weight"], weights["h.0.ln_1.bias"], config.layer_norm_epsilon
row = x[3].tolist()  # one token, as plain numbers
mu = sum(row) / C
var = sum((r - mu) ** 2 for r in row) / C  # divided by C, not by C - 1
by_hand = [(row[c] - mu) / math.sqrt(var + eps) * float(g[c]) + float(b[c]) for c in range(C)]

n = F.layer_norm(x, (C,), g, b, eps)  # (T, C)
check("PyTorch and hand", n[3], torch.tensor(by_hand))

# %% [markdown]
# ## 5. Heads
# Queries, keys and values are three linear maps of the same vector, kept as one matrix `c_attn`
# of shape (C, 3C). Their $C$ numbers are then cut into $H$ heads of $D = C / H$: each head attends
# on its own, and what they find is put side by side and mixed by one more matrix, `c_proj`. First
# as a loop over heads, then all heads as one leading dimension.

# %%
qkv = n @ weights["h.0.attn.c_attn.weight"] + weights["h.0.attn.c_attn.bias"]  # (T, 3 C)
q, k, v = qkv.split(C, dim=-1)  # (T, C) each

heads = []
for head in range(H):
    part = slice(head * D, (head + 1) * D)
    heads.append(attention_loop(q[:, part], k[:, part], v[:, part]))  # (T, D)
o_loop = torch.cat(heads, dim=-1)  # (T, C)

q, k, v = (y.view(-1, H, D).transpose(0, 1) for y in (q, k, v))  # (H, T, D) each
o = attention(q, k, v).transpose(0, 1).reshape(-1, C)  # (T, C)
check("all heads and loop", o, o_loop)

# %% [markdown]
# ## 6. The MLP and the residual stream
# The second part of a layer sees each position alone: up to $4C$ numbers, a bend, back to $C$.
# The bend is GELU, in the form with tanh that GPT-2 was trained with:
#
# $$\mathrm{gelu}(u) = \tfrac12 u \left(1 + \tanh\!\big[\sqrt{2/\pi}\,(u + 0.044715\, u^3)\big]
# \right) .$$


# %%
def gelu(u):
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


u = torch.linspace(-4, 4, 81)
check("GELU and PyTorch", gelu(u), F.gelu(u, approximate="tanh"))

# %% [markdown]
# Neither part replaces $x$. Each *adds* to it: $x \leftarrow x + \mathrm{attn}(\mathrm{LN}_1 x)$,
# then $x \leftarrow x + \mathrm{mlp}(\mathrm{LN}_2 x)$. The sum that runs through all layers is
# called the residual stream. Positions meet in attention only; all else is position by position.
#
# ## 7. The model
# As modules, with the names of the official checkpoint, so that its tensors load by name. After
# the last layer comes one more LayerNorm, and the logit of token $w$ is $\mathrm{wte}[w] \cdot x$:
# the matrix that reads tokens in also writes them out (*tied* weights), so there is no other head.


# %%
class Linear(nn.Module):
    """x W + b, W stored as [in, out]: the official files have it so ("Conv1D")."""

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

    def forward(self, x, past=None):  # (B, T, C); past: keys and values of older positions
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, H, D).transpose(1, 2) for y in self.c_attn(x).split(C, dim=-1))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, H, S, D)
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
        self.ln_1, self.ln_2 = nn.LayerNorm(C, eps=eps), nn.LayerNorm(C, eps=eps)
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
        """ids (B, T) -> logits (B, T, V) and the cache: L pairs of k, v (B, H, S, D)."""
        older = 0 if cache is None else cache[0][0].shape[2]  # positions that the cache holds
        x = self.wte(ids) + self.wpe(torch.arange(older, older + ids.shape[1]))
        kvs = []
        for layer, block in enumerate(self.h):
            x, kv = block(x, None if cache is None else cache[layer])
            kvs.append(kv)
        return self.ln_f(x) @ self.wte.weight.T, kvs


# %% [markdown]
# Loading is strict: a missing or an extra tensor is an error. (Some official files hold the causal
# mask as a buffer, or the tied head once more; both are left out.) Then the comparisons: with the
# library, which is this model with more arguments, and with Hugging Face, if it is installed.

# %%
tiny = TinyGPT2()
drop = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
tiny.load_state_dict({name: w for name, w in weights.items() if not name.endswith(drop)})
logits, h = tiny(ids[None])  # (1, T, V), L pairs
check("logits, minprefix", logits, model(ids[None]))

try:
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar
except ImportError:
    print("transformers: not installed (pip install -r requirements-dev.txt), so not compared")
else:
    disable_progress_bar()
    official = GPT2LMHeadModel.from_pretrained(find(MODEL), dtype=torch.float64)
    check("logits, transformers", logits, official.eval()(ids[None]).logits)

# %% [markdown]
# With a whole model we can look at what its heads have learned. Of all $L \times H$ heads these two
# put most weight on two things: on the token just before, and on what followed the same token
# earlier in the text. Heads of these two kinds let a model copy a name that it has read once.

# %%
x, p = tiny.wte(ids[None]) + tiny.wpe(torch.arange(len(ids))), []
for block in tiny.h:
    q, k, _ = (
        y.view(-1, H, D).transpose(0, 1) for y in block.attn.c_attn(block.ln_1(x)).split(C, -1)
    )
    p.append(attention_weights(q, k))  # (H, T, T)
    x = block(x)[0]
p = torch.stack(p)  # (L, H, T, T)

before = torch.eye(len(ids)).roll(-1, 1).tril()  # (T, T): j = i - 1
followed = (ids[:, None] == ids.roll(1)).tril(-1).double()  # (T, T): token j - 1 is token i
followed[:, 0] = 0  # nothing stands before the first
picture, axes = new(2, width=4.8, height=4.4)
for ax, wanted, job in zip(
    axes, (before, followed), ("token before", "what followed"), strict=True
):
    layer, head = divmod(int((p * wanted).sum((2, 3)).argmax()), H)
    image = ax.imshow(p[layer, head], cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(len(ids)), tokens, rotation=90)
    ax.set_yticks(range(len(ids)), tokens)
    ax.set(xlabel="token that is read (j)", ylabel="reader (i)")
    ax.set_title(f"{job}: layer {layer}, head {head}")
picture.colorbar(image, ax=axes, label="attention weight $p_{ij}$")
show(picture, "01_heads")

# %% [markdown]
# The softmax of the last row of logits is $p(z_{i+1} \mid z_{\le i})$. The likeliest next tokens:

# %%
print(f"after {''.join(tokens)!r}:")
for chance, z in zip(*logits[0, -1].softmax(-1).topk(5), strict=True):
    print(f"  {chance:6.1%}  {tokenizer.decode([int(z)])!r}")

# %% [markdown]
# ## 8. What is left of a token: $h_i$
# Generation appends the likeliest token, reads everything again, and so on. Most of that work is
# repeated: by causality nothing at position $i$ depends on later tokens. So what can a later
# position still want from position $i$? Look at `Block`: positions meet in attention, and there a
# later query reads exactly $k_i$ and $v_i$, of each layer. Nothing else of position $i$ is ever
# needed again. The paper calls it $h_i$ and writes the model as a recurrence,
#
# $$h_i = \mathrm{LM}(z_i, h_{<i}) , \qquad (1)$$
#
# and programs call the stored $h_{<i}$ a *KV cache*. First: the past does not depend on the future.

# %%
cut = 6
_, h_cut = tiny(ids[None, :cut])  # the first tokens alone
for layer in range(L):
    for whole, alone in zip(h[layer], h_cut[layer], strict=True):
        torch.testing.assert_close(whole[:, :, :cut], alone, rtol=0, atol=1e-12)
print(f"h_0 ... h_{cut - 1} are the same whether {len(ids) - cut} more tokens follow or none")

# %% [markdown]
# Second: equation (1) computes. `step` gets one token and the cache, and nothing else. Both
# ways must choose the same tokens, since in exact arithmetic they are the same numbers.


# %%
def greedy(ids, n):
    """Append the likeliest token n times; all tokens are read again each time."""
    for _ in range(n):
        logits, _ = tiny(ids[None])
        ids = torch.cat([ids, logits[0, -1:].argmax(-1)])
    return ids


def step(z, h):
    """Equation (1) and the next token: z_i (1,), h_<i -> z_{i+1} (1,), h_<=i."""
    logits, h = tiny(z[None], h)
    return logits[0, -1:].argmax(-1), h


def greedy_cached(ids, n):
    """The same from the cache: each new token is read once."""
    logits, h = tiny(ids[None])
    new = [logits[0, -1:].argmax(-1)]
    while len(new) < n:
        z, h = step(new[-1], h)
        new.append(z)
    return torch.cat([ids, *new]), h


n_new = 20
again, (cached, h) = greedy(ids, n_new), greedy_cached(ids, n_new)
assert torch.equal(again, cached)
S = h[0][0].shape[2]
print(repr(tokenizer.decode(again.tolist())))
print(f"positions computed: {sum(len(ids) + i for i in range(n_new))} without a cache, {S} with")

# %% [markdown]
# Everything that the model knows of its past is in `h`. The past has no other way in:

# %%
per_position = sum(y[0, :, 0].numel() for pair in h for y in pair)
print(f"one h_i: {L} layers x 2 (key, value) x {H} heads x {D} = {per_position:,} numbers")
print(f"the cache: {S} positions, {S * per_position * 4 / 2**20:.2f} MiB in fp32")
assert per_position == L * 2 * C

# %% [markdown]
# Here is the thought that all of prefix-tuning hangs on. The model cannot tell where an $h_i$ comes
# from. A token may have been read; or someone has simply *written numbers there*. Tutorial
# 02_equation_3 writes them, and learns which ones to write.
#
# ## Recap
# - A score is $q_i \cdot k_j / \sqrt D$, a weight its softmax over $j \le i$, an output the
#   weighted mean of values. Heads do this side by side.
# - A block adds attention, then an MLP, to the residual stream, each behind a LayerNorm. The head
#   is the token embedding.
# - Positions meet in attention only. So a position leaves behind its keys and values, $2 L C$
#   numbers, and $h_{<i}$ with $z_i$ gives all the rest: equation (1).
#
# ## Exercises
# Solutions are in `tutorials/solutions/01_gpt2_from_scratch.py`.
#
# 1. Count the parameters of GPT-2 by a formula in $V$, $C$, $L$ and `n_positions`. Compare with the
#    model's, and with the counts of the official sizes in `minprefix.models.config.MODELS`.
# 2. Leave out the causal mask. Which logits change, and what would training a model without it
#    teach?
# 3. Put two texts of different lengths into one batch, padded on the right. Why do the real
#    positions need no other mask than the causal one?
# 4. Make the LayerNorm's $\epsilon$ a thousandth larger. By how much do logits move, and by how
#    much does fp32 move them? What follows for tests of equality?
# 5. Read "The Tiger" into a cache and "The Raven" into another. Make a third one of the first's
#    keys and the second's values. Continue it with " is a pub near the river. The food at the".
#    Whose first token is likelier, and what does that say about keys and values?
#
# ## References
# - [1] Vaswani et al. 2017, Attention is all you need: https://arxiv.org/abs/1706.03762
# - [2] Radford et al. 2019, Language models are unsupervised multitask learners:
#   https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
# - [3] The official checkpoints: https://huggingface.co/openai-community/gpt2
# - [4] Li & Liang 2021, Prefix-tuning: https://arxiv.org/abs/2101.00190
# - GELU: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415; LayerNorm: Ba et al. 2016,
#   https://arxiv.org/abs/1607.06450
