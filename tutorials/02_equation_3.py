# %% [markdown]
# # 2. Equation 3: what a prefix is
# Prefix-tuning changes one line of a language model, equation (3) of Li & Liang [1]. Here that line
# is derived and then rewritten: as a loop that reads like the paper, as a concatenation, as two
# softmaxes with a gate, and as the operator that a GPU kernel computes. All of them must give the
# same logits.
#
# **What you will learn.** What exactly is trained, and where it enters. How much attention a prefix
# gets, and why; what it cannot do within a layer. Why the positions of the text shift, why the
# prefix needs no mask, which gradient reaches it, what the MLP is for, and what is kept of it.
#
# **What to know first.** 01_gpt2_from_scratch: attention, the residual stream, $h_i$, and its
# [table of letters](01_gpt2_from_scratch.py).
#
# **Running time.** Some seconds on two CPU cores.
#
# **Sources.** Li & Liang [1] and the authors' code [2]; the softmax in two parts is that of
# online softmax [3]; what a prefix cannot do: Petrov et al. [4].

# %%
import math

import figure  # tutorials/figure.py: all that only draws
import torch
from short_training import TRAINED  # a folder of trained prefixes

import minprefix
from kernels import prefix_attention
from minprefix import Prefix
from minprefix.data.batches import collate, encode_examples, encode_pair
from minprefix.data.load import load_examples

model, tokenizer = minprefix.load("mini", dtype=torch.float64)
model.requires_grad_(False)  # phi of the paper: frozen in all that follows
config = model.config
L, H, C, D = config.n_layer, config.n_head, config.n_embd, config.head_dim


def check(name, a, b):
    """Print how far a is from b; fail if it is more than fp64 rounding."""
    gap, size = (a - b).abs().max().item(), b.abs().max().item()
    print(f"{name}: largest |difference| {gap:.0e}, largest value {size:.3g}")
    assert gap <= 1e-11 * max(1, size)  # 1e5 roundings of 1e-16, all layers


# %% [markdown]
# ## 1. Equation (1): the model as a recurrence
# Let $z_i$ be the token at position $i$. The model is
#
# $$h_i = \mathrm{LM}_\phi(z_i, h_{<i}), \qquad (1)$$
#
# where $h_i$ is all that later positions read of position $i$: one key and one value in each layer
# and head. `LM` below is equation (1); it also returns the logits of the next token. `recurrence`
# goes through the positions and asks a function `h_at` for the next $h_i$. Here that function is
# `LM`; in section 3 it will be another one.


# %%
def LM(z, h):
    """Token z, h_<i (L, 2, H, i, D) -> h_i (L, 2, H, D), logits (V,)."""
    x, h_i = model.wte(z) + model.wpe.weight[h.shape[3]], []  # (C,)
    for block, past in zip(model.h, h, strict=True):
        q, k, v = block.attn.c_attn(block.ln_1(x)).view(3, H, D)
        keys = torch.cat([past[0], k[:, None]], dim=1)  # (H, i + 1, D)
        values = torch.cat([past[1], v[:, None]], dim=1)
        p = (keys @ q[..., None] / math.sqrt(D)).softmax(1)  # (H, i + 1, 1)
        x = x + block.attn.c_proj((p * values).sum(1).flatten())
        x = x + block.mlp(block.ln_2(x))
        h_i.append(torch.stack([k, v]))
    return torch.stack(h_i), model.head(model.ln_f(x))


def recurrence(n, h_at):
    """All h and logits of n positions, where h_at(i, h_<i) -> h_i, logits_i."""
    h, logits = model.wte.weight.new_empty(L, 2, H, 0, D), []
    for i in range(n):
        h_i, logits_i = h_at(i, h)
        h = torch.cat([h, h_i[..., None, :]], dim=3)
        logits.append(logits_i)
    return h, torch.stack(logits)  # (L, 2, H, n, D), (n, V)


# %% [markdown]
# The example is the shortest table of the dev data with its text, as training reads it: `source,
# bos, target, eos`. The source is the paper's $x$, and the target its $y$. GPT-2 has one special
# token for both the beginning of a text (*bos*) and its end (*eos*). So the bos in the middle ends
# the source and begins the target.

# %%
dev = load_examples("restaurants", "dev")
example = min(dev, key=lambda e: len(e.source))
pair = encode_pair(tokenizer, example.source, example.targets[0])
z = torch.tensor(pair.ids[:-1])  # (T,): the end of text is only predicted
T, bos = len(z), pair.prompt_len - 1  # bos: its position
_, logits = recurrence(T, lambda i, h: LM(z[i], h))
print(f"x: {example.source}\ny: {example.targets[0]}")
check("the recurrence and the model", logits, model(z[None])[0])

# %% [markdown]
# ## 2. Equation (2): what is asked of it
# The model reads all of $z$ and is asked only for $y$. With $Y_{idx}$ the positions of the target
# and of the eos that ends it,
#
# $$\max_\phi \; \log p_\phi(y \mid x)
# = \max_\phi \sum_{i \in Y_{idx}} \log p_\phi(z_i \mid h_{<i}). \qquad (2)$$
#
# $z_i$ is predicted at position $i - 1$. So the label at position $t$ is the next token if that
# token is in $Y_{idx}$, and otherwise -100, "no loss". Fine-tuning maximizes (2) over the weights
# $\phi$.

# %%
Y_idx = range(pair.prompt_len, len(pair.ids))
log_p = logits.log_softmax(-1)  # (T, V)
nats = torch.stack([-log_p[i - 1, pair.ids[i]] for i in Y_idx])

batch = collate([pair], tokenizer.eos_id)
y = pair.ids[pair.prompt_len :]  # the target and the eos
assert batch.labels[0].tolist() == [-100] * bos + y
assert tokenizer.bos_id == tokenizer.eos_id
losses = model.token_losses(z[None], batch.labels)
check("equation (2) and the library's loss", nats, losses)
print(f"-log p(y | x) = {nats.sum():.1f} nats, {nats.mean():.2f} a token")

# %% [markdown]
# ## 3. What an instruction does to $h$
# Without training, one writes an instruction before the table. Its tokens take positions
# $0 \dots P - 1$. Later positions meet it in attention only, so all its influence goes through its
# keys and values; and by causality these are the same whatever follows. Let us keep them and forget
# the words: where $h_i$ is given, take it, otherwise compute it.
#
# **Predict.** Do the logits of the table change when its instruction is replaced in this way?


# %%
def equation_3(P_theta, z):
    """P_theta (L, 2, H, P, D), z (T,) -> logits (T, V), literally."""
    P_idx = range(P_theta.shape[3])
    z = [None] * len(P_idx) + list(z)  # [PREFIX; x; y]: no tokens in the prefix
    no_logits = P_theta.new_empty(config.vocab_size)

    def h_at(i, h):
        if i in P_idx:
            return P_theta[..., i, :], no_logits
        return LM(z[i], h)

    return recurrence(len(z), h_at)[1][len(P_idx) :]


instruction = "Write one sentence about this restaurant.\n"
words = torch.tensor(tokenizer.encode(instruction))
P = len(words)
h_words, _ = recurrence(P, lambda i, h: LM(words[i], h))
prompted = model(torch.cat([words, z])[None])[0, P:]  # (T, V), at z's positions
print(f"{P} positions of {h_words[..., 0, :].numel():,} numbers")
check("keys and values against words", equation_3(h_words, z), prompted)

# %% [markdown]
# **Answer.** They do not: the text cannot see where the numbers came from.
#
# ## 4. Equation (3)
# So the numbers need not come from words. There are only $V^P$ instructions of $P$ tokens, but keys
# and values may be any real numbers. Make them parameters:
#
# $$h_i = \begin{cases} P_\theta[i, :] & i \in P_{idx} \\
# \mathrm{LM}_\phi(z_i, h_{<i}) & \text{otherwise.} \end{cases} \qquad (3)$$
#
# $P_\theta$ has $P \times \dim(h_i)$ entries and is all that is trained, with the loss of equation
# (2); $\phi$ is frozen. The first line only looks a value up: $P_\theta[i, :]$ replaces what the
# model would have computed there, in every layer. The second line is the frozen model, and yet its
# $h_i$ depends on $\theta$, because it reads the prefix.

# %%
prefix = Prefix.random(config, P, seed=0).double()  # N(0, 1), as in [2]
P_theta = prefix.table().detach()  # (L, 2, H, P, D)
literal = equation_3(P_theta, z)
check("literal and library", literal, model(z[None], prefix=prefix)[0])

# %% [markdown]
# ## 5. All positions at once
# A loop over positions is slow. The layers are the same for all tokens, so run them on all tokens
# at once. How a layer attends is an argument:


# %%
def run(z, attend, offset=P):
    """z (T,) -> logits (T, V), with attend(layer, q, k, v), all (H, T, D).

    Token t stands at position offset + t (section 8 says why).
    """
    x = model.wte(z) + model.wpe.weight[offset : offset + len(z)]  # (T, C)
    for layer, block in enumerate(model.h):
        qkv = block.attn.c_attn(block.ln_1(x)).view(-1, 3, H, D)
        q, k, v = qkv.permute(1, 2, 0, 3)  # (H, T, D) each
        o = attend(layer, q, k, v)
        x = x + block.attn.c_proj(o.transpose(0, 1).flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return model.head(model.ln_f(x))


# %% [markdown]
# In each layer the queries are those of the T tokens, and the keys are $[K_P; K_S]$, those of the
# prefix and of the S = T tokens. Nothing is computed *at* prefix positions, so they have no
# queries.
#
# Which keys may token $t$ see? Within the text $j \le t$, as always, and all of the prefix, because
# it stands before every token and the causal rule hides only what comes later. So **the prefix
# needs no mask**.

# %%
causal = torch.ones(T, T, dtype=torch.bool).tril()


def weights_of(q, k, prefix_k):
    """q, k (H, T, D), prefix_k (H, P, D) -> p (H, T, P + T)."""
    s = q @ torch.cat([prefix_k, k], 1).mT / math.sqrt(D)
    mask = torch.cat([causal.new_ones(T, prefix_k.shape[1]), causal], 1)
    return s.masked_fill(~mask, -math.inf).softmax(-1)


def concatenated(table):
    def attend(layer, q, k, v):
        prefix_k, prefix_v = table[layer]
        return weights_of(q, k, prefix_k) @ torch.cat([prefix_v, v], 1)

    return attend


check("concatenated and literal", run(z, concatenated(P_theta)), literal)

# %% [markdown]
# ## 6. No concatenation: two softmaxes and a gate
# It is wasteful to copy the prefix before the keys of every row, in every layer. The softmax is a
# ratio of sums, and sums can be split. With one softmax over the keys of the prefix,
#
# $$Z_P = \sum_{j \in P_{idx}} e^{s_{j}}, \quad
# o_P = \frac{1}{Z_P} \sum_{j \in P_{idx}} e^{s_{j}} v_j,$$
#
# and $Z_S$, $o_S$ in the same way over the keys of the text,
#
# $$o = \frac{Z_P\, o_P + Z_S\, o_S}{Z_P + Z_S} = \lambda\, o_P + (1 - \lambda)\, o_S, \qquad
# \lambda = \frac{Z_P}{Z_P + Z_S}.$$
#
# So each token, in each head, has a gate $\lambda$: the part of its attention that goes to the
# prefix. Programs keep $\log Z$, because $Z$ overflows: $\lambda = \sigma(\log Z_P - \log Z_S)$.


# %%
def softmax_part(q, k, v, mask=None):
    """o and log Z over these keys alone: (H, T, D), (H, T, 1)."""
    s = q @ k.mT / math.sqrt(D)
    s = s if mask is None else s.masked_fill(~mask, -math.inf)
    log_Z = s.logsumexp(-1, keepdim=True)
    return (s - log_Z).exp() @ v, log_Z


def two_softmaxes(table):
    def attend(layer, q, k, v):
        o_P, log_Z_P = softmax_part(q, *table[layer])
        o_S, log_Z_S = softmax_part(q, k, v, causal)
        lam = torch.sigmoid(log_Z_P - log_Z_S)  # (H, T, 1)
        return lam * o_P + (1 - lam) * o_S

    return attend


def operator(table):  # on a GPU: the Triton kernel of 04_fused_attention
    def attend(layer, q, k, v):
        return prefix_attention(q[None], k[None], v[None], *table[layer])[0]

    return attend


check("two softmaxes and literal", run(z, two_softmaxes(P_theta)), literal)
check("prefix_attention and literal", run(z, operator(P_theta)), literal)

# %% [markdown]
# ## 7. What the gate does, and what it cannot do
# **Predict.** What happens to $\lambda$ when the prefix gets twice as many positions, each key
# twice? When a query reads more of the text? And when all keys and values of the prefix are zero?


# %%
def inside(table, offset=P):
    """q, k (L, H, T, D) and p (L, H, T, P + T) of each layer, as z is read."""
    noted = []

    def attend(layer, q, k, v):
        noted.append((q, k, weights_of(q, k, table[layer, 0])))
        return concatenated(table)(layer, q, k, v)

    run(z, attend, offset)
    return [torch.stack(x) for x in zip(*noted, strict=True)]


def odds(p, n):
    """lambda / (1 - lambda) = Z_P / Z_S of n prefix positions: (L, H, T)."""
    return p[..., :n].sum(-1) / p[..., n:].sum(-1)


_, _, once = inside(P_theta)
_, _, twice = inside(torch.cat([P_theta, P_theta], 3))
ratio = odds(twice, 2 * P)[0] / odds(once, P)[0]  # layer 0 reads the same x
check("P grows: odds of lambda, 2 P over P", ratio, torch.full_like(ratio, 2))

last = once[:, :, -1]  # the last query's weights, (L, H, P + T)
of_prefix = last[..., :P].sum(-1, keepdim=True)  # (L, H, 1)
of_text = last[..., P:].flip(-1).cumsum(-1)  # of its nearest 1, 2, ... T tokens
lam = of_prefix / (of_prefix + of_text)  # (L, H, T)
for n in (1, 10, T):
    of_n = lam[..., n - 1].mean()
    print(f"the last query over {n:2} tokens: mean lambda {of_n:.2f}")
assert (lam.diff() <= 0).all() and (lam[..., -1] < lam[..., 0]).all()

zero = torch.zeros_like(P_theta)
q, k, p = inside(zero)
s = (q @ k.mT / math.sqrt(D)).masked_fill(~causal, -math.inf)
lam = P / (P + s.exp().sum(-1))  # each zero key adds e^0 = 1 to Z_P
check("zero table: P / (P + Z_S)", p[..., :P].sum(-1), lam)
no_prefix = run(z, concatenated(zero[..., :0, :]))  # at the same positions
moved = (run(z, concatenated(zero)) - no_prefix).abs().max()
print(f"mean lambda {lam.mean():.2f}, logits move by up to {moved:.1f}")
assert moved > 1
closed = Prefix.from_table(P_theta, P, gate=torch.zeros(L, H)).double()
check("g = 0 and no prefix", model(z[None], prefix=closed)[0], no_prefix)

# %% [markdown]
# **Answer.** Each further position adds a positive term to $Z_P$, so $\lambda$ rises with P: twice
# the terms make the *odds* $\lambda / (1 - \lambda) = Z_P / Z_S$ twice as large. Each further token
# adds a term to $Z_S$, so for a given query $\lambda$ falls: in a long text a prefix needs larger
# scores. And a **zero table does change the model**: each of its keys has the score 0 and adds
# $e^0 = 1$ to $Z_P$, so $o = (1 - \lambda)\, o_S$ is too small.
#
# To switch a prefix off, multiply $Z_P$ by 0. The library can train such a factor $g \ge 0$ for
# each layer and head. It is called `gate` there, and it begins at 0:
#
# $$o = \frac{g\, Z_P\, o_P + Z_S\, o_S}{g\, Z_P + Z_S} .$$
#
# Now what a prefix cannot do. The weights within the text are $e^{s_j} / (Z_P + Z_S)$: the prefix
# makes all of them smaller by the same factor $1 - \lambda$. **Within a layer it cannot change how
# the attention to the text is divided among its tokens** (Petrov et al. [4]).
#
# **Predict.** With a strong prefix and without one, compare how a token divides its attention among
# the tokens of the text, layer by layer. Where does it differ?

# %%
# trained on E2E to the end by docs/train_prefixes.py
trained = Prefix.load(TRAINED / "e2e-P10.safetensors").double()
assert trained.prefix_len == P  # as many as the instruction has tokens
q, k, p = inside(trained.table().detach())
division = p[..., P:] / p[..., P:].sum(-1, keepdim=True)  # (L, H, T, T)
none = k[0][:, :0]  # keys of a prefix of no positions
same_x = torch.stack([weights_of(q[i], k[i], none) for i in range(L)])
check("division, against the same q and k alone", division, same_x)
_, _, alone = inside(zero[..., :0, :])  # no prefix in any layer: other x above
differ = (division - alone).abs().amax((1, 2, 3))
print("against no prefix at all, by layer:", *(f"{d:.0e}" for d in differ))
assert differ[0] < 1e-12 and (differ[1:] > 0.01).all()

# %% [markdown]
# **Answer.** In layer 0 nowhere, to the last digits. In every layer above it does differ, because
# the prefix has changed $x$ there, and so the queries and keys. So in its own layer a prefix only
# scales the text's output by $1 - \lambda$ and adds $\lambda\, o_P$. (With P = 1, $o_P$ is even the
# same vector for all tokens.) It does *not* follow that a prefix cannot make the model look
# elsewhere. It can, one layer later: section 11 shows a trained prefix that turns the attention
# back to the table. Whether it can teach a task that needs attention patterns which no layer has
# learned is another question; [4] found tasks where it could not.
#
# ## 8. Why positions shift
# In $[\mathrm{PREFIX}; x; y]$ the prefix takes positions $0 \dots P - 1$, so token $t$ stands at
# $P + t$. The loop counts the prefix's positions by itself. The matrix form does not see them, so
# it must be given the `offset` P. A model with `n_positions` then has room for `n_positions` - P
# tokens of text.
#
# **Predict.** At this offset the keys and values of the instruction do what its words do. A trained
# prefix does not come from words. What does another offset do to its loss?

# %%
rows = encode_examples(tokenizer, dev)
rows = sorted(rows, key=lambda row: len(row.ids))[:16]  # short ones are quick
few = collate(rows, tokenizer.eos_id)
losses = {}
for offset in (P, P - 1, 0, 5 * P):
    moved = Prefix.from_table(trained.table(), position_offset=offset)
    loss = model.token_losses(few.input_ids, few.labels, prefix=moved).mean()
    losses[offset] = loss.item()
    print(f"offset {offset:2}: dev loss {losses[offset]:.3f} nats per token")
assert losses[P] < losses[0] - 0.1 < losses[5 * P] - 0.2
assert abs(losses[P] - losses[P - 1]) < 0.05
unshifted = Prefix.from_table(h_words, position_offset=0)
moved = (model(z[None], prefix=unshifted)[0] - prompted).abs().max()
print(f"the instruction's, at offset 0: its logits move by up to {moved:.0f}")
assert moved > 1

# %% [markdown]
# **Answer.** One position less hardly matters; the offset 0 costs a clear part of what was learned,
# and a distant one costs more. No error is raised. A prefix could be trained at any offset, but it
# must be used at the one it was trained with. P is the convention of [2] and of PEFT.
#
# ## 9. The gradient that reaches $P_\theta$
# Let $\ell$ be the loss and $d_i = \partial \ell / \partial o_i$ what arrives at the output of one
# head for query $i$. With weights $p_{ij}$ over the columns $j$ of $[K_P; K_S]$,
# $o_i = \sum_j p_{ij} v_j$ gives
#
# $$\frac{\partial \ell}{\partial v_j} = \sum_i p_{ij}\, d_i, \qquad
# \frac{\partial \ell}{\partial p_{ij}} = d_i \cdot v_j .$$
#
# The softmax has $\partial p_{il} / \partial s_{ij} = p_{il} (1_{l=j} - p_{ij})$, where $1_{l=j}$
# is 1 for $l = j$ and otherwise 0. Therefore
#
# $$\frac{\partial \ell}{\partial s_{ij}}
# = p_{ij} \Big( d_i \cdot v_j - \sum_l p_{il}\, d_i \cdot v_l \Big)
# = p_{ij}\, d_i \cdot (v_j - o_i),$$
#
# and with $s_{ij} = q_i \cdot k_j / \sqrt D$
#
# $$\frac{\partial \ell}{\partial k_j}
# = \frac{1}{\sqrt D} \sum_i p_{ij}\, d_i \cdot (v_j - o_i)\; q_i .$$
#
# The rows of a batch share the prefix, so for its keys and values the sums over $i$ run over the
# queries of *all* rows (04_fused_attention says in which order). Here there is one row.

# %%
free = P_theta.clone().requires_grad_()
noted = {}


def remembered(layer, q, k, v):
    o = concatenated(free)(layer, q, k, v)
    o.retain_grad()
    noted[layer] = (q, weights_of(q, k, P_theta[layer, 0])[..., :P], o)
    return o


asked = torch.tensor(Y_idx) - 1  # the positions that predict y
log_p = run(z, remembered)[asked].log_softmax(-1)
loss = -log_p[range(len(asked)), y].mean()
loss.backward()
by_hand = torch.empty_like(free)
for layer, (q, p, o) in noted.items():  # (H, T, D), (H, T, P), (H, T, D)
    d, prefix_v = o.grad, P_theta[layer, 1]
    by_hand[layer, 1] = p.mT @ d
    ds = p * (d @ prefix_v.mT - (d * o).sum(-1, keepdim=True))  # (H, T, P)
    by_hand[layer, 0] = ds.mT @ q / math.sqrt(D)
size = free.grad.abs().max()  # to compare relative to it
check("by hand and autograd", by_hand.detach() / size, free.grad / size)

# %% [markdown]
# Every term has the factor $p_{ij}$: a prefix position that no token looks at does not learn. In
# the key's gradient, $v_j - o_i$ says that a key moves towards the queries whose output its value
# would improve. And $d_i$ came down through all frozen layers above: training a prefix costs a
# backward pass through the model, even though no weight of the model gets a gradient.
#
# ## 10. The MLP, and what is kept of it
# The paper reports (section 4.3) that optimizing $P_\theta$ directly was unstable and sensitive to
# the start. It trains a small matrix $P'_\theta$ (P, C) instead, and an MLP (a linear layer to
# `mid_dim`, tanh, a linear layer to $2LC$ [2]):
#
# $$P_\theta[i, :] = \mathrm{MLP}_\theta(P'_\theta[i, :]).$$
#
# The MLP's inputs are the P vectors of $P'_\theta$ and nothing else: no text enters it. So after
# training its output is a constant. Compute it once, keep the table, and throw the rest away.

# %%
mlp = Prefix.random(config, P, seed=0, parametrisation="mlp").double()
kept = mlp.export()
assert torch.equal(model(z[None], prefix=mlp), model(z[None], prefix=kept))
assert [name for name, _ in kept.named_parameters()] == ["prefix_table"]
n_kept = kept.prefix_table.numel()
print(f"trained: {mlp.n_trained:,} numbers, kept: {n_kept:,}")
assert n_kept == P * 2 * L * C

# %% [markdown]
# Whether to train the table or the MLP is a question of training, not of what a prefix can be. With
# `mini` both work, at very different learning rates (03_discrete_to_continuous); 05_table_to_text
# shows why the rates differ.
#
# ## 11. What a trained prefix does
# Here are the gates of section 6, in each head and at each token, with the instruction and with the
# prefix that was trained to the end (2,500 steps of 32 rows of E2E).
#
# **Predict.** Which of the two, the instruction or the trained prefix, gets more attention while
# the *sentence* is written? And where do heads look that find nothing to do?

# %%
tables = {"instruction": h_words, "trained prefix": trained.table().detach()}
weights = {name: inside(table)[2] for name, table in tables.items()}
lams = {name: p[..., :P].sum(-1) for name, p in weights.items()}  # (L, H, T)
figure.shares(
    "02_gates", {name: lam.flatten(0, 1) for name, lam in lams.items()},
    r"$\lambda$, part of the attention", "Oranges", line=bos - 0.5,
    xlabel="token (line: the bos, then the target)",
    yticks=range(0, L * H, H), yticklabels=range(L), ylabel="layer and head",
)  # fmt: skip

# %%
_, _, alone = inside(zero[..., :0, :], offset=0)  # no prefix: first token at 0
sinks = alone[:, :, 1:bos, 0].mean(-1)  # (L, H); token 0 has no choice
source, target, to_source, to_bos = {}, {}, {}, {}
for name, lam in lams.items():
    source[name], target[name] = lam[:, :, 1:bos], lam[:, :, bos + 1 :]
    by_head = torch.stack([sinks, source[name].mean(-1)]).flatten(1)  # (2, L H)
    r = torch.corrcoef(by_head)[0, 1].item()
    top = weights[name][-2:, :, bos + 1 :, P:].mean((0, 1, 2))  # (T,)
    to_source[name], to_bos[name] = top[:bos].sum().item(), top[bos].item()
    means = source[name].mean(), target[name].mean()
    print(f"{name}: mean lambda {means[0]:.2f} in the source,", end=" ")
    print(f"{means[1]:.2f} in the target; correlation with the sinks {r:.2f}")
    print("  last two layers, from the target: ", end="")
    print(f"{to_source[name]:.2f} to the source, {to_bos[name]:.2f} to the bos")
    assert r > 0.5
by_words, by_prefix = tables
assert source[by_words][0].mean() > target[by_words][0].mean()
assert target[by_words].mean() < target[by_prefix].mean() / 2
assert source[by_prefix][:2].mean() < 0.2 < source[by_prefix][2:].mean()
assert to_source[by_prefix] > 5 * to_source[by_words]
assert to_bos[by_words] > 0.4 > 4 * to_bos[by_prefix]

# %% [markdown]
# **Answer.** Three things can be seen. (And in layer 0 with the instruction, $\lambda$ falls from
# left to right as the text grows: section 7.)
# - *The dark lines are sinks.* In 01_gpt2_from_scratch, a head with nothing to do parked on the
#   first token. The more a head does so, the more of its attention goes to a prefix: the printed
#   correlation is between a head's weight on the first token without a prefix and its $\lambda$. In
#   layers 0 and 1 the trained prefix is hardly read at all.
# - *The instruction is forgotten when the sentence begins.* The bos also separates documents in the
#   model's own training. After it, heads park on the bos, and look neither at the instruction nor
#   at the table. The trained prefix keeps more of the attention.
# - *The trained prefix makes the model look back.* In the last two layers the sentence no longer
#   parks on the bos. It reads the table, many times more than with the instruction. No gate can do
#   this within its layer: the cause is the changed $x$ from the layers below.
#
# ## Common mistakes
# > - **A zero table as a start that changes nothing**, PEFT's `init_weights="zero"`. See section 7.
# > - **Other positions in use than in training.** Libraries differ in this, and so do two versions
# >   of one library for padded rows. Save the offset with the prefix.
# > - **Throwing the MLP away too early.** Training can only go on with it. (In the file that is
# >   shipped it is useless: see 05_table_to_text.)
#
# ## Recap
# - Trained is $P_\theta$: P keys and values in each layer. It enters in attention and nowhere else:
#   equation (3). Everything else is the frozen model. An instruction is such a table, too.
# - Two softmaxes and a gate $\lambda$ give the same as concatenation, and copy nothing. $\lambda$
#   rises with P and falls as the text grows; a zero table is not "no prefix".
# - In its own layer a prefix scales the text's output by $1 - \lambda$ and adds $\lambda\, o_P$. It
#   changes where the model looks in the layers above.
# - Nothing is computed at prefix positions, and all tokens come after them: no mask. Token t stands
#   at position P + t.
# - The MLP is a way to train the table. Afterwards $2 P L C$ numbers are kept.
#
# ## Exercises
# 1. *Easy.* Put the P positions of a prefix into another order. What changes in the logits? Is it
#    the same for the words of an instruction? *Hint:* where does the order of a sum matter?
# 2. *Easy.* Give the keys $[K_P; K_S]$ the mask `ones(T, P + T).tril()`. Change one token and list
#    the outputs of the layer that move. Which should have moved? *Hint:* T = 12, P = 4 is enough.
# 3. *Medium.* Show $\partial o / \partial \log Z_P = \lambda (1 - \lambda) (o_P - o_S)$, and check
#    it with autograd. When do the keys of a prefix get no gradient? *Hint:* take P = 1 first.
# 4. *Medium.* *Embedding-only* tuning frees P embeddings (P, C) and lets the model compute the
#    rest. Show that it is equation (3) with a restricted table. How many numbers does each have?
#    *Hint:* by causality, what do the keys and values at these positions depend on?
# 5. *Hard.* Two users, two prefixes of different lengths, one batch: write the attention for it,
#    and check each row against that user alone. *Hint:* pad, and hide what was padded. Then leave
#    the padding visible and see what happens. (07_many_users goes on from here.)
#
# Solutions: `tutorials/solutions/02_equation_3.py`.
#
# ## References
# - [1] Li & Liang 2021, Prefix-tuning: https://arxiv.org/abs/2101.00190
# - [2] The authors' code: https://github.com/XiangLi1999/PrefixTuning
# - [3] Milakov & Gimelshein 2018, Online normalizer calculation for softmax:
#   https://arxiv.org/abs/1805.02867; Dao 2023, FlashAttention-2: https://arxiv.org/abs/2307.08691
# - [4] Petrov et al. 2023, When do prompting and prefix-tuning work?
#   https://arxiv.org/abs/2310.19698
# - He et al. 2022 write a prefix as a gated change of attention, as section 6 does:
#   https://arxiv.org/abs/2110.04366
# - PEFT: https://github.com/huggingface/peft
