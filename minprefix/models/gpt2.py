"""GPT-2, from config to logits, with the prefix as an argument of the attention layer.

Eq. (1) of Li & Liang 2021 [1], h_i = LM(z_i, h_<i): what a later position reads of position i are
its keys and values in every layer. A prefix is P more of them per layer that no token has produced,
eq. (3): the attention layer takes them as `prefix_k` and `prefix_v`; the cache never holds them.
An infix (section 7.2) is the same behind some of the tokens: those before it do not see it.

Read bottom-up: `Attention`, `Block`, `GPT2`. Modules have the names of the official checkpoints
[2], so weights load by equal keys. Shapes use the letters of the README's table: batch B, tokens T,
keys S, prefix positions P, layers L, heads H, width C, head width D = C / H, vocabulary V.

[1] https://arxiv.org/abs/2101.00190   [2] https://huggingface.co/openai-community/gpt2
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import prefix_attention, prefix_attention_qkv
from minprefix.models.losses import frozen_head_loss

IGNORE = -100  # a label at which there is no loss


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2; the defaults are those of the smallest official model."""

    vocab_size: int = 50257  # V
    n_positions: int = 1024  # longest position + 1
    n_embd: int = 768  # C
    n_layer: int = 12  # L
    n_head: int = 12  # H
    n_inner: int | None = None  # width inside the MLP; None = 4 C
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int = 50256
    eos_token_id: int = 50256
    embd_pdrop: float = 0.1  # probability, on embeddings; dropout acts while fine-tuning only
    resid_pdrop: float = 0.1  # probability, on what each layer adds
    attn_pdrop: float = 0.1  # kept for the file; no dropout inside attention here
    linearisation: str = ""  # of a fine-tuned model: the frame it learned (`batches.encode_prompt`)
    max_source: int | None = None  # likewise, to how many tokens sources were cut; None = never

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")

    @property
    def head_dim(self) -> int:  # D
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class PrefixActivations:
    """h_i for i in P_idx: the keys and values that the model reads of a prefix, eq. (3).

    Made by `prefix.py` once per step (or once per generated text), read by every layer.
    """

    table: Tensor  # (L, 2, H, P, D), one prefix; (L, 2, N, H, P, D), a bank
    position_offset: int | Tensor  # token t stands at position t + offset; (B,) with a bank
    max_offset: int  # the largest of them
    gate: Tensor | None = None  # (L, H) or (L, N, H): weight >= 0 on the prefix's softmax terms
    index: Tensor | None = None  # (B,) which prefix of the bank each row uses, -1 = none
    lens: Tensor | None = None  # (N,) lengths of ragged prefixes
    infix: bool | Tensor = False  # it stands within the text, before token `starts`; (B,): a bank

    @classmethod
    def empty(cls, config: GPT2Config, like: Tensor) -> "PrefixActivations":
        """No prefix: P = 0, in the dtype and on the device of `like`."""
        shape = (config.n_layer, 2, config.n_head, 0, config.head_dim)
        return cls(like.new_empty(shape), position_offset=0, max_offset=0)

    @property
    def rows(self) -> dict[str, Tensor | None]:
        """Which prefix of a bank each row sees, as attention takes it."""
        return {"prefix_index": self.index, "prefix_lens": self.lens}

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values, (H, P, D) or (N, H, P, D), and the gate, (H,) or (N, H) or None."""
        k, v = self.table[layer]
        return k, v, None if self.gate is None else self.gate[layer]

    def positions(self, places: Tensor) -> Tensor:
        """Where tokens at `places` (T,) or (B, T) of their text stand: place + offset."""
        offset = self.position_offset
        return places + (offset[:, None] if isinstance(offset, Tensor) else offset)

    def map(self, change: Callable[[Tensor], Tensor], gates: bool = True) -> "PrefixActivations":
        """With a change of the table, and of the gate if there is one (and gates are meant)."""
        gate = change(self.gate) if gates and self.gate is not None else self.gate
        return replace(self, table=change(self.table), gate=gate)

    def leaves(self) -> list[Tensor]:
        """What has a gradient: the table, and the gate if there is one."""
        return [x for x in (self.table, self.gate) if x is not None]

    def check_fit(self, config, batch_size: int, n_tokens: int) -> None:
        """ValueError if a model of this config cannot read it, or not before so many tokens."""
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

    def select(self, rows: Tensor) -> "PrefixActivations":
        """For these rows of the batch, in this order and as often as they are named."""
        if self.index is None:  # one prefix for all rows
            return self
        return replace(self, index=self.index[rows], position_offset=self.position_offset[rows])

    def passed(self) -> "PrefixActivations":
        """For tokens that all stand behind an infix: to them it is a prefix."""
        return replace(self, infix=False)

    def behind(self, places: Tensor, starts: Tensor | None) -> Tensor | None:
        """Which tokens, at `places` (T,) or (B, T), stand behind it: (B, T); None = all."""
        if self.infix is False:
            return None
        if starts is None or starts.dim() != 1:
            raise ValueError(
                "an infix needs `starts` (B,), in each row the first token behind it; got "
                f"{None if starts is None else tuple(starts.shape)}"
            )
        return places >= (starts * self.infix)[:, None]  # a bank's prefixes start at 0


class Conv1D(nn.Module):
    """A linear layer whose weight is stored as [in, out], as in the official checkpoints."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:  # (..., n_in) -> (..., n_out)
        return F.linear(x, self.weight.T, self.bias)


def gated_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor | None, *,
    prefix_index: Tensor | None = None, prefix_lens: Tensor | None = None,
    behind: Tensor | None = None, **visible,
) -> Tensor:  # fmt: skip
    """Attention in which the prefix's softmax terms weigh `gate` times their value.

    With o_s, lse_s over the sequence alone and o_p, lse_p over the prefix alone,

        o = (o_s + r o_p) / (1 + r) = o_s + lam (o_p - o_s),
        r = gate exp(lse_p - lse_s),   lam = r / (1 + r) = gate / (gate + exp(lse_s - lse_p)):

    gate = 1 is plain prefix attention, gate = 0 exactly the frozen model. No log of the gate is
    taken, so its gradient exists at 0. For queries that do not see an infix, lam = 0.

    Args:
        gate: (H,), or (N, H) for a bank; None = 1 everywhere, in one call of the operator.
        prefix_k, prefix_v: (H, P, D); or a bank (N, H, P, D) with its prefix_index (B,).
        prefix_lens: (N,), with a bank. The rest as in `kernels.prefix_attention`.
        behind: (B, T) bool, which queries see the prefix; None = all.
    """
    if gate is None and behind is None:
        rows = {"prefix_index": prefix_index, "prefix_lens": prefix_lens}
        return prefix_attention(q, k, v, prefix_k, prefix_v, **rows, **visible)
    gate = prefix_k.new_ones(prefix_k.shape[:-2]) if gate is None else gate  # (H,) or (N, H)
    none = q.new_empty(q.shape[1], 0, q.shape[3])
    o_s, lse_s = prefix_attention(q, k, v, none, none, return_lse=True, **visible)
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = (x.expand(q.shape[0], -1, -1, -1) for x in (prefix_k, prefix_v))
        gate = gate[None]  # (1, H)
    elif prefix_index is not None:
        row = prefix_index.clamp(min=0)
        prefix_k, prefix_v = prefix_k[row], prefix_v[row]  # (B, H, P, D)
        prefix_lens = None if prefix_lens is None else prefix_lens[row]
        gate = torch.where((prefix_index >= 0)[:, None], gate[row], 0)  # (B, H)
    prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    o_p, lse_p = prefix_attention(
        q, prefix_k, prefix_v, none, none, causal=False, kv_lens=prefix_lens, return_lse=True
    )
    # exp(80) is still finite in fp32, and exp(-80) is nothing beside 1
    difference = (lse_s - lse_p).clamp(-80, 80)
    lam = gate[:, :, None] / (gate[:, :, None] + difference.exp())  # (B, H, T)
    lam = lam if behind is None else lam * behind[:, None]
    return (o_s + lam[..., None] * (o_p - o_s)).to(q.dtype)


class KVCache:
    """Keys and values of the tokens so far, row by row, without the prefix: h_<i of eq. (1).

    Row b holds `lengths[b]` tokens; rows of different lengths stand side by side without padding
    between their tokens. New tokens overwrite whatever padding stood behind them.
    """

    def __init__(self, config: GPT2Config, batch_size: int, max_len: int, like: Tensor):
        shape = (config.n_layer, batch_size, config.n_head, max_len, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)  # (L, B, H, S, D)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like.device)  # (B,)
        self.longest = 0  # no row is longer: known without asking the GPU

    def longest_after(self, T: int) -> int:
        """What `longest` will be when each row has read T new tokens."""
        return self.longest + T

    def places(self, T: int) -> Tensor:
        """Where in its text each of T new tokens per row stands: (B, T)."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def attend(self, layer: int, q, k, v, prefix_k, prefix_v, gate, **prefix_rows) -> Tensor:
        """Attention of the new tokens, q, k, v (B, H, T, D), to the prefix and all tokens so far.

        Padding behind a row's tokens lies after its queries: causality hides it.
        """
        visible = {**prefix_rows, "q_offset": self.lengths} if self.longest else prefix_rows
        k, v = self.append(layer, k, v)
        return gated_prefix_attention(q, k, v, prefix_k, prefix_v, gate, **visible)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, D) behind each row's tokens; return the layer's all (B, H, S, D)."""
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
        """Keep these rows, in this order and as often as they are named (beams)."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.lengths = self.lengths[rows]


class Attention(nn.Module):
    """Multi-head self-attention over [prefix; tokens so far]."""

    linear = Conv1D  # how weights are stored

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = self.linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = self.linear(config.n_embd, config.n_embd)

    def forward(self, x, prefix_k, prefix_v, gate=None, attend=None, **visible) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        Args:
            prefix_k, prefix_v: (H, P, D) or (N, H, P, D).
            gate: (H,) or (N, H); None = ungated.
            attend: attention to cached tokens, too (`KVCache.attend`); None = to those in x only.
            visible: prefix_index, prefix_lens, kv_lens, causal of `kernels.prefix_attention`;
                behind.
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D), a view
        if attend is not None:
            o = attend(q, k, v, prefix_k, prefix_v, gate, **visible)
        elif gate is not None or "behind" in visible:
            o = gated_prefix_attention(q, k, v, prefix_k, prefix_v, gate, **visible)
        else:  # the same, with one gradient for the whole of qkv
            o = prefix_attention_qkv(qkv, prefix_k, prefix_v, **visible)
        return self.c_proj(o.transpose(1, 2).reshape(B, T, C))  # merging the heads is a view


class MLP(nn.Module):
    """Two layers with GPT-2's tanh form of GELU between them."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, n_inner)
        self.c_proj = Conv1D(n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.resid_pdrop)

    def forward(self, x, prefix_k, prefix_v, gate=None, attend=None, at=None, **visible) -> Tensor:
        """x (B, T, C) -> (B, T, C); with `at` (n,), places b T + t, the results there: (n, C)."""
        x = x + self.drop(self.attn(self.ln_1(x), prefix_k, prefix_v, gate, attend, **visible))
        if at is not None:
            x = x.flatten(0, 1).index_select(0, at)  # (n, C)
        return x + self.drop(self.mlp(self.ln_2(x)))


@functools.cache
def compiled_block(kind: type[nn.Module] = Block) -> Callable[..., Tensor]:
    """A block's `forward` by torch.compile: all layers share it, rows and tokens may change."""
    # first, middle and last layers, prefix, infix and gate, one row or many: more than 8 graphs
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(kind.forward, dynamic=True)


def run_block(model, block: nn.Module, x, prefix_k, prefix_v, gate, attend, *args, **options):
    """One layer's forward pass: compiled where there is no cache, its activations recomputed in
    the backward pass, as `model.compile_blocks` and `model.activation_checkpointing` say."""
    run = block
    if model.compile_blocks and attend is None:
        run = partial(compiled_block(type(block)), block)
    args = (x, prefix_k, prefix_v, gate, attend, *args)
    if model.activation_checkpointing and torch.is_grad_enabled():
        keep = {"use_reentrant": False, "preserve_rng_state": block.training}  # for dropout
        return checkpoint(run, *args, **keep, **options)
    return run(*args, **options)


class GPT2(nn.Module):
    """The decoder: token ids to next-token logits. The head is the token embedding (tied)."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.activation_checkpointing = False  # recompute each block in the backward pass
        self.compile_blocks = False  # torch.compile each block, where there is no cache

    def init_weights(self, seed: int) -> "GPT2":
        """Random weights as GPT-2 has them at the start of its training: N(0, 0.02), and what is
        added to the residual stream scaled by 1 / sqrt(2 L)."""
        generator = torch.Generator(device=self.wte.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 0.02
                if name.endswith("c_proj.weight"):
                    std *= (2 * self.config.n_layer) ** -0.5
                nn.init.normal_(weight, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                nn.init.ones_(weight)
        return self

    def forward(self, input_ids: Tensor, **kwargs) -> Tensor:
        """Logits of the next token: (B, T) -> (B, T, V). Arguments as in `hidden_states`."""
        return self.head(self.hidden_states(input_ids, **kwargs))

    head_bias = None  # BART has one

    def head(self, hidden: Tensor) -> Tensor:  # (..., C) -> (..., V)
        return F.linear(hidden, self.wte.weight, self.head_bias)

    def token_losses(
        self, input_ids: Tensor, labels: Tensor, at: Tensor | None = None, **kwargs
    ) -> Tensor:
        """-log p of each labelled token, eq. (2), in nats: (n,).

        Args:
            input_ids: (B, T) int.
            labels: (B, T) int, the token that follows each input; -100 where there is no loss.
            at: (n,) int, the places b T + t of the labels: all that are not -100, in this order,
                which a GPU must be waited for to learn. What only other positions need is left out.
        """
        if at is None:
            at = (labels != IGNORE).flatten().nonzero()[:, 0]
        hidden, labels = self.hidden_states(input_ids, at=at, **kwargs), labels.flatten()[at]
        if not self.wte.weight.requires_grad:
            return frozen_head_loss(hidden, self.wte.weight, labels, bias=self.head_bias)
        logits = self.head(hidden)  # (n, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction="none")

    def hidden_states(
        self, input_ids: Tensor, *, prefix=None, prefix_index: Tensor | None = None,
        starts: Tensor | None = None, kv_lens: Tensor | None = None,
        cache: KVCache | None = None, at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What the head reads: (B, T) -> (B, T, C), or with `at` (n, C).

        Args:
            input_ids: (B, T) int; with a cache, the tokens after those that it holds. Or their
                embeddings (B, T, C), which need not be those of any token.
            prefix: a `Prefix`, a `PrefixBank` or ready `PrefixActivations`; None = plain GPT-2.
            prefix_index: (B,) int, with a bank: which prefix each row uses, -1 = none.
            starts: (B,) int, with an infix: the first token of each row behind it (the bos, or any
                other last token of a prompt). A prefix stands before all and does not read it.
            kv_lens: (B,) int, how many of the T tokens of each row are real (right padding).
            cache: keys and values of earlier tokens; extended by this call.
            at: (n,) int, places b T + t: the results there alone. The last layer's MLP then runs
                for them only: nothing reads what it adds to other positions.
        Raises:
            ValueError: positions past n_positions; a prefix of another shape than the model; an
                infix without `starts`.
        """
        B, T = input_ids.shape[:2]
        acts = self._activations(prefix, prefix_index)
        acts.check_fit(self.config, B, T if cache is None else cache.longest_after(T))

        visible = acts.rows
        steps = torch.arange(T, device=input_ids.device) if cache is None else cache.places(T)
        positions = acts.positions(steps)  # (T,) or (B, T)
        behind = acts.behind(steps, starts)  # (B, T)
        if behind is not None:
            positions, visible["behind"] = positions.where(behind, steps), behind
        embd = input_ids if input_ids.is_floating_point() else self.wte(input_ids)
        x = self.drop(embd + self.wpe(positions))  # (B, T, C)

        if cache is None:
            visible["kv_lens"] = kv_lens
        for layer, block in enumerate(self.h):
            attend = None if cache is None else partial(cache.attend, layer)
            here = at if layer == self.config.n_layer - 1 else None
            x = run_block(self, block, x, *acts.of_layer(layer), attend, here, **visible)
        if cache is not None:
            cache.advance(kv_lens, T)
        return self.ln_f(x)

    def _activations(self, prefix, prefix_index: Tensor | None) -> PrefixActivations:
        if prefix_index is not None and (prefix is None or isinstance(prefix, PrefixActivations)):
            raise ValueError("prefix_index needs a PrefixBank")
        if prefix is None:
            return PrefixActivations.empty(self.config, self.wte.weight)
        if not isinstance(prefix, PrefixActivations) and hasattr(prefix, "activations"):
            prefix = prefix.activations(prefix_index)
        if not isinstance(prefix, PrefixActivations):
            raise ValueError(f"a GPT-2 needs a Prefix, got {type(prefix).__name__}")
        return prefix
