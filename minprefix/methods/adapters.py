"""Adapters, a baseline of the paper: small networks between the layers of a frozen model.

An adapter (section 5.2 of Li & Liang 2021 [1]) is a bottleneck with a skip connection, inserted
after parts of a frozen model; only the adapter is trained:

    A(x) = x + W_up relu(W_down n(x) + b_down) + b_up,   W_down (m, C), W_up (C, m).

There are two designs, both from the authors' code [2] and both with ReLU:

    lin      one per layer, after the whole block; n is a layer norm of its own. Lin et al. 2020
             [3]; design 1 of [2], and its default
    houlsby  two per layer, after attention and after the MLP, each before its output is added to
             the residual stream; n(x) = x. Houlsby et al. 2019 [4]; design 2 of [2]. The code of
             [4] uses GELU and also trains the model's layer norms; [2] does neither.

W_down is initialised with N(0, 0.02) and the biases with 0, as in [2]. We initialise W_up with 0,
so that step 0 is exactly the frozen model. [2] draws W_up like W_down, and the code of [4] draws
both from a truncated N(0, 0.001). The frozen model has no dropout here; [2] leaves it on.

Read `Bottleneck`, `Adapter`, then `TunedAdapter`. An adapter consists of forward hooks, so
`gpt2.py` need not know about it. Shapes use the letters of `models/gpt2.py`; m is the width of a
bottleneck.

An adapter file holds the weights of `Adapter` in fp32 under their names. Its metadata are the
format, the design, the width, the epsilon of the layer norms, the frame of the text, the base model
and a checksum.

[1] https://arxiv.org/abs/2101.00190
[2] https://github.com/XiangLi1999/PrefixTuning: old_transformers/src/transformers/
    modeling_gpt2_adapter.py (designs), gpt2/run_language_modeling.py (what trains)
[3] https://arxiv.org/abs/2004.03829, code https://github.com/zlinao/VGLM
[4] https://arxiv.org/abs/1902.00751, code https://github.com/google-research/adapter-bert
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprefix.checks import check_choice
from minprefix.files import brief, names_file, warn_no_checksum
from minprefix.generation.fast import KEPT
from minprefix.methods.config import DESIGNS, SUBLAYERS
from minprefix.models.base import ATTACHED, adapter_of, check_free
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import check_base, fingerprint, need_gpt2
from minprefix.prefix.files import frame_metadata, read_frame
from minprefix.tensors import check_values, load_tensors, save_tensors, verify_checksum
from minprefix.training.blocks import is_compiled
from minprefix.training.tuned import Tuned, bind_added

FORMAT = "minprefix-adapter-1"
SHARE = 0.03  # of the model's parameters: the larger of the paper's two adapters


def count(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(weight.numel() for weight in module.parameters())


class Bottleneck(nn.Module):
    """A(x): see the module's header. Weights may be in fp32 while x is not; products are in x's
    dtype."""

    def __init__(self, config: GPT2Config, width: int, norm: bool):
        super().__init__()
        C = config.n_embd
        self.ln = nn.LayerNorm(C, eps=config.layer_norm_epsilon) if norm else None
        self.down, self.up = nn.Linear(C, width), nn.Linear(width, C)

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        h = x
        if self.ln is not None:
            weight, bias = self.ln.weight.to(x.dtype), self.ln.bias.to(x.dtype)
            h = F.layer_norm(x, x.shape[-1:], weight, bias, self.ln.eps)
        h = F.relu(F.linear(h, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)))
        return x + F.linear(h, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))


def hook_after(sublayer: nn.Module, part: Bottleneck):
    """A forward hook that replaces the output of `sublayer` by `part(output)`. A copy of the
    sublayer also has the hook, but there it does nothing."""
    here = weakref.ref(sublayer)
    return lambda module, args, x: part(x) if module is here() else None


class Adapter(nn.Module):
    """Bottlenecks for all layers of one model. Make it with `random` or `load`, then `attach` it.

    Attributes:
        design, bottleneck: as in `by_name.BaselineConfig`.
        base: fingerprint of the model that it belongs to; "" = unknown.
        linearisation, max_source: the frame in which it was trained (`batches.encode_prompt`);
            becomes the `frame` of the model it is attached to. "" = none; None = nothing is cut.
    """

    def __init__(self, config: GPT2Config, bottleneck: int, design: str = "lin"):
        super().__init__()
        check_choice("adapter_design", design, DESIGNS)
        if bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, got {bottleneck}")
        self.design, self.bottleneck = design, bottleneck
        self.n_layer, self.n_embd = config.n_layer, config.n_embd
        self.layer_norm_epsilon = config.layer_norm_epsilon
        self.base, self.linearisation = "", ""
        self.max_source: int | None = None

        def layer() -> nn.ModuleDict:
            norm = design == "lin"
            return nn.ModuleDict(
                {p: Bottleneck(config, bottleneck, norm) for p in SUBLAYERS[design]}
            )

        self.h: Any = nn.ModuleList(layer() for _ in range(config.n_layer))

    @classmethod
    @torch.no_grad()
    def random(
        cls, config: GPT2Config, bottleneck: int, seed: int, design: str = "lin"
    ) -> "Adapter":
        """The start of training, exactly the frozen model: see the module's header."""
        adapter, generator = cls(config, bottleneck, design), torch.Generator().manual_seed(seed)
        for layer in adapter.h:
            for part in layer.values():
                nn.init.normal_(part.down.weight, std=0.02, generator=generator)
                for weight in (part.down.bias, part.up.weight, part.up.bias):
                    nn.init.zeros_(weight)
        return adapter

    @classmethod
    def load(cls, path) -> "Adapter":
        """Read an adapter file; see `load_adapter`."""
        return load_adapter(path)

    def save(self, path) -> None:
        """Write an adapter file; see `save_adapter`."""
        save_adapter(path, self)

    def bind(self, model: GPT2) -> None:
        """Record that this adapter belongs to `model`."""
        self.base = fingerprint(model)

    def check_base(self, model: GPT2) -> None:
        """ValueError if this adapter does not fit `model`, or was made for another model."""
        need_gpt2(model, "an adapter")
        config = model.config
        if (self.n_layer, self.n_embd) != (config.n_layer, config.n_embd):
            raise ValueError(
                f"this adapter is for {self.n_layer} layers of width {self.n_embd}, the model has "
                f"{config.n_layer} of width {config.n_embd}"
            )
        check_base(self.base, model, "adapter")

    def attach(self, model: GPT2) -> None:
        """Make `model` compute with this adapter, in training and in generation.

        The model's weights, their names and its config do not change. Saving or copying the model
        (`copy.deepcopy`) gives the model without the adapter.

        Raises:
            ValueError: the model is not `base`, already has an adapter, or has compiled layers.
        """
        self.check_base(model)
        self._hook(model)

    def detach(self, model: GPT2) -> None:
        """Undo `attach`. ValueError if this adapter is not attached to `model`."""
        if adapter_of(model) is not self:
            raise ValueError("this adapter is not attached to this model")
        _, handles = ATTACHED.pop(model)
        for handle in handles:
            handle.remove()
        KEPT.pop(model, None)  # graphs recorded with the adapter

    @contextmanager
    def attached(self, model: GPT2) -> Iterator[None]:
        """Attach within the block, without the slow `check_base`, which must have been called."""
        self._hook(model)
        try:
            yield
        finally:
            self.detach(model)

    def _hook(self, model: GPT2) -> None:
        check_free(model)
        if is_compiled(model):  # a compiled block does not call the hooks
            raise ValueError("an adapter needs layers that are not compiled")
        handles = []
        for block, layer in zip(model.h, self.h, strict=True):
            for place, part in layer.items():
                sublayer = block if place == "block" else getattr(block, place)
                handles.append(sublayer.register_forward_hook(hook_after(sublayer, part)))
        ATTACHED[model] = self, handles
        KEPT.pop(model, None)  # graphs recorded without the adapter


def bottleneck_for(config: GPT2Config, share: float, design: str = "lin") -> int:
    """The width, at least 1, whose number of parameters is nearest to `share` of the model's. The
    number is an affine function of the width."""
    with torch.device("meta"):  # shapes without memory
        one, two = (count(Adapter(config, m, design)) for m in (1, 2))
        goal = share * count(GPT2(config))
    return max(1, 1 + round((goal - one) / (two - one)))


# files -----------------------------------------------------------------------------------------


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Write the adapter file, atomically. OSError if it cannot be written."""
    tensors = {name: tensor.float() for name, tensor in adapter.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "design": adapter.design,
        "bottleneck": str(adapter.bottleneck),
        "layer_norm_epsilon": repr(adapter.layer_norm_epsilon),
        "base": adapter.base,
        **frame_metadata(adapter),
    }
    save_tensors(path, tensors, metadata, checksum=True)


@names_file
def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter file.

    Raises:
        ValueError: the file is not an adapter file, is damaged, or holds other tensors.
        OSError: it cannot be read.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not an adapter file (format {brief(metadata.get('format'))})")
    has_checksum = verify_checksum(path)
    design, width = metadata.get("design"), metadata.get("bottleneck", "")
    if design not in SUBLAYERS:
        raise ValueError(f"{path}: unknown design {brief(design)}")
    down, up = (tensors.get(f"h.0.{SUBLAYERS[design][0]}.{w}.bias") for w in ("down", "up"))
    if down is None or up is None or width != str(down.numel()) or 0 in (down.numel(), up.numel()):
        raise ValueError(
            f"{path}: the tensors do not fit design {design!r} and bottleneck {brief(width)}"
        )
    try:
        eps = float(metadata.get("layer_norm_epsilon", ""))
    except ValueError:
        eps = math.nan
    if not 0 < eps < 1:
        raise ValueError(f"{path}: layer_norm_epsilon must be a number between 0 and 1")
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    config = GPT2Config(n_layer=n_layer, n_head=1, n_embd=up.numel(), layer_norm_epsilon=eps)
    with torch.device("meta"):
        adapter = Adapter(config, down.numel(), design)
    wanted = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted | found):
        if found.get(name) != wanted.get(name):
            shapes = f"is {found.get(name)}, must be {wanted.get(name)}"
            raise ValueError(f"{path}: {name} {shapes} in {n_layer} layers of design {design}")
    check_values(path, tensors)
    adapter.load_state_dict({name: x.float() for name, x in tensors.items()}, assign=True)
    adapter.base = metadata.get("base", "")
    adapter.linearisation, adapter.max_source = read_frame(path, metadata)
    if not has_checksum:
        warn_no_checksum(Path(path))
    return adapter


# training --------------------------------------------------------------------------------------


def make_adapter(
    model: GPT2, design: str, bottleneck: int | None, share: float | None, seed: int
) -> Adapter:
    """A new adapter, bound to the model and on its device, with the given width or share of the
    model's parameters (`SHARE` if neither is given)."""
    need_gpt2(model, "method 'adapter'")
    width = bottleneck or bottleneck_for(model.config, share or SHARE, design)
    adapter = Adapter.random(model.config, width, seed, design).to(model.wte.weight.device)
    adapter.bind(model)
    return adapter


@dataclass
class TunedAdapter(Tuned):
    """Training of an adapter in a frozen model."""

    adapter: Adapter

    method = "adapter"
    kept = "adapter.safetensors"
    reads = ("adapter_design", "bottleneck", "adapter_share")
    # narrow models: the best on E2E's dev set, for three widths; others: the paper's rate for 3 %
    # of the parameters (for 0.1 % it has 8e-5)
    rates = {"GPT-2": (1e-2, 5e-5)}  # noqa: RUF012

    @property
    def weights(self) -> Adapter:
        return self.adapter

    def bind(self, model, linearisation, max_source) -> dict:
        return bind_added(self.adapter, model, linearisation, max_source)

    def attached(self, model):
        return self.adapter.attached(model)

    def save(self, path, model, tokenizer) -> None:
        self.adapter.save(path)

    def __str__(self) -> str:
        return f"adapter, design {self.adapter.design}, bottleneck {self.adapter.bottleneck}"
