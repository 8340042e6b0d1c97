"""Solutions to the exercises of tutorial 7 (07_many_users). Each one is asserted.

The prefixes here are not trained. They start from words, which is enough for these questions.
"""

import copy
import tempfile
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch

import minprefix
from minprefix import Prefix, PrefixBank
from minprefix.data.batches import collate, encode_examples, encode_prompt
from minprefix.data.load import load_examples

model, tokenizer = minprefix.load("mini")
model = model.requires_grad_(False).double()
WORDS = {"Ada": "brief:", "Ben": "table-to-text:", "Eve": "Do you fancy this?"}
users = {user: Prefix.from_words(model, tokenizer, words) for user, words in WORDS.items()}
lengths = [prefix.prefix_len for prefix in users.values()]
dev = load_examples("restaurants", "dev")

# 1. One offset for all changes the rows whose own offset is another. A prefix was trained with its
#    offset, so the offset belongs to the prefix (and is saved in its file).
ids = torch.tensor([encode_prompt(tokenizer, "name : The Eagle | type : pub")] * 3)
acts = PrefixBank(list(users.values())).activations(torch.arange(3))
longest = torch.full((3,), max(lengths))
own, wrong = (model(ids, prefix=a) for a in (acts, replace(acts, position_offset=longest)))
moved = (own - wrong).abs().flatten(1).amax(1)  # (3,)
print(f"1. lengths {lengths}, all at offset {max(lengths)}: logits move by {moved.tolist()}")
assert len(set(lengths)) == 3
for length, change in zip(lengths, moved.tolist(), strict=True):
    assert (change == 0) == (length == max(lengths)) and (change == 0 or change > 1e-3)

# 2. Ada and Eve in one batch: each user's own mean, their sum, an optimizer for each.
rows = encode_examples(tokenizer, dev[:2])
data = {"Ada": rows[:2], "Eve": rows[4:6]}


def tune(together: bool) -> dict[str, torch.Tensor]:
    """The tables after two steps."""
    prefixes = {user: copy.deepcopy(users[user]) for user in data}
    optimizers = [torch.optim.AdamW(p.parameters(), lr=0.01) for p in prefixes.values()]
    for _ in range(2):
        if together:
            batch = collate([row for own in data.values() for row in own], tokenizer.eos_id)
            index = torch.tensor([n for n, own in enumerate(data.values()) for _ in own])
            losses = model.token_losses(
                batch.input_ids, batch.labels, batch.at,
                prefix=PrefixBank(list(prefixes.values())), prefix_index=index,
            )  # fmt: skip
            owner = index[batch.at // batch.input_ids.shape[1]]  # of each label
            loss = sum(losses[owner == n].mean() for n in range(len(data)))
        else:
            loss = 0
            for user, own in data.items():
                batch = collate(own, tokenizer.eos_id)
                kind = {"prefix": prefixes[user]}
                loss += model.token_losses(batch.input_ids, batch.labels, batch.at, **kind).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {user: prefix.prefix_table.detach() for user, prefix in prefixes.items()}


both, apart = tune(True), tune(False)
gap = max((both[user] - apart[user]).abs().max().item() for user in data)
step = max((both[user] - users[user].prefix_table).abs().max().item() for user in data)
print(f"2. after two steps of up to {step:.3f} the tables differ by {gap:.1e}")
# Adam divides by the size of the gradient, so its rounding counts where it is nearly 0
assert gap < 1e-6 < step


# 3. Prefixes in files; of those in memory, the least recently used one goes.
class Shelf:
    """Prefixes in files, at most `slots` of them in memory."""

    def __init__(self, files: dict[str, Path], slots: int):
        self.files, self.slots, self.loads = files, slots, 0
        self.held: OrderedDict[str, Prefix] = OrderedDict()

    def get(self, user: str) -> Prefix:
        if user not in self.held:
            if len(self.held) == self.slots:
                self.held.popitem(last=False)
            self.held[user], self.loads = Prefix.load(self.files[user]).double(), self.loads + 1
        self.held.move_to_end(user)
        return self.held[user]


with tempfile.TemporaryDirectory() as folder:
    files = {user: Path(folder) / f"{user}.safetensors" for user in users}
    for user, path in files.items():
        users[user].save(path)
    shelf = Shelf(files, slots=2)
    for user in (
        "Ada",
        "Ben",
        "Ada",
        "Eve",
        "Ada",
        "Ben",
    ):  # Ben goes, then Eve
        logits = model(ids[:1], prefix=shelf.get(user))
        exact = model(ids[:1], prefix=users[user])
        assert len(shelf.held) <= 2
        # files hold fp32, the tables here are fp64
        assert (logits - exact).abs().max() < 1e-4
    print(f"3. six requests, {shelf.loads} loads, in memory: {list(shelf.held)}")
    assert shelf.loads == 4 and list(shelf.held) == ["Ada", "Ben"]

# 4. A step of decoding reads all weights, for one row or for eight. Times are printed only.
requests = [(n % len(users), e.source) for n, e in enumerate(dev[:8])]
bank = PrefixBank([prefix.float() for prefix in users.values()])
model = model.float()


def seconds(n_calls: int) -> float:
    """Answer all requests with 16 tokens each, in calls of equal size."""
    began = time.perf_counter()
    for part in (requests[i::n_calls] for i in range(n_calls)):
        texts = minprefix.generate(
            model, tokenizer, [source for _, source in part], prefix=bank,
            prefix_index=[n for n, _ in part], max_new_tokens=16, min_new_tokens=16,
        )  # fmt: skip
        assert len(texts) == len(part)
    return time.perf_counter() - began


one_by_one, together = (min(seconds(n) for _ in range(2)) for n in (8, 1))
print(f"4. eight requests: {one_by_one:.2f} s one by one, {together:.2f} s in one batch")

# 5. GPT-2 medium (24 layers of width 1024, 354,823,168 parameters) in bf16, 80 GB.
L, C, e, parameters, P, S = 24, 1024, 2, 354_823_168, 10, 512
prefix_bytes, cache_bytes = 2 * L * P * C * e, 2 * L * S * C * e
fits = int((80e9 - e * parameters) // (prefix_bytes + cache_bytes))
print(
    f"5. {prefix_bytes / 1e6:.1f} MB and a cache of {cache_bytes / 1e6:.1f} MB each: {fits} users"
)
assert cache_bytes * P == prefix_bytes * S  # a position is a position: the cache is the limit
