"""The settings of a new prefix, for `make.make_prefix`. This file does not import PyTorch."""

from dataclasses import dataclass

from minprefix.checks import check_choice, check_limit
from minprefix.limits import WIDTH

PARAMETRISATIONS = ("table", "mlp", "embedding", "embedding-mlp")
PLACES = ("prefix", "infix")
INITS = ("random", "words", "prompt")
SYSTEMS = ("minprefix", "peft", "cartridge")  # formats that `convert.convert` writes


@dataclass(frozen=True)
class PrefixConfig:
    """The settings of a new prefix."""

    prefix_len: int | None = None  # P, positions; None = 10, or the length of an init "prompt"
    # what is trained: the "table" itself, an "mlp" that computes it, the "embedding" of virtual
    # tokens, or an MLP that computes their embeddings ("embedding-mlp")
    parametrisation: str = "mlp"
    place: str = "prefix"  # "prefix" (before the source) or "infix" (between source and target)
    mid_dim: int = 512  # hidden width of the MLP; in the paper 512 for tables, 800 for summaries
    # the start: the activations of "words", "random" numbers, or a "prompt", which it then equals
    init: str = "words"
    init_text: str = "table-to-text:"  # the words or the prompt
    # learn a weight per layer and head that starts at 0, so that step 0 is the frozen model
    gate: bool = False
    # token t of the text gets position t + this; None = P, or 0 with a gate or for BART
    position_offset: int | None = None
    sites: tuple[str, ...] = ()  # BART: "encoder", "decoder" or "cross" attention; none = all

    def __post_init__(self):
        check_form(self.parametrisation, self.place)
        check_choice("init", self.init, INITS)
        object.__setattr__(self, "sites", tuple(self.sites))  # a list in config.json
        if (self.init, self.place) == ("prompt", "infix"):
            raise ValueError("init 'prompt' needs place 'prefix': after a source, a prompt's "
                             "activations differ for each source")  # fmt: skip
        if self.prefix_len is not None and self.prefix_len < 1:
            raise ValueError(f"prefix_len must be at least 1, got {self.prefix_len}")
        if self.init == "prompt" and self.prefix_len is not None:
            raise ValueError(
                f"init 'prompt' takes prefix_len from the text, got prefix_len {self.prefix_len}"
            )
        if self.mid_dim < 1:
            raise ValueError(f"mid_dim must be at least 1, got {self.mid_dim}")
        for name in ("mid_dim", "prefix_len"):
            check_limit(self, name, WIDTH)


def check_form(parametrisation: str, place: str) -> None:
    """ValueError for names that do not exist or cannot be combined."""
    check_choice("parametrisation", parametrisation, PARAMETRISATIONS)
    check_choice("place", place, PLACES)
    if place == "infix" and parametrisation.startswith("embedding"):
        raise ValueError(
            f"parametrisation {parametrisation!r} needs place 'prefix': after a source, the keys "
            "and values of virtual tokens differ for each source"
        )
