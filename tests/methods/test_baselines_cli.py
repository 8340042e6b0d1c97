"""The baselines from the command line: train, resume, generate, evaluate, info."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import tiny_with_words

from minprefix.generation.texts import generate
from minprefix.methods.adapters import Adapter, bottleneck_for, count
from minprefix.methods.by_name import TUNED
from minprefix.methods.config import BaselineConfig
from minprefix.models.tokenizer import Tokenizer
from minprefix.models.weights import ASSETS, fingerprint, load, save_model
from minprefix.prefix.config import PrefixConfig
from minprefix.training.config import METHOD_NAMES

QUICK = ("--batch-size", 4, "--steps", 4, "--eval-every", 2, "--log-every", 1, "--samples", 1,
         "--lr", 1e-2, "--device", "cpu")  # fmt: skip
TABLE = "boat : Gull 20 | colour : green"
FEW = ("--max-new-tokens", 6, "--device", "cpu", "--json")


def train(cli, model, data, out, *options) -> tuple[dict, str]:
    text, err = cli(
        "train", "--model", model, "--data", data, "--out", out, *QUICK, *options, "--json"
    )
    return json.loads(text), err


@pytest.fixture
def run(cli, tiny_folder, tables, tmp_path) -> Path:
    """The folder of a short, finished run of an adapter."""
    train(cli, tiny_folder, tables, tmp_path / "run", "--method", "adapter", "--bottleneck", 3)
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize("design", ["lin", "houlsby"])
def test_an_adapter_from_training_to_scores(cli, tiny_folder, tables, tmp_path, design):
    options = ("--method", "adapter", "--adapter-design", design, "--adapter-share", 0.02)
    result, err = train(cli, tiny_folder, tables, tmp_path / "run", *options)
    path = tmp_path / "run" / "adapter.safetensors"
    assert result["kept"] == str(path) and result["steps"] == 4
    model, tokenizer = load(tiny_folder)
    adapter = Adapter.load(path)
    assert adapter.base == fingerprint(model) and adapter.linearisation == "paper"
    assert adapter.bottleneck == bottleneck_for(model.config, 0.02, design)
    told = f"design {design}, bottleneck {adapter.bottleneck}: {count(adapter):,} parameters, "
    share = f"{100 * count(adapter) / count(model):.3f} % of the model"
    assert told + share in err  # nearest to 2 %

    plain = generate(model, tokenizer, [TABLE], max_new_tokens=6)
    adapter.attach(model)
    (text,) = generate(model, tokenizer, [TABLE], max_new_tokens=6)
    common = ("--model", tiny_folder, "--adapter", path)
    out, _ = cli("generate", TABLE, *common, *FEW)
    assert json.loads(out)["texts"] == [text.strip()] != plain
    out, _ = cli("evaluate", *common, "--data", tables, *FEW)
    assert json.loads(out)["tables"] == 3
    out, _ = cli("info", *common, "--json")
    rows = {row["part"]: row["parameters"] for row in json.loads(out)["parameters"]}
    assert rows[f"adapter, design {design}"] == count(adapter)


def test_top_layers_from_training_to_scores(cli, tiny_folder, tables, tmp_path):
    options = ("--method", "ft-top", "--top-layers", 1)
    result, err = train(cli, tiny_folder, tables, tmp_path / "run", *options)
    folder = tmp_path / "run" / "model"
    assert result["kept"] == str(folder) and "top 1 layers: " in err
    before, after = (load(name)[0].state_dict() for name in (tiny_folder, folder))
    same = {name for name in before if before[name].equal(after[name])}
    assert same == {name for name in before if not name.startswith(("h.1.", "ln_f."))}
    out, _ = cli("evaluate", "--model", folder, "--data", tables, *FEW)
    assert json.loads(out)["tables"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter", "ft-top"])
def test_a_run_is_resumed_with_its_baseline(cli, tiny_folder, tables, tmp_path, method):
    name, value = {"adapter": ("bottleneck", 3), "ft-top": ("top_layers", 1)}[method]
    options = ("--method", method, f"--{name.replace('_', '-')}={value}")
    train(cli, tiny_folder, tables, tmp_path / "run", *options)
    log = tmp_path / "run" / "log.jsonl"
    before = log.read_text()
    config = tmp_path / "run" / "config.json"
    settings = json.loads(config.read_text())
    assert settings["baseline"][name] == value
    out, _ = cli("train", "--resume", tmp_path / "run", "--json")
    assert json.loads(out)["steps"] == 4 and log.read_text() == before


def test_older_runs_without_baselines_are_resumed(cli, tiny_folder, tables, tmp_path):
    train(cli, tiny_folder, tables, tmp_path / "run", "--mid-dim", 4)
    config = tmp_path / "run" / "config.json"
    settings = json.loads(config.read_text())
    del settings["baseline"]
    config.write_text(json.dumps(settings))
    out, _ = cli("train", "--resume", tmp_path / "run", "--json")
    assert json.loads(out)["steps"] == 4


def test_errors_in_one_line(cli, tiny_folder, tables, run, tmp_path):
    other = tmp_path / "other"
    save_model(tiny_with_words(1), Tokenizer.from_folder(ASSETS / "mini"), other)
    path = run / "adapter.safetensors"
    adapter, tiny = ("--adapter", path), ("--model", tiny_folder)
    wrong = {
        "--prefix and --adapter are different": ("generate", "a", *tiny, *adapter, "--prefix", "p"),
        "--adapter and --hard-prompt are different": (
            "evaluate", *tiny, *adapter, "--data", tables, "--hard-prompt",
        ),
        f"its base is {fingerprint(load(tiny_folder)[0])[:12]}": (
            "generate", "a", "--model", other, *adapter,
        ),
        f"{path} was trained with --linearisation paper, not original-code": (
            "evaluate", *tiny, *adapter, "--data", tables, "--linearisation", "original-code",
        ),
        "nowhere.safetensors: no such file": ("info", *tiny, "--adapter", "nowhere.safetensors"),
        f"{path}: not a prefix file": ("info", *tiny, "--prefix", path),
        f"a run of method adapter: its result is {path}": ("export", run, "--out", tmp_path / "p"),
        "adapter_share 0.1 both say": (
            "train", *tiny, "--data", tables, "--out", tmp_path / "new", "--method", "adapter",
            "--adapter-share", 0.1, "--bottleneck", 3,
        ),
        "top_layers must lie in [1, 2]": (
            "train", *tiny, "--data", tables, "--out", tmp_path / "new", "--method", "ft-top",
            "--top-layers", 3,
        ),
    }  # fmt: skip
    usage = ("are different", "both say")
    for message, argv in wrong.items():
        out, err = cli(*argv, code=2 if message.endswith(usage) else 1)
        assert message in err and out == "" and err.count("\n") == 1, err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("ft-top", ("--prefix-len", 50, "--place", "infix"), "--prefix-len is for method prefix,"),
        ("finetune", ("--place=infix",), "--place is for method prefix, not for finetune"),
        ("adapter", ("--gate",), "--gate is for method prefix, not for adapter"),
        ("adapter", ("--top-layers", 1), "--top-layers is for method ft-top, not for adapter"),
        ("prefix", ("--init=random", "--init-text=x"), "--init-text is for init words or prompt"),
        ("prefix", ("--bottleneck", 4), "--bottleneck is for method adapter, not for prefix"),
        ("ft-top", ("--adapter-share=0.1",), "--adapter-share is for method adapter, not for ft-"),
    ],
)
def test_options_of_other_methods_are_refused(
    cli, tiny_folder, tables, tmp_path, method, options, message
):
    common = ("--model", tiny_folder, "--data", tables, "--out", tmp_path / "new")
    out, err = cli("train", *common, "--method", method, *options, code=2)
    assert message in err and out == "" and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_each_method_reads_its_fields():
    """All methods have names; each field is read by one of them, and all that is read exists."""
    names = [field.name for config in (PrefixConfig, BaselineConfig) for field in fields(config)]
    assert set(TUNED) == set(METHOD_NAMES)
    assert {name for tuned in TUNED.values() for name in tuned.reads} == set(names)


def test_info_of_an_official_model_downloads_nothing(cli, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("minprefix.models.weights.fetch", refuse)
    out, err = cli("info", "--model", "gpt2-medium", "--json")
    result = json.loads(out)
    kept = {row["method"]: row["kept"] for row in result["methods"]}
    assert (kept["prefix, P = 5"], kept["prefix, P = 10"]) == (245_760, 491_520)
    assert result["parameters"][-1]["parameters"] == kept["fine-tuning"] == 354_823_168
    assert "245,760" in cli("info", "--model", "gpt2-medium")[0] and err == ""
