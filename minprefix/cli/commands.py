"""The commands: a class of options for each, whose docstring is the command's help; see `COMMANDS`.

What a command does is the function `run` of the file of its name. It is imported when the command
runs, so that --help and a usage error need no PyTorch.
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
    """Tune a prefix, or a baseline of the paper."""

    # the paper's learning rate, epochs, batch size and prefix length for the method on a data set
    preset: Literal[*DATA_SETS] | None = None
    track: FlagCreatePairsOff[bool] = False  # log to TensorBoard, too: files in the run folder
    # False: at the end remove what only resuming needs (twice the size of what is trained)
    keep_state: bool = True
    train: Flat[TrainConfig] = TrainConfig()
    prefix: Flat[PrefixConfig] = PrefixConfig()
    baseline: Flat[BaselineConfig] = BaselineConfig()


@dataclass(frozen=True, kw_only=True)
class RunsOptions(Common):
    """Compare runs of train; make them smaller, or delete them."""

    folders: Positional[tuple[Path, ...]]  # run folders
    figure: Path | None = None  # draw the dev losses of the runs into this file, such as curves.png
    slim: FlagCreatePairsOff[bool] = False  # remove what only resuming needs
    delete: FlagCreatePairsOff[bool] = False  # remove the runs with all that is in their folders


@dataclass(frozen=True, kw_only=True)
class SearchOptions(WithRun):
    """Search the discrete prompt that lowers the loss most; the model is frozen."""

    search: Flat[SearchConfig] = SearchConfig()


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(WithTrained):
    """Write texts; the text of a single prompt is streamed."""

    # without any, and without --data, prompts are read from standard input, one per line; "" starts
    # from nothing
    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT ...")] = ()
    # read a prompt as a table, as training with this --linearisation does, or (none) as a text to
    # be continued; None = as the prefix was trained, and none without a prefix
    frame: Literal[*LINEARISATIONS, "none"] | None = None
    # write a text for each input of this data, which needs no texts of its own
    data: Annotated[str | None, arg(help=DATA)] = None
    split: Literal["train", "dev", "test"] = "test"  # of --data
    generation: Flat[GenerationConfig] = GenerationConfig()


def template_of(words: list[str]) -> str:
    """The template that the words after --hard-prompt name: one, or the default."""
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
    """Write texts for a data set and score them."""

    split: Literal["train", "dev", "test"] = "test"  # which examples
    # ask the frozen model in words, in which {table} stands for the table; without a TEMPLATE: in
    # the first of its built-in ones
    hard_prompt: Template = None
    prompt: Path | None = None  # prompt.json of the command search, or its run folder
    shots: int = 0  # examples in context, from the training split
    limit: int | None = None  # only the first tables
    max_source: int | None = None  # cut sources to their first tokens; None = as in training
    batch_size: int = 64  # tables at a time
    outputs: Path | None = None  # write sources and texts to this file, as JSON lines
    # quick (BLEU, ROUGE-L, slots), a data set's official scores, or auto: by the form of the data
    metrics: Literal[*METRICS] = "quick"
    # how the quick scores split texts: 13a (Latin letters), intl (any script with blanks), zh
    # (Chinese) or char (any other script without blanks)
    score_tokenizer: Literal[*TOKENIZERS] = "13a"
    generation: Flat[GenerationConfig] = GenerationConfig()

    def __post_init__(self):
        super().__post_init__()
        self.look_into("prompt")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Common):
    """Compute the scores of a file of texts, without a model."""

    outputs_file: Annotated[Positional[Path], arg(metavar="OUTPUTS")]  # one text a line
    # one text a line, a blank line between those of different outputs; or reference0,
    # reference1, ..., each with a line for each output; or a folder with these
    references_files: Annotated[Positional[tuple[Path, ...]], arg(metavar="REFERENCES ...")]
    # quick (BLEU, rouge-score's ROUGE-L), or the scores of one data set's official script
    metrics: Literal["quick", *SUITES] = "quick"
    # how the quick scores split texts: 13a (Latin letters), intl (any script with blanks), zh
    # (Chinese) or char (any other script without blanks)
    score_tokenizer: Literal[*TOKENIZERS] = "13a"
    groups: Path | None = None  # WebNLG's category of each output, one a line: adds seen, unseen


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Common):
    """Write a run's latest prefix, without its MLP."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]  # run folder of the command train
    # folder to make, with the prefix file and a README.md for the hub; or a file .safetensors alone
    out: Path


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Common):
    """Convert a prefix from PEFT, the paper's code or adapter-hub, or to PEFT."""

    # prefix file or run folder of ours, folder of PEFT or adapter-hub, folder or state dict of the
    # authors' code (GPT-2, BART), or the name of such a folder on the hub
    source: Positional[Path]
    to: Literal[*SYSTEMS]  # prefix file, or PEFT folder: prefix-tuning or CARTRIDGE
    out: Path  # file or folder to write
    # base model, a name or a folder: the prefix is checked with it and bound to it (adapter-hub's
    # files and virtual tokens cannot be read without)
    model: str | None = None
    # token t stands at t + this; None = as it was trained: P with PEFT and the authors' code for
    # GPT-2, 0 with adapter-hub and for BART
    position_offset: int | None = None


@dataclass(frozen=True, kw_only=True)
class Preset:
    # sizes and settings where no other is given: small, for a CPU, or mini, the recipe of the
    # embedded model, for a GPU; --preset mini --help shows that one's defaults
    preset: Literal[*PRESETS] = "small"


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(Preset, WithDevice):
    """Train a GPT-2 from scratch on a folder of text, tokenizer included."""

    # .txt, .txt.gz, .txt.xz; or token ids, .npy, .npy.xz; names that begin with val: held out
    text: Annotated[Positional[Path], arg(metavar="FOLDER")]
    out: Path  # run folder and model to make
    # mini, a hub id or a folder with vocab.json and merges.txt; None = one is trained on the text
    tokenizer: str | None = None
    samples: int = 3  # texts to write at the end
    pretrain: Flat[PretrainConfig] = PretrainConfig()
    words: Suppress[tuple[str, ...]] = ()  # the command line, which goes on with an interrupted run

    @classmethod
    def parse(cls, words, prog: str, description: str) -> "PretrainOptions":
        """The preset first: it has the values of the options that are not given."""
        preset = parse_known(Preset, words, prog).preset
        required, config = tyro.MISSING, PRESETS[preset]
        default = cls(text=required, out=required, preset=preset, pretrain=config, words=words)
        return parse(cls, words, prog, description, default)


@dataclass(frozen=True, kw_only=True)
class DownloadOptions(Common):
    """Fetch an official model into the hub's cache."""

    name: Positional[str]  # gpt2, gpt2-medium, ..., or the name of any model of the two families


@dataclass(frozen=True, kw_only=True)
class DataOptions(Common):
    """Fetch an official data set, or check a copy of it."""

    name: Positional[Literal[*DATA_SETS]]  # the data set
    # check the files of this folder and fetch into it what is missing; None =
    # $XDG_CACHE_HOME/minprefix/data/NAME, where --data NAME finds it
    data_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class InfoOptions(WithTrained):
    """Count the parameters of a model, of each method on it, of a prefix or an adapter."""

    # print only the GPU, versions, the assembler, and whether attention runs through the kernels
    gpu: FlagCreatePairsOff[bool] = False


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Common):
    """Tune a prefix on the embedded data, write texts and measure them."""

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
