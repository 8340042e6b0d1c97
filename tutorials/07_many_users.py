# %% [markdown]
# # 7. Many users, one model
#
# One frozen model writes for many users in the same batch, each with a prefix of their own. This
# is what sections 8.1 and 8.2 of the paper propose; here it is done, and checked.
#
# **What you will learn.** How such a batch is computed. Why no user's prefix holds anything of
# another user's data. What it takes to add and to delete a user. What a user costs, beside a
# fine-tuned copy of the model.
#
# **What to know first.** 02_equation_3: what a prefix is, and why token t stands at position t +
# offset. 05_table_to_text: the training loop. The letters are those of [the table in tutorial
# 01](01_gpt2_from_scratch.py).
#
# **Running time.** About a minute on two CPU cores.
#
# **Sources.** Li & Liang 2021 [1], sections 8.1 and 8.2.

# %%
import copy
import gc
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from figure import OTHER, PREFIX, new, show
from short_training import TRAINED, for_training, train
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

import minprefix
from kernels import prefix_attention
from minprefix import Prefix, PrefixBank
from minprefix.data.batches import collate, encode_examples, encode_prompt
from minprefix.data.load import load_examples
from minprefix.models.weights import fingerprint

torch.manual_seed(0)
model, tokenizer = minprefix.load("mini")
frozen = for_training(model)
model.requires_grad_(False)
model_before = fingerprint(model)


def usable(split: str) -> list:
    """The tables that have all fields which the users below write about."""
    wanted = {"type", "food", "area"}
    examples = load_examples("restaurants", split)
    return [e for e in examples if {*dict(e.table)} >= wanted]


train_set, dev = usable("train"), usable("dev")

# %% [markdown]
# ## 1. Two tasks in one batch
#
# Two prefixes lie in `docs/prefixes`, trained to the end for this model. One writes sentences
# about restaurant tables, the other sums up notes of a local newspaper.
#
# **Predict.** The first two rows of this batch hold the same table, the last two the same note.
# The prefixes are swapped in the second and the fourth. What is written?

# %%
names = ("e2e", "notes")
tasks = [Prefix.load(TRAINED / f"{name}-P10.safetensors") for name in names]
table = (
    "name : The Blue Heron | type : pub | food : Italian | price : cheap | "
    "area : riverside | near : Burger King"
)
note = load_examples("notes", "dev")[0].source
print(f"table: {table}\nnote:  {note}\n")
requests = (
    ("table", table, 0),
    ("table", table, 1),
    ("note", note, 1),
    ("note", note, 0),
)
both = minprefix.generate(
    model, tokenizer, [text for _, text, _ in requests],
    prefix=PrefixBank(tasks), prefix_index=[n for _, _, n in requests],
    max_new_tokens=50,
)  # fmt: skip
for (what, _, n), text in zip(requests, both, strict=True):
    print(f"{what:5} with {names[n]:5} {text.strip()}")
assert "The Blue Heron" in both[0] and "Swanmouth" in both[2]
assert both[0] != both[1] and both[2] != both[3] and "restaurant" in both[3]

# %% [markdown]
# **Answer.** The prefix decides what is done. The first and the third row are what the prefixes
# were trained for. (Work out the sum in the note: the summary has the form, the place and the
# idea right and the number wrong. 08 comes back to such faults.) With the e2e prefix the note
# becomes a restaurant, and with the notes prefix the table becomes a kind of headline. All four
# rows went through the same weights in the same calls.
#
# The rest of this page shows how one batch can hold several prefixes, and what follows from it,
# with small prefixes of our own.
#
# ## 2. Users and what they want
# Four users get texts about restaurants, each in another style. A style is a rule, so that we can
# check who got what. (Real users would give examples; a rule makes them for us. The rules copy
# values of the table, which few steps can teach. 05 shows a fact that they cannot.)


# %%
STYLES = {
    "Ada": "{name}, {type}.",
    "Ben": "{food} {type}: {name}.",
    "Cleo": "Where? {area}. What? {name}.",
    "Eve": "Fancy {food} food? Try {name}.",
}
WORDS = {
    "Ada": "brief:",
    "Ben": "table-to-text:",
    "Cleo": "where?",
    "Eve": "ask:",
}


def wanted(user: str, example) -> str:
    """What the user's rule writes about this table."""
    return STYLES[user].format(**dict(example.table))


print(dev[0].source)
for user in STYLES:
    print(f"  {user:5} {wanted(user, dev[0])}")

# %% [markdown]
# Each prefix starts from the activations of a few words (so lengths differ), and is trained on
# its user's texts alone, by the loop of 05. A direct table, without the MLP, bears the large rate
# that so few steps need.


# %%
def tune(user: str) -> Prefix:
    prefix = Prefix.from_words(model, tokenizer, WORDS[user])
    examples = [replace(e, targets=(wanted(user, e),)) for e in train_set]
    settings = {"steps": 40, "lr": 0.1, "warmup": 1}
    losses = list(train(frozen, tokenizer, examples, prefix, **settings))
    print(f"{user:5} P {prefix.prefix_len}, ", end="")
    print(f"loss {losses[0]:.2f}, at the end {losses[-1]:.2f}")
    assert losses[-1] < 0.5 * losses[0]
    prefix.linearisation = "paper"  # `generate` adds the bos, as in training
    return prefix.requires_grad_(False)


users = {user: tune(user) for user in ("Ada", "Ben", "Cleo")}

# %% [markdown]
# ## 3. One batch, many prefixes
# With fine-tuned copies every user has other matrices, so rows of different users cannot share a
# matrix product. Here all rows share every matrix of the model. A prefix is read in one place
# only, in attention, which each row computes on its own in any case:
#
# $$ o_b = \mathrm{softmax}\big(q_b\, [K_{n(b)} ; K_b]^\top / \sqrt D\big)\,
# [V_{n(b)} ; V_b] $$
#
# where $n(b)$ is the user of row b. First by hand, for one layer. The prefixes have different
# lengths. In the *bank*, (N, H, P, D), they are padded with zeros, and `prefix_lens` says how
# many positions are real.
#
# **Predict.** The padding is zero. What would happen if attention saw it?

# %%
layer, (B, T) = 3, (4, 6)
tables = [p.table()[layer].double() for p in users.values()]  # (2, H, P_n, D)
lens = torch.tensor([table.shape[2] for table in tables])
P = int(lens.max())
bank = torch.stack([pad(t, (0, 0, 0, P - t.shape[2])) for t in tables])
bank_k, bank_v = bank[:, 0], bank[:, 1]  # each (N, H, P, D)
index = torch.tensor([2, 0, -1, 1])  # whose prefix each row reads; -1: nobody's
H, D = bank_k.shape[1], bank_k.shape[3]
q, k, v = (torch.randn(B, H, T, D, dtype=torch.float64) for _ in range(3))

by_hand = torch.empty_like(q)
for b, n in enumerate(index.tolist()):
    prefix_k, prefix_v = tables[n] if n >= 0 else k.new_empty(2, H, 0, D)
    keys = torch.cat([prefix_k, k[b]], dim=1)  # (H, P_n + T, D)
    values = torch.cat([prefix_v, v[b]], dim=1)
    visible = torch.ones(T, keys.shape[1]).tril(keys.shape[1] - T) > 0
    s = (D**-0.5 * q[b] @ keys.mT).masked_fill(~visible, float("-inf"))
    by_hand[b] = s.softmax(-1) @ values

at_once = prefix_attention(
    q, k, v, bank_k, bank_v, prefix_index=index, prefix_lens=lens
)
gap = (at_once - by_hand).abs().max().item()
print(f"lengths {lens.tolist()}, bank {tuple(bank_k.shape)}")
print(f"row by row against at once: largest |difference| {gap:.1e}")
assert gap < 1e-13  # fp64, another order of summation; worst seen 2e-15
seen = prefix_attention(q, k, v, bank_k, bank_v, prefix_index=index)
for b, n in enumerate(index.tolist()):
    gap = (seen[b] - by_hand[b]).abs().max().item()
    print(f"row {b}, prefix {n:2}: with visible padding it moves by {gap:.1e}")
    assert (gap > 1e-3) == (n >= 0 and lens[n] < P)

# %% [markdown]
# **Answer.** The rows of the shorter prefixes would be wrong: a zero key has the score 0, and
# softmax gives it the weight $e^0$, not 0. (A library for adapters has this fault.) The longest
# prefix has no padding, and the row without one reads none.
#
# `PrefixBank` does the same for all layers, and one thing more: *positions*. A row's tokens stand
# at t + offset, and the offset is that of its own prefix, 0 without one.

# %%
in_memory = PrefixBank(list(users.values()))
acts = in_memory.activations(index)
print(f"table (L, 2, N, H, P, D) {tuple(acts.table.shape)}")
print(f"rows {index.tolist()} stand at offsets {acts.position_offset.tolist()}")

# %% [markdown]
# Now the model. Seven requests in one batch: prompts of different lengths, one row without a
# prefix, two of the same user. In fp64, each row must be what its user would get alone: the same
# prompt without padding, with that one prefix.

# %%
exact_model = copy.deepcopy(model).double()


def exact() -> dict[str, Prefix]:
    """The users' prefixes in fp64."""
    return {user: copy.deepcopy(p).double() for user, p in users.items()}


def mixed_batch(requests: list[tuple[str | None, str]]) -> list[torch.Tensor]:
    """Logits of each request, (its tokens, V), from one call with a bank."""
    place = {user: n for n, user in enumerate(users64)} | {None: -1}
    ids = [torch.tensor(encode_prompt(tokenizer, text)) for _, text in requests]
    lengths = torch.tensor([len(row) for row in ids])
    logits = exact_model(
        pad_sequence(ids, batch_first=True), kv_lens=lengths,
        prefix=PrefixBank(list(users64.values())),
        prefix_index=torch.tensor([place[user] for user, _ in requests]),
    )  # fmt: skip
    return [row[:n] for row, n in zip(logits, lengths.tolist(), strict=True)]


def alone(user: str | None, source: str) -> torch.Tensor:
    ids = torch.tensor([encode_prompt(tokenizer, source)])
    return exact_model(ids, prefix=None if user is None else users64[user])[0]


users64 = exact()
asked = ("Cleo", "Ada", None, "Ben", "Ben", "Ada", "Cleo")
requests = [(user, dev[n].source) for n, user in enumerate(asked)]
with torch.no_grad():
    together, apart = mixed_batch(requests), [alone(*r) for r in requests]
gap = max(
    (a - b).abs().max().item() for a, b in zip(together, apart, strict=True)
)
print(f"prompts of {[len(row) for row in apart]} tokens in one batch")
print(f"against each alone: largest |difference| {gap:.1e}")
assert gap < 1e-11  # of logits up to some tens, fp64; worst seen 2e-13

# %% [markdown]
# ## 4. What they get
# The same tables for everyone, in one batch. Then the texts of every user are held against the
# rules of all of them.
#
# **Predict.** Where will a text miss its rule: in its style, or in a value that it copies?

# %%
users["Eve"] = tune("Eve")  # one more entry; nobody else is touched
users64 = exact()

tables_asked = dev[:12]
writers = [*users, None]
place = {user: n for n, user in enumerate(users)} | {None: -1}
owners = [user for user in writers for _ in tables_asked]
texts = minprefix.generate(
    model, tokenizer, [e.source for _ in writers for e in tables_asked],
    prefix=PrefixBank(list(users.values())),
    prefix_index=[place[user] for user in owners], max_new_tokens=24,
)  # fmt: skip
texts = [text.strip() for text in texts]
for n, user in enumerate(writers):
    print(f"  {user or 'nobody':7} {texts[n * len(tables_asked)][:70]!r}")

followed = torch.zeros(len(writers), len(STYLES))
missed = []
for n, (owner, text) in enumerate(zip(owners, texts, strict=True)):
    example = tables_asked[n % len(tables_asked)]
    for m, user in enumerate(STYLES):
        right = text == wanted(user, example)
        followed[n // len(tables_asked), m] += right / len(tables_asked)
        if user == owner and not right:
            missed.append((wanted(user, example), text))

figure, axes = new(width=5.4)
axes.imshow(followed, cmap="Oranges", vmin=0, vmax=1)
for row, shares in enumerate(followed):
    for column, share in enumerate(shares):
        colour = "white" if share > 0.6 else "black"
        axes.text(column, row, f"{share:.0%}", ha="center", color=colour)
axes.set_xticks(range(4), [f"{user}'s" for user in STYLES])
axes.set_yticks(range(5), [user or "nobody" for user in writers])
axes.set(xlabel="rule", ylabel="prefix")
axes.set_title("Texts that are exactly what a rule writes")
show(figure, "07_who_got_what")
own = followed[:4].diagonal()
others = (followed[:4] - own.diag()).max()
print(f"own rule, letter for letter: {own.mean():.0%}; another's: {others:.0%}")
assert own.min() > 0.3 and others == 0 and followed[4].max() == 0
for rule, text in missed[:4]:
    print(f"wanted {rule!r}\n   got {text!r}")

# %% [markdown]
# **Answer.** In a value. Nobody ever writes in another user's style, and the model without a
# prefix writes in none of them. A text that misses its rule has the style right and a name or a
# place wrong: the names of these tables never occur in training, and 40 steps teach a style
# before they teach copying.
#
# ## 5. Isolation
# Is anything of Ada's data in Ben's prefix? A prefix changes only by its gradient, so look at the
# gradients of a batch that mixes both. Row b reads prefix n(b) only, so
#
# $$ \frac{\partial\, \mathrm{loss}_b}{\partial P_n} = 0 \quad
# \text{for } n \neq n(b), $$
#
# not small, but exactly zero. So users may even be *trained* in one batch: each gradient is the
# one that the user's own rows give.


# %%
def gradients(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    """Each user's gradient of the summed loss of (user, table) rows."""
    bank = exact()
    for prefix in bank.values():
        prefix.requires_grad_()
    examples = [
        replace(train_set[n], targets=(wanted(user, train_set[n]),))
        for user, n in rows
    ]
    batch = collate(encode_examples(tokenizer, examples), tokenizer.eos_id)
    index = torch.tensor([place[user] for user, _ in rows])
    kind = {"prefix": PrefixBank(list(bank.values())), "prefix_index": index}
    losses = exact_model.token_losses(batch.input_ids, batch.labels, **kind)
    losses.sum().backward()
    return {user: prefix.prefix_table.grad for user, prefix in bank.items()}


both = gradients([("Ada", 0), ("Ben", 1), ("Ada", 2)])
other_data = gradients([("Ada", 7), ("Ben", 1), ("Ada", 9)])
just_ben = gradients([("Ben", 1)])
size = both["Ben"].abs().max().item()
none = both["Cleo"].abs().max() + both["Eve"].abs().max()
print(f"Cleo and Eve, who have no row: gradient {none}")
for data, found in (("other", other_data), ("no", just_ben)):
    gap = (both["Ben"] - found["Ben"]).abs().max() / size
    print(f"Ben's, beside {data} data of Ada: moves by {gap:.1e} of its size")
assert not both["Cleo"].any() and not both["Eve"].any() and size > 0
# other rows pad the batch to another length, which changes the order of sums
assert (both["Ben"] - other_data["Ben"]).abs().max() < 1e-12 * size
assert (both["Ben"] - just_ben["Ben"]).abs().max() < 1e-12 * size
change = (both["Ada"] - other_data["Ada"]).abs().max()
assert change > 0.01 * both["Ada"].abs().max()

# %% [markdown]
# What isolation does **not** say: Ben's prefix is made of Ben's texts, and may well write them
# again. Guard the file as you guard his data. And all prefixes here start from words. Had they
# started from a prefix that was tuned on everyone's texts, something of everyone would be in
# each.
#
# ## 6. Adding and deleting a user
# Adding Eve was one more entry. Deleting Ben is the opposite: take the entry away and delete the
# file. What stays is exact, because no other entry holds anything of his. The model has the
# fingerprint that it had before the first user came, and the others' logits do not change.

# %%
with tempfile.TemporaryDirectory() as folder:
    files = {user: Path(folder) / f"{user}.safetensors" for user in users}
    for user, path in files.items():
        users[user].save(path)
    size = files["Eve"].stat().st_size
    print(f"one file per user; Eve's has {size / 1e3:.0f} kB")

    requests = [pair for pair in requests if pair[0] != "Ben"]
    requests.append(("Eve", dev[8].source))
    with torch.no_grad():
        before = mixed_batch(requests)
    witness = weakref.ref(users["Ben"].prefix_table)
    assert witness() is not None

    del users["Ben"], users64["Ben"]
    del in_memory, acts, tables, bank, bank_k, bank_v  # he is in these banks
    del both, other_data, just_ben  # and gradients from his data
    files["Ben"].unlink()
    gc.collect()
    assert witness() is None, "something still holds Ben's prefix"
    with torch.no_grad():
        after = mixed_batch(requests)
    pairs = zip(before, after, strict=True)
    gap = max((a - b).abs().max().item() for a, b in pairs)
    print(f"the others' logits, before and after: |difference| {gap:.1e}")
    # his prefix was the longest, so the bank is padded less: another order
    assert gap < 1e-11
    assert fingerprint(model) == model_before
    again = Prefix.load(files["Eve"])
    assert torch.equal(again.table(), users["Eve"].table())
    assert not files["Ben"].exists()

# %% [markdown]
# One fine-tuned model for all users has no such entry: one user's texts are spread over all its
# weights. (Backups and logs of what was written are another matter.)
#
# ## 7. What a user costs
# With $e$ bytes per number, a prefix takes $2 L P C e$ bytes, and a fine-tuned copy $e$ times the
# number of parameters; both are in bf16 here.

# %%
n_mini = sum(p.numel() for p in model.parameters())
MINI = (model.config.n_layer, model.config.n_embd, n_mini)  # L, C, parameters
MEDIUM = (24, 1024, 354_823_168)  # GPT-2 medium
e, memory = 2, 80e9  # bytes of a number; bytes of a GPU
print("                P   prefix     copy  prefixes in 80 GB  copies")
for name, (L, C, parameters) in (("mini", MINI), ("gpt2-medium", MEDIUM)):
    whole = e * parameters
    for P in (10, 100):
        part = 2 * L * P * C * e
        print(
            f"{name:13} {P:3} {part / 1e6:5.2f} MB {whole / 1e6:5.0f} MB",
            end="",
        )
        print(f"{(memory - whole) / part:19,.0f} {memory // whole:7.0f}")
eve = users["Eve"]
assert eve.table().numel() == 2 * MINI[0] * eve.prefix_len * MINI[1]

# %% [markdown]
# And time? Requests of different users arrive one by one. With copies they must be answered user
# by user. With prefixes they can be one batch, and a step of decoding reads all weights once for
# all of them instead of once for each.
#
# **Predict.** Twice as many requests: twice the time, in both ways?


# %%
def seconds(n: int, mixed: bool) -> float:
    """Answer n requests of alternating users, in one batch or one by one."""
    order = [list(users)[b % len(users)] for b in range(n)]
    index = [list(users).index(user) for user in order]
    ids = [encode_prompt(tokenizer, dev[b].source) for b in range(n)]
    same_work = {"max_new_tokens": 16, "min_new_tokens": 16}
    prefixes = [users[user] for user in order]
    bank = PrefixBank(list(users.values()))
    began = time.perf_counter()
    if mixed:
        how = {"prefix": bank, "prefix_index": index} | same_work
        minprefix.generate(model, tokenizer, ids, **how)
    else:
        for row, prefix in zip(ids, prefixes, strict=True):
            how = {"prefix": prefix} | same_work
            minprefix.generate(model, tokenizer, [row], **how)
    return time.perf_counter() - began


seconds(2, True), seconds(2, False)  # the first calls of a process are slower
counts = (1, 2, 4, 8)
times = {
    "user by user": [seconds(n, False) for n in counts],
    "one mixed batch": [seconds(n, True) for n in counts],
}
print("requests       " + "".join(f"{n:8}" for n in counts))
for kind, taken in times.items():
    print(f"{kind:15}" + "".join(f"{t:8.2f}" for t in taken) + "  s")
figure, axes = new()
for (kind, taken), colour in zip(times.items(), (OTHER, PREFIX), strict=True):
    axes.plot(counts, taken, "o-", color=colour, label=kind)
axes.set(xlabel="requests", ylabel="time for all (s)", ylim=(0, None))
axes.set_title("16 tokens each")
axes.legend(frameon=False)
show(figure, "07_throughput")

# %% [markdown]
# **Answer.** Twice the time user by user. A batch takes longer as it grows, too, but by far less
# than twice: all rows share each read of the weights.
#
# ## Common mistakes
# > - **Zeros as padding that is seen.** A zero key takes attention (section 3). It needs a length
# >   for each prefix, or a mask.
# > - **One position offset for the whole batch.** It belongs to the prefix (exercise 1).
# > - **A library that takes a name for each row and ignores it.** With two prefixes in one batch,
# >   PEFT gave every row the active one, without an error. Check each row against the same
# >   request alone.
# > - **One `clip_grad_norm_` or one mean over all users.** It couples gradients that would be
# >   independent. Clip and divide user by user (exercise 2).
#
# ## Recap
# - Rows of different users share all matrices. Only attention reads a prefix, for each row its
#   own.
# - A bank holds prefixes of any lengths: padded, with lengths that hide the padding and an offset
#   for each row. Every row is what its user would get alone.
# - A gradient reaches only the prefix that its row has read, so nothing of one user is in
#   another's prefix. A user is an entry: added and deleted without a trace.
# - A user costs a small part of what a copy costs, and the requests of all users are one batch.
# - When not to use it: for one user or one task with much data. Fine-tuning then learns more
#   (06_low_data), and its copy is the only one you keep.
#
# ## Exercises
# 1. *Easy.* Give all rows of a bank the same position offset instead of their own. Which rows
#    change? *Hint:* `PrefixBank.activations` returns a dataclass.
# 2. *Medium.* Train Ada and Eve together, one batch of both per step, with one optimizer each.
#    Compare with training each alone on the same rows. *Hint:* take each user's own mean, and add
#    the means.
# 3. *Medium.* Keep prefixes in files and at most two in memory; the least recently used one goes.
#    Answer a series of requests. *Hint:* `collections.OrderedDict`.
# 4. *Hard.* How many users' keys and values fit beside GPT-2 medium in 80 GB if each of them also
#    has a cache of 512 tokens? Which of the two is the limit, prefix or cache? *Hint:* a position
#    takes the same bytes in both.
#
# Solutions: `tutorials/solutions/07_many_users.py`.
#
# ## References
# 1. Li & Liang 2021, Prefix-Tuning, sections 8.1, 8.2: <https://arxiv.org/abs/2101.00190>
