"""Options that commands share, and what they name: a device, a trained prefix or adapter, a run.

A command's `Options` inherits from one of these: `Common` (every command), `WithModel`,
`WithTrained` (a model with what was trained for it), `WithData`, `WithRun` (a run folder).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, UseAppendAction, arg

from minprefix.cli.parse import changed, parse
from minprefix.data.load import DATA_SETS, LINEARISATIONS, load_train_and_dev
from minprefix.data.splits import TOPICS, choose, hold_out, low_data
from minprefix.methods.adapters import Adapter
from minprefix.models import weights
from minprefix.prefix.prefix import Prefix

Config = TypeVar("Config")
# a config among the options: a group of the help, without its name in the options; a tuple's option
# is given once for each of its values
Flat = OmitArgPrefixes[UseAppendAction[Config]]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command."""

    json: FlagCreatePairsOff[bool] = False  # print the result as one JSON object
    debug: FlagCreatePairsOff[bool] = False  # show the traceback of an error

    @classmethod
    def parse(cls, words: tuple[str, ...], prog: str, description: str):
        """The options that the words of the command line name."""
        return parse(cls, words, prog, description)


@dataclass(frozen=True, kw_only=True)
class WithDevice(Common):
    """Options of commands that compute."""

    device: str | None = None  # such as cpu or cuda:1; None = cuda where there is one, else cpu

    @property
    def where(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


MODEL = f"{', '.join(weights.MODELS)}, the name of a model on the hub, or a folder"


@dataclass(frozen=True, kw_only=True)
class WithModel(WithDevice):
    """Options of commands with a model."""

    model: Annotated[str, arg(help=MODEL)] = "mini"


@dataclass(frozen=True, kw_only=True)
class WithTrained(WithModel):
    """Options of commands with a model and what was trained for it."""

    prefix: Path | None = None  # prefix file
    adapter: Path | None = None  # adapter file


def load_trained(options: WithTrained, model) -> Prefix | None:
    """The prefix that --prefix names, on the model's device and checked to be made for it.

    An adapter that --adapter names is attached to the model instead.
    """
    if options.adapter and options.prefix:
        raise ValueError("--prefix and --adapter are different methods: choose one")
    if options.adapter:
        Adapter.load(options.adapter).to(options.where).attach(model)
    if not options.prefix:
        return None
    prefix = Prefix.load(options.prefix).to(options.where)
    prefix.check_base(model)
    return prefix


DATA = (
    f"restaurants or notes (embedded), {', '.join(DATA_SETS)} (see the command data), a folder "
    "(their files, src1_*.txt, *.jsonl) or a file (.csv, .xml, .json, .parquet, .txt with "
    "src||tgt, .jsonl)"
)


@dataclass(frozen=True, kw_only=True)
class WithData(WithModel):
    """Options of commands with a model and data."""

    data: Annotated[str, arg(help=DATA)] = "restaurants"
    # only these examples: seen or unseen (WebNLG), or a split of XSum for extrapolation
    topics: Literal[*TOPICS] | None = None
    # how a table becomes text: as the paper prints it, or as its code does; None = as the prefix or
    # the fine-tuned model was trained, and paper for a new run
    linearisation: Literal[*LINEARISATIONS] | None = None


@dataclass(frozen=True, kw_only=True)
class WithRun(WithData):
    """Options of commands that make a run folder, or go on with one."""

    dev: str | None = None  # dev file, where --data is a file
    subset: int | None = None  # low data: so many training pairs, and 30 % as many for dev
    subset_seed: int = 0  # which pairs a subset takes
    out: Path | None = None  # run folder to make
    resume: Path | None = None  # run folder to go on with; a run keeps its settings

    def check_folder(
        self, state_path: Callable[[Path], Path], may_change: tuple[str, ...] = ()
    ) -> None:
        """ValueError if the options do not name one folder, a new one or one to go on with.

        Args:
            state_path: where a run folder has its saved state.
            may_change: options that may be given with --resume, too.
        """
        if (self.out is None) == (self.resume is None):
            raise ValueError(
                "give either --out (a new run) or --resume (a run folder to go on with)"
            )
        if self.resume:
            same = {name: getattr(self, name) for name in ("resume", "device", "json", "debug")}
            for option in changed(self, type(self)(**same)):
                if option in may_change:
                    continue
                raise ValueError(
                    f"{self.resume}: a run keeps its settings, {option} cannot go with --resume"
                )
        elif self.out and ((self.out / "config.json").exists() or state_path(self.out).exists()):
            raise ValueError(
                f"{self.out} holds a run: go on with --resume {self.out}, or choose another"
            )

    def settings(self) -> dict[str, Any]:
        """The part of config.json that these options give."""
        return {
            "model": self.model, "device": self.where, "data": self.data, "dev": self.dev,
            "linearisation": self.linearisation or "paper", "topics": self.topics,
            "subset": self.subset, "subset_seed": self.subset_seed, "hold_out": True,
        }  # fmt: skip


def examples_of(settings: dict[str, Any]) -> tuple[list, list, str]:
    """Training and dev examples of a run's settings; without dev data a part is held out.

    Returns:
        the examples, and what to tell the user if there is no dev data, else "".
    """
    note = ""
    train, dev = load_train_and_dev(settings["data"], settings["dev"], settings["linearisation"])
    if not dev and settings.get("hold_out"):  # older runs did not
        total = len(train)
        train, dev = hold_out(train)
        note = (
            f"no dev data: {len(dev)} of {total} examples are held out to choose the best step "
            "(--dev FILE gives others)" if dev else
            f"{total} examples are too few to hold any out: the last step is kept"
        )  # fmt: skip
    topics, size = settings.get("topics"), settings.get("subset")  # older runs have neither
    train, dev = choose(train, topics, "train"), choose(dev, topics, "dev") if dev else dev
    if size is not None:
        train, dev = low_data(train, dev, size, settings["subset_seed"])
    return train, dev, note
