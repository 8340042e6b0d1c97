# %% [markdown]
# # Solutions: 3. From discrete prompts to prefixes
#
# The exercises stand at the end of `tutorials/03_discrete_to_continuous.py`. All in fp64.

# %%
import torch

import minprefix
from minprefix.data.batches import collate, encode_examples
from minprefix.data.load import load_examples
from minprefix.methods.search.scores import prompt_tables
from minprefix.models.activations import PrefixActivations
from minprefix.prefix.parametrisations import computed_table, token_activations
from minprefix.prefix.prefix import Prefix

model, tokenizer = minprefix.load("mini", dtype=torch.float64)
model.requires_grad_(False)
C, L = model.config.n_embd, model.config.n_layer
prompt = tokenizer.encode("table-to-text:")
P, table = len(prompt), token_activations(model, prompt)
rows = encode_examples(tokenizer, load_examples("restaurants", "dev")[:2])
ids = torch.tensor([rows[0].ids[:-1]])

# %% [markdown]
# ## 1. The bridge with offset 0
#
# The row's first token then stands at position 0 instead of P. Its embedding is $W_E[z] + w_0$
# instead of $W_E[z] + w_P$, so its queries, keys and values are others, in every layer. The prefix
# is right; the text after it is not the text after a prompt.

# %%
with_prompt = model(torch.tensor([prompt + ids[0].tolist()]))[:, P:]
gaps = {
    offset: (model(ids, prefix=Prefix.from_table(table, offset)) - with_prompt).abs().max().item()
    for offset in (P, 0)
}
print("largest |difference| to the prompt, by offset:", gaps)
assert gaps[P] < 1e-11 and gaps[0] > 1e-2

# %% [markdown]
# ## 2. "A B" is not A beside B
#
# In layer 0 it is, once B is moved to its positions: keys and values are those of embedding plus
# position. From layer 1 on B's have read A.

# %%
a, b = (tokenizer.encode(words) for words in ("a table of", " facts, in words"))
both = token_activations(model, a + b)[..., len(a) :, :]  # B's part
w = model.wpe.weight
moved = model.wte.weight[b] + w[len(a) : len(a) + len(b)] - w[: len(b)]  # `activations` adds w[p]
alone = computed_table(model, moved)
gap = (both - alone).abs().amax(dim=(1, 2, 3, 4))  # (L,)
print("largest |difference| by layer:", ", ".join(f"{x:.1e}" for x in gap.tolist()))
assert gap[0] < 1e-11 and (gap[1:] > 1e-2).all()

# %% [markdown]
# ## 3. From embeddings to an MLP prefix

# %%
virtual = Prefix.random(model.config, P, seed=1, parametrisation="embedding").double()
virtual.bind(model)
prefix = Prefix.random(model.config, P, seed=2, parametrisation="mlp").double()
with torch.no_grad():
    residual = prefix.mlp.fit_last_layer(virtual.table())
    one, two = (model(ids, prefix=x) for x in (virtual, prefix))
gap = (one - two).abs().max().item()
print(f"MLP: residual {residual:.1e}; logits: largest |difference| {gap:.1e}")
assert gap < 1e-11  # fp64: 2.5e-13 seen, logits of order 20

# %% [markdown]
# ## 4. The part of the gradient that embeddings can follow
#
# One position, its embedding $x$, its table $h(x)$ of $2LC$ numbers, the loss $\ell(h)$ with
# gradient $g$. Moves of $x$ reach the columns of $J = \partial h / \partial x$. Central
# differences give $J$: $2C$ embeddings are one batch of prompts. The chain rule, $J^T g =
# \partial \ell / \partial x$, checks it.

# %%
x, step = model.wte.weight[prompt[:1]], 1e-4  # (1, C)
nudges = step * torch.eye(C, dtype=torch.float64)[:, None]  # (C, 1, C)
tables = prompt_tables(model, torch.cat([x + nudges, x - nudges]))  # (L, 2, 2C, H, 1, D)
flat = tables.transpose(0, 2).transpose(1, 2).flatten(1)  # (2C, 2LC): prompt, layer, kv
J = ((flat[:C] - flat[C:]) / (2 * step)).T  # (2LC, C)

batch = collate(rows, tokenizer.eos_id)


def loss_of(table):
    acts = PrefixActivations(table, 1, 1)
    return model.token_losses(batch.input_ids, batch.labels, batch.at, prefix=acts).mean()


h = prompt_tables(model, x[None])[:, :, 0].requires_grad_()  # (L, 2, H, 1, D)
(g,) = torch.autograd.grad(loss_of(h), h)
g = g.flatten()  # in the order of J: layer, then kv
free = x[None].clone().requires_grad_()
(dx,) = torch.autograd.grad(loss_of(prompt_tables(model, free)[:, :, 0]), free)
error = (J.T @ g - dx.flatten()).norm() / dx.norm()
print(f"chain rule: relative error {error:.1e}")
assert error < 1e-4  # differences: the step squared times curvature

Q, _ = torch.linalg.qr(J)  # (2LC, C), the directions that embeddings reach
share = ((Q.T @ g).norm() / g.norm()).item() ** 2
print(
    f"embeddings follow {share:.1%} of the squared gradient; random directions: {1 / (2 * L):.1%}"
)
assert 0 < share < 1 - 1e-3  # the rest is what only a prefix can use
