# %% [markdown]
# # 2. Equation 3: what a prefix is
# Prefix-tuning changes one line of a language model, equation (3) of Li & Liang [1]. Here that line
# is derived and then rewritten: a loop that reads like the paper, a concatenation, two softmaxes
# with a gate, and the operator that a GPU kernel computes. Each must give the logits of the one
# before, through all layers of the embedded model.
#
# **What you will learn.** What exactly is trained, and where it enters. What a written
# instruction does to the model, and why numbers in its place can do more. Why positions shift, why
# the prefix needs no mask, what gradient reaches it, why it is trained through an MLP and what is
# kept of that. The letters are those of the README: T tokens, P prefix positions, L layers, H heads
# of D numbers, C = H D.
#
# **What to know first.** 01_gpt2_from_scratch: attention, the residual stream, and $h_i$, the keys
# and values that a position leaves behind. Derivatives of a softmax help in section 8.
#
# **Running time.** About a minute on two CPU cores, nearly all of it in section 9, which trains.
# With a larger `MODEL` section 9 takes longer.
#
# **Sources.** Li & Liang [1] and the authors' code [2]; the softmax in two parts is that of
# online softmax [3]. The list is at the end.

# %%
import math

import torch
from figure import FAINT, OTHER, PREFIX, TEXT, new, show
from matplotlib.colors import to_rgb

import minprefix
from kernels import prefix_attention
from minprefix.data.batches import collate, encode_examples, encode_pair
from minprefix.data.load import load_examples
from minprefix.prefix.prefix import Prefix

MODEL = "mini"  # embedded; or gpt2, gpt2-medium, a folder
model, tokenizer = minprefix.load(MODEL, dtype=torch.float64)
model.requires_grad_(False)  # phi of the paper: frozen, here and in all that follows
config = model.config
L, H, C, D = config.n_layer, config.n_head, config.n_embd, config.head_dim


def check(name, a, b):
    """Print how far a is from b, and fail if that is more than rounding in fp64."""
    gap, size = (a - b).abs().max().item(), b.abs().max().item()
    print(f"{name}: largest |difference| {gap:.0e}, largest value {size:.3g}")
    assert gap <= 1e-11 * max(1, size)  # 1e5 roundings of 1e-16: sums through all layers


# %% [markdown]
# ## 1. Equation (1): the model as a recurrence
# Let $z_i$ be the token at position $i$. The model is
#
# $$h_i = \mathrm{LM}_\phi(z_i, h_{<i}), \qquad (1)$$
#
# where $h_i$ is all that later positions read of position $i$: one key and one value in each layer
# and head, so $h_i$ has shape (L, 2, H, D), and $h_{<i}$ is a cache of $i$ of them. The function
# below is equation (1), and returns the logits of $p(z_{i+1} \mid h_{\le i})$ beside it.


# %%
def LM(z, h, i):
    """Token z at position i, h_<i (L, 2, H, i, D) -> h_i (L, 2, H, D), logits (V,)."""
    x, h_i = model.wte(z) + model.wpe.weight[i], []  # (C,)
    for block, past in zip(model.h, h, strict=True):
        q, k, v = block.attn.c_attn(block.ln_1(x)).view(3, H, D)
        keys = torch.cat([past[0], k[:, None]], dim=1)  # (H, i + 1, D)
        values = torch.cat([past[1], v[:, None]], dim=1)
        p = (keys @ q[..., None] / math.sqrt(D)).softmax(1)  # (H, i + 1, 1)
        x = x + block.attn.c_proj((p * values).sum(1).flatten())
        x = x + block.mlp(block.ln_2(x))
        h_i.append(torch.stack([k, v]))
    return torch.stack(h_i), model.head(model.ln_f(x))


def recurrence(z, h_at):
    """h_i = h_at(i, h_<i) for i = 0, 1, ...: all of h (L, 2, H, S, D), logits (S, V)."""
    h, logits = model.wte.weight.new_empty(L, 2, H, 0, D), []
    for i in range(len(z)):
        h_i, logits_i = h_at(i, h)
        h = torch.cat([h, h_i[..., None, :]], dim=3)
        logits.append(logits_i)
    return h, torch.stack(logits)


# %% [markdown]
# The example is a table and its text from the embedded data, as training reads it:
# $z = [x; y]$ with the table $x$, a token that ends it, the text $y$ and the end of text.

# %%
example = min(load_examples("restaurants", "dev"), key=lambda e: len(e.source))
pair = encode_pair(tokenizer, example.source, example.targets[0])
z = torch.tensor(pair.ids[:-1])  # (T,) what is read; the end of text is only predicted
T = len(z)
h, logits = recurrence(z, lambda i, h: LM(z[i], h, i))
print(f"x: {example.source}\ny: {example.targets[0]}")
check("the recurrence and the model", logits, model(z[None])[0])

# %% [markdown]
# ## 2. Equation (2): what is asked of it
# The model reads all of $z$ and is asked only for $y$. With $Y_{idx}$ the positions of $y$,
#
# $$\max_\phi \; \log p_\phi(y \mid x)
# = \max_\phi \sum_{i \in Y_{idx}} \log p_\phi(z_i \mid h_{<i}). \qquad (2)$$
#
# $z_i$ is predicted at position $i - 1$. So the label at position $t$ is the next token, and
# labels that lie in $x$ do not count. Fine-tuning maximises (2) over the weights $\phi$.

# %%
Y_idx = range(pair.prompt_len, len(pair.ids))
log_p = logits.log_softmax(-1)  # (T, V)
nats = torch.stack([-log_p[i - 1, pair.ids[i]] for i in Y_idx])

batch = collate([pair], tokenizer.eos_id)  # labels as the library makes them: -100 = no loss
for t in range(pair.prompt_len - 3, pair.prompt_len + 2):
    read, asked = int(z[t]), batch.labels[0, t].item()
    read = "the end of x" if read == tokenizer.bos_id else repr(tokenizer.decode([read]))
    asked = "nothing" if asked < 0 else repr(tokenizer.decode([asked]))
    print(f"position {t:3} reads {read:14} is asked for {asked}")
check("equation (2) and token_losses", nats, model.token_losses(z[None], batch.labels))
print(f"-log p(y | x) = {nats.sum():.1f} nats, {nats.mean():.2f} a token")

# %% [markdown]
# ## 3. What an instruction does to $h$
# Without training, one writes an instruction before the table. Its tokens take positions
# $0 \dots P - 1$. Later positions meet it in attention only: all that it does, it does through its
# rows of $h$, and by causality these rows are the same whatever follows. Let us cut them out.

# %%
words = torch.tensor(tokenizer.encode("Write one sentence about this restaurant.\n"))
P = len(words)
h_words, _ = recurrence(words, lambda i, h: LM(words[i], h, i))  # (L, 2, H, P, D)
prompted = model(torch.cat([words, z])[None])[0, P:]  # (T, V) at the positions of z
print(f"P = {P} rows of {h_words[..., 0, :].numel():,} numbers")

# %% [markdown]
# Now comes the step that is the whole idea. Forget the words and keep the rows. Where a row
# is given, take it; else compute. The result cannot differ, and it does not.


# %%
def equation_3(P_theta, z):
    """P_theta (L, 2, H, P, D), z (T,) -> logits (T, V), literally."""
    P_idx = range(P_theta.shape[3])
    z = [None] * len(P_idx) + list(z)  # [PREFIX; x; y]: no tokens stand in the prefix

    def h_at(i, h):
        if i in P_idx:
            return P_theta[..., i, :], torch.empty(config.vocab_size, dtype=P_theta.dtype)
        return LM(z[i], h, i)

    return recurrence(z, h_at)[1][len(P_idx) :]


check("the rows and the words", equation_3(h_words, z), prompted)

# %% [markdown]
# ## 4. Equation (3)
# The model cannot see where the rows came from, so they need not come from words. There are
# only $V^P$ instructions of length $P$; rows may be any real numbers. Make them parameters:
#
# $$h_i = \begin{cases} P_\theta[i, :] & i \in P_{idx} \\
# \mathrm{LM}_\phi(z_i, h_{<i}) & \text{otherwise.} \end{cases} \qquad (3)$$
#
# $P_\theta$ has $|P_{idx}| \times \dim(h_i)$ entries and is all that is trained, on equation (2) as
# it stands, with $Y_{idx}$ counted behind the prefix; $\phi$ is frozen. The first line is a plain
# read: rows do not pass through the model, they *are* activations, of every layer. The second line
# is the frozen model, and yet its $h_i$ depends on $\theta$: it reads the prefix on the way.

# %%
P = 5
prefix = Prefix.random(config, P, seed=0).double()  # its table: N(0, 1), as in [2]
P_theta = prefix.table().detach()  # (L, 2, H, P, D); row i of the paper is P_theta[..., i, :]
literal = equation_3(P_theta, z)
check("literal equation (3) and the library", literal, model(z[None], prefix=prefix)[0])

# %% [markdown]
# ## 5. All positions at once
# A loop over positions is slow. The layers are the same for all tokens, so run them on all tokens,
# and leave open only how a layer attends:


# %%
def run(z, attend, offset=P):
    """z (T,) -> logits (T, V); attend(layer, q, k, v), all (H, T, D), is its attention."""
    x = model.wte(z) + model.wpe.weight[offset : offset + len(z)]  # (T, C)
    for layer, block in enumerate(model.h):
        q, k, v = block.attn.c_attn(block.ln_1(x)).view(-1, 3, H, D).permute(1, 2, 0, 3)
        x = x + block.attn.c_proj(attend(layer, q, k, v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return model.head(model.ln_f(x))


# %% [markdown]
# In each layer the queries are those of the T tokens, and the keys are $[K_P; K_S]$, those of
# prefix and tokens. Nothing is computed *at* prefix positions, so there are no queries for them.
#
# Which keys may token $t$ see? In the sequence $j \le t$, as ever. Of the prefix all: it stands
# before every token, where the causal rule forbids nothing. So **the prefix needs no mask**. Said
# with the full triangle of $P + T$ positions: drop the first P rows, and what is left of the first
# P columns is all ones.

# %%
full = torch.ones(P + T, P + T, dtype=torch.bool).tril()  # [PREFIX; x; y] reading itself
mask = full[P:]  # (T, P + T): the queries that exist
assert mask[:, :P].all() and torch.equal(mask[:, P:], torch.ones(T, T).tril().bool())


def concatenated(table):
    def attend(layer, q, k, v):
        keys, values = torch.cat([table[layer, 0], k], 1), torch.cat([table[layer, 1], v], 1)
        s = q @ keys.mT / math.sqrt(D)  # (H, T, P + T)
        return s.masked_fill(~mask, -math.inf).softmax(-1) @ values

    return attend


check("concatenated and literal", run(z, concatenated(P_theta)), literal)

# %%
n = P + 12  # positions that are drawn
cells = torch.ones(n, n, 3)
cells[full[:n, :n]] = torch.tensor(to_rgb(TEXT))
cells[P:, :P] = torch.tensor(to_rgb(PREFIX))
cells[:P][full[:P, :n]] = torch.tensor(to_rgb(FAINT))
picture, ax = new(width=5.2, height=4.6)
ax.imshow(cells)
ax.set(xlabel="position that is read (j)", ylabel="reader (i)", xticks=range(n), yticks=range(n))
ax.set_title("orange: $P_{idx}$, read by all   blue: causal   grey: never computed", fontsize=9)
show(picture, "02_mask")

# %% [markdown]
# ## 6. No concatenation: two softmaxes and a gate
# Copying the prefix in front of the keys of every row, in every layer, is waste. The softmax is a
# ratio of sums, and sums can be split. With the unnormalised sums over prefix and sequence,
#
# $$Z_P = \sum_{j \in P} e^{s_{j}}, \quad o_P = \frac{1}{Z_P} \sum_{j \in P} e^{s_{j}} v_j, \qquad
# Z_S, \; o_S \text{ likewise,}$$
#
# $$o = \frac{Z_P\, o_P + Z_S\, o_S}{Z_P + Z_S} = \lambda\, o_P + (1 - \lambda)\, o_S, \qquad
# \lambda = \frac{Z_P}{Z_P + Z_S}.$$
#
# A kernel keeps $\log Z$, for $Z$ overflows: $\lambda = \sigma(\log Z_P - \log Z_S)$. This
# is also the best way to see what a prefix does. In each head, for each token, a gate
# $\lambda$ opens towards the prefix, and through it come mixtures of its P values. The layer's
# attention to the text, $o_S$, goes on beside it, times $1 - \lambda$.


# %%
def softmax_part(q, k, v, seen=None):
    """o and log Z over these keys alone: (H, T, D), (H, T, 1)."""
    s = q @ k.mT / math.sqrt(D)
    s = s if seen is None else s.masked_fill(~seen, -math.inf)
    log_Z = s.logsumexp(-1, keepdim=True)
    return (s - log_Z).exp() @ v, log_Z


def two_softmaxes(table, gates=None):
    def attend(layer, q, k, v):
        o_P, log_Z_P = softmax_part(q, *table[layer])
        o_S, log_Z_S = softmax_part(q, k, v, mask[:, P:])
        lam = torch.sigmoid(log_Z_P - log_Z_S)  # (H, T, 1)
        if gates is not None:
            gates.append(lam[..., 0])
        return lam * o_P + (1 - lam) * o_S

    return attend


def operator(table):
    return lambda layer, q, k, v: prefix_attention(q[None], k[None], v[None], *table[layer])[0]


check("two softmaxes and literal", run(z, two_softmaxes(P_theta)), literal)
check("kernels.prefix_attention and literal", run(z, operator(P_theta)), literal)

# %% [markdown]
# The last line ran the operator that the library's models call. On a GPU it is the Triton kernel of
# tutorial 04_fused_attention.
#
# ## 7. Why positions shift
# In $z = [\mathrm{PREFIX}; x; y]$ the prefix takes positions $0 \dots P - 1$, so token $t$ of $x$
# stands at $P + t$. In `LM(z[i], h, i)` this came by itself. In the matrix form it must be said
# (`offset`), since the P positions have no embeddings that would be counted. The rows of a real
# instruction show what it is for: they were computed at $0 \dots P - 1$, and the model
# has learned how text at $P, P + 1, \dots$ reads what stands there.

# %%
P_words = h_words.shape[3]
shifted = model(z[None], prefix=Prefix.from_table(h_words, position_offset=P_words))[0]
check("offset P: the instruction itself", shifted, prompted)
for offset in (P_words, P_words - 1, 0):
    out = model(z[None], prefix=Prefix.from_table(h_words, position_offset=offset))[0]
    moved, stay = (out - prompted).abs().max(), (out.argmax(-1) == prompted.argmax(-1)).sum()
    print(f"offset {offset:2}: logits move by {moved:6.3f}, {stay} of {T} likeliest tokens stay")

# %% [markdown]
# With another offset the model reads the same words under a text that stands elsewhere: another
# function, better or worse by luck. Learned rows have no words behind them, and would get used to
# any offset in training; then it must stay the same in use (section 10). P is the convention of
# [2] and of PEFT.
#
# ## 8. The gradient that reaches $P_\theta$
# Let $\ell$ be the loss and $d_t = \partial \ell / \partial o_t$ what arrives at the output of
# one head at token $t$. With weights $p_{tj}$ over $[K_P; K_S]$, $o_t = \sum_j p_{tj} v_j$ gives
#
# $$\frac{\partial \ell}{\partial v_j} = \sum_t p_{tj}\, d_t, \qquad
# \frac{\partial \ell}{\partial p_{tj}} = d_t \cdot v_j .$$
#
# The softmax has $\partial p_{tj} / \partial s_{tm} = p_{tj} (\delta_{jm} - p_{tm})$, therefore
#
# $$\frac{\partial \ell}{\partial s_{tm}}
# = p_{tm} \Big( d_t \cdot v_m - \sum_j p_{tj}\, d_t \cdot v_j \Big)
# = p_{tm}\, d_t \cdot (v_m - o_t),$$
#
# and with $s_{tm} = q_t \cdot k_m / \sqrt D$
#
# $$\frac{\partial \ell}{\partial k_m}
# = \frac{1}{\sqrt D} \sum_t p_{tm}\, d_t \cdot (v_m - o_t)\; q_t .$$

# %%
free = P_theta.clone().requires_grad_()
seen = {}


def remembered(layer, q, k, v):
    o = concatenated(free)(layer, q, k, v)
    o.retain_grad()
    seen[layer] = (q, k, o)
    return o


at = [i - 1 for i in Y_idx]
loss = -run(z, remembered)[at].log_softmax(-1)[range(len(at)), pair.ids[pair.prompt_len :]].mean()
loss.backward()
by_hand = torch.empty_like(free)
for layer, (q, k, o) in seen.items():
    prefix_k, prefix_v = P_theta[layer]
    s = q @ torch.cat([prefix_k, k], 1).mT / math.sqrt(D)
    p = s.masked_fill(~mask, -math.inf).softmax(-1)[..., :P]  # (H, T, P): the prefix's columns
    d = o.grad  # (H, T, D)
    by_hand[layer, 1] = p.mT @ d
    ds = p * (d @ prefix_v.mT - (d * o).sum(-1, keepdim=True))  # (H, T, P)
    by_hand[layer, 0] = ds.mT @ q / math.sqrt(D)
size = free.grad.abs().max()  # to compare relative to it
check("gradient by hand and autograd", by_hand.detach() / size, free.grad / size)

# %% [markdown]
# Every term has the factor $p_{tj}$: a row that no token looks at does not learn. The key's
# gradient also has $v_m - o_t$: a key is pulled towards queries whose output its value would
# improve. And $d_t$ came down through all frozen layers above: training a prefix costs a backward
# pass through the model, though no weight of it gets a gradient.
#
# ## 9. Why an MLP
# Optimised directly, $P_\theta$ was unstable and sensitive to its start, the paper reports
# (section 4.3). It trains a reparametrisation instead, of a small matrix $P'_\theta$,
#
# $$P_\theta[i, :] = \mathrm{MLP}_\theta(P'_\theta[i, :]),$$
#
# in [2]: an embedding (P, C), a linear layer to `mid_dim`, tanh, a linear layer to $2LC$. We do not
# take this on trust. The same batches, the same steps, AdamW, several learning rates, two random
# starts each:

# %%
STEPS, BATCH, SEEDS = 20, 4, (0, 1)
small, _ = minprefix.load(MODEL)  # fp32: twice as fast
small.requires_grad_(False)


def shortest(split, n):  # short rows are quick
    rows = encode_examples(tokenizer, load_examples("restaurants", split))
    return sorted(rows, key=lambda row: len(row.ids))[:n]


train_rows, dev_rows = shortest("train", 96), shortest("dev", 16)
order = torch.randperm(STEPS * BATCH, generator=torch.Generator().manual_seed(0)) % len(train_rows)


def loss_of(rows, prefix):
    """Equation (2), as a mean per token, in nats."""
    batch = collate(rows, tokenizer.eos_id)
    return small.token_losses(batch.input_ids, batch.labels, prefix=prefix).mean()


@torch.no_grad()
def dev_loss(prefix):
    return loss_of(dev_rows, prefix).item()


def train(prefix, lr):
    """All there is to training: AdamW on the prefix's parameters. The loss of each step."""
    optimizer, losses = torch.optim.AdamW(prefix.parameters(), lr, weight_decay=0), []
    for step in order.view(STEPS, BATCH).tolist():
        loss = loss_of([train_rows[i] for i in step], prefix)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
RATES = {"table": (1e-2, 1e-1, 1.0), "mlp": (1e-4, 1e-3, 1e-2)}  # lr, a factor of 10 apart
runs = {}
for kind, rates in RATES.items():
    for lr in rates:
        for seed in SEEDS:
            trained = Prefix.random(config, P, seed, parametrisation=kind)
            losses = train(trained, lr)
            runs[kind, lr, seed] = (losses, dev_loss(trained), trained)
        shown = ", ".join(f"{runs[kind, lr, seed][1]:.2f}" for seed in SEEDS)
        print(f"{kind:5}  lr {lr:<6g}  dev loss after {STEPS} steps, by seed: {shown}")

# %%
picture, axes = new(2, width=4.8)
for (kind, lr, seed), (losses, _, _) in runs.items():
    shade = 0.35 + 0.3 * RATES[kind].index(lr)
    smooth = torch.tensor(losses).unfold(0, 4, 1).mean(1)  # of 4 steps, whose rows differ
    colour, line = (PREFIX, "-") if kind == "mlp" else (OTHER, "--")
    label = f"{kind}, lr {lr:g}" if seed == 0 else None
    axes[0].plot(range(2, 2 + len(smooth)), smooth, line, color=colour, alpha=shade, label=label)
axes[0].set(xlabel="step", ylabel="training loss (nats per token)")
axes[0].legend(fontsize=7)
for kind, colour in (("table", OTHER), ("mlp", PREFIX)):
    points = [(lr, dev) for (name, lr, _), (_, dev, _) in runs.items() if name == kind]
    axes[1].semilogx(*zip(*points, strict=True), "o", color=colour, label=kind)
axes[1].set(xlabel="learning rate", ylabel=f"dev loss after {STEPS} steps (nats per token)")
axes[1].legend()
show(picture, "02_mlp")

# %% [markdown]
# The instability that the paper reports does *not* show here: each form has a good rate among the
# three, fails at ten times that rate, and ends close to the same loss from both starts. What
# shows is the smaller claim: at its best rate the MLP is ahead after equally many steps. A finer
# search of rates, more steps or another model may say otherwise.
#
# It also shows why the two want such different rates. AdamW moves each parameter by about lr in a
# step. An entry of a direct table is one parameter; an entry of the MLP's table is a sum of
# `mid_dim` products, all of which move. And since all P rows pass through the same two
# layers, what one row learns moves the others.

# %%
best = {
    kind: min((runs[kind, lr, seed] for lr in RATES[kind] for seed in SEEDS), key=lambda r: r[1])
    for kind in RATES
}
print(f"best of each: table {best['table'][1]:.2f}, mlp {best['mlp'][1]:.2f} nats per token")
if MODEL == "mini":
    assert best["mlp"][1] < best["table"][1]  # as the text says

# %% [markdown]
# ## 10. What is kept
# The MLP's inputs are the P rows of $P'_\theta$ and nothing else: no text enters it. So once it is
# trained, its output is a constant. Compute it once, keep the table, throw the rest away.

# %%
mlp = best["mlp"][2]
kept = mlp.export()
assert torch.equal(small(z[None], prefix=mlp), small(z[None], prefix=kept))
assert [name for name, _ in kept.named_parameters()] == ["prefix_table"]


def numbers(L, C, P, mid_dim):
    """Entries of P_theta; parameters of the MLP and P'_theta that train it."""
    table = P * 2 * L * C
    return table, P * C + (C + 1) * mid_dim + (mid_dim + 1) * 2 * L * C


assert numbers(L, C, P, 512) == (kept.prefix_table.numel(), mlp.n_trained)
assert numbers(24, 1024, 5, 512)[0] == 245_760  # the paper's E2E prefix, "250K"
for name, size in {MODEL: (L, C, P, 512), "gpt2-medium": (24, 1024, 5, 512)}.items():
    n_kept, n_trained = numbers(*size)
    mib = 4 * n_kept / 2**20  # fp32
    print(f"{name:12} P = {P}: trained {n_trained:11,}, kept {n_kept:8,} ({mib:.2f} MiB)")

# %% [markdown]
# Two last looks at the trained prefix. First section 7's promise: the same rows, with the text
# at other positions than in training. Then the gates $\lambda$ of section 6, layer by layer,
# beside those of the written instruction.

# %%
for offset in (P, P - 1, 0):
    moved = Prefix.from_table(kept.table(), position_offset=offset)
    print(f"trained at offset {P}, used at {offset}: dev loss {dev_loss(moved):.3f}")

picture, axes = new(2, width=4.8, height=5)
table = kept.table().detach().double()
for ax, rows, title in ((axes[0], h_words, "instruction"), (axes[1], table, "trained prefix")):
    gates = []
    run(z, two_softmaxes(rows, gates), offset=rows.shape[3])
    lam = torch.cat(gates)  # (L H, T)
    image = ax.imshow(lam, cmap="Oranges", vmin=0, vmax=1, aspect="auto")
    ax.axvline(pair.prompt_len - 1.5, color=TEXT)  # from here on, tokens are predicted
    ax.set_yticks(range(0, L * H, H), range(L))
    ax.set(xlabel="token t (blue: where y begins)", ylabel="layer, and in it the heads")
    ax.set_title(f"{title}: mean {lam.mean():.2f}")
picture.colorbar(image, ax=axes, label=r"$\lambda$, weight of the prefix")
show(picture, "02_gates")

# %% [markdown]
# ## Recap
# - Trained is $P_\theta$: P keys and values in each layer. It enters in attention and nowhere else:
#   $h_i = P_\theta[i, :]$ for $i \in P_{idx}$, equation (3). All else is the frozen model.
# - An instruction is such a table, too: one of $V^P$. That is why a prefix can do at least what
#   an instruction of its length can; 03_discrete_to_continuous goes from one to the other.
# - Two softmaxes and a gate $\lambda$ give the same as concatenation, and need no copy of anything.
# - Nothing is computed at prefix positions, and all tokens stand behind them: no mask.
# - Token t stands at position P + t, as behind an instruction. What matters is to use the offset of
#   the training.
# - The MLP is a way to train the table. It is gone afterwards: $2 P L C$ numbers are kept.
#
# ## Exercises
# Solutions are in `tutorials/solutions/02_equation_3.py`.
#
# 1. Permute the P rows of a prefix. What changes in the logits, and why? Is it the same for the
#    words of an instruction?
# 2. Set all values of a prefix to 0 and leave its keys. What does it still do to a layer's output?
# 3. Show $\partial o / \partial \log Z_P = \lambda (1 - \lambda) (o_P - o_S)$, and check it with
#    autograd. When does a prefix get no gradient through its keys?
# 4. *Embedding-only* tuning frees P rows of embeddings (P, C) and lets the model compute the rest.
#    Show that it is equation (3) with a restricted table. How many numbers does each have?
# 5. Two users, two prefixes of different lengths, one batch: write the attention for it, and check
#    each row against that user alone. (07_many_users goes on from here.)
#
# ## References
# - [1] Li & Liang 2021, Prefix-tuning: https://arxiv.org/abs/2101.00190
# - [2] The authors' code: https://github.com/XiangLi1999/PrefixTuning
# - [3] Milakov & Gimelshein 2018, Online normalizer calculation for softmax:
#   https://arxiv.org/abs/1805.02867; Dao 2023, FlashAttention-2: https://arxiv.org/abs/2307.08691
# - He et al. 2022 write a prefix as a gated change of attention, as section 6 does, and compare it
#   with adapters: https://arxiv.org/abs/2110.04366
# - PEFT, whose prefix-tuning shares the layout of the table: https://github.com/huggingface/peft
