# %% [markdown]
# # 3. From discrete prompts to prefixes
# There are four ways to tell a frozen model what to do: words written by hand, words found by a
# search, free embeddings in the place of words, and a prefix. Whatever one of them can express, the
# next can express, too. This is the argument of sections 4.1 and 7.2 of the paper.
#
# **What you will learn.** Why the four are nested. Why there are prefixes that no embeddings give.
# What each reaches with equal effort, and how much the learning rate decides. Which words learned
# embeddings are near to.
#
# **What to know first.** 01_gpt2_from_scratch (keys and values, and its
# [table of letters](01_gpt2_from_scratch.py)) and 02_equation_3.
#
# **Running time.** A good minute on two CPU cores; one search and four short trainings are most of
# it.
#
# **Sources.** Li & Liang 2021, <https://arxiv.org/abs/2101.00190> (sections 4 and 7.2); Zou et al.
# 2023, <https://arxiv.org/abs/2307.15043> (the search of section 5).

# %%
import tempfile

import figure  # tutorials/figure.py: all that only draws
import torch
import torch.nn.functional as F
from short_training import for_training, loss_on, train

import minprefix
from minprefix import Prefix
from minprefix.data.batches import encode_pair
from minprefix.data.load import load_examples
from minprefix.methods.config import SearchConfig
from minprefix.methods.search.scores import GRADIENT_COST
from minprefix.methods.search.search import PromptSearch
from minprefix.prefix.parametrisations import computed_table, token_activations

WORDS = "table-to-text:"  # the prompt by hand, and every start
model, tokenizer = minprefix.load("mini")
model.requires_grad_(False)
frozen = for_training(model)  # in bf16 if this CPU has it, which is faster
exact, _ = minprefix.load("mini", dtype=torch.float64)  # to show equality
exact.requires_grad_(False)
config = model.config
L, H, D = config.n_layer, config.n_head, config.head_dim
C, V = config.n_embd, config.vocab_size
P = len(tokenizer.encode(WORDS))  # positions of every prompt and prefix here

# %% [markdown]
# ## 1. One task, one measure
# The task is restaurant tables to text, here only tables with at most four fields, because short
# rows are cheap. A row is `source, bos, target, eos`. The measure is the loss of equation (2)
# (02_equation_3), in nats per target token, on dev rows that no training sees.


# %%
def short(split: str) -> list:
    examples = load_examples("restaurants", split)
    return [example for example in examples if len(example.table) <= 4]


train_set, dev = short("train"), short("dev")[:10]


def dev_loss(prefix: Prefix | None) -> float:
    """Nats per target token, with a prefix before each row."""
    return loss_on(frozen, tokenizer, dev, prefix)


n_rows = sum(len(example.targets) for example in train_set)
print(f"{n_rows} training rows, {sum(len(e.targets) for e in dev)} dev rows")
print("a source:", dev[0].source)
print("a target:", dev[0].targets[0])
print(f"nothing before the row: {dev_loss(None):.3f} nats per target token")

# %% [markdown]
# ## 2. A discrete prompt
# A discrete prompt is $P$ tokens before the row. The model never sees a token, only its embedding,
# one of the $V$ vectors in the matrix $W_E$ ($V \times C$). To choose one of them is to multiply by
# a one-hot vector, so what the model reads is $X = \mathrm{onehot}(z)\,W_E$, of shape $P \times C$.

# %%
prompt = tokenizer.encode(WORDS)
W_E = exact.wte.weight  # (V, C)
print("the prompt's tokens:", [tokenizer.decode([token]) for token in prompt])
X = F.one_hot(torch.tensor(prompt), V).double() @ W_E  # (P, C)
assert torch.equal(X, torch.stack([W_E[token] for token in prompt]))

# %% [markdown]
# ## 3. Any embeddings
# If the model reads $X$, its vectors need not come from $W_E$. *Embedding-only* tuning (elsewhere
# called prompt tuning) trains $X \in \mathbb{R}^{P \times C}$ itself; a discrete prompt is a
# special case. Our models take token ids or embeddings, and give the same logits to the last bit:

# %%
row = encode_pair(tokenizer, dev[0].source, dev[0].targets[0]).ids[:-1]
from_tokens = exact(torch.tensor([prompt + row]))[0, P:]  # (T, V)
embd = torch.cat([X, W_E[row]])[None]  # (1, P + T, C)
from_embeddings = exact(embd)[0, P:]
gap = (from_tokens - from_embeddings).abs().max().item()
print(f"logits, tokens against embeddings: largest |difference| {gap:.1e}")
assert gap == 0

# %% [markdown]
# ## 4. Any keys and values
# The row reads only the keys and values of the positions before it, and these do not depend on the
# row (02_equation_3). So they can be computed once, from $X$ alone. With $w_i$ the embedding of
# position $i$ (`wpe`), and $W_K$, $W_V$, $b_K$, $b_V$ the parts of the matrix `c_attn` and of its
# bias that make keys and values, layer by layer:
#
# $$x^{(0)}_i = X_i + w_i, \qquad n = \mathrm{LN}_1(x), \qquad
# k^{(l)}_i = n^{(l)}_i W_K^{(l)} + b_K^{(l)}, \qquad
# v^{(l)}_i = n^{(l)}_i W_V^{(l)} + b_V^{(l)}, \qquad x^{(l+1)} = \mathrm{block}^{(l)}(x^{(l)}).$$
#
# The result has the shape of a prefix table, $(L, 2, H, P, D)$.

# %%
x, layers = X + exact.wpe.weight[:P], []  # (P, C)
for block in exact.h:
    qkv = block.attn.c_attn(block.ln_1(x)).view(P, 3, H, D)
    q, k, v = qkv.permute(1, 2, 0, 3)  # (H, P, D) each
    layers.append(torch.stack([k, v]))  # (2, H, P, D)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + block.attn.c_proj(o.transpose(0, 1).flatten(1))
    x = x + block.mlp(block.ln_2(x))
table = torch.stack(layers)  # (L, 2, H, P, D)

gap = (table - computed_table(exact, X)).abs().max().item()
print(f"loop and the library's `computed_table`: {gap:.1e} apart")
assert gap < 1e-12  # fp64: the same products in another order

# %% [markdown]
# Now the prompt is taken away, and its keys and values are handed over as a prefix, equation (3).
# The row stands where it stood after the prompt, at positions $P, P + 1, \dots$, so
# `position_offset` is P.

# %%
bridge = Prefix.from_table(table, position_offset=P)
from_prefix = exact(torch.tensor([row]), prefix=bridge)[0]  # (T, V)
size = from_tokens.abs().max().item()
gap = (from_tokens - from_prefix).abs().max().item()
print(f"logits, prompt and prefix: {gap:.1e} apart, largest |logit| {size:.0f}")
assert gap < 1e-12 * size

library = Prefix.from_prompt(exact, tokenizer, WORDS)  # the same in one call
assert (library.table() - table).abs().max() < 1e-12

# the same for embeddings that are no words, here random ones
virtual = Prefix.random(config, P, seed=0, parametrisation="embedding").double()
virtual.bind(exact)  # the model that computes keys and values from them
(free,) = virtual.parameters()  # (P, C): all that would be trained
read = exact(torch.cat([free, W_E[row]])[None])[0, P:]
as_table = exact(torch.tensor([row]), prefix=virtual.export())[0]
gap = (read - as_table).abs().max().item()
print(f"logits, random embeddings and their table: {gap:.1e} apart")
assert gap < 1e-12 * read.abs().max().item()

# %% [markdown]
# So discrete prompts are among the embeddings, and embeddings among the prefixes. There are $V^P$
# prompts; embeddings are $P C$ free numbers; a prefix has $P \cdot 2 L C$, a factor $2 L$ more. Are
# there prefixes that no embeddings give? One layer is enough to see it. In layer 0 the same
# $n_i \in \mathbb{R}^C$ makes the key *and* the value, $2C$ numbers:
#
# $$[k_i\,;\,v_i] - [b_K\,;\,b_V] = n_i\,[W_K\ W_V].$$
#
# Whatever the embeddings are, the left side lies in a space of $C$ dimensions out of $2C$.
#
# **Predict.** Take the keys of one prompt and the values of another. That is a prefix. Do any
# embeddings give this table? If so, least squares finds an $n$ that leaves nothing over.

# %%
other_words = tokenizer.encode("Once upon a time, in the old town")[:P]
other = token_activations(exact, other_words)
mixed = table.clone()
mixed[0, 1] = other[0, 1]  # layer 0: the values of other words
W = exact.h[0].attn.c_attn.weight[:, C:]  # (C, 2C): [W_K W_V]
b = exact.h[0].attn.c_attn.bias[C:]  # (2C,)


def unreachable(table) -> float:
    """|residual| / |left side|: the part of layer 0 that no embeddings give."""
    kv = table[0].permute(2, 0, 1, 3).reshape(P, 2 * C) - b
    n = torch.linalg.lstsq(W.T, kv.T).solution  # (C, P)
    return ((kv.T - W.T @ n).norm() / kv.norm()).item()


tables = {"words": table, "random embeddings": virtual.table().detach()}
tables["mixed"] = mixed
residuals = {name: unreachable(one) for name, one in tables.items()}
for name, part in residuals.items():
    print(f"  {name:18} part that no embeddings give: {part:.1e}")
assert max(residuals["words"], residuals["random embeddings"]) < 1e-10
assert residuals["mixed"] > 0.01

# %% [markdown]
# **Answer.** No embeddings give this table. Keys say *where* a text looks, values say *what it gets
# there*. Embeddings tie the two together, in layer 0 and through it in all layers above. A prefix
# sets them freely, in every layer. (This is about tables. It does not show that no embeddings could
# reach the same *outputs* by another table.)
#
# ## 5. Trained with equal effort
# What is possible is not what training finds. So we train all of them on the same rows, from the
# same start (the words above), with the same effort. Effort is counted in row-evaluations: reading
# a row once is one, and a step with gradients costs `GRADIENT_COST` = 2 for each of its 8 rows,
# because the backward pass through a frozen model takes about as much work as the forward pass.
#
# The search is *greedy coordinate gradient*: the gradient with respect to the one-hot vectors
# proposes tokens, and the loss decides. It finishes the step in which its budget runs out. The
# others get as many steps as fit into what it has spent.
#
# Embeddings and prefix are trained with the loop of `short_training.py`, which 05_table_to_text
# explains. The prefix is trained in two ways: through the paper's MLP, at two learning rates, and
# as a table without an MLP. (The rate of 1e-3 comes from [earlier trials](../docs/log.md).) These
# are single runs, so small differences say nothing.
#
# **Predict.** The prefix can express the most. Is it ahead with equal effort? And how much does the
# learning rate matter?

# %%
cost = GRADIENT_COST * 8  # row-evaluations of a step with gradients
# one chain of prompts; 32 candidates a step, the best is judged on 16 rows
search = SearchConfig(
    prompt_len=P, steps=1000, budget=60 * cost, batch_size=8, judge_rows=16,
    chains=1, starts=16, candidates=32, start=(WORDS,),
)  # fmt: skip
folder = tempfile.mkdtemp(prefix="minprefix-")
found = PromptSearch(model, tokenizer, search, train_set, [], folder)
result = found.run(progress=False)
steps = result["row_evaluations"] // cost
print(f"searched prompt: {result['text']!r}, {result['steps']} steps")
print(f"{result['row_evaluations']:,} row-evaluations;", end=" ")
print(f"the others: {steps} steps, {steps * cost:,} row-evaluations")


def tune(kind: str, lr: float) -> tuple[Prefix, list[float]]:
    """Train from WORDS: the prefix, and its dev loss after 0, 10, ... steps."""
    prefix = Prefix.from_prompt(model, tokenizer, WORDS, parametrisation=kind)
    losses = [dev_loss(prefix)]
    how = {"steps": steps, "lr": lr, "warmup": 10}
    training = train(frozen, tokenizer, train_set, prefix, **how)
    for step, _ in enumerate(training, 1):
        if step % 10 == 0 or step == steps:
            losses.append(dev_loss(prefix))
    return prefix, losses


# %%
KINDS = {
    "embeddings, rate 6e-2": ("embedding", 6e-2, figure.OTHER, "o-"),
    "prefix by MLP, 1e-3": ("mlp", 1e-3, figure.PREFIX, "o-"),
    "prefix by MLP, 4e-3": ("mlp", 4e-3, figure.PREFIX, "o:"),
    "prefix, table, 6e-2": ("table", 6e-2, figure.PALE, "o-"),
}
at = [cost * step for step in (*range(0, steps, 10), steps)]
curves, ends = {}, {}
for name, (kind, lr, colour, style) in KINDS.items():
    prefix, losses = tune(kind, lr)
    curves[name], ends[name] = (at, losses, colour, style), losses[-1]
    if kind == "embedding":
        embeddings = prefix
hand = dev_loss(Prefix.from_prompt(model, tokenizer, WORDS))
searched = dev_loss(found.prefix(result["tokens"]))
ends |= {"words by hand": hand, "searched prompt": searched}
for name, loss in sorted(ends.items(), key=lambda end: end[1]):
    print(f"  {name:21} {loss:.3f} nats per target token")
marks = {"words by hand": (hand, figure.FAINT)}
marks["searched prompt"] = searched, figure.TEXT
figure.lines(
    "03_ladder", curves, marks, xlabel="effort (row-evaluations)",
    ylabel="dev loss (nats per target token)",
    title="The same start, the same effort",
)  # fmt: skip
learned = ends["embeddings, rate 6e-2"]
assert ends["prefix by MLP, 1e-3"] < learned - 0.1
assert ends["prefix, table, 6e-2"] < learned - 0.1
assert learned < searched - 1
assert abs(searched - hand) < 0.3
assert ends["prefix by MLP, 4e-3"] > hand + 1
after_ten = {name: losses[1] for name, (_, losses, *_) in curves.items()}
assert after_ten["prefix by MLP, 1e-3"] > hand + 1
assert after_ten["prefix, table, 6e-2"] < hand - 0.5

# %% [markdown]
# **Answer.** At a suitable rate the prefix ends ahead of the embeddings, with the MLP and without
# it. These two end so close together that single runs cannot say which is better.
#
# But the MLP at four times its rate ends *worse than the words that it began with*, and even at
# 1e-3 it loses the words at first. The MLP is the cause, not the table: all its weights move
# together, so the table moves much farther than the rate says (05_table_to_text measures how far).
# In these runs the table without an MLP, and the embeddings, learn well at sixty times the MLP's
# rate. So when a prefix loses in a short trial, look at its learning rate first.
#
# The search hardly improves on the words. It cannot take small steps along a gradient: it must try
# whole tokens, and this effort pays for a handful of its steps.
#
# ## 6. Which words are the learned embeddings near to?
# For each of the $P$ learned vectors of $X$ we look for the tokens whose embeddings have the
# largest cosine with it.
#
# **Predict.** Has embedding-only tuning found a prompt, so that the nearest tokens do the same
# work?

# %%
X = next(embeddings.parameters()).detach()  # (P, C)
W_E = model.wte.weight
best = (F.normalize(X, dim=1) @ F.normalize(W_E, dim=1).T).topk(3, dim=1)
print("begins as   norm now   nearest tokens (cosine)")
for i, token in enumerate(prompt):
    near = ", ".join(
        f"{tokenizer.decode([int(z)])!r} {cosine:.2f}"
        for z, cosine in zip(best.indices[i], best.values[i], strict=True)
    )
    print(f"{tokenizer.decode([token])!r:10}  {X[i].norm():8.1f}   {near}")
norms = W_E.norm(dim=1)
print(f"norm of a token's embedding: {norms.mean():.1f} on average")
nearest = best.indices[:, 0].tolist()
rounded = dev_loss(Prefix.from_table(token_activations(model, nearest), P))
print(f"dev loss: learned {learned:.3f}, nearest tokens {rounded:.3f}")
assert best.values.max() < 0.6 and X.norm(dim=1).min() > 1.5 * norms.mean()
assert rounded > learned + 1

# %% [markdown]
# **Answer.** No. The learned vectors are much longer than those of tokens, and even the nearest
# token points in quite another direction. In some places it is still the token that training began
# with. Rounded to tokens, nearly all that was learned is lost: the solution lies far from all
# prompts.
#
# ## Common mistakes
# > - **One learning rate for all methods.** In PEFT's own benchmark the accuracy of a prefix more
# >   than doubles with another length, start and rate. Compare methods at their best settings.
# > - **A verdict after one short run.** After ten steps of section 5 the MLP's prefix is behind
# >   even the words; at the end it is ahead of the embeddings.
# > - **"Prompt tuning" for "prefix-tuning".** Prompt tuning trains embeddings. Its results say
# >   little about prefixes, and a file of one cannot be loaded as the other.
# > - **Tokens that merge at the seam.** If prompt and row are tokenised as one string, the tokens
# >   at the border can differ from those of the parts. Join token ids, as section 3 does.
# > - **A prefix made of two prompts' prefixes side by side.** It is not the prefix of the joined
# >   prompt (exercise 2). Nor are two *trained* prefixes side by side their two tasks together:
# >   neither was trained in the presence of the other. (A trained prefix before an instruction is
# >   possible: the instruction is part of the text. Train it with the instruction in every row.)
#
# ## Recap
# - A discrete prompt is a choice of embeddings, and embeddings are a prefix that the model computes
#   for itself: the logits agree to rounding.
# - Most tables come from no embeddings: in layer 0 alone, embeddings reach half of the directions.
# - What a method can express and what it learns are two things. The MLP won at a small learning
#   rate; at four times that rate it lost to the words.
# - The less expressive method can still be the right choice: a prompt needs no training framework,
#   and it can be read.
#
# ## Exercises
# 1. *Easy.* Give the bridge of section 4 the offset 0 instead of $P$. Are the logits still those of
#    the prompt? Why not? *Hint:* which embedding does the first token of the row get?
# 2. *Medium.* Is the prefix of a prompt "A B" the prefix of A beside the prefix of B? Compare layer
#    by layer. *Hint:* move B to its positions first; in which layer does B begin to read A?
# 3. *Medium.* Begin an MLP prefix from the table of *random embeddings* with `fit_last_layer`, and
#    show that its logits are those of the embeddings. *Hint:* `virtual.table()` and `prefix.mlp`.
# 4. *Hard.* The gradient of the loss with respect to the table has $2LC$ numbers for P = 1. Which
#    part of it can embeddings follow? *Hint:* by differences, find the $C$ directions in which
#    embeddings move a table, and project the gradient on them.
#
# Solutions: `tutorials/solutions/03_discrete_to_continuous.py`.
#
# ## References
# Li & Liang 2021, <https://arxiv.org/abs/2101.00190>; Lester et al. 2021 (prompt tuning),
# <https://arxiv.org/abs/2104.08691>; Shin et al. 2020 (AutoPrompt),
# <https://arxiv.org/abs/2010.15980>; Zou et al. 2023 (greedy coordinate gradient),
# <https://arxiv.org/abs/2307.15043>; PEFT's benchmark of methods,
# <https://github.com/huggingface/peft/tree/main/method_comparison>.
