"""GPT-2, from token ids to logits, with the prefix as an argument of the attention layer.

In eq. (1) of Li & Liang 2021 [1], h_i = LM(z_i, h_<i), later positions read position i through
its keys and values in every layer. A prefix, eq. (3), adds P keys and values to each layer that no
token has produced. The attention layer takes them as an argument; the cache never holds them. An
infix (section 7.2) stands after some of the tokens, and the tokens before it do not see it.

Read `GPT2Config` in `config.py`, then `Attention`, `Block` and `GPT2` here. `activations.py` holds
what a layer reads of a prefix, `base.py` the head and the loss, and `fused.py` the forms of a block
with fewer kernels. Modules are named as in the official checkpoints [2], so the weights load by
equal keys. Shapes use these letters: batch B, tokens T, keys S, prefix positions P,
layers L, heads H, width C, head width D = C / H, and the vocabulary V.

[1] https://arxiv.org/abs/2101.00190   [2] https://huggingface.co/openai-community/gpt2
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprefix.models.activations import LayerPrefix, PrefixActivations, Visible, self_attention
from minprefix.models.base import FUNCTIONS, LanguageModel, check_ids
from minprefix.models.cache import KVCache
from minprefix.models.config import BARTConfig, GPT2Config


class Conv1D(nn.Module):
    """A linear layer whose weight is stored as [in, out], as in the official checkpoints."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:  # (..., n_in) -> (..., n_out)
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention over [prefix; tokens so far]."""

    linear: type[nn.Module] = Conv1D  # how weights are stored

    def __init__(self, config: GPT2Config | BARTConfig, query_factor: float = 1.0):
        super().__init__()
        self.n_head, self.query_factor = config.n_head, query_factor
        self.c_attn = self.linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = self.linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, prefix: LayerPrefix, visible: Visible, attend=None) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        Args:
            attend: attention to the cached tokens as well (`KVCache.attend`); None = only to the
                tokens in x.
        """
        return self.c_proj(self.heads(self.c_attn(x), prefix, visible, attend))

    def heads(self, qkv: Tensor, prefix: LayerPrefix, visible: Visible, attend=None) -> Tensor:
        """Everything between the two products: qkv (B, T, 3 C) -> (B, T, C)."""
        B, T, C = *qkv.shape[:2], qkv.shape[2] // 3
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head)
        if self.query_factor != 1:  # in some relatives of GPT-2
            qkv = torch.cat([qkv[:, :, :1] * self.query_factor, qkv[:, :, 1:]], dim=2)
        if attend is None:
            o = self_attention(qkv, prefix, visible)  # (B, H, T, D)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D), a view
            o = attend(q, k, v, prefix, visible)
        return o.transpose(1, 2).reshape(B, T, C)  # merging the heads is a view


class MLP(nn.Module):
    """Two linear layers with a nonlinear function between them, in GPT-2 the tanh form of GELU."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, n_inner)
        self.c_proj = Conv1D(n_inner, config.n_embd)
        self.act = FUNCTIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config, layer: int = 0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, config.query_factor(layer))
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.resid_pdrop)

    def forward(self, x, prefix: LayerPrefix, visible: Visible, attend=None, at=None) -> Tensor:
        """x (B, T, C) -> (B, T, C), or only the results at `at` (n,), places b T + t: (n, C)."""
        x = x + self.drop(self.attn(self.ln_1(x), prefix, visible, attend))
        if at is not None:
            x = x.flatten(0, 1).index_select(0, at)  # (n, C)
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT2(LanguageModel):
    """The decoder: token ids to next-token logits. The head is the token embedding (tied), or in
    some relatives of GPT-2 a matrix of its own."""

    reads, reads_name, captures = PrefixActivations, "Prefix", True
    head_bias = None  # BART has one

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config: GPT2Config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def blocks(self) -> list[nn.Module]:
        return list(self.h)

    def init_std(self, name: str) -> float:
        """GPT-2's: 0.02, divided by sqrt(2 L) where a layer adds to the residual stream."""
        return 0.02 * (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 0.02

    def forward(self, input_ids: Tensor, **kwargs) -> Tensor:
        """Logits of the next token: (B, T) -> (B, T, V). Arguments as in `hidden_states`."""
        return self.head(self.hidden_states(input_ids, **kwargs))

    def begin(self, prompts: list[list[int]], acts: PrefixActivations) -> tuple[list, dict]:
        """What generation feeds to the model first, and further arguments: the prompts, none."""
        return prompts, {}

    def hidden_states(
        self, input_ids: Tensor, *, prefix=None, prefix_index: Tensor | None = None,
        starts: Tensor | None = None, kv_lens: Tensor | None = None,
        cache: KVCache | None = None, at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The input of the head: (B, T) -> (B, T, C), or with `at` (n, C).

        Args:
            input_ids: (B, T) int; with a cache, the tokens after those that it holds. Embeddings
                (B, T, C) are accepted as well; they need not belong to any token.
            prefix: a `Prefix`, a `PrefixBank` or ready `PrefixActivations`; None = plain GPT-2.
            prefix_index: (B,) int, with a bank: which prefix each row uses, -1 = none.
            starts: (B,) int, with an infix: the first token of each row after it (the bos, or any
                other last token of a prompt). A prefix stands before all tokens and ignores it.
            kv_lens: (B,) int, how many of the T tokens of each row are real (right padding).
            cache: keys and values of earlier tokens; this call adds those of its tokens.
            at: (n,) int, places b T + t: only the results there are returned. The MLP of the last
                layer then runs for these places alone, since no other result is read.
        Raises:
            ValueError: positions past n_positions; a prefix of another shape than the model; an
                infix without `starts`.
        """
        check_ids(input_ids)
        B, T = input_ids.shape[:2]
        acts: PrefixActivations = self.activations_of(prefix, prefix_index)
        acts.check_fit(self.config, B, T if cache is None else cache.longest_after(T))

        steps = torch.arange(T, device=input_ids.device) if cache is None else cache.places(T)
        positions = acts.positions(steps)  # (T,) or (B, T)
        after = acts.after(steps, starts)  # (B, T)
        if after is not None:
            positions = positions.where(after, steps)
        embd = input_ids if input_ids.is_floating_point() else self.wte(input_ids)
        x = self.drop(embd + self.wpe(positions))  # (B, T, C)

        visible = acts.visible(kv_lens=kv_lens if cache is None else None, after=after)
        for layer, (block, own) in enumerate(zip(self.h, acts.layers(), strict=True)):
            attend = None if cache is None else partial(cache.attend, layer)
            here = at if layer == self.config.n_layer - 1 else None
            x = block(x, own, visible, attend, here)
        if cache is not None:
            cache.advance(kv_lens, T)
        return self.ln_f(x)
