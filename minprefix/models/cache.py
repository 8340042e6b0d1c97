"""Texts of several lengths in one batch, and the keys and values of their tokens so far."""

from dataclasses import replace

import torch
from torch import Tensor

from minprefix.models.activations import LayerPrefix, Visible, gated_attention
from minprefix.models.config import BARTConfig, GPT2Config


def right_padded(texts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), 0 after each text, and lengths (B,)."""
    T = max(len(tokens) for tokens in texts)
    ids = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens in texts])
    return ids.to(device), torch.tensor([len(tokens) for tokens in texts], device=device)


def computed_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which a model with weights like `like` computes: under autocast, autocast's."""
    kind = like.device.type
    short = torch.is_autocast_enabled(kind) and like.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if short else like.dtype


class KVCache:
    """Keys and values of the tokens so far, row by row, without the prefix: h_<i of eq. (1).

    Row b holds `lengths[b]` tokens, without padding between them. New tokens overwrite padding at
    the end of a row.
    """

    def __init__(
        self, config: GPT2Config | BARTConfig, batch_size: int, max_len: int, like: Tensor
    ):
        shape = (config.n_layer, batch_size, config.n_head, max_len, config.head_dim)
        kind = computed_dtype(like)
        self.k = like.new_zeros(shape, dtype=kind)  # (L, B, H, S, D)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like.device)  # (B,)
        self.longest = 0  # an upper bound of the lengths, known without waiting for the GPU

    def longest_after(self, T: int) -> int:
        """The value of `longest` after each row has read T new tokens."""
        return self.longest + T

    def places(self, T: int) -> Tensor:
        """The place in its text of each of T new tokens per row: (B, T)."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def attend(self, layer: int, q, k, v, prefix: LayerPrefix, visible: Visible) -> Tensor:
        """Attention of the new tokens, q, k, v (B, H, T, D), to the prefix and all tokens so far.

        Padding after a row's tokens is hidden by causality, because it comes after its queries.
        """
        if self.longest:
            visible = replace(visible, q_offset=self.lengths)
        k, v = self.append(layer, k, v)
        return gated_attention(q, k, v, prefix, visible)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, D) after each row's tokens; returns those of all (B, H, S, D)."""
        T = k.shape[2]
        row, at = torch.arange(k.shape[0], device=k.device)[:, None], self.places(T)
        self.k[layer][row, :, at] = k.transpose(1, 2)
        self.v[layer][row, :, at] = v.transpose(1, 2)
        S = self.longest + T
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def advance(self, lengths: Tensor | None, T: int) -> None:
        """Count the tokens that all layers have appended: `lengths` (B,) of T, or T in each row."""
        self.lengths = self.lengths + (T if lengths is None else lengths)
        self.longest += T

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row that is named twice (beams) is duplicated."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.lengths = self.lengths[rows]
