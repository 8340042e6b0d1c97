"""A prefix affects no other row of a batch, whatever its values; absurd ones are rejected."""

import random

import pytest
import torch
from conftest import random_ids, tiny_gpt2

from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate_ids
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.prefix import Prefix

HOSTILE = [float("nan"), float("inf"), 3e38]


@torch.no_grad()
def poisoned(prefix: Prefix, value: float) -> Prefix:
    """A copy whose table, and gate if there is one, hold `value` alone."""
    copy = prefix.export()
    copy.prefix_table.fill_(value)
    if copy.gate is not None:
        copy.gate.fill_(abs(value))
    return copy


def random_bank(rng: random.Random, model) -> PrefixBank:
    """Two or three prefixes of any length and offset, with and without gates, some infix."""
    gates, infixes = rng.random() < 0.5, rng.random() < 0.3
    prefixes = []
    for seed in range(rng.randint(2, 3)):
        place = "infix" if infixes and rng.random() < 0.5 else "prefix"
        gate = gates and rng.random() < 0.7
        options = {"gate": gate, "position_offset": rng.choice([0, 3]), "place": place}
        prefix = Prefix.random(model.config, rng.choice([1, 4, 17]), seed, **options)
        prefix = prefix.to(model.wte.weight)
        if gate:
            torch.nn.init.ones_(prefix.gate)
        prefixes.append(prefix)
    return PrefixBank(prefixes)


def mixed_batch(seed: int, models) -> tuple[PrefixBank, PrefixBank, list[int], int]:
    """A bank, the same with one poisoned prefix, an index for each row, and which is poisoned."""
    rng = random.Random(seed)
    model = models[seed % len(models)]
    bank = random_bank(rng, model)
    N = len(bank.prefixes)
    bad = rng.randrange(N)
    other = list(bank.prefixes)
    other[bad] = poisoned(other[bad], rng.choice(HOSTILE))
    index = [rng.randint(-1, N - 1) for _ in range(rng.randint(2, 6))]
    index[rng.randrange(len(index))] = rng.choice([-1, (bad + 1) % N])  # one row at least is clean
    return bank, PrefixBank(other), index, bad


def check_forward(model, seed: int, good: PrefixBank, bad: PrefixBank, index: list[int], n: int):
    """Logits, losses and all gradients of the clean rows are those of the batch without poison."""
    B, T = len(index), 7
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    ids = random_ids(model, B, T, seed=seed)
    clean = torch.tensor([row != n for row in index])
    labels = random_ids(model, B, T, seed=seed + 1)
    labels = labels.where((torch.arange(T) < lengths[:, None]) & clean[:, None], -100)
    kwargs = {"prefix_index": torch.tensor(index), "kv_lens": lengths, "starts": lengths // 2}
    found = []
    for bank in (good, bad):
        logits = model(ids, prefix=bank, **kwargs)[clean]
        own = [p for i, prefix in enumerate(bank.prefixes) if i != n for p in prefix.parameters()]
        losses = model.token_losses(ids, labels, prefix=bank, **kwargs)
        found.append([logits, losses, *torch.autograd.grad(losses.sum(), own, allow_unused=True)])
    for x, y in zip(*found, strict=True):
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), f"seed {seed}"


def check_texts(model, seed: int, good: PrefixBank, bad: PrefixBank, index: list[int], n: int):
    """The texts of the clean rows, in every loop."""
    rng = random.Random(seed)
    prompts = [
        random_ids(model, rng.randint(1, 9), seed=seed + b).tolist() for b in range(len(index))
    ]
    beams = {"num_beams": 2}
    sampled = {"do_sample": True, "seed": seed}
    config = GenerationConfig(max_new_tokens=5, **rng.choice([{}, beams, sampled]))
    for fast in (True, False):
        made = [
            generate_ids(model, prompts, config, 96, prefix=bank, prefix_index=index, fast=fast)
            for bank in (good, bad)
        ]
        for row, text, other in zip(index, *made, strict=True):
            assert row == n or text == other, f"seed {seed}, fast={fast}, {config}"


@pytest.fixture(scope="module")
def models():
    return [tiny_gpt2(dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]


def check_batches(models, seeds) -> None:
    for seed in seeds:
        model, case = models[seed % len(models)], mixed_batch(seed, models)
        (check_texts if seed % 4 == 0 else check_forward)(model, seed, *case)


def test_a_poisoned_prefix_reaches_no_other_row(models):
    check_batches(models, range(60))


@pytest.mark.slow
def test_a_poisoned_prefix_reaches_no_other_row_in_1000_batches(models):
    check_batches(models, range(60, 1060))


@pytest.mark.parametrize(
    "value, told",
    [
        (float("nan"), "holds values that are not finite numbers"),
        (float("inf"), "holds values that are not finite numbers"),
        (3e38, "holds 3e.38; values of more than 65504, the largest of fp16, make attention"),
        (-65505.0, "holds 6.55e.04; values of more than 65504"),
    ],
)
@pytest.mark.parametrize("name", ["prefix_table", "gate"])
def test_absurd_tables_are_refused(tmp_path, name, value, told):
    model = tiny_gpt2(dtype=torch.float32)
    prefix = Prefix.random(model.config, 3, seed=0, gate=True)
    with torch.no_grad():
        dict(prefix.named_parameters())[name].view(-1)[1] = value
    prefix.save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=f"p.safetensors: {name} {told}"):
        Prefix.load(tmp_path / "p.safetensors")
