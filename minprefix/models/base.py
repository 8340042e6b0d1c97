"""The common parts of GPT-2 and BART: the head, the loss, random weights.

Differences that the rest of the program must know are methods and attributes here, so that no other
code needs to ask which of the two a model is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprefix.models.activations import BARTActivations, PrefixActivations
from minprefix.models.config import BARTConfig, GPT2Config
from minprefix.models.losses import IGNORE, MULTIPLE, frozen_head_loss, with_padding


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# the functions inside an MLP, by their names in config.json
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu, "gelu": F.gelu, "relu": F.relu,
    "silu": F.silu, "swish": F.silu, "tanh": torch.tanh,
}  # fmt: skip


def check_ids(input_ids: Any) -> None:
    """ValueError unless these are token ids (B, T) or embeddings (B, T, C)."""
    found = type(input_ids).__name__
    if isinstance(input_ids, Tensor):
        ids = input_ids.dtype in (torch.int64, torch.int32)
        if input_ids.dim() == (2 if ids else 3) and (ids or input_ids.is_floating_point()):
            return
        found = f"{tuple(input_ids.shape)} of {input_ids.dtype}"
    raise ValueError(f"the ids must be a tensor of shape (B, T) of torch.int64, got {found}")


class LanguageModel(nn.Module):
    """A model whose head is the token embedding `wte` (tied) or a separate matrix; `hidden_states`
    computes the input of the head."""

    reads: ClassVar[type[PrefixActivations] | type[BARTActivations]]  # activations that it reads
    reads_name: ClassVar[str]  # the class of such a prefix
    captures: ClassVar[bool]  # whether CUDA graphs can repeat a training step
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
        """The standard deviation with which `init_weights` draws this matrix."""
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
        """Weight and bias of the head, (V', C) and (V',), without gradients. After `pad_head`, V' >
        V, and the logits of the additional rows must be ignored."""
        own: tuple[Tensor, Tensor | None] = self.head_weight.detach(), self.head_bias
        padded = PADDED.get(self, own)
        # `.to(...)` or loading has given the model other tensors, so these are obsolete
        same = all(
            x is y or (x is not None and y is not None and x.data_ptr() == y.data_ptr())
            for x, y in zip(own, padded, strict=True)
        )
        if not same:
            PADDED.pop(self)
        return padded if same else own

    @torch.inference_mode(False)  # also when generation calls it, since the weights may be trained
    @torch.no_grad()
    def pad_head(self) -> None:
        """Pad the head in memory with rows of zeros, which makes its products faster on a GPU.

        The weight and `head_bias` become views of the first V rows of larger tensors. Their shapes,
        names and values do not change, nothing is stored twice, and files do not contain the
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
            at: (n,) int, the places b T + t of all labels that are not -100, in this order. It is
                an argument because computing it would wait for a GPU. Work that only other
                positions need is left out.
            kwargs: arguments of `hidden_states`.
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
        """The activations of a prefix, of a bank with an index, or of None; activations are
        returned unchanged.

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
        """The frame (linearisation, max_source) in which it, or the adapter attached to it, was
        trained; ("", None) = none."""
        learned = adapter_of(self)
        learned = learned if learned is not None and learned.linearisation else self.config
        return learned.linearisation, learned.max_source


# weight and bias of the heads that `pad_head` has padded; a copy of a model is not padded
PADDED: WeakKeyDictionary[LanguageModel, tuple[Tensor, Tensor | None]] = WeakKeyDictionary()
# models with an adapter: the adapter, and the function that removes its hooks
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
    """Within the block there is no dropout; each module's mode is restored at the end."""
    training = [module for module in model.modules() if module.training]
    for module in training:  # not `eval`, which visits every module once more
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
