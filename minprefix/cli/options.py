"""The options that commands share.

The options of each command (`commands.py`) inherit from one of these: `Common` (every command),
`WithModel`, `WithTrained` (a model with a prefix or adapter), `WithData`, `WithRun` (a run folder).
This file does not import PyTorch, so that --help is immediate.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, UseAppendAction, arg

from minprefix.checks import check_choice
from minprefix.cli.parse import WrongUsage, changed, parse
from minprefix.data.load import DATA_SETS, LINEARISATIONS, load_train_and_dev
from minprefix.data.load import EMBEDDED as EMBEDDED_DATA
from minprefix.data.splits import TOPICS, choose, hold_out, low_data
from minprefix.files import brief
from minprefix.models.config import EMBEDDED, MODELS

Config = TypeVar("Config")
# a config is a group in the help, and its name is not part of the options; the option of a tuple is
# given once for each value
Flat = OmitArgPrefixes[UseAppendAction[Config]]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command."""

    json: FlagCreatePairsOff[bool] = False  # print the result as one JSON object
    debug: FlagCreatePairsOff[bool] = False  # show the traceback of an error

    @classmethod
    def parse(cls, words: tuple[str, ...], prog: str, description: str):
        """Parse the words of the command line."""
        return parse(cls, words, prog, description)


@dataclass(frozen=True, kw_only=True)
class WithDevice(Common):
    """Options of commands that compute."""

    device: str | None = None  # such as cpu or cuda:1; None = cuda if available, else cpu

    @property
    def where(self) -> str:
        """The device."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


# the file of a run folder that each option uses: `kept` of the training methods, and of a search
KEPT = {
    "prefix": "prefix.safetensors", "adapter": "adapter.safetensors", "model": "model",
    "prompt": "prompt.json",
}  # fmt: skip
FOREIGN_FILE = "adapter_config.json"  # in a folder of PEFT or of adapter-hub


def kept_file(option: str, given: Any) -> Any:
    """The file of a run folder that --`option` uses; anything other than a run folder is returned.

    Raises:
        ValueError: the folder does not have it; names the option for what the folder has.
    """
    folder = Path(given)
    if (folder / KEPT[option]).exists():
        return type(given)(folder / KEPT[option])
    if not folder.is_dir():
        return given
    found = [other for other, name in KEPT.items() if (folder / name).exists()]
    if option == "model" and not found:
        return given  # the folder of a checkpoint
    if found:
        here = " and ".join(KEPT[other] for other in found)
        advice = f"but {here}: give {' or '.join(f'--{other} {folder}' for other in found)}"
    elif (folder / FOREIGN_FILE).is_file():
        advice = (
            f"but {FOREIGN_FILE}: `python -m minprefix convert {folder} --to minprefix "
            "--out prefix.safetensors` converts a prefix of PEFT or adapter-hub"
        )
    else:
        advice = "and no other result of training"
    raise ValueError(f"--{option} {folder}: the folder has no {KEPT[option]}, {advice}")


MODEL = f"{', '.join(MODELS)}, the hub name of a model, a folder, or a run folder of fine-tuning"


@dataclass(frozen=True, kw_only=True)
class WithModel(WithDevice):
    """Options of commands with a model."""

    model: Annotated[str, arg(help=MODEL)] = "mini"

    def __post_init__(self):
        if self.model not in EMBEDDED:
            self.resolve_run_folders("model")

    def resolve_run_folders(self, *names: str) -> None:
        """Replace a run folder in one of these options by the file that the run has kept."""
        for name in names:
            if given := getattr(self, name):
                object.__setattr__(self, name, kept_file(name, given))


@dataclass(frozen=True, kw_only=True)
class WithTrained(WithModel):
    """Options of commands with a model and a prefix or adapter for it."""

    prefix: Path | None = None  # prefix file, or the run folder of its training
    adapter: Path | None = None  # adapter file, or the run folder of its training
    # dtype of the model's weights; the 16-bit types halve its memory
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        super().__post_init__()
        self.resolve_run_folders("prefix", "adapter")


DATA = (
    f"restaurants or notes (embedded); {', '.join(DATA_SETS)} (see the command data); a folder "
    "with the files of one of these, or with src1_*.txt, *.source or *.jsonl; or a file (.jsonl, "
    ".json, .csv, .parquet, .xml, .txt with lines src||tgt, .source with .target next to it)"
)


@dataclass(frozen=True, kw_only=True)
class WithData(WithModel):
    """Options of commands with a model and data."""

    data: Annotated[str, arg(help=DATA)] = "restaurants"
    # use only these examples: seen or unseen (WebNLG), or one of the extrapolation splits of XSum
    topics: Literal[*TOPICS] | None = None
    # how a table is written as text: as printed in the paper, or as in its code; None = as in the
    # training of the prefix or of the fine-tuned model, or "paper" for a new run
    linearisation: Literal[*LINEARISATIONS] | None = None
    language: str | None = None  # use only the texts in this language, such as ru


@dataclass(frozen=True, kw_only=True)
class WithRun(WithData):
    """Options of commands that create or continue a run folder."""

    dev: str | None = None  # the dev file, if --data is a file
    subset: int | None = None  # use this many training pairs, and 30 % as many dev pairs
    subset_seed: int = 0  # seed with which the pairs of a subset are chosen
    out: Path | None = None  # new run folder
    resume: Path | None = None  # run folder to continue, with its own settings

    def check_folder(
        self, has_state: Callable[[Path], bool], may_change: tuple[str, ...] = ()
    ) -> None:
        """ValueError if the options do not name exactly one folder, either new or to be continued.

        Args:
            has_state: tells whether a run folder has a saved state.
            may_change: options that are allowed together with --resume.
        """
        if (self.out is None) == (self.resume is None):
            raise WrongUsage(
                "give either --out (a new run folder) or --resume (a run folder to continue)"
            )
        if self.resume:
            same = {name: getattr(self, name) for name in ("resume", "device", "json", "debug")}
            for option in changed(self, type(self)(**same)):
                if option in may_change:
                    continue
                raise WrongUsage(
                    f"{self.resume}: a run keeps its settings, so --resume does not allow {option}"
                )
        elif self.out and ((self.out / "config.json").exists() or has_state(self.out)):
            raise ValueError(
                f"{self.out} already holds a run: continue it with --resume {self.out}, or choose "
                "another folder"
            )

    def settings(self) -> dict[str, Any]:
        """The part of config.json that these options give."""
        return {
            "model": self.model, "device": self.where, "data": self.data, "dev": self.dev,
            "linearisation": self.linearisation or "paper", "topics": self.topics,
            "subset": self.subset, "subset_seed": self.subset_seed, "hold_out": True,
            "language": self.language, "from": os.getcwd(),
        }  # fmt: skip


KINDS = {
    "model": str, "device": str, "data": str, "dev": str | None, "linearisation": str,
    "language": str | None, "topics": str | None, "subset": int | None, "subset_seed": int,
}  # fmt: skip


def resolve_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, with relative paths resolved in the directory where it was started.

    If there is no such file (the run was moved, or the settings are of an older version), the path
    stays relative to the working directory.

    Raises:
        ValueError, KeyError: invalid settings of the data or the model.
    """
    older: dict[str, Any] = {"language": None, "subset": None, "subset_seed": 0, "topics": None}
    for name, kind in KINDS.items():
        if not isinstance(value := (older | settings)[name], kind):
            raise ValueError(f"{name} is {brief(value)}")
    check_choice("linearisation", settings["linearisation"], LINEARISATIONS)
    if settings.get("topics") is not None:
        check_choice("topics", settings["topics"], TOPICS)
    begun, names = settings.get("from"), {*EMBEDDED, *DATA_SETS, *EMBEDDED_DATA}
    if not isinstance(begun, str) or begun == os.getcwd():
        return settings
    paths = {name: settings[name] for name in ("model", "data", "dev") if settings[name]}
    paths = {name: Path(begun, path) for name, path in paths.items() if path not in names}
    return settings | {name: str(path) for name, path in paths.items() if path.exists()}


def examples_of(settings: dict[str, Any]) -> tuple[list, list, str]:
    """Training and dev examples of a run's settings; without dev data, some examples are held out.

    Returns:
        the examples, and a note for the user if there is no dev data, else "".
    """
    note = ""
    train, dev = load_train_and_dev(
        settings["data"], settings["dev"], settings["linearisation"],
        settings.get("language"),  # older runs have none
    )  # fmt: skip
    if not dev and settings.get("hold_out"):  # older runs held out nothing
        total = len(train)
        train, dev = hold_out(train)
        note = (
            f"no dev data was given: {len(dev)} of the {total} examples are held out to choose the "
            "best step (use --dev FILE to give others)" if dev else
            f"{total} examples are too few to hold any out, so the last step is kept"
        )  # fmt: skip
    topics, size = settings.get("topics"), settings.get("subset")  # older runs have neither
    train, dev = choose(train, topics, "train"), choose(dev, topics, "dev") if dev else dev
    if size is not None:
        train, dev = low_data(train, dev, size, settings["subset_seed"])
    return train, dev, note
