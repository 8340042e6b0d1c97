"""What GPT-2 and BART have in common: the head, the loss, random weights.

A model also says here what the rest of the program must know of it, so that nothing else asks
which of the two it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprefix.models.activations import BARTActivations, PrefixActivations
from minprefix.models.config import BARTConfig, GPT2Config
from minprefix.models.losses import IGNORE, MULTIPLE, frozen_head_loss, with_padding

tanh_gelu = partial(F.gelu, approximate="tanh")
# what may stand inside an MLP, by the names of config.json
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu, "gelu": F.gelu, "relu": F.relu,
    "silu": F.silu, "swish": F.silu, "tanh": torch.tanh,
}  # fmt: skip


class LanguageModel(nn.Module):
    """The head is the token embedding `wte` (tied) or a matrix of its own; `hidden_states` makes
    what it reads."""

    reads: ClassVar[type[PrefixActivations] | type[BARTActivations]]  # what it reads of a prefix
    reads_name: ClassVar[str]  # the class of such a prefix
    captures: ClassVar[bool]  # CUDA graphs can repeat a step: equal shapes, equal kernels
    head_bias: Tensor | None
    origin: str = ""  # the fingerprint of the checkpoint that it was loaded from
    config: GPT2Config | BARTConfig
    wte: nn.Embedding
    begin: Callable[..., tuple[list, dict]]
    hidden_states: Callable[..., Tensor]

    def blocks(self) -> list[nn.Module]:
        """All layers, in the order in which they run."""
        raise NotImplementedError

    def init_std(self, name: str) -> float:
        """Of the normal distribution from which `init_weights` draws this matrix."""
        return 0.02

    def init_weights(self, seed: int) -> Self:
        """Random weights: matrices from N(0, `init_std`), biases 0, layer norms 1."""
        generator = torch.Generator(device=self.wte.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=self.init_std(name), generator=generator)
            else:
                nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
        if self.head_bias is not None:
            nn.init.zeros_(self.head_bias)
        return self

    @property
    def head_weight(self) -> Tensor:
        """The matrix that the head multiplies with: (V, C)."""
        return self.wte.weight

    def head(self, hidden: Tensor) -> Tensor:  # (..., C) -> (..., V)
        weight, bias = self.head_weight, self.head_bias
        if not (torch.is_grad_enabled() and weight.requires_grad):
            weight, bias = self.head_weights()
        logits, V = F.linear(hidden, weight, bias), self.config.vocab_size
        return logits if len(weight) == V else logits[..., :V]

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the head, (V', C) and (V',), without gradients: after `pad_head` of
        V' > V rows, whose logits nobody may see; else the model's own."""
        own: tuple[Tensor, Tensor | None] = self.head_weight.detach(), self.head_bias
        padded = PADDED.get(self, own)
        # `.to(...)` or loading gave the model other tensors: these are not its own any more
        same = all(
            x is y or (x is not None and y is not None and x.data_ptr() == y.data_ptr())
            for x, y in zip(own, padded, strict=True)
        )
        if not same:
            PADDED.pop(self)
        return padded if same else own

    @torch.inference_mode(False)  # whatever generation is in: the weights may be trained with later
    @torch.no_grad()
    def pad_head(self) -> None:
        """Let rows of zeros follow those of the head in memory, which makes its products faster on
        a GPU.

        Its weight and `head_bias` move into larger tensors, whose first V rows they then are:
        their shapes, names and values stay, and nothing is kept twice. What is saved is without the
        padding. A CUDA graph that was recorded before has the old addresses.
        """
        if self.head_weights()[0].shape[0] % MULTIPLE == 0:
            return
        weight, bias = with_padding(self.head_weight), self.head_bias
        V = self.config.vocab_size
        self.head_weight.data = weight[:V]
        if bias is not None:
            bias = with_padding(bias)
            self.head_bias = bias[:V]
        PADDED[self] = weight, bias

    def token_losses(
        self, input_ids: Tensor, labels: Tensor, at: Tensor | None = None, **kwargs
    ) -> Tensor:
        """-log p of each labelled token, eq. (2), in nats: (n,).

        Args:
            input_ids: (B, T) int.
            labels: (B, T) int, the token that follows each input; -100 where there is no loss.
            at: (n,) int, the places b T + t of the labels: all that are not -100, in this order,
                which a GPU must be waited for to learn. What only other positions need is left out.
            kwargs: of `hidden_states`.
        """
        if at is None:
            at = (labels != IGNORE).flatten().nonzero()[:, 0]
        hidden, labels = self.hidden_states(input_ids, at=at, **kwargs), labels.flatten()[at]
        if not self.head_weight.requires_grad:
            weight, bias = self.head_weights()
            V = self.config.vocab_size
            return frozen_head_loss(hidden, weight, labels, bias=bias, vocab_size=V)
        logits = self.head(hidden)  # (n, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction="none")

    def activations_of(self, prefix, prefix_index: Tensor | None = None) -> Any:
        """What it reads of a prefix, of a bank with an index, or of None; ready ones stay.

        Raises:
            ValueError: a prefix of the other family, an index without a bank.
        """
        acts = prefix
        if prefix is None:
            acts = self.reads.empty(self.config, self.wte.weight)
        elif hasattr(prefix, "activations"):
            acts, prefix_index = prefix.activations(prefix_index), None
        if prefix_index is not None:
            raise ValueError("prefix_index needs a PrefixBank, a bank of GPT-2's prefixes")
        if not isinstance(acts, self.reads):
            found = type(prefix).__name__
            raise ValueError(f"a {self.config.family} needs a {self.reads_name}, got {found}")
        return acts

    @property
    def frame(self) -> tuple[str, int | None]:
        """The frame of text that it learned, (linearisation, max_source), or that the adapter
        attached to it learned; ("", None) = none."""
        learned = adapter_of(self)
        learned = learned if learned is not None and learned.linearisation else self.config
        return learned.linearisation, learned.max_source


# weight and bias of the heads that `pad_head` has padded; a copy of a model has none
PADDED: WeakKeyDictionary[LanguageModel, tuple[Tensor, Tensor | None]] = WeakKeyDictionary()
# models that compute with an adapter: it, and what takes its hooks away
ATTACHED: WeakKeyDictionary[LanguageModel, tuple[nn.Module, list]] = WeakKeyDictionary()


def adapter_of(model: LanguageModel) -> Any:
    """The adapter that is attached to the model, or None."""
    return ATTACHED[model][0] if model in ATTACHED else None


def check_free(model: LanguageModel) -> None:
    """ValueError if an adapter is attached to the model."""
    if adapter_of(model) is not None:
        raise ValueError("the model already has an adapter: detach it first")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; each module's own mode comes back at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
