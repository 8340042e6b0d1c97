"""The activations of a prefix, eq. (3) of Li & Liang 2021 [1], and the attention that reads them.

`Prefix.activations` makes a `PrefixActivations` once per training step or generated text; each
layer reads its own keys and values from it, a `LayerPrefix`. A BART has one for each kind of
attention (`BARTActivations`). `Visible` says which prefix and which keys each query sees. Read
these classes, then `gated_attention`. Shapes use the letters of `models/gpt2.py`.

[1] https://arxiv.org/abs/2101.00190
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import prefix_attention, prefix_attention_qkv
from kernels.merge import Partial, merge_gated
from kernels.reference import prefix_row_lens
from minprefix.models.config import BARTConfig, GPT2Config


class LayerPrefix(NamedTuple):
    """The keys and values of a prefix in one layer."""

    k: Tensor  # (H, P, D), one prefix; (N, H, P, D), a bank
    v: Tensor
    gate: Tensor | None = None  # (H,) or (N, H): weight >= 0 on the prefix's softmax terms


@dataclass(frozen=True)
class Visible:
    """What each query sees: which prefix of a bank, and which keys of the sequence."""

    prefix_index: Tensor | None = None  # (B,) which prefix of the bank each row uses, -1 = none
    prefix_lens: Tensor | None = None  # (N,) lengths of a bank's prefixes; None = all P
    kv_lens: Tensor | None = None  # (B,) keys of each row that are real; None = all
    q_offset: Tensor | None = None  # (B,) place of each row's first query; None = S - T
    causal: bool = True  # a query sees no key after its own place
    after: Tensor | None = None  # (B, T) bool, queries after an infix, which see it; None = all
    seen: Tensor | None = None  # (B, T, S) bool, with beams: the keys that each query sees

    def keys(self) -> dict:
        """The arguments of the operator that concern the sequence."""
        return {"kv_lens": self.kv_lens, "q_offset": self.q_offset, "causal": self.causal}

    def all(self) -> dict:
        """The arguments of the operator that concern the sequence and the prefix."""
        rows = {"prefix_index": self.prefix_index, "prefix_lens": self.prefix_lens}
        return rows | self.keys()


class Activations:
    """What a model reads of a prefix. The defaults here are for a prefix that all rows share."""

    infix: bool | Tensor = False

    def select(self, rows: Tensor) -> "Activations":
        """The activations for these rows of the batch, in this order, repeated as given."""
        return self

    def passed(self) -> "Activations":
        """The activations for tokens that all come after an infix, which is a prefix to them."""
        return self

    # for steps on static buffers (`generation/fast.py`)

    def sizes(self) -> tuple:
        """Everything but values on which the work of a step depends."""
        raise NotImplementedError

    def with_room(self, rows: int) -> "Activations":
        """Copies at fixed addresses; tensors with an entry per row get room for `rows`."""
        raise NotImplementedError

    def overwritten(self, other: Any) -> "Activations":
        """The values of `other` at the addresses of this one."""
        raise NotImplementedError

    def first(self, rows: int) -> "Activations":
        """The activations for the first `rows` rows."""
        return self

    def move(self, to: Tensor, source: Tensor) -> None:
        """Copy the entries of rows `source` to rows `to`, in place."""


@dataclass(frozen=True)
class PrefixActivations(Activations):
    """h_i for i in P_idx: the keys and values of one prefix, or of a bank, in all layers."""

    table: Tensor  # (L, 2, H, P, D), one prefix; (L, 2, N, H, P, D), a bank
    position_offset: Any  # int or Tensor: token t is at position t + offset; (B,) with a bank
    max_offset: int  # the largest offset
    gate: Tensor | None = None  # (L, H) or (L, N, H): weight >= 0 on the prefix's softmax terms
    index: Tensor | None = None  # (B,) which prefix of the bank each row uses, -1 = none
    lens: Tensor | None = None  # (N,) lengths of ragged prefixes
    infix: bool | Tensor = False  # whether it is before token `starts`; (B,) with a bank

    @classmethod
    def empty(cls, config: GPT2Config | BARTConfig, like: Tensor) -> "PrefixActivations":
        """No prefix: P = 0, in the dtype and on the device of `like`."""
        shape = (config.n_layer, 2, config.n_head, 0, config.head_dim)
        return cls(like.new_empty(shape), position_offset=0, max_offset=0)

    def layers(self) -> list[LayerPrefix]:
        """The prefix of each layer. One `unbind` for all layers gives one gradient table; separate
        slices would each give a table that is zero elsewhere."""
        parts = self.table.flatten(0, 1).unbind()  # k and v of layer 0, k and v of layer 1, ..
        gates = [None] * len(self.table) if self.gate is None else self.gate.unbind()
        return [LayerPrefix(*x) for x in zip(parts[::2], parts[1::2], gates, strict=True)]

    def visible(self, **keys) -> Visible:
        """Which prefix each row sees, and which keys (fields of `Visible`)."""
        return Visible(self.index, self.lens, **keys)

    def positions(self, places: Tensor) -> Tensor:
        """The positions of the tokens at `places` (T,) or (B, T) of their text: place + offset."""
        offset = self.position_offset
        return places + (offset[:, None] if isinstance(offset, Tensor) else offset)

    def after(self, places: Tensor, starts: Tensor | None) -> Tensor | None:
        """Which tokens, at `places` (T,) or (B, T), come after an infix: (B, T); None = all."""
        if self.infix is False:
            return None
        if starts is None or starts.dim() != 1:
            raise ValueError(
                "an infix needs `starts` (B,), in each row the first token after it; got "
                f"{None if starts is None else tuple(starts.shape)}"
            )
        return places >= (starts * self.infix)[:, None]  # a bank's prefixes start at 0

    def map(self, change: Callable[[Tensor], Tensor], gates: bool = True) -> "PrefixActivations":
        """Apply `change` to the table and, if `gates`, to the gate as well."""
        gate = change(self.gate) if gates and self.gate is not None else self.gate
        return replace(self, table=change(self.table), gate=gate)

    def leaves(self) -> list[Tensor]:
        """The tensors with a gradient: the table, and the gate if there is one."""
        return [x for x in (self.table, self.gate) if x is not None]

    def check_fit(self, config: GPT2Config | BARTConfig, batch_size: int, n_tokens: int) -> None:
        """ValueError if a model of this config cannot read it together with `n_tokens` tokens."""
        shape = tuple(self.table.shape)
        want = (config.n_layer, 2, config.n_head, config.head_dim)
        if (*shape[:2], shape[-3], shape[-1]) != want:
            raise ValueError(
                f"the prefix has shape {shape}, the model needs (L, 2, [N,] H, P, D) with "
                f"L = {want[0]}, H = {want[2]}, D = {want[3]}"
            )
        if self.index is not None and self.index.shape != (batch_size,):
            raise ValueError(
                f"the batch has {batch_size} rows, the prefix index has shape "
                f"{tuple(self.index.shape)}"
            )
        if self.max_offset + n_tokens > config.n_positions:
            raise ValueError(
                f"too long: position offset {self.max_offset} + {n_tokens} tokens > "
                f"{config.n_positions} positions of the model"
            )

    def passed(self) -> "PrefixActivations":
        return replace(self, infix=False)

    def select(self, rows: Tensor | slice) -> "PrefixActivations":
        if self.index is None:  # one prefix for all rows
            return self
        return replace(self, index=self.index[rows], position_offset=self.position_offset[rows])

    def first(self, rows: int) -> "PrefixActivations":
        return self.select(slice(rows))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the fields, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def sizes(self) -> tuple:
        offset = None if self.index is not None else self.position_offset
        return offset, *((name, x.shape, x.dtype) for name, x in self.tensors().items())

    def with_room(self, rows: int) -> "PrefixActivations":
        copies: dict[str, Any] = {
            name: x.new_zeros(rows) if name in PER_ROW else x.detach().clone()
            for name, x in self.tensors().items()
        }
        return replace(self, **copies)

    def overwritten(self, other: "PrefixActivations") -> "PrefixActivations":
        for name, x in other.tensors().items():
            getattr(self, name)[: len(x)] = x
        return replace(self, max_offset=other.max_offset)

    def move(self, to: Tensor, source: Tensor) -> None:
        if self.index is not None:
            for x in (self.index, self.position_offset):
                x[to] = x[source]


PER_ROW = ("index", "position_offset")  # of a bank's activations: one entry per row of the batch


@dataclass(frozen=True)
class BARTActivations(Activations):
    """What a BART reads of a prefix: keys and values at each site that has a prefix.

    Embedding-only has no table: `virtual` holds the embeddings of P tokens before the source. The
    encoder reads them at positions 0 .. P-1, and the decoder reads them through cross attention.
    """

    sites: dict[str, PrefixActivations] = field(default_factory=dict)
    position_offset: int = 0  # token t of source or target is at t + offset
    virtual: Tensor | None = None  # (P, C)

    @classmethod
    def empty(cls, config: GPT2Config | BARTConfig, like: Tensor) -> "BARTActivations":
        """No prefix."""
        return cls()

    def at(self, site: str, config: BARTConfig, like: Tensor) -> PrefixActivations:
        """What the site reads; without a prefix P = 0, in the dtype and on the device of `like`."""
        if site in self.sites:
            return self.sites[site]
        offset = 0 if self.virtual is not None and site != "encoder" else self.position_offset
        none = PrefixActivations.empty(config.at(site), like)
        return replace(none, position_offset=offset, max_offset=offset)

    def sizes(self) -> tuple:
        own = self.position_offset, self.virtual is None
        return *own, *((site, acts.sizes()) for site, acts in self.sites.items())

    def with_room(self, rows: int) -> "BARTActivations":
        return replace(self, sites={site: x.with_room(rows) for site, x in self.sites.items()})

    def overwritten(self, other: "BARTActivations") -> "BARTActivations":
        pairs = ((site, self.sites[site], x) for site, x in other.sites.items())
        return replace(other, sites={site: mine.overwritten(x) for site, mine, x in pairs})

    def map(self, change: Callable[[Tensor], Tensor], gates: bool = True) -> "BARTActivations":
        """Apply `change` to the tables and the virtual tokens and, if `gates`, to the gates."""
        virtual = None if self.virtual is None else change(self.virtual)
        sites = {site: acts.map(change, gates) for site, acts in self.sites.items()}
        return replace(self, sites=sites, virtual=virtual)

    def leaves(self) -> list[Tensor]:
        """The tensors that may have a gradient."""
        found = [leaf for acts in self.sites.values() for leaf in acts.leaves()]
        return found if self.virtual is None else [*found, self.virtual]


def self_attention(qkv: Tensor, prefix: LayerPrefix, visible: Visible) -> Tensor:
    """`gated_attention` of tokens to one another; qkv (B, T, 3, H, D) -> (B, H, T, D).

    Without a gate the gradient of qkv is one tensor.
    """
    if prefix.gate is None and visible.after is None:
        return prefix_attention_qkv(qkv, prefix.k, prefix.v, **visible.all())
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return gated_attention(q, k, v, prefix, visible)


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: LayerPrefix, visible: Visible,
    append: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attention in which the softmax terms of the prefix are multiplied by `prefix.gate`.

    gate = 1 is plain prefix attention, and gate = 0 is exactly the frozen model (`kernels/merge.py`
    has the equation). Without a gate this is one call of the operator.

    Args:
        q: (B, H, T, D). k, v: (B, H, S, D).
        append: the queries' own keys and values (B, H, T, D), to be written into k and v first.
    Returns:
        (B, H, T, D)
    """
    step: Any = {"append": append, "seen": visible.seen}
    if prefix.gate is None and visible.after is None:
        return prefix_attention(q, k, v, prefix.k, prefix.v, **visible.all(), **step)
    none = q.new_empty(q.shape[1], 0, q.shape[3])
    sequence = prefix_attention(q, k, v, none, none, return_lse=True, **visible.keys(), **step)
    return with_gated_prefix(q, sequence, prefix, visible)


def with_gated_prefix(
    q: Tensor, sequence: Partial, prefix: LayerPrefix, visible: Visible
) -> Tensor:
    """`gated_attention`, given attention over the sequence alone."""
    prefix_k, prefix_v, gate = prefix
    gate = prefix_k.new_ones(prefix_k.shape[:-2]) if gate is None else gate  # (H,) or (N, H)
    index, lens = visible.prefix_index, visible.prefix_lens
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = (x.expand(q.shape[0], -1, -1, -1) for x in (prefix_k, prefix_v))
        gate = gate[None]  # (1, H)
    elif index is not None:
        lens = prefix_row_lens(prefix_k, index, lens)
        row = index.clamp(min=0)
        prefix_k, prefix_v = prefix_k[row], prefix_v[row]  # (B, H, P, D)
        gate = torch.where((index >= 0)[:, None], gate[row], 0)  # (B, H)
    prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    none = q.new_empty(q.shape[1], 0, q.shape[3])
    alone = prefix_attention(
        q, prefix_k, prefix_v, none, none, causal=False, kv_lens=lens, return_lse=True
    )
    seen = None if visible.after is None else visible.after[:, None]  # (B, 1, T)
    return merge_gated(sequence, alone, gate[:, :, None], seen)
