# %% [markdown]
# # 7. Many users, one model
#
# One frozen model writes for many users in the same batch, each with a prefix of their own. This
# is what sections 8.1 and 8.2 of the paper propose; here it is done, and checked.
#
# **What you will learn.** How such a batch is computed. Why no user's prefix holds anything of
# another user's data. What it takes to add and to delete a user. What a user costs, compared with a
# fine-tuned copy of the model.
#
# **What to know first.** 02_equation_3: what a prefix is, and why positions shift.
# 05_table_to_text: the training loop. The letters are those of [the table in tutorial
# 01](01_gpt2_from_scratch.py).
#
# **Running time.** About a minute on two CPU cores.
#
# **Sources.** Li & Liang 2021 [1], sections 8.1 and 8.2.

# %%
import copy
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pictures_results as pictures
import torch
from short_training import TRAINED, for_training, train
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

import minprefix
from kernels import prefix_attention
from minprefix import Prefix, PrefixBank
from minprefix.data.batches import collate, encode_examples, encode_prompt
from minprefix.data.load import load_examples

torch.manual_seed(0)
model, tokenizer = minprefix.load("mini")
model.requires_grad_(False)
frozen = for_training(model)  # a copy in bf16 where this is faster


def usable(split: str) -> list:
    """The tables that have all fields which the users below write about."""
    wanted = {"type", "food", "area"}
    examples = load_examples("restaurants", split)
    return [e for e in examples if {*dict(e.table)} >= wanted]


train_set, dev = usable("train"), usable("dev")
names = [{dict(e.table)["name"] for e in part} for part in (train_set, dev)]
assert not names[0] & names[1]  # a name in dev is never seen in training

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
requests = [("table", table, n) for n in (0, 1)]
requests += [("note", note, n) for n in (1, 0)]
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
# were trained for. (The summary has the form and the place right, but its number is wrong;
# 08_summarisation_bart counts such faults.) With the e2e prefix the note becomes a restaurant, and
# with the notes prefix the table becomes a kind of headline. All four rows went through the same
# weights in the same calls. How can one batch hold several prefixes, and what follows from it? We
# train small prefixes of our own to see.
#
# ## 2. Users and what they want
# Four users get texts about restaurants, each in another style. A style is a rule that makes a
# user's examples, and with it we can check who got what.


# %%
STYLES = {  # the words that a prefix starts from, and the rule
    "Ada": ("brief:", "{name}, {type}."),
    "Ben": ("table-to-text:", "{food} {type}: {name}."),
    "Cleo": ("where?", "Where? {area}. What? {name}."),
    "Eve": ("ask:", "Fancy {food} food? Try {name}."),
}


def wanted(user: str, example) -> str:
    """What the user's rule writes about this table."""
    return STYLES[user][1].format(**dict(example.table))


def in_style(user: str, text: str) -> bool:
    """Whether the text is the user's rule with any values in its fields."""
    between = re.split(r"{\w+}", STYLES[user][1])  # the words between fields
    return bool(re.fullmatch("[^,.:?]+".join(map(re.escape, between)), text))


print(dev[0].source)
for user in STYLES:
    print(f"  {user:5} {wanted(user, dev[0])}")
    styles = [in_style(other, wanted(user, dev[0])) for other in STYLES]
    assert sum(styles) == 1 and in_style(user, wanted(user, dev[0]))

# %% [markdown]
# Each prefix starts from the keys and values of a few words (so lengths differ), and is trained on
# its user's texts alone, by the loop of 05_table_to_text. It is a table without an MLP, so it can
# be trained at the large rate that so few steps need, even without a warm-up (05, section 4).


# %%
def tune(user: str) -> Prefix:
    prefix = Prefix.from_words(model, tokenizer, STYLES[user][0])
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
# matrix product. Here all rows share every matrix of the model. Only attention reads a prefix, and
# attention is computed for each row on its own in any case:
#
# $$ o_b = \mathrm{softmax}\big(q_b\, [K_{n(b)} ; K_b]^\top / \sqrt D\big)\,
# [V_{n(b)} ; V_b] $$
#
# where $n(b)$ is the user of row b. The prefixes of a *bank*, (N, H, P, D), are padded with zeros
# to the same length, and `prefix_lens` says how many positions are real. Here is one layer, by hand
# and by the library.
#
# **Predict.** What happens to each row if `prefix_lens` is left out, so that attention sees the
# padding?

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
# **Answer.** The rows of the shorter prefixes are wrong: zeros take attention (section 7 of 02).
# The longest prefix has no padding, and the row without one reads none.
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


def in_fp64(users: dict[str, Prefix]) -> dict[str, Prefix]:
    return {user: copy.deepcopy(p).double() for user, p in users.items()}


def in_one_batch(users: dict[str, Prefix], requests) -> list[torch.Tensor]:
    """Logits of each request (user, table), (its tokens, V), from one call."""
    place = {user: n for n, user in enumerate(users)} | {None: -1}
    ids = [torch.tensor(encode_prompt(tokenizer, text)) for _, text in requests]
    lengths = torch.tensor([len(row) for row in ids])
    logits = exact_model(
        pad_sequence(ids, batch_first=True), kv_lens=lengths,
        prefix=PrefixBank(list(users.values())),
        prefix_index=torch.tensor([place[user] for user, _ in requests]),
    )  # fmt: skip
    return [row[:n] for row, n in zip(logits, lengths.tolist(), strict=True)]


def alone(users: dict[str, Prefix], user: str | None, text: str):
    ids = torch.tensor([encode_prompt(tokenizer, text)])
    return exact_model(ids, prefix=users.get(user))[0]


def largest_gap(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


users64 = in_fp64(users)
asked = ("Cleo", "Ada", None, "Ben", "Ben", "Ada", "Cleo")
requests = [(user, dev[n].source) for n, user in enumerate(asked)]
with torch.no_grad():
    together = in_one_batch(users64, requests)
    apart = [alone(users64, *request) for request in requests]
print(f"prompts of {[len(row) for row in apart]} tokens in one batch")
gap = largest_gap(together, apart)
print(f"against each alone: largest |difference| {gap:.1e}")
assert gap < 1e-11  # of logits up to some tens, fp64; worst seen 2e-13

# %% [markdown]
# ## 4. What they get
# The same tables for everyone, in one batch. Of each text we ask two things: whose style it has,
# and whether it is letter for letter what its user's rule writes.
#
# **Predict.** Where will a text miss its rule: in its style, or in a value that it copies?

# %%
users["Eve"] = tune("Eve")  # one more entry; nobody else is touched

tables_asked = dev[:12]
writers = [*users, None]
place = {user: n for n, user in enumerate(users)} | {None: -1}
owners = [user for user in writers for _ in tables_asked]
texts = minprefix.generate(
    model, tokenizer, [e.source for _ in writers for e in tables_asked],
    prefix=PrefixBank(list(users.values())),
    prefix_index=[place[user] for user in owners], max_new_tokens=24,
)  # fmt: skip

shares = torch.zeros(len(writers), len(STYLES))  # of texts in each style
right, missed = dict.fromkeys(users, 0), []
for n, (owner, text) in enumerate(zip(owners, texts, strict=True)):
    text, example = text.strip(), tables_asked[n % len(tables_asked)]
    for m, user in enumerate(STYLES):
        shares[n // len(tables_asked), m] += in_style(user, text)
    if owner and text == wanted(owner, example):
        right[owner] += 1
    elif owner:
        missed.append((wanted(owner, example), text))
shares /= len(tables_asked)
pictures.who_got_what(shares, [user or "nobody" for user in writers], [*STYLES])
print("right to the letter:", right, "of", len(tables_asked))
for rule, text in missed[:4]:
    print(f"wanted {rule!r}\n   got {text!r}")
own = shares[:4].diagonal()
assert own.min() > 0.9 and (shares[:4] - own.diag()).max() == 0
assert shares[4].max() < 0.2
assert min(right.values()) > 0.3 * len(tables_asked)
assert sum(right.values()) < own.sum() * len(tables_asked)

# %% [markdown]
# **Answer.** In a value. All texts of a prefix, except at most one, are in its own user's style,
# and none is in another's. (A text without a prefix may fit by chance: Ben's rule is little more
# than a colon.) Where a text differs from its rule, mostly a name or a place is wrong: these names
# never occur in training, and 40 steps teach a style before they teach copying.
#
# ## 5. Isolation
# Is anything of Ada's data in Ben's prefix? A prefix changes only by its gradient, so look at the
# gradients of a batch that mixes both. Let $\theta_n$ be the numbers of prefix n. Row b reads
# prefix n(b) only, so
#
# $$ \frac{\partial\, \mathrm{loss}_b}{\partial \theta_n} = 0 \quad
# \text{for } n \neq n(b), $$
#
# exactly. So users may even be *trained* in one batch: each gradient is the one that the user's own
# rows give.


# %%
def gradients(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    """Each user's gradient of the summed loss of (user, table) rows."""
    bank = in_fp64(users)
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
    assert gap < 1e-12  # other rows change the padding, so the order of sums
assert not both["Cleo"].any() and not both["Eve"].any() and size > 0
change = (both["Ada"] - other_data["Ada"]).abs().max()
assert change > 0.01 * both["Ada"].abs().max()

# %% [markdown]
# Isolation has limits. Ben's prefix is made of Ben's texts and may well write them again, so guard
# the file as you guard his data. And all prefixes here start from words. If they had started from
# a prefix that was trained on everyone's texts, each could hold something of everyone.
#
# ## 6. Adding and deleting a user
# Adding Eve was one more entry. Deleting Ben is the opposite: take the entry away and delete the
# file. No other entry holds anything of his, so the others' logits do not change.

# %%
with tempfile.TemporaryDirectory() as folder:
    files = {user: Path(folder) / f"{user}.safetensors" for user in users}
    for user, path in files.items():
        users[user].save(path)
    size = files["Eve"].stat().st_size
    print(f"one file per user; Eve's has {size / 1e3:.0f} kB")
    files["Ben"].unlink()
    rest = {user: Prefix.load(files[user]) for user in users if user != "Ben"}

requests = [*[pair for pair in requests if pair[0] != "Ben"],
            ("Eve", dev[8].source)]  # fmt: skip
with torch.no_grad():
    before = in_one_batch(in_fp64(users), requests)
    after = in_one_batch(in_fp64(rest), requests)
gap = largest_gap(before, after)
print(f"the others' logits with Ben and without: |difference| {gap:.1e}")
# his prefix was the longest, so the bank is padded less: another order of sums
assert gap < 1e-11

# %% [markdown]
# One fine-tuned model for all users has no such entry: one user's texts are spread over all its
# weights. (Backups and logs of what was written must be deleted, too.)
#
# ## 7. What a user costs
# With $e$ bytes per number, a prefix takes $2 L P C e$ bytes, and a fine-tuned copy $e$ times the
# number of parameters; both are in bf16 here.

# %%
L, C, parameters = 24, 1024, 354_823_168  # GPT-2 medium
e, memory = 2, 80e9  # bytes of a number; bytes of a GPU
whole = e * parameters
print(f"a copy {whole / 1e6:.0f} MB: 80 GB hold {memory // whole:.0f} of them")
for P in (10, 100):
    part = 2 * L * P * C * e
    fit = (memory - whole) // part
    print(f"P {P:3}: {part / 1e6:.2f} MB: beside one model {fit:,.0f} of them")
config, P = model.config, users["Eve"].prefix_len
assert users["Eve"].table().numel() == 2 * config.n_layer * P * config.n_embd

# %% [markdown]
# A prefix also takes positions: a text of its user may have P tokens fewer than the model has
# positions. In time, copies cost more: their requests must be answered user by user. With prefixes
# the requests of all users can be one batch, and a step of decoding reads all weights once for all
# rows (exercise 4). LoRA also allows such batches, but there each row has products of its own
# beside every matrix.
#
# ## Common mistakes
# > - **Padding that is seen.** Each prefix of a bank needs its length, or a mask (section 3).
# > - **One position offset for the whole batch.** It belongs to the prefix (exercise 1).
# > - **A library that takes a name for each row and ignores it.** With two prefixes in one batch,
# >   PEFT gave every row the active one, without an error. Check each row against the same
# >   request alone.
# > - **Two trained prefixes joined**, one for the task and one for the user. Neither was trained to
# >   be read beside the other (03). Train one prefix for both.
# > - **One `clip_grad_norm_` or one mean over all users.** It couples gradients that would be
# >   independent. Clip and divide user by user (exercise 2).
#
# ## Recap
# - Rows of different users share all matrices. Only attention reads a prefix, for each row its own.
# - A bank holds prefixes of any lengths: padded, with lengths that hide the padding and an offset
#   for each row. Every row is what its user would get alone.
# - A gradient reaches only the prefix that its row has read, so nothing of one user is in
#   another's prefix. A user is an entry: added and deleted without a trace.
# - A user costs a small part of what a copy costs. But for one user or one task with much data, one
#   fine-tuned copy is all that has to be kept (06_low_data).
#
# ## Exercises
# 1. *Easy.* Give all rows of a bank the same position offset instead of their own. Which rows
#    change? *Hint:* `PrefixBank.activations` returns a dataclass.
# 2. *Medium.* Train Ada and Eve together, one batch of both per step, with one optimizer each.
#    Compare with training each alone on the same rows. *Hint:* take each user's own mean, and add
#    the means.
# 3. *Medium.* Keep prefixes in files and at most two in memory; the least recently used one goes.
#    Answer a series of requests. *Hint:* `collections.OrderedDict`.
# 4. *Medium.* Time eight requests of several users, one by one and in one batch. *Hint:*
#    `min_new_tokens` makes the work equal; a first call of each kind is slower.
# 5. *Hard.* How many users' keys and values fit beside GPT-2 medium in 80 GB if each of them also
#    has a cache of 512 tokens? Which of the two is the limit, prefix or cache? *Hint:* a position
#    takes the same bytes in both.
#
# Solutions: `tutorials/solutions/07_many_users.py`.
#
# ## References
# 1. Li & Liang 2021, Prefix-Tuning, sections 8.1, 8.2: <https://arxiv.org/abs/2101.00190>
