"""What computes a prefix while it trains: an MLP (section 4.3) or virtual tokens (section 7.2).

A prefix is keys and values, P_theta of eq. (3) in Li & Liang 2021 [1]. They may be free parameters,
which `prefix.Prefix` holds itself; the output of an MLP over P rows (`PrefixMLP`); or, in the
ablation EMB-n ("embedding-only", section 7.2), what the frozen model computes from P free token
embeddings (`VirtualTokens`). Virtual tokens are at positions 0 .. P-1, before the text. The model
is causal, so their keys and values do not depend on the text and form a table as well. The table
is computed once per step; attention, caches, graphs and files need not know where it came from.

`token_activations` does the same with the embeddings of real words, from which a prefix may start.
Shapes use the letters of `models/gpt2.py`. Widths and the random start are those of the authors'
code [2].

[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprefix.files import brief
from minprefix.models.activations import LayerPrefix, Visible, gated_attention
from minprefix.models.base import evaluating
from minprefix.models.config import BARTConfig, GPT2Config
from minprefix.models.gpt2 import GPT2


class RowMLP(nn.Module):
    """P rows of n_out numbers: embedding P x C, linear to mid_dim, tanh, linear to n_out."""

    def __init__(self, n_embd: int, prefix_len: int, mid_dim: int, n_out: int):
        super().__init__()
        self.prefix_embd = nn.Parameter(torch.empty(prefix_len, n_embd))  # (P, C)
        self.linear_in = nn.Linear(n_embd, mid_dim)
        self.linear_out = nn.Linear(mid_dim, n_out)

    def init_weights(self, generator: torch.Generator) -> None:
        """PyTorch's defaults, which the authors' code uses: N(0, 1) for the embedding, and
        U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases of both linear layers."""
        nn.init.normal_(self.prefix_embd, generator=generator)
        for linear in (self.linear_in, self.linear_out):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)

    def hidden(self) -> Tensor:  # (P, mid_dim)
        return torch.tanh(self.linear_in(self.prefix_embd))

    def rows(self) -> Tensor:  # (P, n_out)
        with torch.autocast(self.prefix_embd.device.type, enabled=False):
            return self.linear_out(self.hidden())

    @torch.no_grad()
    def fit_rows(self, rows: Tensor) -> float:
        """Change the last layer as little as possible so that the output is `rows` (P, n_out).

        Solves a least-squares problem in fp64. Returns the largest |difference| that remains, which
        is only rounding as long as P <= mid_dim.
        """
        # (P, mid_dim + 1): the last column is for the bias
        hidden = F.pad(self.hidden().double(), (0, 1), value=1.0)
        layer = torch.cat([self.linear_out.weight, self.linear_out.bias[:, None]], 1).double().T
        layer += torch.linalg.pinv(hidden) @ (rows.double() - hidden @ layer)  # (mid_dim+1, n_out)
        self.linear_out.weight.copy_(layer[:-1].T)
        self.linear_out.bias.copy_(layer[-1])
        return (self.rows() - rows).abs().max().item()


class PrefixMLP(RowMLP):
    """P_theta[i, :] = MLP(P'_theta[i, :]): rows of 2 L C numbers, a key and a value per layer."""

    def __init__(self, config: GPT2Config | BARTConfig, prefix_len: int, mid_dim: int):
        super().__init__(config.n_embd, prefix_len, mid_dim, config.n_layer * 2 * config.n_embd)
        self.table_shape = (prefix_len, config.n_layer, 2, config.n_head, config.head_dim)

    def forward(self) -> Tensor:  # -> (L, 2, H, P, D)
        return self.rows().view(self.table_shape).permute(1, 2, 3, 0, 4)

    def fit_last_layer(self, table: Tensor) -> float:
        """`fit_rows` to a table (L, 2, H, P, D)."""
        return self.fit_rows(table.permute(3, 0, 1, 2, 4).flatten(1))  # (P, 2 L C)


class Recorder:
    """Takes the place of a cache and records the keys and values of each layer, with gradients."""

    def __init__(self, device: torch.device):
        self.device, self.kv = device, {}  # by layer, (2, B, H, T, D)

    def longest_after(self, T: int) -> int:
        return T

    def places(self, T: int) -> Tensor:
        return torch.arange(T, device=self.device)

    def attend(self, layer: int, q, k, v, prefix: LayerPrefix, visible: Visible) -> Tensor:
        """Attention without a cache. Checkpointing calls this twice per layer with equal values."""
        self.kv[layer] = torch.stack([k, v])
        return gated_attention(q, k, v, prefix, visible)

    def advance(self, lengths: Tensor | None, T: int) -> None:
        pass

    def table(self) -> Tensor:
        """What was recorded of a single row: (L, 2, H, T, D)."""
        return torch.stack([self.kv[layer][:, 0] for layer in range(len(self.kv))])


def computed_table(model: GPT2, inputs: Tensor) -> Tensor:
    """The keys and values that the model computes for a text at positions 0, 1, ...: h_<P, eq. (1).

    There is no dropout, whatever mode the model is in.

    Args:
        inputs: (P,) int, tokens; or embeddings (P, C), which receive gradients.
    Returns:
        (L, 2, H, P, D), fp32, or fp64 from an fp64 model.
    """
    recorder: Any = Recorder(inputs.device)
    with evaluating(model):
        model.hidden_states(inputs[None], cache=recorder)
    table = recorder.table()
    return table.to(torch.promote_types(table.dtype, torch.float32))


@torch.no_grad()
def token_activations(model: GPT2, ids: list[int]) -> Tensor:
    """The model's keys and values of the tokens `ids`; see `computed_table`."""
    return computed_table(model, torch.tensor(ids, device=model.wte.weight.device))


def word_ids(tokenizer, words: str, prefix_len: int | None) -> list[int]:
    """The words' BPE tokens, repeated or cut to prefix_len; None = as many as there are.

    Raises:
        ValueError: no words, or a length below 1.
    """
    if not isinstance(words, str):
        raise ValueError(f"the words must be a text, got {brief(words)}")
    ids = tokenizer.encode(words)
    if not ids:
        raise ValueError("the text has no words to start the prefix from")
    prefix_len = len(ids) if prefix_len is None else prefix_len
    if prefix_len < 1:
        raise ValueError(f"prefix_len must be at least 1, got {prefix_len}")
    return [ids[i % len(ids)] for i in range(prefix_len)]


class ModelReference:
    """A model that a prefix uses but does not own: not a submodule, and shared by copies."""

    def __init__(self, model: Any = None):
        self.model = model

    def __deepcopy__(self, memo: dict) -> "ModelReference":
        return ModelReference(self.model)


class VirtualTokens(nn.Module):
    """EMB-n: P free embeddings, read by the frozen model as if they were those of tokens.

    Their parameters stay in fp32 even if the model is in bf16; they are cast where the model reads
    them.

    Args:
        mid_dim: the embeddings are the output of an MLP of this hidden width, which is the default
            of the authors' code; None = the embeddings are the parameters.
    """

    def __init__(self, config: GPT2Config | BARTConfig, prefix_len: int, mid_dim: int | None):
        super().__init__()
        self.model_reference = ModelReference()  # the frozen model, once `Prefix.bind` has named it
        if mid_dim is None:
            self.mlp: RowMLP | None = None
            self.virtual_embd: Any = nn.Parameter(torch.zeros(prefix_len, config.n_embd))  # (P, C)
        else:
            self.mlp = RowMLP(config.n_embd, prefix_len, mid_dim, config.n_embd)
            self.virtual_embd = None

    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, 1), the default of PyTorch's embedding, which the authors use; or `RowMLP`'s."""
        if self.mlp is None:
            nn.init.normal_(self.virtual_embd, generator=generator)
        else:
            self.mlp.init_weights(generator)

    @torch.no_grad()
    def fit(self, embd: Tensor) -> float:
        """Start from these embeddings (P, C); returns the largest |difference| that remains."""
        if self.mlp is not None:
            return self.mlp.fit_rows(embd)
        self.virtual_embd.copy_(embd)
        return 0.0

    def forward(self) -> Tensor:  # -> (L, 2, H, P, D)
        model = self.model_reference.model
        if model is None:
            raise ValueError("virtual tokens are read by a model: call prefix.bind(model) first")
        return computed_table(model, self.embeddings().to(model.wte.weight))

    def embeddings(self) -> Tensor:  # -> (P, C)
        return self.virtual_embd if self.mlp is None else self.mlp.rows()
