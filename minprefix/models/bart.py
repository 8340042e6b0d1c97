"""BART, from config to logits: an encoder-decoder with a prefix at each of its three attentions.

A source x goes through the encoder, a target y through the decoder, which also reads the encoder's
last layer by cross attention. Li & Liang 2021 [1] write it [PREFIX; x; PREFIX'; y]; their code [2]
has three tables, since a layer's prefix is a key and a value for each attention that reads one:

    encoder   every source token sees P prefix positions and the whole source
    decoder   target token t sees P prefix positions and the targets up to t
    cross     target token t sees P prefix positions and the whole encoded source

Nothing in here knows how they came about: they are arguments of attention, as in `gpt2.py`, which
has the parts that are the same (`Attention`, the caches, `PrefixActivations`). What differs from
GPT-2: layer norms stand behind each sum (post-LN), GELU is exact, positions begin in row 2 of their
table, a layer norm follows the embeddings, and the head has a bias. Read `EncoderBlock`,
`DecoderBlock`, `BART`. `weights_bart.py` has the official checkpoints' names of all this [3].

Shapes use the letters of the README's table; S counts source tokens, T target tokens.

[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
[3] Lewis et al. 2020, https://arxiv.org/abs/1910.13461; https://huggingface.co/facebook/bart-large
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprefix.models.gpt2 import (
    GPT2,
    Attention,
    KVCache,
    PrefixActivations,
    gated_prefix_attention,
    run_block,
)

SITES = ("encoder", "decoder", "cross")  # attentions that can have a prefix
FIRST_POSITION = 2  # row of the position table at which token 0 stands, as in the checkpoints


@dataclass(frozen=True)
class BARTConfig:
    """Sizes of a BART and its special tokens; the defaults are those of facebook/bart-large."""

    vocab_size: int = 50265  # V
    n_positions: int = 1024  # longest position + 1, of source and of target
    n_embd: int = 1024  # C
    n_encoder_layer: int = 12  # layers of the encoder
    n_layer: int = 12  # L, layers of the decoder
    n_head: int = 16  # H
    n_inner: int = 4096  # width inside the MLPs
    scale_embedding: bool = False  # multiply token embeddings by sqrt(C)
    bos_token_id: int = 0  # <s>, before a source and before a target
    pad_token_id: int = 1
    eos_token_id: int = 2  # </s>, behind both
    decoder_start_token_id: int = 2  # what the decoder reads first
    forced_bos_token_id: int | None = None  # generation: the first token; None = any
    forced_eos_token_id: int | None = 2  # generation: the last of max_new_tokens; None = any
    no_repeat_ngram_size: int = 0  # generation, where nothing is said: this and the next two
    early_stopping: bool = False
    length_penalty: float = 1.0
    dropout: float = 0.1  # probability, on embeddings and sums; it acts while fine-tuning only
    attention_dropout: float = 0.0  # kept for the file; no dropout inside attention here
    activation_dropout: float = 0.0  # kept for the file; no dropout inside the MLPs here
    linearisation: str = ""  # of a fine-tuned model: the frame it learned, and the next
    max_source: int | None = None

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")

    @property
    def head_dim(self) -> int:  # D
        return self.n_embd // self.n_head

    def at(self, site: str) -> "BARTConfig":
        """With the number of layers that a prefix has at one of SITES."""
        return replace(self, n_layer=self.n_encoder_layer) if site == "encoder" else self


@dataclass(frozen=True)
class BARTActivations:
    """What the model reads of a prefix, eq. (3): keys and values at each site that has one.

    Embedding-only has no table: `virtual` are the embeddings of P tokens before the source, which
    the encoder reads at positions 0 .. P-1 together with it, and the decoder through cross
    attention.
    """

    sites: dict[str, PrefixActivations] = field(default_factory=dict)
    position_offset: int = 0  # token t of source and target, beside virtual tokens of the source
    virtual: Tensor | None = None  # (P, C)
    infix: ClassVar[bool] = False

    def at(self, site: str, config: BARTConfig, like: Tensor) -> PrefixActivations:
        """What the site reads; P = 0, in the dtype and on the device of `like`, if it has none."""
        if site in self.sites:
            return self.sites[site]
        offset = 0 if self.virtual is not None and site != "encoder" else self.position_offset
        none = PrefixActivations.empty(config.at(site), like)
        return replace(none, position_offset=offset, max_offset=offset)

    def map(self, change: Callable[[Tensor], Tensor], gates: bool = True) -> "BARTActivations":
        """With a change of each table, each gate (if they are meant) and the virtual tokens."""
        virtual = None if self.virtual is None else change(self.virtual)
        sites = {site: acts.map(change, gates) for site, acts in self.sites.items()}
        return replace(self, sites=sites, virtual=virtual)

    def leaves(self) -> list[Tensor]:
        """What may have a gradient."""
        found = [leaf for acts in self.sites.values() for leaf in acts.leaves()]
        return found if self.virtual is None else [*found, self.virtual]

    def select(self, rows: Tensor) -> "BARTActivations":
        """For these rows of the batch: the same, one prefix is for all rows."""
        return self

    def passed(self) -> "BARTActivations":
        """For later tokens: the same, there is no infix."""
        return self


@dataclass(frozen=True)
class Source:
    """An encoded source, which the decoder reads by cross attention."""

    states: Tensor  # (B, S, C)
    lens: Tensor | None = None  # (B,) real tokens of each row; None = all
    kv: Tensor | None = None  # (L, 2, B, H, S, D): keys and values of all layers; None = not yet

    def select(self, rows: Tensor) -> "Source":
        """These rows, in this order and as often as they are named."""
        lens = None if self.lens is None else self.lens[rows]
        return Source(self.states[rows], lens, None if self.kv is None else self.kv[:, :, rows])

    def keep(self, order: list[int]) -> "Source":
        """`select` in place, with kv: only rows that another takes the place of are written."""
        moved = [(to, source) for to, source in enumerate(order) if to != source]
        if moved:
            to, source = (list(rows) for rows in zip(*moved, strict=True))
            self.kv[:, :, to] = self.kv[:, :, source]
            for x in (self.states, self.lens):
                x[to] = x[source]
        n = len(order)
        return Source(self.states[:n], self.lens[:n], self.kv[:, :, :n])


class SelfAttention(Attention):
    """GPT-2's, causal or not; the weights lie as `nn.Linear` has them, (out, in)."""

    linear = nn.Linear


class CrossAttention(nn.Module):
    """Multi-head attention of the target's tokens over [prefix; encoded source]."""

    def __init__(self, config: BARTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_q = nn.Linear(config.n_embd, config.n_embd)
        self.c_kv = nn.Linear(config.n_embd, 2 * config.n_embd)  # k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def keys_and_values(self, states: Tensor) -> Tensor:
        """Of the encoder's states (B, S, C): (2, B, H, S, D)."""
        B, S, C = states.shape
        kv = self.c_kv(states).view(B, S, 2, self.n_head, C // self.n_head)
        return kv.permute(2, 0, 3, 1, 4)

    def forward(self, x, kv, prefix_k, prefix_v, gate=None, **visible) -> Tensor:
        """x (B, T, C), kv (2, B, H, S, D) -> (B, T, C).

        Args:
            visible: kv_lens (the source's), prefix_index, prefix_lens of `prefix_attention`.
        """
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        k, v = kv
        o = gated_prefix_attention(q, k, v, prefix_k, prefix_v, gate, causal=False, **visible)
        return self.c_proj(o.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with the exact GELU between them."""

    def __init__(self, config: BARTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.c_proj(F.gelu(self.c_fc(x)))


class EncoderBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: BARTConfig):
        super().__init__()
        self.attn = SelfAttention(config)
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, prefix_k, prefix_v, gate=None, attend=None, **visible) -> Tensor:
        """x (B, S, C) -> (B, S, C). Arguments as in `Attention`; every token sees all others."""
        o = self.attn(x, prefix_k, prefix_v, gate, attend, causal=False, **visible)
        x = self.ln_1(x + self.drop(o))
        return self.ln_2(x + self.drop(self.mlp(x)))


class DecoderBlock(nn.Module):
    """norm(x + attention(x)), norm(x + cross attention(x, source)), norm(x + mlp(x))."""

    def __init__(self, config: BARTConfig):
        super().__init__()
        self.attn = SelfAttention(config)
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.cross = CrossAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.ln_3 = nn.LayerNorm(config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x, prefix_k, prefix_v, gate, attend, at, states, kv, cross_prefix, cross_visible,
        **visible,
    ) -> Tensor:  # fmt: skip
        """x (B, T, C) -> (B, T, C); with `at` (n,), places b T + t, the results there: (n, C).

        Args:
            prefix_k, prefix_v, gate, attend, visible: of self-attention, as in `Attention`.
            states: (B, S, C), the encoder's; or kv (2, B, H, S, D), made of them before.
            cross_prefix, cross_visible: of cross attention: (prefix_k, prefix_v, gate), and as in
                `CrossAttention`.
        """
        x = self.ln_1(x + self.drop(self.attn(x, prefix_k, prefix_v, gate, attend, **visible)))
        kv = self.cross.keys_and_values(states) if kv is None else kv
        x = self.ln_2(x + self.drop(self.cross(x, kv, *cross_prefix, **cross_visible)))
        if at is not None:
            x = x.flatten(0, 1).index_select(0, at)  # (n, C)
        return self.ln_3(x + self.drop(self.mlp(x)))


class Stack(nn.Module):
    """Encoder or decoder: position table, layer norm of the embeddings, layers."""

    def __init__(self, config: BARTConfig, block: type[nn.Module], n_layer: int):
        super().__init__()
        self.wpe = nn.Embedding(FIRST_POSITION + config.n_positions, config.n_embd)
        self.ln_embd = nn.LayerNorm(config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(block(config) for _ in range(n_layer))

    def embed(self, embd: Tensor, positions: Tensor) -> Tensor:
        """What the first layer reads of embeddings (B, T, C) at positions (T,) or (B, T)."""
        return self.drop(self.ln_embd(embd + self.wpe(FIRST_POSITION + positions)))


class BART(nn.Module):
    """Source and target ids to next-token logits. One token embedding (tied) serves all three."""

    def __init__(self, config: BARTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder = Stack(config, EncoderBlock, config.n_encoder_layer)
        self.decoder = Stack(config, DecoderBlock, config.n_layer)
        self.register_buffer("head_bias", torch.zeros(config.vocab_size))  # final_logits_bias
        self.activation_checkpointing = False  # recompute each block in the backward pass
        self.compile_blocks = False  # torch.compile each block, where there is no cache

    def init_weights(self, seed: int) -> "BART":
        """Random weights as BART's training starts: N(0, 0.02); biases 0, layer norms 1."""
        generator = torch.Generator(device=self.wte.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02, generator=generator)
            else:
                nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
        nn.init.zeros_(self.head_bias)
        return self

    # the head, tied to wte, and the loss are GPT-2's
    head, token_losses = GPT2.head, GPT2.token_losses

    def forward(self, source_ids: Tensor, input_ids: Tensor, **kwargs) -> Tensor:
        """Logits of the next target token: (B, S), (B, T) -> (B, T, V). Arguments as in
        `hidden_states`."""
        return self.head(self.hidden_states(input_ids, source_ids=source_ids, **kwargs))

    def encode(
        self, source_ids: Tensor, source_lens: Tensor | None = None, *, prefix=None,
        prefix_index: Tensor | None = None, recorder=None,
    ) -> Source:  # fmt: skip
        """The encoder's last layer.

        Args:
            source_ids: (B, S) int.
            source_lens: (B,) int, how many of the S tokens of each row are real (right padding).
            prefix, prefix_index: as in `hidden_states`.
            recorder: `parametrisations.Recorder` to note keys and values of the layers.
        """
        prefix = self._activations(prefix, prefix_index)
        (B, S), virtual = source_ids.shape, prefix.virtual
        acts = prefix.at("encoder", self.config, self.wte.weight)
        acts.check_fit(self.config.at("encoder"), B, S)
        embd = self.wte(source_ids)  # (B, S, C)
        positions = acts.positions(torch.arange(S, device=source_ids.device))
        if virtual is not None:
            P = len(virtual)
            embd = torch.cat([virtual.to(embd).expand(B, -1, -1), embd], dim=1)
            positions = torch.cat([torch.arange(P, device=embd.device), positions])
            source_lens = None if source_lens is None else source_lens + P
        x = self.encoder.embed(self._scaled(embd), positions)
        visible = acts.rows | {"kv_lens": source_lens}
        for layer, block in enumerate(self.encoder.h):
            attend = None if recorder is None else partial(recorder.attend, layer)
            x = run_block(self, block, x, *acts.of_layer(layer), attend, **visible)
        return Source(x, source_lens)

    def with_keys(self, source: Source) -> Source:
        """With the keys and values that cross attention reads, made once for a whole text."""
        kv = [block.cross.keys_and_values(source.states) for block in self.decoder.h]
        return replace(source, kv=torch.stack(kv))

    def hidden_states(
        self, input_ids: Tensor, *, source: Source | None = None,
        source_ids: Tensor | None = None, source_lens: Tensor | None = None,
        prefix=None, prefix_index: Tensor | None = None, kv_lens: Tensor | None = None,
        cache: KVCache | None = None, at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What the head reads: (B, T) -> (B, T, C), or with `at` (n, C).

        Args:
            input_ids: (B, T) int, what the decoder reads: decoder_start_token_id, then the target;
                with a cache, the tokens after those that it holds.
            source: what `encode` made with the same prefix; None = source_ids, source_lens are
                encoded, as there.
            prefix: a `BARTPrefix` or ready `BARTActivations`; None = plain BART.
            prefix_index: not yet: there is no bank of BART prefixes.
            kv_lens, cache, at: as in `GPT2.hidden_states`.
        Raises:
            ValueError: positions past n_positions; a prefix of another shape, or of GPT-2.
        """
        B, T = input_ids.shape
        prefix = self._activations(prefix, prefix_index)
        if source is None:
            source = self.encode(source_ids, source_lens, prefix=prefix)
        own, cross = (prefix.at(s, self.config, self.wte.weight) for s in ("decoder", "cross"))
        own.check_fit(self.config, B, T if cache is None else cache.longest_after(T))
        cross.check_fit(self.config, B, 0)
        steps = torch.arange(T, device=input_ids.device) if cache is None else cache.places(T)
        x = self.decoder.embed(self._scaled(self.wte(input_ids)), own.positions(steps))

        visible, cross_visible = own.rows, cross.rows | {"kv_lens": source.lens}
        if cache is None:
            visible["kv_lens"] = kv_lens
        for layer, block in enumerate(self.decoder.h):
            attend = None if cache is None else partial(cache.attend, layer)
            here = at if layer == self.config.n_layer - 1 else None
            kv = None if source.kv is None else source.kv[layer]
            read = (source.states, kv, cross.of_layer(layer), cross_visible)
            x = run_block(self, block, x, *own.of_layer(layer), attend, here, *read, **visible)
        if cache is not None:
            cache.advance(kv_lens, T)
        return x

    def _scaled(self, embd: Tensor) -> Tensor:
        return embd * self.config.n_embd**0.5 if self.config.scale_embedding else embd

    def _activations(self, prefix, prefix_index: Tensor | None) -> BARTActivations:
        if prefix_index is not None:
            raise ValueError("prefix_index needs a bank, and there is none of BART prefixes")
        if prefix is None:
            return BARTActivations()
        acts = prefix if isinstance(prefix, BARTActivations) else prefix.activations()
        if not isinstance(acts, BARTActivations):
            raise ValueError(f"a BART needs a BARTPrefix, got {type(prefix).__name__}")
        return acts
