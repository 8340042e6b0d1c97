"""Fine-tuning of the top layers, a baseline of the paper: the model's last blocks are trained.

Source: https://github.com/XiangLi1999/PrefixTuning, gpt2/run_language_modeling.py (what trains).
"""

from dataclasses import dataclass

from torch import nn

from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import fingerprint, need_gpt2, save_model
from minprefix.training.tuned import Tuned, bind_own


class TopLayers(nn.Module):
    """The modules of `model` that fine-tuning of the top layers trains.

    These are the last `n_top` blocks and the final layer norm, as with `top_layers 22` in the
    authors' code (blocks 22 and 23 of GPT-2 medium). With `embedding` they include the token
    embedding, which is also the head, as with its `top_layers 2`. The paper does not say which of
    the two FT-top2 is. Without the embedding, the backward pass ends at the lowest trained block.
    """

    def __init__(self, model: GPT2, n_top: int = 2, embedding: bool = False):
        super().__init__()
        if not 1 <= n_top <= model.config.n_layer:
            raise ValueError(
                f"top_layers must lie in [1, {model.config.n_layer}], the model's layers, "
                f"got {n_top}"
            )
        self.n_top, self.embedding = n_top, embedding
        self.h, self.ln_f = model.h[-n_top:], model.ln_f
        if embedding:
            self.wte, self.drop = model.wte, model.drop


@dataclass
class TunedTopLayers(Tuned):
    """Fine-tuning of the top layers of a model."""

    layers: TopLayers

    method = "ft-top"
    kept = "model"
    reads = ("top_layers", "top_embedding")
    frozen = False
    rates = {"GPT-2": (5e-3, 5e-5)}  # noqa: RUF012 (E2E's dev set chose; as for all weights)

    @property
    def weights(self) -> TopLayers:
        return self.layers

    def bind(self, model, linearisation, max_source) -> dict:
        need_gpt2(model, "method 'ft-top'")
        if self.layers.ln_f is not model.ln_f:
            raise ValueError("the top layers belong to another model")
        base = fingerprint(model)
        bind_own(self.layers, model, linearisation, max_source)
        return {"base model": base}

    def save(self, path, model, tokenizer) -> None:
        save_model(model, tokenizer, path)

    def __str__(self) -> str:
        return f"top {self.layers.n_top} layers" + (
            " and embedding" if self.layers.embedding else ""
        )
