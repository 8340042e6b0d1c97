"""The precision of a run: fp32, or bf16 on devices that support it in hardware."""

from typing import Any

import torch

from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import fingerprint


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware (False if PyTorch cannot tell)."""
    can = getattr(torch.cpu, "get_capabilities", dict)()
    return any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether a run of one of `config.PRECISIONS` computes in bf16 on this device."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def in_bf16(model: GPT2 | BART) -> Any:
    """A model with the same weights in bf16; `model` stays as it is."""
    make: Any = type(model)
    with torch.device("meta"):
        copy = make(model.config)
    weights = {name: x.to(torch.bfloat16) for name, x in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    copy.origin = fingerprint(model)
    return copy.train(model.training)
