"""BART, from config to logits: an encoder-decoder with a prefix at each of its three attentions.

A source x goes through the encoder, a target y through the decoder, which also reads the encoder's
last layer by cross attention. Li & Liang 2021 [1] write it [PREFIX; x; PREFIX'; y]; their code [2]
has three tables, since a layer's prefix is a key and a value for each attention that reads one:

    encoder   every source token sees P prefix positions and the whole source
    decoder   target token t sees P prefix positions and the targets up to t
    cross     target token t sees P prefix positions and the whole encoded source

The prefixes are arguments of attention, as in `gpt2.py`, from which self-attention is imported;
`base.py` has the head and the loss. Unlike in GPT-2, layer norms come after each sum (post-LN),
GELU is exact, positions begin in row 2 of their table, a layer norm follows the embeddings, and the
head has a bias. Read `EncoderBlock`, `DecoderBlock`, `BART`. `weights_bart.py` has the names in the
official checkpoints [3].

Shapes use the letters of `models/gpt2.py`; S counts source tokens, T target tokens.

[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
[3] Lewis et al. 2020, https://arxiv.org/abs/1910.13461; https://huggingface.co/facebook/bart-large
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minprefix.models.activations import BARTActivations, LayerPrefix, Visible, gated_attention
from minprefix.models.base import FUNCTIONS, LanguageModel, check_ids
from minprefix.models.cache import KVCache, right_padded
from minprefix.models.config import BARTConfig
from minprefix.models.gpt2 import Attention

FIRST_POSITION = 2  # row of the position table for token 0, as in the checkpoints


@dataclass(frozen=True)
class EncodedSource:
    """An encoded source, which the decoder reads by cross attention."""

    states: Tensor  # (B, S, C)
    lens: Tensor | None = None  # (B,) real tokens of each row; None = all
    kv: Any = None  # Tensor (L, 2, B, H, S, D): keys and values of all layers; None = not yet

    def select(self, rows: Tensor) -> "EncodedSource":
        """These rows, in this order; a row that is named twice is duplicated."""
        lens = None if self.lens is None else self.lens[rows]
        return EncodedSource(
            self.states[rows], lens, None if self.kv is None else self.kv[:, :, rows]
        )

    # for steps on static buffers (`generation/fast.py`), as in `Activations`; needs kv and lens

    def with_room(self, rows: int, columns: int) -> "EncodedSource":
        """A copy at fixed addresses, without states, for `rows` rows and `columns` tokens."""
        n_layer, _, _, n_head, _, head_dim = self.kv.shape
        kv = self.kv.new_zeros(n_layer, 2, rows, n_head, columns, head_dim)
        lens = torch.ones(rows, dtype=torch.long, device=kv.device)  # finite values in free rows
        return EncodedSource(self.states.new_empty(0), lens, kv).overwritten(self)

    def overwritten(self, other: "EncodedSource") -> "EncodedSource":
        """The values of `other` at the addresses of this one."""
        rows, columns = other.kv.shape[2], other.kv.shape[4]
        assert self.lens is not None and other.lens is not None
        self.kv[:, :, :rows, :, :columns] = other.kv
        self.lens[:rows] = other.lens
        return self

    def first(self, rows: int) -> "EncodedSource":
        """The first `rows` rows."""
        lens = None if self.lens is None else self.lens[:rows]
        return EncodedSource(self.states[:rows], lens, self.kv[:, :, :rows])

    def move(self, to: Tensor, source: Tensor) -> None:
        """Overwrite rows `to` with rows `source`, in kv and lens."""
        assert self.lens is not None
        self.kv[:, :, to] = self.kv[:, :, source]
        self.lens[to] = self.lens[source]


class SelfAttention(Attention):
    """GPT-2's attention, causal or not, with weights stored as in `nn.Linear`, (out, in)."""

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
        """Keys and values of the encoder's states (B, S, C): (2, B, H, S, D)."""
        B, S, C = states.shape
        kv = self.c_kv(states).view(B, S, 2, self.n_head, C // self.n_head)
        return kv.permute(2, 0, 3, 1, 4)

    def forward(self, x, kv, prefix: LayerPrefix, visible: Visible) -> Tensor:
        """x (B, T, C), kv (2, B, H, S, D) -> (B, T, C); `visible` is not causal."""
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        k, v = kv
        o = gated_attention(q, k, v, prefix, visible)
        return self.c_proj(o.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with a nonlinear function between them: the exact GELU, or config's."""

    def __init__(self, config: BARTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.act = FUNCTIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.c_proj(self.act(self.c_fc(x)))


class EncoderBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: BARTConfig):
        super().__init__()
        self.attn = SelfAttention(config)
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, prefix: LayerPrefix, visible: Visible, attend=None) -> Tensor:
        """x (B, S, C) -> (B, S, C). Arguments as in `Attention`; `visible` is not causal."""
        x = self.ln_1(x + self.drop(self.attn(x, prefix, visible, attend)))
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

    def forward(self, x, prefix: LayerPrefix, visible: Visible, attend, at, cross) -> Tensor:
        """x (B, T, C) -> (B, T, C); with `at` (n,), places b T + t, the results there: (n, C).

        Args:
            prefix, visible, attend: for self-attention, as in `Attention`.
            cross: for cross attention: the encoder's states (B, S, C), or None and their kv
                (2, B, H, S, D); then its prefix and `Visible`.
        """
        x = self.ln_1(x + self.drop(self.attn(x, prefix, visible, attend)))
        x = self.ln_2(x + self.drop(self.read(x, cross)))
        if at is not None:
            x = x.flatten(0, 1).index_select(0, at)  # (n, C)
        return self.ln_3(x + self.drop(self.mlp(x)))

    def read(self, x: Tensor, cross: tuple) -> Tensor:
        """Cross attention with its keys and values, which are made here if they are missing."""
        states, kv, *read = cross
        kv = self.cross.keys_and_values(states) if kv is None else kv
        return self.cross(x, kv, *read)


class Stack(nn.Module):
    """Encoder or decoder: position table, layer norm of the embeddings, layers."""

    def __init__(self, config: BARTConfig, block: type[nn.Module], n_layer: int):
        super().__init__()
        self.wpe = nn.Embedding(FIRST_POSITION + config.n_positions, config.n_embd)
        self.ln_embd = nn.LayerNorm(config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h: Any = nn.ModuleList(block(config) for _ in range(n_layer))

    def embed(self, embd: Tensor, positions: Tensor) -> Tensor:
        """The input of the first layer, for embeddings (B, T, C) at positions (T,) or (B, T)."""
        return self.drop(self.ln_embd(embd + self.wpe(FIRST_POSITION + positions)))


class BART(LanguageModel):
    """Source and target ids to next-token logits. One token embedding (tied) serves all three."""

    reads, reads_name, captures = BARTActivations, "BARTPrefix", False

    def __init__(self, config: BARTConfig):
        super().__init__()
        self.config: BARTConfig = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder = Stack(config, EncoderBlock, config.n_encoder_layer)
        self.decoder = Stack(config, DecoderBlock, config.n_layer)
        self.register_buffer("head_bias", torch.zeros(config.vocab_size))  # final_logits_bias

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.h, *self.decoder.h]

    def forward(self, source_ids: Tensor, input_ids: Tensor, **kwargs) -> Tensor:
        """Logits of the next target token: (B, S), (B, T) -> (B, T, V). Arguments as in
        `hidden_states`."""
        return self.head(self.hidden_states(input_ids, source_ids=source_ids, **kwargs))

    def begin(self, prompts: list[list[int]], acts: BARTActivations) -> tuple[list, dict]:
        """What generation feeds to the decoder first, its start token (and a forced token after
        it), and further arguments: the encoded prompts."""
        first = [self.config.decoder_start_token_id]
        if self.config.forced_bos_token_id is not None:
            first.append(self.config.forced_bos_token_id)
        ids, lengths = right_padded(prompts, self.wte.weight.device)
        source = self.with_keys(self.encode(ids, lengths, prefix=acts))
        return [list(first) for _ in prompts], {"source": source}

    def encode(
        self, source_ids: Tensor, source_lens: Tensor | None = None, *, prefix=None,
        prefix_index: Tensor | None = None, recorder=None,
    ) -> EncodedSource:  # fmt: skip
        """The encoder's last layer.

        Args:
            source_ids: (B, S) int.
            source_lens: (B,) int, how many of the S tokens of each row are real (right padding).
            prefix, prefix_index: as in `hidden_states`.
            recorder: a `parametrisations.Recorder` that records the layers' keys and values.
        """
        check_ids(source_ids)
        prefix = self.activations_of(prefix, prefix_index)
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
        visible = acts.visible(kv_lens=source_lens, causal=False)
        for layer, (block, read) in enumerate(zip(self.encoder.h, acts.layers(), strict=True)):
            attend = None if recorder is None else partial(recorder.attend, layer)
            x = block(x, read, visible, attend)
        return EncodedSource(x, source_lens)

    def with_keys(self, source: EncodedSource) -> EncodedSource:
        """Add the keys and values for cross attention, which are computed once for a whole text."""
        kv = [block.cross.keys_and_values(source.states) for block in self.decoder.h]
        return replace(source, kv=torch.stack(kv))

    def hidden_states(
        self, input_ids: Tensor, *, source: EncodedSource | None = None,
        source_ids: Tensor | None = None, source_lens: Tensor | None = None,
        prefix=None, prefix_index: Tensor | None = None, kv_lens: Tensor | None = None,
        cache: KVCache | None = None, at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The input of the head: (B, T) -> (B, T, C), or with `at` (n, C).

        Args:
            input_ids: (B, T) int, the decoder's input: decoder_start_token_id, then the target;
                with a cache, the tokens after those that it holds.
            source: the result of `encode` with the same prefix; None = encode source_ids and
                source_lens.
            prefix: a `BARTPrefix` or ready `BARTActivations`; None = plain BART.
            prefix_index: not supported, because there is no bank of BART prefixes.
            kv_lens, cache, at: as in `GPT2.hidden_states`.
        Raises:
            ValueError: positions past n_positions; a prefix of another shape, or of GPT-2.
        """
        check_ids(input_ids)
        B, T = input_ids.shape
        prefix = self.activations_of(prefix, prefix_index)
        if source is None:
            if source_ids is None:
                raise ValueError("a BART needs a source: give source_ids or source")
            source = self.encode(source_ids, source_lens, prefix=prefix)
        own, cross = (prefix.at(s, self.config, self.wte.weight) for s in ("decoder", "cross"))
        own.check_fit(self.config, B, T if cache is None else cache.longest_after(T))
        cross.check_fit(self.config, B, 0)
        steps = torch.arange(T, device=input_ids.device) if cache is None else cache.places(T)
        x = self.decoder.embed(self._scaled(self.wte(input_ids)), own.positions(steps))

        visible = own.visible(kv_lens=kv_lens if cache is None else None)
        cross_visible = cross.visible(kv_lens=source.lens, causal=False)
        prefixes = zip(own.layers(), cross.layers(), strict=True)
        for layer, (block, (self_prefix, cross_prefix)) in enumerate(
            zip(self.decoder.h, prefixes, strict=True)
        ):
            attend = None if cache is None else partial(cache.attend, layer)
            here = at if layer == self.config.n_layer - 1 else None
            kv = None if source.kv is None else source.kv[layer]
            read = (source.states, kv, cross_prefix, cross_visible)
            x = block(x, self_prefix, visible, attend, here, read)
        if cache is not None:
            cache.advance(kv_lens, T)
        return x

    def _scaled(self, embd: Tensor) -> Tensor:
        return embd * self.config.n_embd**0.5 if self.config.scale_embedding else embd
