"""Options and help from dataclass fields: each field is an option with its type and default."""

import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
from tyro._docstrings import get_field_docstring

from minprefix.cli.commands import COMMANDS
from minprefix.cli.options import Flat
from minprefix.cli.parse import ELSEWHERE, changed, options_of, parse
from minprefix.generation.config import GenerationConfig
from minprefix.methods.config import BaselineConfig, SearchConfig
from minprefix.prefix.config import PrefixConfig
from minprefix.training.config import PRESETS, PretrainConfig
from minprefix.training.trainer import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sample:
    """One field of each kind."""

    count: int = 3  # whole
    share: float = 0.5  # in [0, 1], 50 % by default
    maybe: int | None = None  # may be left out
    perhaps: float | None = None  # the same for a fraction
    name: str = "a"  # text
    on: bool = False  # a switch
    either: bool | None = None  # a switch that may be left out
    many_words: tuple[str, ...] = ()  # several texts

    def __post_init__(self):
        if self.share > 1:
            raise ValueError(f"share must be at most 1, got {self.share}")


@dataclass(frozen=True)
class Options:
    """A group of options."""

    sample: Flat[Sample] = Sample()


def sample(*argv: str) -> Sample:
    return parse(Options, argv, "command", "What it does.").sample


@pytest.mark.parametrize(
    "argv, changes",
    [
        ((), {}),
        (("--count", "4"), {"count": 4}),
        (("--count=-4",), {"count": -4}),
        (("--share", "1e-3"), {"share": 1e-3}),
        (("--share", "-1e-3"), {"share": -1e-3}),
        (("--maybe", "0"), {"maybe": 0}),
        (("--perhaps", "2"), {"perhaps": 2.0}),
        (("--name", "b c"), {"name": "b c"}),
        (("--on",), {"on": True}),
        (("--on", "--no-on"), {"on": False}),
        (("--either",), {"either": True}),
        (("--no-either",), {"either": False}),
        (("--many-words", "x", "--many-words", "y z"), {"many_words": ("x", "y z")}),
    ],
)
def test_each_kind_of_field_has_its_option(argv, changes):
    expected = replace(Sample(), **changes)
    got = sample(*argv)
    assert got == expected
    types = {name: type(value) for name, value in asdict(got).items()}
    assert types == {name: type(value) for name, value in asdict(expected).items()}
    usual = asdict(Sample())
    differ = {"--" + n.replace("_", "-") for n, value in changes.items() if value != usual[n]}
    assert set(changed(Options(got), Options())) == differ


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--count", "4.5"], "--count: invalid literal for int() with base 10: '4.5'"),
        (["--maybe", "few"], "--maybe: "),
        (["--share", "half"], "--share: could not convert string to float: 'half'"),
        (["--maybe"], "--maybe: a value is missing"),
        (["--coun", "4"], "unrecognized arguments: --coun"),
        (["--no-name"], "unrecognized arguments: --no-name"),
    ],
)
def test_wrong_usage_is_one_line(capsys, argv, named):
    with pytest.raises(SystemExit) as stop:
        sample(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("command: error: ") and err.count("\n") == 1 and named in err
    if len(argv) == 2 and "unrecognized" not in named:  # it is the option that is unknown
        assert argv[1] in err


def test_what_a_dataclass_refuses_is_no_wrong_usage():
    with pytest.raises(ValueError, match=r"^share must be at most 1, got 2\.0$"):
        sample("--share", "2")


@pytest.mark.parametrize(
    "command, cls",
    [
        ("train", TrainConfig),
        ("train", PrefixConfig),
        ("train", BaselineConfig),
        ("search", SearchConfig),
        ("pretrain", PretrainConfig),
        ("generate", GenerationConfig),
        ("evaluate", GenerationConfig),
    ],
)
def test_every_field_has_an_option_with_the_comment_as_help(command, cls, cli):
    text = " ".join(cli(command, "--help")[0].replace("│", "").split())
    for field in fields(cls):
        comment = " ".join(get_field_docstring(cls, field.name, ()).split())
        default = f"(default: {field.default})" if field.default != () else "(repeatable)"
        assert f" --{field.name.replace('_', '-')} " in text.replace(",", " ")
        assert f" {comment} {default}" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_a_help(command, cli):
    text = cli(command, "--help")[0]
    boxes = " ".join(text.replace("│", "").split())
    assert not re.search(r"--[\w-]+ \S+ \((default|required|repeatable)", boxes)


def test_a_preset_has_the_values_that_are_not_given(cli):
    out, _ = cli("pretrain", "--preset", "mini", "--help")
    assert f"(default: {PRESETS['mini'].n_embd})" in out


def test_help_has_every_command(cli):
    out, err = cli("--help")
    assert err == ""
    for command in COMMANDS:
        assert f"\n  {command} " in out
        assert cli(command, "--help")[0].startswith(f"usage: python -m minprefix {command}")


def test_help_and_usage_errors_need_no_torch():
    """They take a fifth of a second, not two."""
    code = f"""
import sys
from minprefix.cli.main import main
lines = [["--help"], *([name, "--help"] for name in {[*COMMANDS]})]
for words in [*lines, ["train", "--learning-rate", "1"], ["export"], ["data", "e3e"], ["tune"]]:
    try:
        main(words)
    except SystemExit:
        pass
    assert "torch" not in sys.modules, words
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 4


@pytest.mark.parametrize(
    "argv, meant",
    [
        (("train", "--learning-rate", "1e-3"), "--lr"),
        (("train", "--learning_rate=1e-3"), "--lr"),
        (("train", "--num-virtual-tokens", "5", "--prefix_projection"),
         "--prefix-len or --parametrisation mlp"),
        (("generate", "x", "--max-length", "9"), "--max-new-tokens"),
        (("generate", "x", "--num-beam", "2"), "--num-beams"),
        (("evaluate", "--output", "x"), "--outputs"),
        (("train", "--output", "x"), "--out"),
        (("export", "x", "--output", "y"), "--out"),
        (("info", "--per-device-train-batch-size", "2"), ""),
        (("train", "--quack"), ""),
    ],
)  # fmt: skip
def test_a_wrong_option_comes_with_the_one_that_is_meant(cli, argv, meant):
    _, err = cli(*argv, code=2)
    assert ("did you mean" in err) == bool(meant) and err.count("\n") == 1
    assert f"did you mean {meant}?" in err or not meant


@pytest.mark.parametrize("option", ELSEWHERE)
def test_hints_are_options(option):
    known = {name for cls in COMMANDS.values() for name in options_of(cls)}
    assert option.split()[0] in known
    assert not {f"--{name}" for name in ELSEWHERE[option].split()} & set(
        options_of(COMMANDS["train"])
    )
