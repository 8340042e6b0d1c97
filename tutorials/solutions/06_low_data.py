# %% [markdown]
# # Solutions: 6. Few examples
#
# The exercises stand at the end of `tutorials/06_low_data.py`.

# %%
import tempfile
from itertools import pairwise

import torch
from scipy import stats

import minprefix
from minprefix.data.load import load_examples
from minprefix.data.splits import subset
from minprefix.methods.adapters import count
from minprefix.methods.top_layers import TopLayers, TunedTopLayers
from minprefix.training.config import TrainConfig
from minprefix.training.trainer import Trainer

train = load_examples("restaurants", "train")

# %% [markdown]
# ## 1. Nested subsets
#
# `subset` sorts all pairs by a hash of (seed, index) and takes the first ones. Two seeds are two
# independent orders: of n pairs out of N they share n^2 / N on average.


# %%
def pairs(size: int, seed: int) -> set:
    return {(e.source, target) for e in subset(train, size, seed) for target in e.targets}


sizes = (20, 50, 100, 200, 500)
for small, large in pairwise(sizes):
    assert pairs(small, 0) < pairs(large, 0)
N = sum(len(e.targets) for e in train)
shared = [len(pairs(500, one) & pairs(500, two)) for one in range(5) for two in range(one)]
print(f"two seeds, 500 of {N}: {sum(shared) / len(shared):.0f} shared, {500**2 / N:.0f} by chance")
assert abs(sum(shared) / len(shared) - 500**2 / N) < 20  # 10 draws of spread about 8

# %% [markdown]
# ## 2. How many subsets
#
# The interval of n differences is $t_{n-1}\, \sigma / \sqrt{n}$ to each side. With a mean of
# $\sigma$, 0 lies outside of it once $t_{n-1} < \sqrt{n}$.

# %%
need = next(n for n in range(2, 100) if stats.t.ppf(0.975, n - 1) < n**0.5)
print(f"from {need} subsets on; with 2, the factor is {stats.t.ppf(0.975, 1) / 2**0.5:.1f}")
assert need == 7

# %% [markdown]
# ## 3. The top two layers
#
# The model's own weights are trained, so step 0 is the frozen model itself. The layers below never
# move.

# %%
model, tokenizer = minprefix.load("mini")
before = {name: weight.clone() for name, weight in model.state_dict().items()}
top = TunedTopLayers(TopLayers(model, 2))
print(f"{count(top.weights):,} parameters, {count(top.weights) / count(model):.1%} of the model")
config = TrainConfig(
    method="ft-top", steps=6, batch_size=4, lr=5e-4, samples=0, log_every=3, precision="fp32"
)
few = subset(train, 20, 0)
with tempfile.TemporaryDirectory() as out:
    trainer = Trainer(model, tokenizer, config, few, [], out, top)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())  # step 0
    trainer.run(progress=False)
moved = {n for n, w in model.state_dict().items() if not torch.equal(before[n], w)}
layers = sorted({int(name.split(".")[1]) for name in moved if name.startswith("h.")})
print("layers that moved:", layers, "and", sorted(n for n in moved if not n.startswith("h.")))
assert layers == [model.config.n_layer - 2, model.config.n_layer - 1]
assert all(name.startswith(("h.", "ln_f.")) for name in moved)
