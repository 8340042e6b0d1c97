"""Options and help from dataclass fields: each field has one, of its type, with its default."""

import argparse
from dataclasses import asdict, dataclass, fields, replace

import pytest

from minprefix.cli.main import build_parser
from minprefix.cli.options import OneLineParser, add_fields, field_help, from_args
from minprefix.generation.decoding import GenerationConfig
from minprefix.methods.by_name import BaselineConfig
from minprefix.prefix.config import PrefixConfig
from minprefix.training.trainer import TrainConfig


@dataclass(frozen=True)
class Sample:
    """One field of each kind."""

    count: int = 3  # whole
    share: float = 0.5  # in [0, 1], 50 % by default
    maybe: int | None = None  # may be left out
    perhaps: float | None = None  # the same for a fraction
    name: str = "a"  # text
    on: bool = False  # a switch
    many_words: tuple[str, ...] = ()  # several texts


def parse(*argv: str) -> Sample:
    parser = OneLineParser()
    add_fields(parser, Sample)
    return from_args(Sample, parser.parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ((), {}),
        (("--count", "4"), {"count": 4}),
        (("--share", "1e-3"), {"share": 1e-3}),
        (("--maybe", "0"), {"maybe": 0}),
        (("--perhaps", "2"), {"perhaps": 2.0}),
        (("--name", "b c"), {"name": "b c"}),
        (("--on",), {"on": True}),
        (("--on", "--no-on"), {"on": False}),
        (("--many-words", "x", "--many-words", "y z"), {"many_words": ("x", "y z")}),
    ],
)
def test_each_kind_of_field_has_its_option(argv, changes):
    expected = replace(Sample(), **changes)
    got = parse(*argv)
    assert got == expected
    types = {name: type(value) for name, value in asdict(got).items()}
    assert types == {name: type(value) for name, value in asdict(expected).items()}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--count", "4.5"], "--count: invalid int value: '4.5'"),
        (["--share", "half"], "--share: invalid float value: 'half'"),
        (["--maybe"], "--maybe: expected one argument"),
        (["--coun", "4"], "--coun"),
    ],
)
def test_wrong_usage_is_one_line(capsys, argv, named):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.count("\n") == 1 and named in err


@pytest.mark.parametrize(
    ("command", "cls"),
    [
        ("train", TrainConfig),
        ("train", PrefixConfig),
        ("train", BaselineConfig),
        ("generate", GenerationConfig),
        ("evaluate", GenerationConfig),
    ],
)
def test_every_field_has_an_option_with_the_comment_as_help(command, cls):
    parsers = build_parser()._subparsers._group_actions[0].choices
    actions = {action.dest: action for action in parsers[command]._actions}
    comments = field_help(cls)
    assert set(comments) == {field.name for field in fields(cls)}
    formatter = argparse.HelpFormatter("")
    for field in fields(cls):
        action, comment = actions[field.name], comments[field.name]
        assert action.option_strings[0] == "--" + field.name.replace("_", "-")
        assert len(comment) > 5
        shown = formatter._expand_help(action)  # fails at a bare % in a comment
        default = f"(default: {field.default})" if field.default != () else "once for each"
        assert comment in shown and default in shown
    assert from_args(cls, parsers[command].parse_args([])) == cls()


def test_help_has_every_command(cli):
    out, err = cli("--help")
    assert err == ""
    for command in ("train", "generate", "evaluate", "export", "download", "info", "demo"):
        assert f"\n    {command} " in out
        assert cli(command, "--help")[0].startswith(f"usage: python -m minprefix {command}")
