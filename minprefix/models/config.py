"""The sizes of GPT-2 and of BART, and those of the official models.

A config holds the contents of a model's config.json. Differences between the two families that
depend only on numbers are methods or constants here, such as how many positions a prompt may take.
This file does not import PyTorch.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from minprefix.models.settings import GenerationSettings

SITES = ("encoder", "decoder", "cross")  # the attentions of a BART, each of which may have a prefix


def check_heads(config: "GPT2Config | BARTConfig") -> None:
    """ValueError if the heads do not divide the width."""
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")


@dataclass(frozen=True)
class GPT2Config(GenerationSettings):
    """Sizes of a GPT-2; the defaults are those of the smallest official model."""

    vocab_size: int = 50257  # V
    n_positions: int = 1024  # longest position + 1
    n_embd: int = 768  # C
    n_layer: int = 12  # L
    n_head: int = 12  # H
    n_inner: int | None = None  # width inside the MLP; None = 4 C
    layer_norm_epsilon: float = 1e-5
    activation_function: str = "gelu_new"  # inside the MLP, a key of `base.FUNCTIONS`
    scale_attn_weights: bool = True  # scores are multiplied by 1 / sqrt(D)
    scale_attn_by_inverse_layer_idx: bool = False  # and by 1 / l in layer l = 1 ... L
    reorder_and_upcast_attn: bool = False  # kept for the file; scores are fp32 here in any case
    tie_word_embeddings: bool = True  # the head is the token embedding
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    embd_pdrop: float = 0.1  # probability, on embeddings; dropout acts while fine-tuning only
    resid_pdrop: float = 0.1  # probability, on what each layer adds
    attn_pdrop: float = 0.1  # kept for the file; no dropout inside attention here
    linearisation: str = ""  # of a fine-tuned model: its frame in training, `batches.encode_prompt`
    max_source: int | None = None  # of a fine-tuned model: tokens to which sources were cut

    family: ClassVar[str] = "GPT-2"
    default_frame: ClassVar[str] = ""  # without a frame from training, a text is used as it is

    def __post_init__(self):
        check_heads(self)

    @property
    def head_dim(self) -> int:  # D
        return self.n_embd // self.n_head

    def query_factor(self, layer: int) -> float:
        """The factor of the queries of a layer (0 ... L - 1), in addition to 1 / sqrt(D)."""
        factor = 1.0 if self.scale_attn_weights else self.head_dim**0.5
        return factor / (layer + 1) if self.scale_attn_by_inverse_layer_idx else factor

    def room_for_prompt(self, n_new: int) -> int:
        """How many positions a prompt may take before `n_new` new tokens."""
        return self.n_positions - n_new

    def room_for_new(self, prompt_len: int) -> int:
        """How many new tokens fit after a prompt."""
        return self.n_positions - prompt_len

    def check_room(self, prompt_len: int, n_new: int, offset: int) -> None:
        """ValueError if a prompt and the new tokens after it need more positions than there are."""
        if prompt_len + offset + n_new > self.n_positions:
            raise ValueError(
                f"too long: {prompt_len} prompt tokens + position offset {offset} + max_new_tokens "
                f"{n_new} > {self.n_positions} positions of the model"
            )


@dataclass(frozen=True)
class BARTConfig(GenerationSettings):
    """Sizes of a BART and its special tokens; the defaults are those of facebook/bart-large."""

    vocab_size: int = 50265  # V
    n_positions: int = 1024  # longest position + 1, of source and of target
    n_embd: int = 1024  # C
    n_encoder_layer: int = 12  # layers of the encoder
    n_layer: int = 12  # L, layers of the decoder
    n_head: int = 16  # H
    n_inner: int = 4096  # width inside the MLPs
    scale_embedding: bool = False  # multiply token embeddings by sqrt(C)
    activation_function: str = "gelu"  # inside the MLPs, a key of `base.FUNCTIONS`
    bos_token_id: int | None = 0  # <s>, before a source and before a target
    pad_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2  # </s>, after both
    decoder_start_token_id: int = 2  # what the decoder reads first
    forced_eos_token_id: int | None = 2
    dropout: float = 0.1  # probability, on embeddings and sums; it acts while fine-tuning only
    attention_dropout: float = 0.0  # kept for the file; no dropout inside attention here
    activation_dropout: float = 0.0  # kept for the file; no dropout inside the MLPs here
    linearisation: str = ""  # this and the next: the frame of a fine-tuned model, as in GPT2Config
    max_source: int | None = None

    family: ClassVar[str] = "BART"
    default_frame: ClassVar[str] = "paper"  # a source always has its <s> and </s>

    def __post_init__(self):
        check_heads(self)

    @property
    def head_dim(self) -> int:  # D
        return self.n_embd // self.n_head

    def at(self, site: str) -> "BARTConfig":
        """A copy with the number of layers of one of SITES."""
        return replace(self, n_layer=self.n_encoder_layer) if site == "encoder" else self

    def room_for_prompt(self, n_new: int) -> int:
        """How many positions a prompt may take: all, since only the prompt is in the encoder."""
        return self.n_positions

    def room_for_new(self, prompt_len: int) -> int:
        """How many new tokens fit after the start token: a prompt is in the encoder."""
        return self.n_positions - 1

    def check_room(self, prompt_len: int, n_new: int, offset: int) -> None:
        """ValueError if the source or the target needs more positions than there are."""
        for what, n in (("source", prompt_len), ("start and new", 1 + n_new)):
            if n + offset > self.n_positions:
                raise ValueError(
                    f"too long: {n} {what} tokens + position offset {offset} > {self.n_positions} "
                    "positions of the model"
                )


BART_BASE = BARTConfig(n_embd=768, n_encoder_layer=6, n_layer=6, n_head=12, n_inner=3072)

# the official models with their numbers of parameters, the tied head counted once
OFFICIAL: dict[str, tuple[GPT2Config | BARTConfig, int]] = {
    "distilgpt2": (GPT2Config(n_layer=6), 81_912_576),
    "gpt2": (GPT2Config(), 124_439_808),
    "gpt2-medium": (GPT2Config(n_embd=1024, n_layer=24, n_head=16), 354_823_168),
    "gpt2-large": (GPT2Config(n_embd=1280, n_layer=36, n_head=20), 774_030_080),
    "gpt2-xl": (GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200),
    "facebook/bart-base": (BART_BASE, 139_420_416),
    "facebook/bart-large": (BARTConfig(), 406_291_456),
    "facebook/bart-large-cnn": (BARTConfig(vocab_size=50264), 406_290_432),
}
EMBEDDED = {"mini": 17_538_816, "mini-bart": 14_462_720}  # also of the models in assets/
MODELS = EMBEDDED | {name: n for name, (_, n) in OFFICIAL.items()}
