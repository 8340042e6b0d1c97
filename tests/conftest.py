"""Shared helpers: tiny random models, and the data that a development checkout has beside it."""

from pathlib import Path

import pytest
import torch

from minprefix.gpt2 import GPT2, GPT2Config

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = GPT2Config(
    vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=96, eos_token_id=96
)


def tiny_gpt2(seed: int = 0, dtype=torch.float64, **changes) -> GPT2:
    """A random GPT-2 of a few thousand parameters, in eval mode. Weights are larger than GPT-2's
    own start, so that logits differ clearly."""
    config = GPT2Config(**{**TINY.__dict__, **changes})
    model = GPT2(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.to(dtype).eval()


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data for development; users do not have it."""
    if not SHARED.is_dir():
        pytest.skip("needs the development data in ../shared, which is not here")
    return SHARED


def hf_twin(model: GPT2):
    """The GPT-2 of `transformers` with our weights, in their dtype: eager attention, eval mode."""
    from transformers import GPT2Config as HFConfig
    from transformers import GPT2LMHeadModel

    twin = GPT2LMHeadModel(HFConfig(**model.config.__dict__, attn_implementation="eager"))
    weights = {f"transformer.{name}": weight for name, weight in model.state_dict().items()}
    twin.load_state_dict(weights | {"lm_head.weight": model.wte.weight})
    return twin.to(model.wte.weight.dtype).eval()


def random_ids(model: GPT2, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids of the model's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def assert_close(actual, exact, tolerance: float, name: str = "") -> None:
    """|actual - exact| <= tolerance * max(1, max |exact|), in the maximum norm."""
    assert actual.shape == exact.shape, f"{name}: shapes {actual.shape}, {exact.shape}"
    if exact.numel():
        err, size = (actual - exact).abs().max().item(), exact.abs().max().item()
        assert err <= tolerance * max(1, size), f"{name}: error {err:.1e}, largest {size:.1e}"


def assert_within_rounding(actual, low, exact, magnitude, max_score, name):
    """|actual - exact| <= 2 |low - exact| + 4 eps (1 + max_score) magnitude, in the maximum norm.

    `exact` is fp64, `low` plain PyTorch in the dtype of `actual`. 2: another summation order.
    4 eps (1 + |s|): a rounded score moves exp(s - lse) by eps |s|. PyTorch's fused attention on the
    CPU (it recomputes exp(s - lse) too) uses 0.22 of the budget at most, and beyond 2 |low - exact|
    0.02 eps (1 + |s|) magnitude.
    """
    err, low_err = ((x.double() - exact).abs().max().item() for x in (actual, low))
    budget = 2 * low_err + 4 * torch.finfo(actual.dtype).eps * (1 + max_score) * magnitude
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    assert err <= budget, f"{name}: error {err:.1e}, budget {budget:.1e}"
