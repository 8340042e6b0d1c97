"""The authors' state dicts and adapter-hub's files: tables by those systems' formulas, errors."""

import json
import pickle
from itertools import pairwise

import pytest
import torch
from conftest import assert_close, hf_twin, random_ids, tiny_gpt2
from safetensors.torch import save_file
from torch import nn

from minprefix.models.config import GPT2Config
from minprefix.prefix.foreign import AuthorsTokens, read_adapters, read_authors, run_virtual_tokens
from minprefix.prefix.prefix import Prefix

P, L, H, D, MID = 5, 3, 4, 8, 16  # of `tiny_gpt2`
C = H * D
CONFIG = tiny_gpt2().config
TOLERANCE = 1e-12  # of the largest entry, other orders of summation in fp64; worst seen: 9.2e-16


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear, tanh, Linear, ...: `control_trans` in both systems."""
    torch.manual_seed(seed)
    layers = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def state_of(control_trans, wte=None, wte2=None) -> dict[str, torch.Tensor]:
    """The state dict of a module that has these parts."""
    parts = {"wte": wte, "wte2": wte2}
    state = {f"{name}.weight": part.weight.detach() for name, part in parts.items() if part}
    if isinstance(control_trans, nn.Module):
        return state | {f"control_trans.{k}": v for k, v in control_trans.state_dict().items()}
    return state | ({} if control_trans is None else {"control_trans": control_trans})


def assert_holds(prefix: Prefix, rows: torch.Tensor) -> None:
    """Key and value of each layer, head and position: of `rows` (P, L 2 H D) viewed as both systems
    do, (P, 2 L, H, D) with entry 2 l the key of layer l and 2 l + 1 its value. Bit for bit."""
    rows = rows.view(P, 2 * L, H, D)
    assert prefix.prefix_table.shape == (L, 2, H, P, D)
    for layer in range(L):
        for head in range(H):
            for p in range(P):
                key, value = prefix.prefix_table[layer, :, head, p]
                assert torch.equal(key, rows[p, 2 * layer, head])
                assert torch.equal(value, rows[p, 2 * layer + 1, head])


@pytest.fixture
def authors(tmp_path):
    """What the authors' code leaves: the state dict and GPT-2's config with their settings."""

    def write(state) -> str:
        torch.save(state, tmp_path / "pytorch_model.bin")
        raw = {"model_type": "gpt2", **CONFIG.of_model(), "preseqlen": 10, "use_infix": False}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return tmp_path

    return write


@pytest.mark.parametrize("widths", [(C, MID, 2 * L * C), (C, MID, MID, 2 * L * C)])
@torch.no_grad()
def test_authors_mlp(authors, widths):
    """Two layers, or three ("deep")."""
    wte, control_trans = nn.Embedding(P, C), mlp(*widths)
    prefix = read_authors(authors(state_of(control_trans, wte)))
    assert prefix.position_offset == P and prefix.gate is None and prefix.base == ""
    assert_holds(prefix, control_trans(wte(torch.arange(P)[None]))[0])


@torch.no_grad()
def test_authors_direct(authors):
    """At random, (P L 2 C,) position by position; from a word, (2 L, 1, H, P, D)."""
    flat = torch.randn(P * L * 2 * C)
    prefix = read_authors(authors({"control_trans": flat}))
    assert prefix.position_offset == P
    assert_holds(prefix, flat)
    word = torch.randn(2 * L, 1, H, P, D)  # as the model's past_key_values, one after another
    prefix = read_authors(authors({"control_trans": word}))
    assert prefix.position_offset == P
    assert_holds(prefix, word[:, 0].permute(2, 0, 1, 3).flatten())


@torch.no_grad()
def test_logits_are_those_of_past_key_values(authors):
    """As the authors compute them: the prefix poses as a cache, so token t stands at P + t."""
    from transformers import DynamicCache

    model = tiny_gpt2()
    wte, control_trans = nn.Embedding(P, C).double(), mlp(C, MID, 2 * L * C).double()
    prefix = read_authors(authors(state_of(control_trans, wte)))
    out = control_trans(wte(torch.arange(P).expand(2, P)))  # a batch of 2
    cache = DynamicCache()
    for layer, (k, v) in enumerate(out.view(2, P, 2 * L, H, D).permute(2, 0, 3, 1, 4).split(2)):
        cache.update(k, v, layer)
    ids = random_ids(model, 2, 7)
    exact = hf_twin(model)(ids, past_key_values=cache, position_ids=P + torch.arange(7)[None])
    assert_close(model(ids, prefix=prefix), exact.logits, TOLERANCE)


@pytest.mark.parametrize("kind", ["Emb", "MLP"])
@torch.no_grad()
def test_authors_virtual_tokens(authors, kind):
    """Embedding-only: the model reads them at 0 .. P-1, its cache is the prefix, text from P on."""
    model = tiny_gpt2()
    wte, control_trans = nn.Embedding(P, C).double(), mlp(C, MID, C).double()
    state = state_of(control_trans if kind == "MLP" else None, wte)
    tokens = read_authors(authors(state))
    embeddings = control_trans(wte.weight) if kind == "MLP" else wte.weight
    assert tokens.infix_table is None and torch.equal(tokens.embeddings, embeddings)
    prefix = run_virtual_tokens(model, tokens)
    prefix.check_base(model)
    assert prefix.base and prefix.position_offset == P

    twin = hf_twin(model)
    cache = twin(inputs_embeds=embeddings[None], use_cache=True).past_key_values
    for layer in range(L):
        k, v = cache.layers[layer].keys[0], cache.layers[layer].values[0]
        assert_close(prefix.prefix_table[layer], torch.stack([k, v]), TOLERANCE)
    ids = random_ids(model, 1, 7)
    exact = twin(ids, past_key_values=cache, position_ids=P + torch.arange(7)[None]).logits
    assert_close(model(ids, prefix=prefix), exact, TOLERANCE)


@torch.no_grad()
def test_authors_infix(authors):
    wte, wte2, control_trans = nn.Embedding(P, C), nn.Embedding(P, C), mlp(C, MID, 2 * L * C)
    tokens = read_authors(authors(state_of(control_trans, wte, wte2)))
    assert torch.equal(tokens.embeddings, wte2.weight)
    assert_holds(Prefix.from_table(tokens.infix_table, P), control_trans(wte(torch.arange(P))))
    with pytest.raises(ValueError, match="infix.*depend on the text before it"):
        run_virtual_tokens(tiny_gpt2(), tokens)


def test_authors_without_config(authors, tmp_path):
    """Layers and heads from the model; a table from a word has them; both must agree."""
    folder = authors(state_of(mlp(C, MID, 2 * L * C), nn.Embedding(P, C)))
    table = read_authors(folder).prefix_table
    with pytest.raises(ValueError, match=r"config.json: .* are \(3, 4, 32\), .* \(3, 2, 32\)"):
        read_authors(folder, GPT2Config(n_layer=3, n_head=2, n_embd=32))
    (folder / "config.json").unlink()
    assert torch.equal(read_authors(folder / "pytorch_model.bin", CONFIG).prefix_table, table)
    with pytest.raises(
        ValueError, match="pytorch_model.bin: does not contain the number of heads.*--model"
    ):
        read_authors(folder)
    torch.save({"control_trans": torch.randn(2 * L, 1, H, P, D)}, folder / "word.pt")
    assert read_authors(folder / "word.pt").prefix_table.shape == (L, 2, H, P, D)


def test_virtual_tokens_of_another_model():
    for shape, message in (
        ((P, C + 1), "width 33 for a model of width 32"),
        ((64, C), "64 .* > 64"),
    ):
        with pytest.raises(ValueError, match=message):
            run_virtual_tokens(tiny_gpt2(), AuthorsTokens(torch.zeros(shape)))


def mlp_state(**changes) -> dict[str, torch.Tensor]:
    state = state_of(mlp(C, MID, 2 * L * C), nn.Embedding(P, C))
    names = {"wte": "wte.weight", "inner": "control_trans.0.weight", "bias": "control_trans.2.bias"}
    return state | {names.get(name, name): tensor for name, tensor in changes.items()}


BART = {"wte_enc.weight": torch.zeros(P, C), "wte.weight": torch.zeros(P, C)}
WRONG = {  # what the file holds, and what is said of it
    "gpt2": (
        {"wte.weight": torch.ones(9, 8), "ln_f.bias": torch.ones(8)},
        "no prefix of the authors' code",
    ),
    "bart": (BART, "the authors' BART prefix: left over none, missing control_trans.0.bias"),
    "nothing": ({}, "the keys are none"),
    "keys missing": (
        {"wte.weight": BART["wte.weight"], "control_trans.0.bias": torch.ones(3)},
        "no prefix of the authors' code",
    ),
    "one dimension": (mlp_state(wte=torch.ones(9)), r"wte.weight must be \(P, C\).*got \(9,\)"),
    "P = 0": (mlp_state(wte=torch.ones(0, C)), r"with P > 0, got \(0, 32\)"),
    "inner": (mlp_state(inner=torch.ones(MID, 9)), r"control_trans.0 must be \(n, 32\).*\(16, 9\)"),
    "bias": (mlp_state(bias=torch.ones(9)), r"control_trans.2 must be .*\(192, 16\) and \(9,\)"),
    "layers": (
        state_of(mlp(C, MID, 4 * C), nn.Embedding(P, C)),
        r"\(5, 128\) is not .* L = 3, C =",
    ),
    "flat": ({"control_trans": torch.ones(191)}, r"\(191,\) is not \(P, 2 L C\).*L = 3, C = 32"),
    "empty": ({"control_trans": torch.ones(0)}, r"\(0,\) is not \(P, 2 L C\)"),
    "word": ({"control_trans": torch.ones(5, 1, H, P, D)}, r"must be \(2 L, 1, H, P, D\), got \(5"),
    "words": ({"control_trans": torch.ones(6, 2, H, P, D)}, r"must be .* got \(6, 2, 4, 5, 8\)"),
    "infix": (
        mlp_state(**{"wte2.weight": torch.ones(4, C)}),
        r"wte2.weight must be \(5, 32\), got",
    ),
    "nan": (mlp_state(bias=torch.full((192,), torch.nan)), "control_trans.2.bias .* not finite"),
    "integers": ({"wte.weight": torch.ones(P, C).int()}, "wte.weight .* not finite numbers"),
    "no dict": ([torch.ones(3)], "something other than tensors"),
    "nested": ({"weights": mlp_state()}, "something other than tensors"),
    "numbers": ({1: torch.ones(3)}, "something other than tensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_state_dicts_are_named(authors, name):
    state, message = WRONG[name]
    folder = authors(state)
    with pytest.raises(ValueError, match=message) as error:
        read_authors(folder)
    assert str(error.value).startswith(f"{folder}/pytorch_model.bin: ")
    assert "\n" not in str(error.value)


class Code:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_and_damage_are_refused(authors):
    folder = authors(mlp_state())
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    torch.save({"wte.weight": Code(folder / "made")}, path)
    with_code = path.read_bytes()
    plain = pickle.dumps({"wte.weight": Code(folder / "made")}, protocol=2)
    for data in (with_code, plain, b"", b"text\n", whole[:100], whole[:-100]):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match="pytorch_model.bin: damaged, or .* other than"
        ) as error:
            read_authors(folder)
        assert "\n" not in str(error.value)
    assert not (folder / "made").exists()
    path.unlink()
    with pytest.raises(OSError, match="pytorch_model.bin"):
        read_authors(folder)


@pytest.fixture
def hub(tmp_path):
    """An adapter-hub folder: the same parts under each of the layers and once more."""

    def write(state, name="a", place="self_prefix", more=None, **config):
        where = [*(f"transformer.h.{i}.attn.prefix_tuning.pool" for i in range(L))]
        where.append("transformer.prefix_tuning")
        tensors = {
            f"{w}.prefix_tunings.{name}.{place}.{key}": x for w in where for key, x in state.items()
        }
        tensors |= more or {}
        torch.save(tensors, tmp_path / "pytorch_adapter.bin")
        inner = {
            "architecture": "prefix_tuning", "bottleneck_size": MID, "cross_prefix": True,
            "dropout": 0.0, "encoder_prefix": True, "flat": False, "leave_out": [],
            "non_linearity": "tanh", "prefix_length": P, "shared_gating": True, "use_gating": False,
        }  # fmt: skip
        outer = {"model_type": config.pop("model_type", "gpt2"), "name": name, "hidden_size": C}
        raw = {"config": inner | config, **outer}
        (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
        return tmp_path

    return write


@torch.no_grad()
def test_adapter_hub(hub):
    """Flat, an MLP, and an MLP made flat by `eject_prefix_tuning`, whose config still has it."""
    flat = torch.randn(P * L * 2 * C)
    for config in ({"flat": True}, {"flat": False}):
        prefix = read_adapters(hub({"control_trans": flat}, **config), CONFIG)
        assert prefix.position_offset == 0 and prefix.prefix_len == P
        assert_holds(prefix, flat)
    wte, control_trans = nn.Embedding(P, C), mlp(C, MID, 2 * L * C)
    prefix = read_adapters(hub(state_of(control_trans, wte)), CONFIG)
    assert prefix.position_offset == 0
    assert_holds(prefix, control_trans(wte(torch.arange(P)[None]))[0])


def test_adapter_hub_in_safetensors(hub):
    """adapter.safetensors in the place of pytorch_adapter.bin, as newer versions save it."""
    flat = torch.randn(P * L * 2 * C)
    folder = hub({"control_trans": flat}, flat=True)
    tensors = torch.load(folder / "pytorch_adapter.bin")
    save_file({key: x.clone() for key, x in tensors.items()}, folder / "adapter.safetensors")
    (folder / "pytorch_adapter.bin").unlink()
    assert_holds(read_adapters(folder, CONFIG), flat)


FLAT = {"control_trans": torch.ones(P * L * 2 * C)}
GATE = {"transformer.h.0.attn.prefix_tuning.prefix_gates.a.weight": torch.ones(1, C)}
OTHER = {"transformer.h.0.attn.prefix_tuning.pool.prefix_tunings.b.self_prefix.control_trans": 1}
WRONG_HUB = {
    "length": (FLAT, {"prefix_length": 6}, "a prefix of 5 positions, but prefix_length is 6"),
    "no length": (FLAT, {"prefix_length": None}, "prefix_length must be a number >= 1, got None"),
    "gated": (FLAT, {"use_gating": True}, "use_gating is True; supported: False"),
    "gates": (FLAT, {"more": GATE}, "prefix_gates.a.weight is not part of a prefix without gates"),
    "layers left out": (FLAT, {"leave_out": [1]}, r"leave_out is \[1\]"),
    "gelu": (mlp_state(), {"non_linearity": "gelu"}, "non_linearity is 'gelu'; supported: 'tanh'"),
    "lora": (FLAT, {"architecture": "lora"}, "architecture is 'lora'; supported: 'prefix_tuning'"),
    "bart": (FLAT, {"model_type": "bart"}, "model_type is 'bart'; supported: 'gpt2'"),
    "cross": (FLAT, {"place": "cross_prefix"}, "is of cross_prefix; GPT-2 has self_prefix only"),
    "encoder": (FLAT, {"place": "encoder_prefix"}, "is of encoder_prefix; GPT-2 has self_prefix"),
    "another size": ({"control_trans": torch.ones(7)}, {}, r"\(7,\) is not \(P, 2 L C\)"),
    "half an MLP": (
        {"wte.weight": torch.ones(P, C)},
        {},
        "expected a flat prefix or an MLP, found",
    ),
    "nothing": ({}, {}, "holds 0 prefixes"),
    "nan": ({"control_trans": FLAT["control_trans"] / 0}, {}, "not finite numbers"),
    "two": (
        FLAT,
        {"more": {k: FLAT["control_trans"] for k in OTHER}},
        "2 prefixes .a, b., expected",
    ),
    "unequal": (
        FLAT,
        {"more": {k.replace(".b.", ".a."): FLAT["control_trans"] + 1 for k in OTHER}},
        "control_trans differs between layers",
    ),
}


@pytest.mark.parametrize("name", WRONG_HUB)
def test_wrong_adapter_hub_folders_are_named(hub, name):
    state, options, message = WRONG_HUB[name]
    folder = hub(state, **options)
    with pytest.raises(ValueError, match=message) as error:
        read_adapters(folder, CONFIG)
    assert str(error.value).startswith(f"{folder}/") and "\n" not in str(error.value)


def test_adapter_hub_needs_the_model(hub):
    folder = hub(FLAT)
    with pytest.raises(ValueError, match="does not contain the number of heads.*--model"):
        read_adapters(folder, None)
    (folder / "pytorch_adapter.bin").write_bytes(b"text")
    with pytest.raises(ValueError, match="pytorch_adapter.bin: damaged"):
        read_adapters(folder, CONFIG)
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(OSError, match="pytorch_adapter.bin"):
        read_adapters(folder, CONFIG)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json: config must be an object, got None"):
        read_adapters(folder, CONFIG)
