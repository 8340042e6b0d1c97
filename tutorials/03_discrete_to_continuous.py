# %% [markdown]
# # 3. From discrete prompts to prefixes
#
# Four ways to tell a frozen model what to do: words written by hand, words found by a search,
# free embeddings in the place of words, and a prefix. They form a ladder: whatever one rung can
# express, the next can express too. This is the argument of sections 4.1 and 7.2 of the paper.
#
# **What you will learn.** Why the rungs are nested, shown in fp64 with equal logits; why a prefix
# is strictly more than embeddings; what each rung reaches when all get the same effort; what words
# learned embeddings are near to; and how much attention a text gives to what stands before it.
#
# **What to know first.** 01_gpt2_from_scratch (keys and values), 02_equation_3 (the prefix in the
# softmax, the share $\lambda$).
#
# **Running time.** About a minute on two CPU cores; three short trainings are most of it. With
# `MODEL = "gpt2"` section 5 takes much longer.
#
# **Sources.** Li & Liang 2021, <https://arxiv.org/abs/2101.00190> (sections 4 and 7.2); Zou et al.
# 2023, <https://arxiv.org/abs/2307.15043> (the search of section 5).

# %%
import math
import tempfile
from pathlib import Path

import torch
from figure import OTHER, PREFIX, TEXT, new, show

import minprefix
from minprefix.cli.demo import BF16
from minprefix.data.batches import collate, encode_examples, encode_prompt
from minprefix.data.load import load_examples
from minprefix.generation.config import GenerationConfig
from minprefix.methods.config import SearchConfig
from minprefix.methods.evaluate import evaluate_method
from minprefix.methods.search.scores import GRADIENT_COST
from minprefix.methods.search.search import PromptSearch
from minprefix.models.activations import LayerPrefix, Visible
from minprefix.prefix.parametrisations import Recorder, computed_table, token_activations
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.precision import in_bf16
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer

MODEL = "mini"
BRIEF = GenerationConfig(max_new_tokens=50)
WORDS = "table-to-text:"  # the prompt by hand, and the start of everything that is trained
STEPS, ROWS = (120, 8) if BF16 else (50, 8)  # fewer where bf16 is slow, to stay within a minute
model, tokenizer = minprefix.load(MODEL)
model.requires_grad_(False)
exact, _ = minprefix.load(MODEL, dtype=torch.float64)  # for everything that is shown to be equal
exact.requires_grad_(False)
fast = in_bf16(model) if BF16 else model  # for everything that takes time
L, C, V = model.config.n_layer, model.config.n_embd, model.config.vocab_size
P = len(tokenizer.encode(WORDS))  # positions of every prompt and prefix here

# %% [markdown]
# ## 1. One task, one measure
#
# The task: restaurant tables to text, here the tables with at most four fields, because short rows
# are cheap. A row is `source, bos, target, eos`. The measure is the loss of eq. (2), the mean of
# $-\log p$ over the target's tokens, in nats, on dev rows that no training sees:
#
# $$\ell = -\frac{1}{|Y|} \sum_{i \in Y} \log p(z_i \mid h_{<i}).$$


# %%
def short(split: str) -> list:
    return [example for example in load_examples("restaurants", split) if len(example.table) <= 4]


train, dev, test = short("train"), short("dev")[:10], short("test")[:12]
dev_rows = encode_examples(tokenizer, dev)


@torch.no_grad()
def dev_loss(prefix: Prefix | None, rows=dev_rows, of=fast) -> float:
    """Nats per target token, with what stands before each row."""
    batch = collate(sorted(rows, key=lambda row: len(row.ids)), tokenizer.eos_id)
    losses = of.token_losses(batch.input_ids, batch.labels, batch.at, prefix=prefix)
    return losses.double().mean().item()


print(f"{sum(len(e.targets) for e in train)} training rows, {len(dev_rows)} dev rows")
print("a source:", dev[0].source)
print("a target:", dev[0].targets[0])
print(f"nothing before the row: {dev_loss(None):.3f} nats per target token")

# %% [markdown]
# ## 2. Rung one: a discrete prompt
#
# A discrete prompt is $P$ tokens before the row. The model never sees a token, only its embedding,
# a row of $W_E$ ($V \times C$). So a prompt is $P$ one-hot rows $O$, and what the model reads is
#
# $$X = O\,W_E, \qquad O \in \{0, 1\}^{P \times V},\ X \in \mathbb{R}^{P \times C}.$$
#
# First one number of it, then the loop over places, then the product.

# %%
prompt = tokenizer.encode(WORDS)
W_E = exact.wte.weight  # (V, C)
print("the prompt's tokens:", [tokenizer.decode([token]) for token in prompt])
print(f"first number of the first embedding: {W_E[prompt[0], 0].item():+.6f}")

X_loop = torch.stack([W_E[token] for token in prompt])  # (P, C), a look-up at each place
one_hot = torch.nn.functional.one_hot(torch.tensor(prompt), V).double()  # (P, V)
X = one_hot @ W_E  # (P, C)
assert torch.equal(X, X_loop)

# %% [markdown]
# ## 3. Rung two: any embeddings
#
# If the model reads $X$, nobody has to choose it from the rows of $W_E$. *Embedding-only* tuning
# frees $X \in \mathbb{R}^{P \times C}$; a discrete prompt is the special case $X = O\,W_E$. The
# logits are the same to the last bit, because the computation is:

# %%
row = dev_rows[0].ids[:-1]  # source, bos, target
from_tokens = exact(torch.tensor([prompt + row]))[0, P:]  # (T, V), the logits behind the prompt
embd = torch.cat([X, W_E[row]])[None]  # (1, P + T, C)
from_embeddings = exact(embd)[0, P:]
gap = (from_tokens - from_embeddings).abs().max().item()
print(f"logits, tokens against embeddings: largest |difference| {gap:.1e}")
assert gap == 0

# %% [markdown]
# ## 4. Rung three: any keys and values
#
# What does the row read of the positions before it? Their keys and values, in each layer, and
# nothing else. By causality these do not depend on the row. So they can be computed once, from $X$
# alone. With $w_p$ the position's embedding, layer by layer ($n = \mathrm{LN}_1(x)$):
#
# $$x^{(0)}_p = X_p + w_p, \qquad k^{(l)}_p = n^{(l)}_p W_K^{(l)} + b_K^{(l)}, \qquad
# v^{(l)}_p = n^{(l)}_p W_V^{(l)} + b_V^{(l)}, \qquad x^{(l+1)} = \mathrm{block}^{(l)}(x^{(l)}).$$
#
# That is a loop over layers. Its result has the shape of a prefix table, $(L, 2, H, P, D)$.

# %%
H, D = exact.config.n_head, exact.config.head_dim
none = LayerPrefix(X.new_empty(H, 0, D), X.new_empty(H, 0, D))  # these positions see no prefix
x, layers = (X + exact.wpe.weight[:P])[None], []  # (1, P, C)
for block in exact.h:
    n = block.ln_1(x)[0]  # (P, C)
    _, k, v = block.attn.c_attn(n).split(C, dim=-1)  # (P, C) each
    layers.append(torch.stack([y.view(P, H, D).transpose(0, 1) for y in (k, v)]))  # (2, H, P, D)
    x = block(x, none, Visible())
table = torch.stack(layers)  # (L, 2, H, P, D)

gap = (table - computed_table(exact, X)).abs().max().item()
print(f"loop against the library's `computed_table`: largest |difference| {gap:.1e}")
assert gap < 1e-12  # fp64: the same products in another batch shape

# %% [markdown]
# Now the prompt is taken away and its keys and values are handed over as a prefix, eq. (3). The row
# stands where it stood behind the prompt, at positions $P, P + 1, \dots$: that is why the tokens'
# positions shift by `position_offset = P`.

# %%
bridge = Prefix.from_table(table, position_offset=P)
from_prefix = exact(torch.tensor([row]), prefix=bridge)[0]  # (T, V): no prompt in the input
size = from_tokens.abs().max().item()
gap = (from_tokens - from_prefix).abs().max().item()
print(f"logits, prompt against prefix: largest |difference| {gap:.1e}, largest |logit| {size:.0f}")
assert gap < 1e-12 * size

library = Prefix.from_prompt(exact, tokenizer, WORDS)  # the same in one call
assert (library.table() - table).abs().max() < 1e-12

# %% [markdown]
# The same holds for embeddings that are no words. Random ones, once before the row and once
# collapsed into a table:

# %%
virtual = Prefix.random(exact.config, P, seed=0, parametrisation="embedding").double()
virtual.bind(exact)  # the frozen model computes the layers above
free = virtual.virtual.virtual_embd  # (P, C), trainable
read = exact(torch.cat([free, W_E[row]])[None])[0, P:]
gap = (read - exact(torch.tensor([row]), prefix=virtual.export())[0]).abs().max().item()
print(f"logits, random embeddings against their table: largest |difference| {gap:.1e}")
assert gap < 1e-12 * read.abs().max().item()

# %% [markdown]
# So: discrete prompts $\subset$ embeddings $\subset$ prefixes. Is the last one strict? Count:

# %%
print(f"for P = {P} positions           choices or free numbers")
print(f"  discrete prompt       {P * math.log2(V):10,.0f}   bits: V^P prompts")
print(f"  embedding-only        {P * C:10,}   numbers: P C")
print(f"  prefix                {P * 2 * L * C:10,}   numbers: P 2 L C")

# %% [markdown]
# Counting suggests it; one layer proves it. In layer 0 the same $n_p \in \mathbb{R}^C$ makes the
# key *and* the value, $2C$ numbers:
#
# $$[k_p\,;\,v_p] - [b_K\,;\,b_V] = n_p\,[W_K\ W_V].$$
#
# Whatever the embeddings are, the left side lies in the row space of $[W_K\ W_V]$, $C$ dimensions
# out of $2C$. Take the keys of one prompt and the values of another: a fine prefix. If any
# embeddings gave it, least squares would find an $n$ with residual 0.

# %%
other = token_activations(exact, tokenizer.encode("Once upon a time, in the old town")[:P])
mixed = table.clone()
mixed[0, 1] = other[0, 1]  # layer 0: the values of other words
W = exact.h[0].attn.c_attn.weight[:, C:]  # (C, 2C): [W_K W_V]
b = exact.h[0].attn.c_attn.bias[C:]  # (2C,)


def unreachable(table) -> float:
    """|residual| / |left side|: the part of layer 0 that no embeddings give."""
    kv = torch.cat([table[0, i].transpose(0, 1).reshape(P, C) for i in (0, 1)], dim=1) - b
    n = torch.linalg.lstsq(W.T, kv.T).solution  # (C, P)
    return ((kv.T - W.T @ n).norm() / kv.norm()).item()


for name, one in (("words", table), ("random embeddings", virtual.table()), ("mixed", mixed)):
    print(f"  layer 0 of {name:18} out of reach of embeddings: {unreachable(one.detach()):.1e}")
assert unreachable(table) < 1e-10 and unreachable(virtual.table().detach()) < 1e-10
assert unreachable(mixed) > 0.01

# %% [markdown]
# Keys say *where* a text looks, values say *what it gets there*. Embeddings tie the two together,
# in layer 0 and through it in all layers above; a prefix sets them freely, in every layer.
#
# ## 5. Trained with equal effort
#
# Nested sets say what is possible, not what training finds. So: the same rows, the same start
# (the words above), the same effort. Effort is counted in row-evaluations, one row read once; a
# step with gradients counts `GRADIENT_COST` per row. The search is greedy coordinate gradient:
# the gradient by the one-hot $O$ proposes tokens, the loss decides. Embeddings and prefix are
# trained with AdamW, the prefix through the paper's MLP. These runs are very short, and the
# search suffers most: it gets a handful of steps. The learning rates are the better of two that
# were tried in such runs.

# %%
EFFORT = GRADIENT_COST * STEPS * ROWS
folder = Path(tempfile.mkdtemp(prefix="minprefix-"))
start = Prefix.from_prompt(model, tokenizer, WORDS)
begin_loss = dev_loss(start)

found = PromptSearch(
    model, tokenizer,
    SearchConfig(
        prompt_len=P, steps=1000, budget=EFFORT, batch_size=8, judge_rows=16, chains=1, starts=16,
        candidates=32, start=(WORDS,), eval_every=1, precision="bf16" if BF16 else "fp32",
    ),
    train, [], folder / "search",
)  # fmt: skip
result = found.run(progress=False)
searched = found.prefix(result["tokens"])
print(f"searched prompt: {result['text']!r}")
print(f"  {result['steps']} steps, {result['row_evaluations']:,} row-evaluations of {EFFORT:,}")


# %%
def tune(name: str, parametrisation: str, lr: float) -> tuple[Prefix, list[tuple[int, float]]]:
    """Train from WORDS; the prefix, and its dev loss against the row-evaluations spent."""
    prefix = Prefix.from_prompt(model, tokenizer, WORDS, parametrisation=parametrisation)
    config = TrainConfig(
        steps=STEPS, batch_size=ROWS, lr=lr, warmup_steps=10, eval_every=STEPS // 4, samples=0,
        precision="bf16" if BF16 else "fp32",
    )  # fmt: skip
    Trainer(model, tokenizer, config, train, dev, folder / name, prefix).run(progress=False)
    log = [entry for entry in read_log(folder / name) if "dev_loss" in entry and entry["step"]]
    cost = GRADIENT_COST * ROWS
    return prefix, [(0, begin_loss), *((cost * e["step"], e["dev_loss"]) for e in log)]


embeddings, embeddings_curve = tune("embedding-only", "embedding", lr=3e-2)
tuned, tuned_curve = tune("prefix", "mlp", lr=2e-3)

# %% [markdown]
# The search notes each prompt that it accepted; their dev losses make its curve.

# %%
search_curve = []
log = read_log(folder / "search")
spent = {entry["step"]: entry["row_evaluations"] for entry in log if "row_evaluations" in entry}
for entry in log:
    if "tokens" in entry:
        search_curve.append((spent.get(entry["step"], 0), dev_loss(found.prefix(entry["tokens"]))))

ladder = {
    "nothing": None,
    "words by hand": start,
    "searched prompt": searched,
    "embedding-only": embeddings.export(),
    "prefix": tuned.export(),
}
losses = {name: dev_loss(prefix) for name, prefix in ladder.items()}
for name, loss in losses.items():
    print(f"  {name:16} {loss:.3f} nats per target token")
order = sorted(losses, key=losses.get, reverse=True)
print("from worst to best:", " > ".join(order))

# %%
figure, axes = new(width=5.6)
curves = (
    ("searched prompt", search_curve, TEXT),
    ("embedding-only", embeddings_curve, OTHER),
    ("prefix", tuned_curve, PREFIX),
)
for name, curve, colour in curves:
    axes.plot(*zip(*curve, strict=True), "o-", color=colour, label=name, ms=4)
axes.axhline(losses["words by hand"], color="#888888", lw=1, ls="--", label=f"words: {WORDS!r}")
axes.set(xlabel="effort (row-evaluations)", ylabel="dev loss (nats per target token)")
axes.set_title("The same start, the same effort")
axes.legend(frameon=False, fontsize=9)
show(figure, "03_ladder")

# %% [markdown]
# ## 6. What words are the learned embeddings near to?
#
# The learned $X$ has $P$ rows; for each, the token whose embedding has the largest cosine. If
# embedding-only tuning had found a prompt, the cosines would be near 1, and the nearest tokens
# would do the same work.

# %%
X = embeddings.virtual.virtual_embd.detach()  # (P, C)
W_E = model.wte.weight
cosine = torch.nn.functional.normalize(X, dim=1) @ torch.nn.functional.normalize(W_E, dim=1).T
best = cosine.topk(3, dim=1)
print("begins as   norm now   nearest tokens (cosine)")
for token, x, values, ids in zip(prompt, X, best.values, best.indices, strict=True):
    near = ", ".join(
        f"{tokenizer.decode([int(i)])!r} {c:.2f}" for i, c in zip(ids, values, strict=True)
    )
    print(f"{tokenizer.decode([token])!r:10}  {x.norm():8.1f}   {near}")
print(f"norm of a token's embedding: {W_E.norm(dim=1).mean():.1f} on average")
nearest = best.indices[:, 0].tolist()
rounded = dev_loss(Prefix.from_table(token_activations(model, nearest), P))
print(
    f"dev loss, learned embeddings: {losses['embedding-only']:.3f}; nearest tokens: {rounded:.3f}"
)

# %% [markdown]
# Where the norms have grown far past those of tokens and the nearest cosines are low, the solution
# is no misspelt sentence: it lies off the set of prompts, and rounding it back loses what was won.
# Where the nearest tokens are still those that it began with, all that was learned is in the part
# that no token has.
#
# ## 7. How much attention goes to it?
#
# In 02_equation_3 the output is $o = \lambda o_P + (1 - \lambda) o_S$, with $\lambda$ the softmax
# mass on the prefix. From the definition, for query $i$ with scores $s_{ij}$:
#
# $$\lambda_i = \sum_{j \in P_{idx}} e^{s_{ij}} \Big/ \Big( \sum_{j \in P_{idx}} e^{s_{ij}} +
# \sum_{j \le i} e^{s_{ij}} \Big).$$
#
# A cache sees every layer's queries and keys pass; one that computes $\lambda$ on the way:


# %%
class Mass(Recorder):
    """Notes the share of attention on the prefix: by layer, (H, T)."""

    def attend(self, layer, q, k, v, prefix, visible):
        p, T = prefix.k.shape[-2], q.shape[2]
        s = q @ torch.cat([prefix.k[None], k], dim=2).mT * q.shape[-1] ** -0.5  # (1, H, T, P + T)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        s[..., p:] = s[..., p:].masked_fill(hidden, -math.inf)
        weights = s.softmax(-1)  # (1, H, T, P + T)
        self.kv[layer] = weights[0, :, :, :p].sum(-1)  # (H, T)
        return weights @ torch.cat([prefix.v[None], v], dim=2)  # (1, H, T, D)


@torch.no_grad()
def mass(prefix: Prefix, ids: list[int]) -> torch.Tensor:
    """lambda of each layer, head and token: (L, H, T)."""
    recorder = Mass(torch.device("cpu"))
    logits = model(torch.tensor([ids]), cache=recorder, prefix=prefix)
    assert torch.allclose(logits, model(torch.tensor([ids]), prefix=prefix), atol=1e-3)
    return torch.stack([recorder.kv[layer] for layer in range(L)])


seen = {name: mass(ladder[name], row) for name in ("searched prompt", "embedding-only", "prefix")}
begins = dev_rows[0].prompt_len - 1  # the bos: from here on the model writes
for name, share in seen.items():
    source, target = share[:, :, :begins].mean(), share[:, :, begins:].mean()
    print(f"  {name:16} lambda over the source {source:.2f}, while it writes {target:.2f}")

# %%
figure, axes = new(columns=3, width=3.4, height=3.4)
for axis, (name, share) in zip(axes, seen.items(), strict=True):
    image = axis.imshow(share[:, :, begins:].mean(-1), vmin=0, vmax=1, cmap="magma", aspect="auto")
    axis.set(xlabel="head", ylabel="layer", title=name, yticks=range(L), xticks=range(H))
figure.colorbar(image, ax=axes, label="share of attention on the P positions")
show(figure, "03_mass_by_head")

# %%
figure, axes = new(width=11, height=3.6)
for (name, share), colour in zip(seen.items(), (TEXT, OTHER, PREFIX), strict=True):
    axes.plot(share.mean((0, 1)), "o-", ms=3, color=colour, label=name)
axes.axvline(begins, color="#888888", lw=1, ls="--")
axes.set_xticks(range(len(row)), [tokenizer.decode([t]) for t in row], rotation=90, fontsize=7)
axes.set(xlabel="token (dashed: the bos, behind it the target)", ylim=(0, 1))
axes.set(ylabel="mean share over layers, heads")
axes.legend(frameon=False)
show(figure, "03_mass_by_token")

# %% [markdown]
# The first token has nothing but itself and the prefix to look at; each further token adds a key of
# the text to the sum below the line, so the share falls along the row unless the keys of the prefix
# win. Which heads keep looking, and in which layers, is what each method chose.
#
# ## 8. What they write

# %%
print("table:    ", test[0].source)
print("reference:", test[0].targets[0], "\n")
for name, prefix in ladder.items():
    if prefix is None:  # nothing before the row, in the same frame
        prompts = [encode_prompt(tokenizer, example.source) for example in test[:1]]
        text = minprefix.generate(fast, tokenizer, prompts, max_new_tokens=40)[0].strip()
        print(f"{name:16} {'':29} {text[:90]!r}")
        continue
    scores, texts = evaluate_method(fast, tokenizer, test, prefix=prefix, config=BRIEF)
    short_scores = f"BLEU {scores['bleu']:5.1f}, slots {scores['slot_coverage']:5.1f} %"
    print(f"{name:16} {short_scores:29} {texts[0][:90]!r}")

# %% [markdown]
# Scores are over the first test tables only, greedy; after runs this short they say which rung is
# usable first, not how good it gets. `make demo` trains the prefix longer, and
# `python -m benchmarks.paper table4` compares the rungs on E2E over several seeds.
#
# ## Recap
#
# - A discrete prompt is a choice of embeddings; embeddings are a prefix that the model computed for
#   itself. Logits agree to rounding, so each rung can begin where the one before it ended.
# - A prefix is strictly more: in layer 0 alone, embeddings reach half of the directions.
# - Expressive is not the same as easy: the prefix has the most numbers, and it took an MLP, warm-up
#   and a smaller learning rate to train them. The printed ladder says how far each came.
# - A rung that is inside another can still be the one to choose: a prompt needs no training
#   framework, and it can be read.
#
# ## Exercises
#
# 1. Give the bridge of section 4 the offset 0 instead of $P$. Are the logits still those of the
#    prompt? Why not?
# 2. Is the prefix of a prompt "A B" the prefix of A beside the prefix of B? Compare layer by layer.
# 3. Climb the ladder: begin an MLP prefix from *random embeddings'* table with `fit_last_layer`,
#    and show that its logits are those of the embeddings.
# 4. Which part of the loss's gradient by the table can embeddings follow? For P = 1, find by
#    differences the directions in which embeddings move a table, and project the gradient on them.
#
# Solutions: `tutorials/solutions/03_discrete_to_continuous.py`. Next: 04_fused_attention; for the
# task itself, 05_table_to_text.
#
# ## References
#
# Li & Liang 2021, <https://arxiv.org/abs/2101.00190>; Lester et al. 2021 (prompt tuning),
# <https://arxiv.org/abs/2104.08691>; Shin et al. 2020 (AutoPrompt),
# <https://arxiv.org/abs/2010.15980>; Zou et al. 2023 (greedy coordinate gradient),
# <https://arxiv.org/abs/2307.15043>.
