"""The commands: a class of options for each, whose docstring is the command's help; see `COMMANDS`.

A command is the function `run` in the file with its name. That file is imported only when the
command runs, so that --help and usage errors do not need PyTorch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg
from tyro.constructors import PrimitiveConstructorSpec

from minprefix.cli.options import DATA, Common, Flat, WithData, WithDevice, WithRun, WithTrained
from minprefix.cli.parse import parse, parse_known
from minprefix.data.load import DATA_SETS, LINEARISATIONS
from minprefix.generation.config import GenerationConfig
from minprefix.methods.config import TEMPLATES, BaselineConfig, SearchConfig
from minprefix.metrics.official import METRICS, SUITES
from minprefix.metrics.quick import TOKENIZERS
from minprefix.prefix.config import SYSTEMS, PrefixConfig
from minprefix.training.config import PRESETS, PretrainConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainOptions(WithRun):
    """Train a prefix, or one of the methods that the paper compares it with."""

    # use the paper's learning rate, epochs, batch size and prefix length for this data set
    preset: Literal[*DATA_SETS] | None = None
    track: FlagCreatePairsOff[bool] = False  # also write TensorBoard files to the run folder
    # keep the last two saved states, which only --resume needs; each holds the trained weights and
    # AdamW's moments, so it is about three times as large as the weights
    keep_state: bool = True

    train: Flat[TrainConfig] = TrainConfig()
    prefix: Flat[PrefixConfig] = PrefixConfig()
    baseline: Flat[BaselineConfig] = BaselineConfig()


@dataclass(frozen=True, kw_only=True)
class RunsOptions(Common):
    """Compare training runs, make their folders smaller, or delete them."""

    # run folders of the command train, such as runs/*
    folders: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="FOLDER ...", help_behavior_hint="(required)")
    ]
    figure: Path | None = None  # plot the dev losses of the runs to this file, such as curves.png
    # remove the files that only --resume needs: the run can then no longer be resumed
    slim: FlagCreatePairsOff[bool] = False
    delete: FlagCreatePairsOff[bool] = False  # remove the run folders with everything in them


@dataclass(frozen=True, kw_only=True)
class SearchOptions(WithRun):
    """Search for the discrete prompt with the lowest loss on the training pairs."""

    search: Flat[SearchConfig] = SearchConfig()


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(WithTrained):
    """Generate texts. The text of a single prompt is printed while it is written."""

    # the prompts; a table is written "name : The Eagle | food : Chinese" or as a JSON object;
    # an empty prompt "" starts a text from nothing; without prompts and --data, each line of
    # standard input that is not blank is a prompt (use --json if texts may contain line ends)
    prompts: Annotated[
        Positional[tuple[str, ...]], arg(metavar="PROMPT ...", help_behavior_hint="")
    ] = ()
    # how to read a prompt: as a table, framed as in training with this --linearisation, or (none)
    # as a text to continue; by default as in training, or none without a prefix
    frame: Literal[*LINEARISATIONS, "none"] | None = None
    # generate a text for each input of this data; no reference texts are needed
    data: Annotated[str | None, arg(help=DATA)] = None
    split: Literal["train", "dev", "test"] = "test"  # which part of --data

    generation: Flat[GenerationConfig] = GenerationConfig()


def template_of(words: list[str]) -> str:
    """The template after --hard-prompt: the one that is given, or the default."""
    if len(words) > 1:
        raise ValueError(f"expected one template, in quotes, got {len(words)} words")
    return words[0] if words else TEMPLATES[0]


Template = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs="*", metavar="[TEMPLATE]", instance_from_str=template_of,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(WithTrained, WithData):
    """Generate texts for a data set and score them."""

    split: Literal["train", "dev", "test"] = "test"  # which part of the data
    # use a prompt in words instead of a prefix; {table} in the TEMPLATE stands for the table;
    # without a TEMPLATE the first built-in one is used
    hard_prompt: Template = None
    # use a prompt that the command search found: its prompt.json, or the run folder
    prompt: Path | None = None
    shots: int = 0  # training examples to put into the hard prompt
    limit: int | None = None  # use only this many tables, beginning with the first
    max_source: int | None = None  # cut sources to this many tokens; None = as in training
    batch_size: int = 64  # tables per batch
    # write sources, texts and references to this file, as JSON lines; for tables also the facts
    # that are missing or wrong in each text
    outputs: Path | None = None
    # quick (BLEU, ROUGE-L, and slot values: the share of the tables' values that the texts state),
    # the official scores of a data set, or auto, which chooses them by the format of the data
    metrics: Literal[*METRICS] = "quick"
    # how the quick scores split texts into words: 13a (Latin script), intl (other scripts with
    # spaces), zh (Chinese) or char (other scripts without spaces)
    score_tokenizer: Literal[*TOKENIZERS] = "13a"

    generation: Flat[GenerationConfig] = GenerationConfig()

    def __post_init__(self):
        super().__post_init__()
        self.resolve_run_folders("prompt")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Common):
    """Score a file of texts; no model is needed."""

    outputs_file: Annotated[Positional[Path], arg(metavar="OUTPUTS")]  # file with one text per line
    # a file with one reference per line and a blank line between the references of different
    # outputs; or files reference0, reference1, ... with one line per output; or a folder of these
    references_files: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="REFERENCES ...", help_behavior_hint="(required)"),
    ]
    # quick (BLEU, ROUGE-L as rouge-score computes it), or the official scores of a data set
    metrics: Literal["quick", *SUITES] = "quick"
    # how the quick scores split texts into words: 13a (Latin script), intl (other scripts with
    # spaces), zh (Chinese) or char (other scripts without spaces)
    score_tokenizer: Literal[*TOKENIZERS] = "13a"
    # file with the WebNLG category of each output, one per line; adds scores of seen and unseen
    groups: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Common):
    """Write the latest prefix of a run to a file of its own, without the MLP."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]  # run folder of the command train
    # a new folder for the prefix file and a README.md for the hub, or just a .safetensors file
    out: Path


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Common):
    """Convert a prefix from PEFT, the paper's code or adapter-hub, or to PEFT."""

    # a prefix file or run folder of minprefix; a folder of PEFT or adapter-hub; a folder or state
    # dict of the authors' code (GPT-2, BART); or the hub name of such a folder
    source: Positional[Path]
    to: Literal[*SYSTEMS]  # a prefix file, or a PEFT folder (prefix-tuning or CARTRIDGE)
    out: Path  # the file or folder to write
    # name or folder of the base model; the prefix is checked against it and bound to it; required
    # for files of adapter-hub and for virtual tokens
    model: str | None = None
    # token t of the text gets position t + this; None = as in the other system: P for GPT-2 in PEFT
    # and in the authors' code, 0 for adapter-hub and for BART
    position_offset: int | None = None


@dataclass(frozen=True, kw_only=True)
class Preset:
    # defaults of the other options: small suits a CPU; mini is the recipe of the embedded model
    # and needs a GPU (--preset mini --help shows its values)
    preset: Literal[*PRESETS] = "small"


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(Preset, WithDevice):
    """Train a GPT-2 and its tokenizer from scratch on a folder of text."""

    # folder of .txt, .txt.gz or .txt.xz files, or of token ids (.npy or .npy.xz); files whose
    # names begin with val are held out
    text: Annotated[Positional[Path], arg(metavar="FOLDER")]
    out: Path  # new folder for the run and the model
    # mini, a hub id or a folder with vocab.json and merges.txt; None = train one on the text
    tokenizer: str | None = None
    samples: int = 3  # texts to generate at the end

    pretrain: Flat[PretrainConfig] = PretrainConfig()
    words: Suppress[tuple[str, ...]] = ()  # the command line, which continues an interrupted run

    @classmethod
    def parse(cls, words, prog: str, description: str) -> "PretrainOptions":
        """Parse the preset first: it has the values of the options that are not given."""
        preset = parse_known(Preset, words, prog).preset
        required, config = tyro.MISSING, PRESETS[preset]
        default = cls(text=required, out=required, preset=preset, pretrain=config, words=words)
        return parse(cls, words, prog, description, default)


@dataclass(frozen=True, kw_only=True)
class DownloadOptions(Common):
    """Download an official model into the cache of huggingface_hub."""

    name: Positional[str]  # gpt2, gpt2-medium, ..., or the hub name of any GPT-2 or BART


@dataclass(frozen=True, kw_only=True)
class DataOptions(Common):
    """Download an official data set, or check a copy of it."""

    name: Positional[Literal[*DATA_SETS]]  # the data set
    # check the files in this folder and download those that are missing; None =
    # $XDG_CACHE_HOME/minprefix/data/NAME, where --data NAME looks for them
    data_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class InfoOptions(WithTrained):
    """Count the parameters of a model, of a prefix or adapter, and of each method."""

    # print only the GPU, the versions, the assembler, and whether the Triton kernels are used
    gpu: FlagCreatePairsOff[bool] = False


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Common):
    """Train a prefix on the embedded data, generate texts and score them."""

    out: Path = Path("runs/demo")  # run folder


COMMANDS: dict[str, type[Common]] = {
    "train": TrainOptions,
    "runs": RunsOptions,
    "search": SearchOptions,
    "generate": GenerateOptions,
    "evaluate": EvaluateOptions,
    "score": ScoreOptions,
    "export": ExportOptions,
    "convert": ConvertOptions,
    "pretrain": PretrainOptions,
    "download": DownloadOptions,
    "data": DataOptions,
    "info": InfoOptions,
    "demo": DemoOptions,
}
