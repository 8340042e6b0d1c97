# %% [markdown]
# # 3. From discrete prompts to prefixes
# Four ways to tell a frozen model what to do: words written by hand, words found by a search,
# free embeddings in the place of words, and a prefix. They form a ladder: whatever one of them can
# express, the next can express too. This is the argument of sections 4.1 and 7.2 of the paper.
#
# **What you will learn.** Why the four are nested, shown in fp64 with equal logits. Why a prefix
# can express strictly more than embeddings. What each reaches with equal effort, and how much the
# learning rate decides. Which words learned embeddings are near to.
#
# **What to know first.** 01_gpt2_from_scratch (keys and values, and its
# [table of letters](01_gpt2_from_scratch.py)) and 02_equation_3.
#
# **Running time.** About a minute on two CPU cores; one search and two short trainings are most of
# it. With `MODEL = "gpt2"` section 5 takes much longer.
#
# **Sources.** Li & Liang 2021, <https://arxiv.org/abs/2101.00190> (sections 4 and 7.2); Zou et al.
# 2023, <https://arxiv.org/abs/2307.15043> (the search of section 5).

# %%
import tempfile
from pathlib import Path

import torch
from figure import FAINT, OTHER, PREFIX, TEXT, new, show

import minprefix
from minprefix.data.batches import collate, encode_examples
from minprefix.data.load import load_examples
from minprefix.methods.config import SearchConfig
from minprefix.methods.search.scores import GRADIENT_COST
from minprefix.methods.search.search import PromptSearch
from minprefix.models.activations import LayerPrefix, Visible
from minprefix.prefix.parametrisations import computed_table, token_activations
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer

MODEL = "mini"
WORDS = "table-to-text:"  # the prompt by hand, and every start
STEPS, ROWS = 60, 8
model, tokenizer = minprefix.load(MODEL)
model.requires_grad_(False)
exact, _ = minprefix.load(MODEL, dtype=torch.float64)  # to show equality
exact.requires_grad_(False)
config = model.config
L, H, D = config.n_layer, config.n_head, config.head_dim
C, V = config.n_embd, config.vocab_size
P = len(tokenizer.encode(WORDS))  # positions of every prompt and prefix here

# %% [markdown]
# ## 1. One task, one measure
# The task is restaurant tables to text, here only tables with at most four fields, because short
# rows are cheap. A row is `source, bos, target, eos`. The measure is the loss of equation (2), the
# mean of $-\log p$ over the target's tokens, in nats, on dev rows that no training sees:
#
# $$\ell = -\frac{1}{|Y|} \sum_{i \in Y} \log p(z_i \mid h_{<i}).$$


# %%
def short(split: str) -> list:
    examples = load_examples("restaurants", split)
    return [example for example in examples if len(example.table) <= 4]


train, dev, test = short("train"), short("dev")[:10], short("test")[0]
dev_rows = encode_examples(tokenizer, dev)


@torch.no_grad()
def dev_loss(prefix: Prefix | None) -> float:
    """Nats per target token, with a prefix before each row."""
    ids, labels = dev_batch.input_ids, dev_batch.labels
    losses = model.token_losses(ids, labels, dev_batch.at, prefix=prefix)
    return losses.mean().item()


dev_batch = collate(dev_rows, tokenizer.eos_id)
n_rows = sum(len(example.targets) for example in train)
print(f"{n_rows} training rows, {len(dev_rows)} dev rows")
print("a source:", dev[0].source)
print("a target:", dev[0].targets[0])
print(f"nothing before the row: {dev_loss(None):.3f} nats per target token")

# %% [markdown]
# ## 2. A discrete prompt
# A discrete prompt is $P$ tokens before the row. The model never sees a token, only its embedding,
# a line of $W_E$ ($V \times C$). To choose a line is to multiply by a one-hot vector, so what the
# model reads is $X = \mathrm{onehot}(z)\,W_E$, of shape $P \times C$.

# %%
prompt = tokenizer.encode(WORDS)
W_E = exact.wte.weight  # (V, C)
print("the prompt's tokens:", [tokenizer.decode([token]) for token in prompt])
one_hot = torch.nn.functional.one_hot(torch.tensor(prompt), V).double()
X = one_hot @ W_E  # (P, C)
assert torch.equal(X, torch.stack([W_E[token] for token in prompt]))

# %% [markdown]
# ## 3. Any embeddings
# If the model reads $X$, nobody has to choose it from the lines of $W_E$. *Embedding-only* tuning
# frees $X \in \mathbb{R}^{P \times C}$. A discrete prompt is a special case of it, and its logits
# are the same to the last bit, because the computation is:

# %%
row = dev_rows[0].ids[:-1]  # source, bos, target
from_tokens = exact(torch.tensor([prompt + row]))[0, P:]  # (T, V)
embd = torch.cat([X, W_E[row]])[None]  # (1, P + T, C)
from_embeddings = exact(embd)[0, P:]
gap = (from_tokens - from_embeddings).abs().max().item()
print(f"logits, tokens against embeddings: largest |difference| {gap:.1e}")
assert gap == 0

# %% [markdown]
# ## 4. Any keys and values
# What does the row read of the positions before it? Their keys and values, in each layer, and
# nothing else. By causality these do not depend on the row. So they can be computed once, from $X$
# alone. With $w_i$ the embedding of position $i$, layer by layer ($n = \mathrm{LN}_1(x)$):
#
# $$x^{(0)}_i = X_i + w_i, \qquad k^{(l)}_i = n^{(l)}_i W_K^{(l)} + b_K^{(l)}, \qquad
# v^{(l)}_i = n^{(l)}_i W_V^{(l)} + b_V^{(l)}, \qquad x^{(l+1)} = \mathrm{block}^{(l)}(x^{(l)}).$$
#
# That is a loop over layers. Its result has the shape of a prefix table, $(L, 2, H, P, D)$.

# %%
none = LayerPrefix(*X.new_empty(2, H, 0, D))  # these see no prefix
x, layers = (X + exact.wpe.weight[:P])[None], []  # (1, P, C)
for block in exact.h:
    n = block.ln_1(x)[0]  # (P, C)
    _, k, v = block.attn.c_attn(n).split(C, dim=-1)  # (P, C) each
    layers.append(torch.stack([k, v]).view(2, P, H, D).transpose(1, 2))
    x = block(x, none, Visible())
table = torch.stack(layers)  # (L, 2, H, P, D)

gap = (table - computed_table(exact, X)).abs().max().item()
print(f"loop and the library's `computed_table`: {gap:.1e} apart")
assert gap < 1e-12  # fp64: the same products in another batch shape

# %% [markdown]
# Now the prompt is taken away, and its keys and values are handed over as a prefix, equation (3).
# The row stands where it stood after the prompt, at positions $P, P + 1, \dots$: that is why the
# positions of the tokens shift by `position_offset = P`.

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
virtual.bind(exact)  # the frozen model computes the layers above
free = virtual.virtual.virtual_embd  # (P, C), trainable
read = exact(torch.cat([free, W_E[row]])[None])[0, P:]
as_table = exact(torch.tensor([row]), prefix=virtual.export())[0]
gap = (read - as_table).abs().max().item()
print(f"logits, random embeddings and their table: {gap:.1e} apart")
assert gap < 1e-12 * read.abs().max().item()

# %% [markdown]
# So discrete prompts are among the embeddings, and embeddings among the prefixes. There are $V^P$
# prompts; embeddings are $P C$ free numbers; a prefix has $P \cdot 2 L C$, a factor $2 L$ more.
# Counting suggests that a prefix can express more; one layer proves it. In layer 0 the same
# $n_i \in \mathbb{R}^C$ makes the key *and* the value, $2C$ numbers:
#
# $$[k_i\,;\,v_i] - [b_K\,;\,b_V] = n_i\,[W_K\ W_V].$$
#
# Whatever the embeddings are, the left side lies in a space of $C$ dimensions out of $2C$.
#
# **Predict.** Take the keys of one prompt and the values of another. That is a prefix. Do any
# embeddings give it? If so, least squares finds an $n$ that leaves nothing over.

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


computed = virtual.table().detach()
kinds = {"words": table, "random embeddings": computed, "mixed": mixed}
left = {name: unreachable(one) for name, one in kinds.items()}
for name, rest in left.items():
    print(f"  {name:18} part that no embeddings give: {rest:.1e}")
assert max(left["words"], left["random embeddings"]) < 1e-10
assert left["mixed"] > 0.01

# %% [markdown]
# **Answer.** No embeddings give it. Keys say *where* a text looks, values say *what it gets there*.
# Embeddings tie the two together, in layer 0 and through it in all layers above. A prefix sets them
# freely, in every layer.
#
# ## 5. Trained with equal effort
# What is possible is not what training finds. So we train all three on the same rows, from the
# same start (the words above), with the same effort. Effort is counted in row-evaluations: one row
# read once is one, and a step with gradients costs `GRADIENT_COST` for each row. The search is
# greedy coordinate gradient: the gradient with respect to the one-hot vectors proposes tokens, and
# the loss decides. It stops at the end of the step in which its budget is spent; the other two then
# get as many steps as fit into what it has spent. (The dev losses of the curves are not counted.)
# Embeddings and prefix are trained with AdamW, the prefix through the paper's MLP, each at the best
# of a few learning rates that were tried; and the prefix once more at four times its rate.
#
# **Predict.** The prefix can express the most. Is it ahead with equal effort? And how much does the
# learning rate matter?

# %%
folder = Path(tempfile.mkdtemp(prefix="minprefix-"))
start = Prefix.from_prompt(model, tokenizer, WORDS)

search = SearchConfig(
    prompt_len=P, steps=1000, budget=GRADIENT_COST * STEPS * ROWS,
    batch_size=8, judge_rows=16, chains=1, starts=16, candidates=32,
    start=(WORDS,), eval_every=1, precision="fp32",
)  # fmt: skip
found = PromptSearch(model, tokenizer, search, train, [], folder / "search")
result = found.run(progress=False)
searched = found.prefix(result["tokens"])
print(f"searched prompt: {result['text']!r}, {result['steps']} steps")
cost = GRADIENT_COST * ROWS  # of a step with gradients
steps = result["row_evaluations"] // cost
print(f"{result['row_evaluations']:,} row-evaluations;", end=" ")
print(f"the others: {steps} steps, {steps * cost:,} row-evaluations")
assert 0 <= result["row_evaluations"] - steps * cost < cost


# %%
def tune(name: str, kind: str, lr: float) -> tuple[Prefix, list]:
    """Train from WORDS: the prefix, and its dev loss by row-evaluations."""
    how = {"parametrisation": kind}
    prefix = Prefix.from_prompt(model, tokenizer, WORDS, **how)
    config = TrainConfig(
        steps=steps, batch_size=ROWS, lr=lr, warmup_steps=10, eval_every=20,
        samples=0, precision="fp32",
    )  # fmt: skip
    out = folder / name
    trainer = Trainer(model, tokenizer, config, train, dev, out, prefix)
    trainer.run(progress=False)
    log = [entry for entry in read_log(out) if "dev_loss" in entry]
    return prefix, [(cost * e["step"], e["dev_loss"]) for e in log]


embeddings, embeddings_curve = tune("embedding-only", "embedding", 6e-2)
tuned, tuned_curve = tune("prefix", "mlp", 1e-3)
_, hasty_curve = tune("prefix-4e-3", "mlp", 4e-3)

# %% [markdown]
# The search notes each prompt that it accepted; their dev losses make its curve.

# %%
search_curve = []
log = read_log(folder / "search")
spent = {e["step"]: e["row_evaluations"] for e in log if "row_evaluations" in e}
for entry in log:
    if "tokens" in entry:
        loss = dev_loss(found.prefix(entry["tokens"]))
        search_curve.append((spent.get(entry["step"], 0), loss))

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
hasty = hasty_curve[-1][1]
print(f"  prefix at 4 times its learning rate: {hasty:.3f}")
hand, learned = losses["words by hand"], losses["embedding-only"]
if MODEL == "mini":
    assert losses["prefix"] < learned - 0.1
    assert learned < losses["searched prompt"] - 1
    assert abs(losses["searched prompt"] - hand) < 0.3
    assert hasty > hand

# %%
figure, axes = new(width=5.6)
curves = {
    "searched prompt": (search_curve, TEXT, "-"),
    "embedding-only": (embeddings_curve, OTHER, "-"),
    "prefix": (tuned_curve, PREFIX, "-"),
    "prefix, 4 times the rate": (hasty_curve, PREFIX, ":"),
}
for name, (curve, colour, line) in curves.items():
    effort, loss = zip(*curve, strict=True)
    axes.plot(effort, loss, line, color=colour, label=name, marker=".")
axes.axhline(hand, color=FAINT, ls="--", label=f"words: {WORDS!r}")
axes.set(xlabel="effort (row-evaluations)")
axes.set(ylabel="dev loss (nats per target token)")
axes.set_title("The same start, the same effort")
axes.legend(frameon=False, fontsize=9, loc=(0.5, 0.5))
show(figure, "03_ladder")

# %% [markdown]
# **Answer.** At a good rate the prefix is ahead, and clearly so at the end. At four times that rate
# it ends *worse than the words it began with*: one step of AdamW then moves every key and value of
# every layer too far, and the frozen layers cannot make sense of them. Embeddings bear a rate sixty
# times as large, because the frozen model computes everything above layer 0 from them. So a short
# trial in which the prefix loses says first of all something about its learning rate.
#
# The search hardly improves on the words. It cannot follow a gradient, it must try tokens, and this
# effort pays for a handful of its steps.
#
# ## 6. Which words are the learned embeddings near to?
# For each of the $P$ learned vectors of $X$ we look for the tokens whose embeddings have the
# largest cosine with it.
#
# **Predict.** Has embedding-only tuning found a prompt, so that the nearest tokens do the same
# work?

# %%
X = embeddings.virtual.virtual_embd.detach()  # (P, C)
W_E = model.wte.weight
unit = torch.nn.functional.normalize
best = (unit(X, dim=1) @ unit(W_E, dim=1).T).topk(3, dim=1)
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
if MODEL == "mini":
    assert best.values.max() < 0.6 and X.norm(dim=1).min() > 1.5 * norms.mean()
    assert rounded > learned + 1

# %% [markdown]
# **Answer.** No. The learned vectors are much longer than those of tokens, and even the nearest
# token points in quite another direction. In some places it is still the token that training began
# with: what was learned is in the part that no token has. Rounded to tokens, nearly all of it is
# lost. The solution is not a badly spelled sentence; it lies far from all prompts.
#
# ## 7. What they write

# %%
print("table:    ", test.source)
print("reference:", test.targets[0], "\n")
for name, prefix in ladder.items():
    if prefix is not None:  # without one there is no frame to ask in
        (text,) = minprefix.generate(
            model, tokenizer, [test.source], prefix=prefix, max_new_tokens=40
        )
        print(f"{name:16} {text[:60]!r}")

# %% [markdown]
# The two prompts go on with the table or begin a document of their own. Embeddings and prefix write
# a sentence about it. After so few steps no text is good, and a lower loss need not be a better
# text: the loss asks for one token at a time after the reference's own words, while a text must
# live with its first mistakes. What longer training brings is the subject of 05_table_to_text.
#
# ## Common mistakes
# > - **One learning rate for all methods.** In PEFT's own benchmark the accuracy of a prefix more
# >   than doubles with another length, start and rate. Compare methods at their best settings.
# > - **A verdict after one short run.** An earlier version of this tutorial stopped after 50 steps
# >   at twice the rate of section 5, and found the prefix behind the embeddings.
# > - **"Prompt tuning" for "prefix-tuning".** Libraries call the training of embeddings prompt
# >   tuning. Their results say little about prefixes, and a file of one cannot be loaded as the
# >   other.
# > - **Tokens that merge at the seam.** If prompt and row are tokenised as one string, the tokens
# >   at the border can differ from those of the parts. Join token ids, as section 3 does.
# > - **A prefix made of two prompts' prefixes side by side.** It is not the prefix of the joined
# >   prompt (exercise 2).
#
# ## Recap
# - A discrete prompt is a choice of embeddings; embeddings are a prefix that the model computed for
#   itself. Logits agree to rounding, so each can begin where the one before it ended.
# - A prefix can express strictly more: in layer 0 alone, embeddings reach half of the directions.
# - What a method can express and what it learns are two things. The prefix won at its own, much
#   smaller learning rate; at four times that rate it lost to the words.
# - The less expressive one can still be the one to choose: a prompt needs no training framework,
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
