# %% [markdown]
# # 7. Many users, one model
#
# **What you will learn.** How one frozen model writes for many users in the same batch, each with a
# prefix of their own: how such a batch is computed, why no user's prefix holds anything of another
# user's data, what adding and deleting a user takes, and what a user costs beside a fine-tuned
# copy. This is what sections 8.1 and 8.2 of the paper propose, done.
#
# **What to know first.** Tutorial 2 (`02_equation_3`): what a prefix is, and why token t stands at
# position t + offset. Letters: N prefixes in a bank, B rows, L layers, H heads, P prefix positions.
#
# **Running time.** About a minute on two CPU cores. With `MODEL = "gpt2"` the training takes
# longer.
#
# **Sources.** Li & Liang 2021 [1], sections 8.1, 8.2; the data of `minprefix/assets/restaurants`.

# %%
import copy
import gc
import tempfile
import time
import weakref
from pathlib import Path

import torch
from figure import OTHER, PREFIX, new, show

import minprefix
from kernels import prefix_attention
from minprefix import Prefix, PrefixBank
from minprefix.data.batches import BatchOrder, collate, encode_pair, encode_prompt
from minprefix.data.load import load_examples
from minprefix.models.weights import fingerprint

MODEL = "mini"
torch.manual_seed(0)
model, tokenizer = minprefix.load(MODEL)
model.requires_grad_(False)
model_before = fingerprint(model)
train, dev = (load_examples("restaurants", split) for split in ("train", "dev"))

# %% [markdown]
# ## 1. Users and what they want
# Four users get texts about restaurants, each in another style. A style is a rule, so that we can
# check who got what. (Real users would give examples; a rule makes them for us.)


# %%
def short(t: dict[str, str]) -> str:
    return f"{t['name']}, {t.get('type', 'place')}."


def name_last(t: dict[str, str]) -> str:
    near = f" near {t['near']}" if "near" in t else ""
    return f"{t.get('food', 'Good')} {t.get('type', 'place')}{near}: {t['name']}."


def children_first(t: dict[str, str]) -> str:
    say = {"yes": "Bring the kids", "no": "Leave the kids at home"}  # a value, phrased otherwise
    return f"{say.get(t.get('family friendly'), 'Ask about kids')}! {t['name']}."


def question(t: dict[str, str]) -> str:
    return f"Fancy {t.get('food', 'good')} food? Try {t['name']}."


STYLES = {"Ada": short, "Ben": name_last, "Cleo": children_first, "Eve": question}
print(dev[0].source)
for user, style in STYLES.items():
    print(f"  {user:5} {style(dict(dev[0].table))}")

# %% [markdown]
# ## 2. A prefix for each
# Each prefix starts from the activations of a few words (so lengths differ), and is trained on its
# user's texts alone. Nothing else is trained. Few steps are enough for a style, with the large
# steps that a short, direct table bears.


# %%
def tune(style, words: str, steps: int = 40, batch_size: int = 8, lr: float = 0.1) -> Prefix:
    """A prefix for one user: AdamW on -log p of the texts that the user's rule writes."""
    prefix = Prefix.from_words(model, tokenizer, words)
    rows = [encode_pair(tokenizer, e.source, style(dict(e.table))) for e in train]
    order = BatchOrder([len(row.ids) for row in rows], batch_size, seed=0)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = collate([rows[i] for i in order.batch(step)], tokenizer.eos_id)
        losses = model.token_losses(batch.input_ids, batch.labels, batch.at, prefix=prefix)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(prefix.parameters(), 1.0)
        optimizer.step()
    print(f"  P {prefix.prefix_len}, last loss {losses.mean():.2f} nats per token")
    return prefix.requires_grad_(False)


WORDS = {"Ada": "brief:", "Ben": "table-to-text:", "Cleo": "for families:", "Eve": "ask:"}
users = {}
for user in ("Ada", "Ben", "Cleo"):  # Eve comes later
    print(user)
    users[user] = tune(STYLES[user], WORDS[user])

# %% [markdown]
# ## 3. One batch, many prefixes
# With fine-tuned copies every user has other matrices, so rows of different users cannot share a
# matrix product. Here all rows share every matrix of the model. Prefixes are read in one place
# only, attention, which is computed for each row on its own anyway:
#
# $$ o_b = \mathrm{softmax}\big(q_b\, [K_{n(b)} ; K_b]^\top / \sqrt D\big)\, [V_{n(b)} ; V_b] $$
#
# where $n(b)$ is the user of row b. First by hand, for one layer. The prefixes have different
# lengths, so in the **bank** (N, H, P, D) they are padded with zeros, and `prefix_lens` says how
# many positions are real. Zeros are keys like any others: softmax would give them weight, so they
# must not be seen.

# %%
layer, (B, T) = 3, (4, 6)
tables = [prefix.table()[layer].double() for prefix in users.values()]  # each (2, H, P_n, D)
lens = torch.tensor([table.shape[2] for table in tables])
P = int(lens.max())
bank = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, P - t.shape[2])) for t in tables])
bank_k, bank_v = bank[:, 0], bank[:, 1]  # each (N, H, P, D)
index = torch.tensor([2, 0, -1, 2])  # whose prefix each row reads; -1: nobody's
H, D = bank_k.shape[1], bank_k.shape[3]
q, k, v = (torch.randn(B, H, T, D, dtype=torch.float64) for _ in range(3))

by_hand = torch.empty_like(q)
for b, n in enumerate(index.tolist()):
    prefix_k, prefix_v = tables[n] if n >= 0 else k.new_empty(2, H, 0, D)
    keys, values = torch.cat([prefix_k, k[b]], dim=1), torch.cat([prefix_v, v[b]], dim=1)
    visible = torch.ones(T, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - T)
    s = (D**-0.5 * q[b] @ keys.mT).masked_fill(~visible, float("-inf"))  # (H, T, P_n + T)
    by_hand[b] = s.softmax(-1) @ values

at_once = prefix_attention(q, k, v, bank_k, bank_v, prefix_index=index, prefix_lens=lens)
gap = (at_once - by_hand).abs().max().item()
print(f"lengths {lens.tolist()}, bank {tuple(bank_k.shape)}; row by row against at once: {gap:.1e}")
assert gap < 1e-13  # fp64, another order of summation; worst seen 2e-15

# %% [markdown]
# `PrefixBank` does this for all layers, and one thing more: **positions**. A row's tokens stand at
# t + offset, and the offset is that of its own prefix, 0 without one.

# %%
in_memory = PrefixBank(list(users.values()))
acts = in_memory.activations(index)
print(f"table (L, 2, N, H, P, D) {tuple(acts.table.shape)}, lengths {acts.lens.tolist()}")
print(f"rows {index.tolist()} stand at offsets {acts.position_offset.tolist()}")

# %% [markdown]
# Now the model. Seven requests in one batch: prompts of different lengths, one row without a
# prefix, two of the same user. In fp64, **each row must be what its user would get alone**: the
# same prompt without padding, with that one prefix.

# %%
exact_model = copy.deepcopy(model).double()


def exact(prefixes: dict[str, Prefix]) -> dict[str, Prefix]:
    """The same prefixes in fp64."""
    return {user: copy.deepcopy(prefix).double() for user, prefix in prefixes.items()}


def mixed_batch(prefixes: dict[str, Prefix], requests: list[tuple[str | None, str]]):
    """Logits of each request, (its tokens, V), from one call with a bank."""
    place = {user: n for n, user in enumerate(prefixes)} | {None: -1}
    ids = [encode_prompt(tokenizer, source) for _, source in requests]
    lengths = torch.tensor([len(row) for row in ids])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    logits = exact_model(
        padded, prefix=PrefixBank(list(prefixes.values())), kv_lens=lengths,
        prefix_index=torch.tensor([place[user] for user, _ in requests]),
    )  # fmt: skip
    return [row[:length] for row, length in zip(logits, lengths.tolist(), strict=True)]


def alone(prefixes: dict[str, Prefix], user: str | None, source: str):
    ids = torch.tensor([encode_prompt(tokenizer, source)])
    return exact_model(ids, prefix=None if user is None else prefixes[user])[0]


def worst(prefixes, requests) -> float:
    """Largest |difference| between the mixed batch and each request alone."""
    rows = zip(requests, mixed_batch(prefixes, requests), strict=True)
    return max((row - alone(prefixes, *r)).abs().max().item() for r, row in rows)


users64 = exact(users)
asked = ("Cleo", "Ada", None, "Ben", "Ben", "Ada", "Cleo")
requests = [(user, dev[n].source) for n, user in enumerate(asked)]
gap = worst(users64, requests)
lengths = [len(encode_prompt(tokenizer, source)) for _, source in requests]
print(f"prompts of {lengths} tokens in one batch, against alone: largest |difference| {gap:.1e}")
assert gap < 1e-11  # of logits up to some tens, fp64; worst seen 2e-13

# %% [markdown]
# ## 4. What they get
# The same tables for everyone, in one batch; then all users' texts are held against all rules.

# %%
eve_style = STYLES["Eve"]
users["Eve"] = tune(eve_style, WORDS["Eve"])  # a new user: one more entry, nobody else is touched
users64 = exact(users)

n_tables = 12
names = [*users, None]
sources = [example.source for example in dev[:n_tables]]
place = {user: n for n, user in enumerate(users)} | {None: -1}
prompts = [encode_prompt(tokenizer, source) for _ in names for source in sources]
owner = [user for user in names for _ in sources]
texts = minprefix.generate(
    model, tokenizer, prompts, prefix=PrefixBank(list(users.values())),
    prefix_index=[place[user] for user in owner], max_new_tokens=24,
)  # fmt: skip
texts = [text.strip() for text in texts]
print(sources[0])
for n, user in enumerate(names):
    print(f"  {user or 'nobody':7} {texts[n * n_tables][:80]!r}")

followed = torch.zeros(len(names), len(STYLES))
for n, text in enumerate(texts):
    for m, style in enumerate(STYLES.values()):
        wanted = style(dict(dev[n % n_tables].table))
        followed[n // n_tables, m] += (text == wanted) / n_tables

figure, axes = new(width=5.4)
axes.imshow(followed, cmap="Oranges", vmin=0, vmax=1)
for (row, column), share in [((r, c), followed[r, c]) for r in range(5) for c in range(4)]:
    colour = "white" if share > 0.6 else "black"
    axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour)
axes.set_xticks(range(4), [f"{user}'s" for user in STYLES])
axes.set_yticks(range(5), [user or "nobody" for user in names])
axes.set(xlabel="rule", ylabel="prefix", title="Texts that are exactly what a rule writes")
show(figure, "07_who_got_what")
own, others = followed[:4].diagonal(), followed[:4] - followed[:4].diagonal().diag()
print(f"own rule followed to the letter: {own.mean():.0%}; another's: {others.max():.0%} at most")
assert own.min() > 0 and others.max() == 0 and followed[4].max() == 0

# %% [markdown]
# A text that misses its rule mostly gets a name or a value wrong, not the style: the names of these
# tables never occur in training, and so few steps teach a style before they teach copying.
#
# ## 5. Isolation
# Is anything of Ada's data in Ben's prefix? A prefix changes only by its gradient, so ask for the
# gradients of a batch that mixes both. Row b reads prefix n(b) only, so
#
# $$ \frac{\partial\, \mathrm{loss}_b}{\partial P_n} = 0 \quad \text{for } n \neq n(b), $$
#
# not small, but exactly zero. So users may even be *trained* in one batch: each gradient is the one
# that the user's own rows give.


# %%
def gradients(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    """Each user's gradient of the summed loss of (user, training table) rows, in one batch."""
    bank = {user: copy.deepcopy(prefix).requires_grad_() for user, prefix in users64.items()}
    pairs = [encode_pair(tokenizer, train[n].source, STYLES[user](dict(train[n].table)))
             for user, n in rows]  # fmt: skip
    batch = collate(pairs, tokenizer.eos_id)
    index = torch.tensor([place[user] for user, _ in rows])
    kind = {"prefix": PrefixBank(list(bank.values())), "prefix_index": index}
    exact_model.token_losses(batch.input_ids, batch.labels, batch.at, **kind).sum().backward()
    return {user: prefix.prefix_table.grad for user, prefix in bank.items()}


both = gradients([("Ada", 0), ("Ben", 1), ("Ada", 2)])
other_data = gradients([("Ada", 7), ("Ben", 1), ("Ada", 9)])
just_ben = gradients([("Ben", 1)])
size = both["Ben"].abs().max().item()
print(
    f"Cleo and Eve, who have no row: gradient {both['Cleo'].abs().max() + both['Eve'].abs().max()}"
)
print(f"Ben beside Ada's data, other data, no data: |differences| "
      f"{(both['Ben'] - other_data['Ben']).abs().max() / size:.1e}, "
      f"{(both['Ben'] - just_ben['Ben']).abs().max() / size:.1e} of his gradient")  # fmt: skip
assert not both["Cleo"].any() and not both["Eve"].any() and size > 0
# other rows pad the batch to another length, so sums are made in another order; worst seen 3e-15
assert (both["Ben"] - other_data["Ben"]).abs().max() < 1e-12 * size
assert (both["Ben"] - just_ben["Ben"]).abs().max() < 1e-12 * size
assert (both["Ada"] - other_data["Ada"]).abs().max() > 0.01 * both["Ada"].abs().max()

# %% [markdown]
# (One loss, one sum: `clip_grad_norm_` over all prefixes together, or a mean over all rows, would
# couple users after all. Clip and divide user by user.)
#
# What isolation does **not** say: Ben's prefix is made of Ben's texts, and it may well write them
# again. Guard the file as you guard his data. And here all prefixes start from words. Had they
# started from a prefix that was tuned on everyone's texts, something of everyone would be in each.
#
# ## 6. Adding and deleting a user
# Adding Eve was one more entry. Deleting Ben is the opposite: take the entry away, delete the file.
# What stays is exact, because no other user's entry holds anything of his: the model has the
# fingerprint it had before the first user came, and the others' logits do not change.

# %%
with tempfile.TemporaryDirectory() as folder:
    files = {user: Path(folder) / f"{user}.safetensors" for user in users}
    for user, path in files.items():
        users[user].save(path)
    sizes = [f"{user} {path.stat().st_size / 1e3:.0f} kB" for user, path in files.items()]
    print(f"one file per user: {', '.join(sizes)}")

    requests = [(user, source) for user, source in requests if user != "Ben"]
    requests.append(("Eve", sources[8]))
    with torch.no_grad():
        before = mixed_batch(users64, requests)
    witness = weakref.ref(users["Ben"].prefix_table)
    assert witness() is not None

    del users["Ben"], users64["Ben"]
    del in_memory, acts, tables, bank, bank_k, bank_v  # every bank with him in it
    del both, other_data, just_ben  # and gradients from his data
    files["Ben"].unlink()
    gc.collect()
    assert witness() is None, "something still holds Ben's prefix"
    with torch.no_grad():
        after = mixed_batch(users64, requests)
    gap = max((a - b).abs().max().item() for a, b in zip(before, after, strict=True))
    print(f"the others' logits before and after: largest |difference| {gap:.1e}")
    assert gap < 1e-11  # his was the longest: the bank is padded less now, so sums differ in order
    assert fingerprint(model) == model_before
    again = Prefix.load(files["Eve"])
    assert torch.equal(again.table(), users["Eve"].table())
    assert not files["Ben"].exists()

# %% [markdown]
# With a fine-tuned model for all, there would be no such entry: one user's texts are spread over
# all its weights. (Copies of files, backups and logs of what was written are not covered by any of
# this.)
#
# ## 7. What a user costs
# With $e$ bytes per number, a prefix takes $2 L P C e$ bytes and a fine-tuned copy $e$ times the
# number of parameters, both in bf16 here. The model itself is there once.

# %%
MEDIUM = {"n_layer": 24, "n_embd": 1024, "parameters": 354_823_168}  # GPT-2 medium
MINI = {"n_layer": model.config.n_layer, "n_embd": model.config.n_embd,
        "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
e, memory = 2, 80e9  # bytes; a GPU with 80 GB
print(f"{'bf16':12} {'P':>4} {'prefix, MB':>11} {'copy, MB':>9} {'ratio':>6} "
      f"{'prefixes in 80 GB':>18} {'copies':>7}")  # fmt: skip
for name, m in ((MODEL, MINI), ("gpt2-medium", MEDIUM)):
    for p in (10, 100):
        prefix_bytes, copy_bytes = 2 * m["n_layer"] * p * m["n_embd"] * e, e * m["parameters"]
        print(f"{name:12} {p:4} {prefix_bytes / 1e6:11.2f} {copy_bytes / 1e6:9.1f} "
              f"{copy_bytes / prefix_bytes:6.0f} {(memory - copy_bytes) / prefix_bytes:18,.0f} "
              f"{memory // copy_bytes:7.0f}")  # fmt: skip
eve = users["Eve"]
C = MINI["n_embd"]
assert eve.table().numel() == 2 * MINI["n_layer"] * eve.prefix_len * C

# %% [markdown]
# And time? Requests of different users arrive one by one. With copies they must be answered user by
# user; with prefixes they can be one batch, and a step of decoding reads all weights once for all
# of them instead of once for each. Measured here, on this machine, now:


# %%
def seconds(n: int, mixed: bool) -> float:
    """Answer n requests of alternating users, in one batch or one by one."""
    order = [list(users)[b % len(users)] for b in range(n)]
    index = [list(users).index(user) for user in order]
    ids = [encode_prompt(tokenizer, dev[b].source) for b in range(n)]
    options = {"max_new_tokens": 16, "min_new_tokens": 16}  # the same work for both
    began = time.perf_counter()
    if mixed:
        bank = PrefixBank(list(users.values()))
        texts = minprefix.generate(
            model, tokenizer, ids, prefix=bank, prefix_index=index, **options
        )
    else:
        texts = [minprefix.generate(model, tokenizer, [row], prefix=users[user], **options)[0]
                 for row, user in zip(ids, order, strict=True)]  # fmt: skip
    took = time.perf_counter() - began
    assert len(texts) == n and all(texts)
    return took


seconds(2, True), seconds(2, False)  # the first calls of a process are slower
counts = (1, 2, 4, 8, 16)
times = {kind: [seconds(n, kind == "one mixed batch") for n in counts]
         for kind in ("user by user", "one mixed batch")}  # fmt: skip
print("requests       " + "".join(f"{n:8}" for n in counts))
for kind, taken in times.items():
    print(f"{kind:15}" + "".join(f"{t:8.2f}" for t in taken) + "  s")
figure, axes = new()
for (kind, taken), colour in zip(times.items(), (OTHER, PREFIX), strict=True):
    axes.plot(counts, taken, "o-", color=colour, label=kind)
axes.set(xlabel="requests", ylabel="time for all (s)", ylim=(0, None), title="16 tokens each")
axes.legend(frameon=False)
show(figure, "07_throughput")

# %% [markdown]
# ## Recap
# - Rows of different users share all matrices; only attention reads a prefix, row by row.
# - A bank holds prefixes of any lengths: padded, with lengths that hide the padding and an offset
#   for each row. Every row is what its user would get alone.
# - Gradients do not cross rows, so nothing of one user is in another's prefix.
# - A user is an entry: added without touching others, deleted exactly.
# - A user costs a small part of what a copy costs, and requests of all users are one batch.
#
# **When not to use it.** For one user or one task with much data, fine-tuning learns more (see
# 06_low_data and the first table of the README), and its copy is then the only one you keep.
#
# ## Exercises
# 1. Give all rows of a bank the same position offset instead of their own. Which rows change?
# 2. Train Ada and Eve together, one batch of both per step, with one optimiser each. Compare with
#    training each alone on the same rows.
# 3. Keep prefixes in files and at most two in memory, the least recently used one goes. Answer a
#    series of requests with it.
# 4. How many users' keys and values fit beside GPT-2 medium in 80 GB if each of them also has a
#    cache of 512 tokens? Which of the two, prefix or cache, is the limit?
#
# Solutions: `tutorials/solutions/07_many_users.py`.
#
# ## References
# 1. Li & Liang 2021, Prefix-Tuning, sections 8.1, 8.2: https://arxiv.org/abs/2101.00190
