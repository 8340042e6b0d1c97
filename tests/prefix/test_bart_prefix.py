"""BART's prefix: initialisation from words, files, the authors' state dicts, errors."""

import json

import pytest
import torch
from conftest import assert_close, hf_bart_twin, random_ids, tiny_bart, tiny_gpt2
from torch import nn

from minprefix.methods.adapters import count
from minprefix.methods.counts import method_rows
from minprefix.models.config import OFFICIAL, SITES
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.bart import BARTPrefix, word_activations
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.convert import convert
from minprefix.prefix.files import load_prefix
from minprefix.prefix.foreign import read_authors
from minprefix.prefix.make import make_prefix
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import load_tensors, save_tensors

IDS = [7, 30, 12]


class ThreeWords:
    """A tokenizer of one text."""

    family = "bart"

    def encode(self, text: str) -> list[int]:
        return IDS if text else []


def test_words_are_what_transformers_computes_of_them():
    """Inputs of each attention, caught by hooks, times its projections."""
    model = tiny_bart()
    twin, caught, words = hf_bart_twin(model), {}, torch.tensor([IDS])
    layers = {"encoder": twin.model.encoder.layers, "decoder": twin.model.decoder.layers}
    for site in SITES:
        stack = layers["encoder" if site == "encoder" else "decoder"]
        for number, layer in enumerate(stack):
            attn = layer.encoder_attn if site == "cross" else layer.self_attn
            for kind, linear in enumerate((attn.k_proj, attn.v_proj)):
                linear.register_forward_hook(
                    lambda _, x, y, at=(site, number, kind): caught.__setitem__(at, y)
                )
    with torch.no_grad():
        twin(input_ids=words, decoder_input_ids=words)
    tables = word_activations(model, IDS)
    assert {site: len(table) for site, table in tables.items()} == dict(
        encoder=2, decoder=3, cross=3
    )
    assert len(caught) == 2 * (2 + 3 + 3)
    for (site, number, kind), y in caught.items():
        exact = y.view(3, 4, 8).transpose(0, 1)  # (H, P, D)
        assert_close(tables[site][number, kind], exact, 1e-12)  # fp64; worst seen: 4e-16


@pytest.mark.parametrize("parametrisation", ["table", "mlp", "embedding"])
def test_from_words(parametrisation):
    model = tiny_bart()
    options = {"parametrisation": parametrisation, "mid_dim": 16}
    prefix = BARTPrefix.from_words(model, ThreeWords(), "a", prefix_len=5, **options)
    ids = [7, 30, 12, 7, 30]
    if parametrisation == "embedding":
        assert torch.equal(prefix.virtual.embeddings(), model.wte.weight[ids])
        assert prefix.position_offset == 5
        return
    exact = word_activations(model, ids)
    for site, table in prefix.tables().items():
        # P <= mid_dim: least squares leaves rounding; worst seen: 1e-14
        assert_close(table, exact[site], 0.0 if parametrisation == "table" else 1e-11)
    assert prefix.init_residual < 1e-11 and prefix.position_offset == 0
    prefix.check_base(model)
    with pytest.raises(ValueError, match="another model"):
        prefix.check_base(tiny_bart(seed=5))
    with pytest.raises(ValueError, match="the text has no words"):
        BARTPrefix.from_words(model, ThreeWords(), "")


def test_random_starts_differ_by_site_and_repeat():
    config = tiny_bart().config
    one, same = (BARTPrefix.random(config, 4, 7, parametrisation="mlp") for _ in range(2))
    assert torch.equal(torch.nn.utils.parameters_to_vector(one.parameters()),
                       torch.nn.utils.parameters_to_vector(same.parameters()))  # fmt: skip
    assert not torch.equal(*(one.sites[s].mlp.prefix_embd for s in ("decoder", "cross")))


@pytest.mark.parametrize(
    "options",
    [
        {"parametrisation": "mlp", "mid_dim": 5}, {"gate": True, "position_offset": 2},
        {"sites": ("cross",)}, {"sites": ("cross", "encoder")},
        {"parametrisation": "embedding-mlp", "mid_dim": 5},
    ],
)  # fmt: skip
def test_a_file_keeps_what_the_model_reads(tmp_path, options):
    model = tiny_bart(dtype=torch.float32)
    prefix = BARTPrefix.random(model.config, 3, 0, **options)
    prefix.bind(model)
    prefix.linearisation = "paper"
    for gate in prefix.gates().values():
        gate.data.fill_(0.5)
    prefix.save(tmp_path / "p.safetensors")
    again = Prefix.load(tmp_path / "p.safetensors")  # whichever family
    assert isinstance(again, BARTPrefix) and tuple(again.sites) == tuple(prefix.sites)
    for name in ("prefix_len", "position_offset", "base", "linearisation", "n_trained"):
        assert getattr(again, name) == getattr(prefix, name) != 0 or name == "position_offset"
    source, target = random_ids(model, 2, 9), random_ids(model, 2, 6, seed=1)
    with torch.no_grad():
        exact = model(source, target, prefix=prefix)
        assert torch.equal(model(source, target, prefix=again), exact)
        assert not torch.equal(model(source, target), exact)


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "p.safetensors"
    BARTPrefix.random(tiny_bart().config, 3, 0, gate=True).save(path)
    good, metadata = load_tensors(path)

    def error(**changes) -> str:
        tensors = {name: x.clone() for name, x in {**good, **changes}.items() if x is not None}
        save_tensors(path, tensors, metadata)
        with pytest.raises(ValueError) as caught:
            load_prefix(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    table, gate = good["cross.prefix_table"], good["cross.gate"]
    assert "same H, P, D" in error(**{"cross.prefix_table": table[:, :, :, :2]})
    assert "cross.gate must be (L, H)" in error(**{"cross.gate": gate[:1]})
    assert "do not fit one model" in error(
        **{"cross.prefix_table": table[:2], "cross.gate": gate[:2]}
    )
    assert "do not fit one model" in error(**{"encoder.gate": None})
    assert "no tables of encoder, decoder, cross" in error(**{"other.prefix_table": table})
    assert "virtual_embd (P, C) alone" in error(virtual_embd=table)
    assert "not finite" in error(**{"cross.gate": gate / 0})
    Prefix.random(tiny_gpt2().config, 2, 0).save(path)
    with pytest.raises(ValueError, match="of GPT-2, not of BART"):
        BARTPrefix.load(path)


# the authors' state dict -------------------------------------------------------------------------

NAMES = {"encoder": ("wte_enc", "control_trans_enc"), "decoder": ("wte", "control_trans"),
         "cross": ("wte2", "control_trans2")}  # fmt: skip


@pytest.fixture
def authors(tmp_path):
    """What the authors' code leaves for a BART of three layers: state dict and config.json."""
    model = tiny_bart(n_encoder_layer=3)
    C, P, rows, state = model.config.n_embd, 5, {}, {}
    torch.manual_seed(0)
    for site, (wte, control) in NAMES.items():
        embd = nn.Embedding(P, C)
        mlp = nn.Sequential(nn.Linear(C, 11), nn.Tanh(), nn.Linear(11, 3 * 2 * C))
        state |= {f"{wte}.weight": embd.weight.detach()}
        state |= {f"{control}.{key}": x for key, x in mlp.state_dict().items()}
        rows[site] = mlp(embd(torch.arange(P)[None])).detach()  # (B, P, L 2 C), B = 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    raw = {"model_type": "bart", "preseqlen": P, "mid_dim": 11, "vocab_size": 97, "d_model": C,
           "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path, model, rows, state


def test_authors_state_dict_gives_the_keys_and_values_of_their_formula(authors):
    """view (B, P, 2 L, H, D), permute (2 L, B, H, P, D), split in twos: [0] key, [1] value."""
    folder, model, rows, _ = authors
    prefix = read_authors(folder)
    assert tuple(prefix.sites) == SITES and prefix.position_offset == 0
    for site, table in prefix.tables().items():
        past = rows[site].view(1, 5, 2 * 3, 4, 8).permute(2, 0, 3, 1, 4).split(2)
        assert len(past) == 3
        for layer, kv in enumerate(past):  # (2, B, H, P, D)
            assert torch.equal(table[layer, 0], kv[0, 0])
            assert torch.equal(table[layer, 1], kv[1, 0])
    source, target = random_ids(model, 2, 9), random_ids(model, 2, 6, seed=1)
    with torch.no_grad():
        model(source, target, prefix=prefix.double())


def test_convert_of_the_authors_bart(authors):
    folder, _, rows, state = authors
    out = folder / "ours.safetensors"
    result = convert(folder, "minprefix", out)
    assert result["sites"] == "encoder,decoder,cross" and result["prefix_len"] == 5
    assert (result["n_layer"], result["n_head"], result["head_dim"]) == (3, 4, 8)
    table = BARTPrefix.load(out).tables()["cross"]
    assert torch.equal(table[1, 1, 2, 3], rows["cross"][0, 3].view(3, 2, 4, 8)[1, 1, 2])
    with pytest.raises(ValueError, match="cannot become PEFT's"):
        convert(out, "peft", folder / "peft")
    assert not (folder / "peft").exists()
    for key, change, message in (
        ("wte_enc.weight", None, "missing wte_enc.weight"),
        ("wte3.weight", torch.zeros(1), "left over wte3.weight"),
        ("wte2.weight", state["wte2.weight"][:4], r"prefixes of \[5, 5, 4\]"),
    ):
        broken = {k: x for k, x in {**state, key: change}.items() if x is not None}
        torch.save(broken, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            read_authors(folder)


# what is refused ----------------------------------------------------------------------------------


def test_forms_that_do_not_exist_are_named():
    model, gpt2 = tiny_bart(), tiny_gpt2()

    def error(model, **config) -> str:
        with pytest.raises(ValueError) as caught:
            make_prefix(model, ThreeWords(), PrefixConfig(**config), seed=0)
        return str(caught.value)

    assert "place 'infix'" in error(model, place="infix", parametrisation="table")
    assert "no prefix of a BART equals a hard prompt" in error(model, init="prompt")
    assert "encoder, decoder, cross, got 'self'" in error(model, sites=("self",))
    assert "neither gate nor sites" in error(model, parametrisation="embedding", gate=True)
    assert "sites cross are BART's" in error(gpt2, sites=("cross",))
    assert "[3, 48)" in error(model, parametrisation="embedding", prefix_len=3, position_offset=2)
    prefix = make_prefix(
        model, ThreeWords(), PrefixConfig(init="random", sites=["cross"], prefix_len=2), 0
    )
    assert tuple(prefix.sites) == ("cross",)
    with pytest.raises(ValueError, match="needs the BARTConfig of its model, got a GPT2Config"):
        BARTPrefix.random(gpt2.config, 2, 0)
    with pytest.raises(ValueError, match="a BARTPrefix is for BART only, got a GPT2"):
        BARTPrefix.from_words(gpt2, ThreeWords())
    with pytest.raises(ValueError, match="a BART needs a source: give source_ids or source"):
        model.hidden_states(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="got a BARTPrefix"):
        PrefixBank([prefix])
    with pytest.raises(ValueError, match="is for a BART and cannot be used with a GPT-2"):
        prefix.check_base(gpt2)
    with pytest.raises(ValueError, match="is for a GPT-2 and cannot be used with a BART"):
        Prefix.random(gpt2.config, 2, 0).check_base(model)


def test_bart_large_has_the_counts_of_the_paper():
    """P = 100 at three attentions: 7.37 M, 1.8 %; P = 200 with MLPs of 800: 62 M trained (both in
    the authors' issues)."""
    rows = {row["method"]: row for row in method_rows(OFFICIAL["facebook/bart-large"][0])}
    L, C = 12, 1024
    assert rows["prefix, P = 100"]["kept"] == 3 * 100 * L * 2 * C == 7_372_800
    assert round(rows["prefix, P = 100"]["percent"], 1) == 1.8
    assert rows["prefix, P = 200"]["trained"] == 62_130_528
    assert rows["prefix, P = 200"]["kept"] == 14_745_600
    small = tiny_bart()
    prefix = BARTPrefix.random(small.config, 5, 0)
    assert count(prefix) == 5 * (2 + 3 + 3) * 2 * 32 == prefix.n_trained
