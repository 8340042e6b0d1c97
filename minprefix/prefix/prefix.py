"""The prefix: the only parameters that prefix-tuning trains.

In eq. (3) of Li & Liang 2021 [1], the activations at the prefix positions are read from the table
P_theta; all others come from the frozen model,

    h_i = P_theta[i, :]  if i in P_idx,  else  LM(z_i, h_<i).

h_i is one key and one value per layer and head, so the table has shape (L, 2, H, P, D). The table
is a parameter itself, or it is computed from other parameters by an MLP or by the model
(`parametrisations.py`). An MLP trains better; virtual tokens show what a table adds. Both are
dropped after training (`Prefix.export`). `make.py` makes a prefix from settings; `bank.py` puts
many into one batch.

P_idx is the beginning of the sequence. For an infix [x; INFIX; y] (section 7.2) it lies between
source and target: before the bos of the frame source, bos, target, eos, and in general before the
last token of a prompt, whatever padding follows. Token t before the infix is at position t and does
not see it; token t after it is at t + offset and does. The activations of our infix are free, as in
eq. (3); in the authors' code they depend on the source (`foreign.AuthorsTokens`).

Shapes use the letters of `models/gpt2.py`. The order of the rows, the widths and the random start
are those of the authors' code: flat feature ((2 l + kv) H + h) D + d, with kv = 0 for the key.

[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
"""

from typing import Any

import torch
from torch import Tensor, nn

from minprefix.models.activations import PrefixActivations
from minprefix.models.bart import BART
from minprefix.models.config import BARTConfig, GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import check_base, fingerprint, need_gpt2
from minprefix.prefix import parametrisations as parts
from minprefix.prefix.config import check_form
from minprefix.prefix.parametrisations import token_activations, word_ids


class Prefix(nn.Module):
    """One prefix for one model. Make it with `random`, `from_words`, `from_prompt` or `load`.

    Attributes:
        prefix_table: (L, 2, H, P, D) parameter; None while an MLP (`mlp`) or virtual tokens
            (`virtual`) compute it. Read `table()`.
        place: "prefix" or "infix".
        gate: (L, H) parameter >= 0 on the prefix's softmax terms, or None.
        position_offset: token t is at position t + offset, in training and in generation.
        base: fingerprint of the model that the prefix belongs to; "" = unknown.
        linearisation: the frame of the texts in training (`batches.encode_prompt`), which
            `generate` then puts around a text; "" = none, texts are used as they are.
        max_source: sources are cut to so many tokens, in training and by `generate`; None = never.
        init_residual: largest |difference| between the activations of the words that the prefix
            started from and what the MLP makes of them.
        parametrisation, n_trained: how the prefix is or was trained, and with how many parameters;
            "" and 0 = unknown. `export` and files keep both.
    """

    family = GPT2Config.family  # of the model that reads it
    prefix_table: Any  # nn.Parameter or None
    mlp: Any  # PrefixMLP or None
    virtual: Any  # VirtualTokens or None

    def __init__(
        self, config: GPT2Config | BARTConfig, prefix_len: int, parametrisation: str = "table",
        mid_dim: int = 512, gate: bool = False, position_offset: int | None = None,
        place: str = "prefix",
    ):  # fmt: skip
        super().__init__()
        check_form(parametrisation, place)
        if prefix_len < 1:
            raise ValueError(f"prefix_len must be at least 1, got {prefix_len}")
        if position_offset is None:
            position_offset = 0 if gate else prefix_len
        if not 0 <= position_offset < config.n_positions:
            raise ValueError(
                f"position_offset {position_offset} (prefix length {prefix_len}) must lie in "
                f"[0, {config.n_positions}), the positions of the model"
            )
        self.prefix_len, self.position_offset, self.place = prefix_len, position_offset, place
        self.base, self.linearisation = "", ""
        self.max_source: int | None = None
        self.init_residual = 0.0
        self.prefix_table = self.mlp = self.virtual = None
        if parametrisation == "mlp":
            self.mlp = parts.PrefixMLP(config, prefix_len, mid_dim)
        elif parametrisation == "table":
            shape = (config.n_layer, 2, config.n_head, prefix_len, config.head_dim)
            self.prefix_table = nn.Parameter(torch.zeros(shape))
        else:
            width = mid_dim if parametrisation == "embedding-mlp" else None
            self.virtual = parts.VirtualTokens(config, prefix_len, width)
        self.gate = nn.Parameter(torch.zeros(config.n_layer, config.n_head)) if gate else None
        self.parametrisation = parametrisation
        self.n_trained = sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def random(cls, config: GPT2Config, prefix_len: int, seed: int, **options) -> "Prefix":
        """A table of N(0, 1), as in the authors' code and PEFT. For an MLP and for virtual tokens
        see `RowMLP.init_weights` and `VirtualTokens.init_weights`.

        Args:
            options: parametrisation ("table"), mid_dim, gate, position_offset, place.
        """
        if not isinstance(config, GPT2Config):
            found = type(config).__name__
            raise ValueError(f"a Prefix needs the GPT2Config of its model, got a {found}")
        prefix = cls(config, prefix_len, **options)
        prefix.init_weights(torch.Generator().manual_seed(seed))
        return prefix

    def init_weights(self, generator: torch.Generator) -> None:
        """The random start of `random`."""
        if self.prefix_table is not None:
            nn.init.normal_(self.prefix_table, generator=generator)
        else:
            (self.mlp or self.virtual).init_weights(generator)

    @classmethod
    def from_words(
        cls, model: GPT2, tokenizer, words: str = "table-to-text:",
        prefix_len: int | None = None, seed: int = 0, **options,
    ) -> "Prefix":  # fmt: skip
        """Start from the activations that the model itself has on `words` (section 7.4).

        P is the number of BPE tokens of the words; with another prefix_len they repeat or are cut.
        A table holds the activations exactly; an MLP is fitted to them (see `init_residual`);
        virtual tokens start as the embeddings of the words. An infix also starts from the words
        alone, at positions 0 .. P-1, because after a source their activations depend on it.
        """
        need_gpt2(model, "a Prefix")
        ids = word_ids(tokenizer, words, prefix_len)
        table = token_activations(model, ids)
        prefix = cls.random(model.config, len(ids), seed, **options).to(table)
        if prefix.virtual is not None:
            embd = model.wte.weight[ids].detach().to(table)  # (P, C)
            prefix.init_residual = prefix.virtual.fit(embd)
        else:
            prefix.init_residual = prefix.fit_table(table)
        prefix.bind(model)
        return prefix

    @torch.no_grad()
    def fit_table(self, table: Tensor) -> float:
        """Start from this table (L, 2, H, P, D); returns the largest |difference| that remains."""
        if self.mlp is not None:
            return self.mlp.fit_last_layer(table)
        self.prefix_table.copy_(table)
        return 0.0

    @classmethod
    def from_prompt(cls, model: GPT2, tokenizer, prompt: str, **options) -> "Prefix":
        """A prefix that equals a hard prompt: the logits are those with `prompt` before the text.

        The tokens of the prompt are at 0 .. P-1 and the text follows, so P and the offset are the
        number of tokens. An MLP holds the activations up to rounding.
        """
        if options.get("place", "prefix") != "prefix":
            raise ValueError(f"a prompt comes before the text, got place {options['place']!r}")
        if "prefix_len" in options:
            raise ValueError(f"the prompt sets prefix_len, got {options['prefix_len']}")
        if "position_offset" not in options:
            options["position_offset"] = len(tokenizer.encode(prompt))
        return cls.from_words(model, tokenizer, prompt, **options)

    @classmethod
    @torch.no_grad()
    def from_table(
        cls, table: Tensor, position_offset: int, gate: Tensor | None = None,
        place: str = "prefix",
    ) -> "Prefix":  # fmt: skip
        """A prefix that holds a copy of `table` (L, 2, H, P, D) and of `gate` (L, H)."""
        if table.dim() != 5 or table.shape[1] != 2 or not table.is_floating_point():
            raise ValueError(
                "a prefix table has the shape (L, 2, H, P, D) and a floating-point dtype, got "
                f"{tuple(table.shape)} and {table.dtype}"
            )
        L, _, H, P, D = table.shape
        # the model's own limit is checked when the prefix is used
        config = GPT2Config(n_layer=L, n_head=H, n_embd=H * D, n_positions=position_offset + 1)
        options: Any = {"gate": gate is not None, "position_offset": position_offset}
        prefix = cls(config, P, place=place, **options).to(table)
        prefix.prefix_table.copy_(table)
        if gate is not None and prefix.gate is not None:
            if gate.shape != (L, H):
                raise ValueError(f"the gate must be {(L, H)}, got {tuple(gate.shape)}")
            prefix.gate.copy_(gate)
        return prefix

    @classmethod
    def load(cls, path) -> Any:
        """Read a prefix file; see `files.load_prefix`."""
        from minprefix.prefix.files import load_prefix

        return load_prefix(path)

    def save(self, path) -> None:
        """Write what is needed to use the prefix, without the MLP; see `files.save_prefix`."""
        from minprefix.prefix.files import save_prefix

        save_prefix(path, self)

    def table(self) -> Tensor:
        """P_theta: (L, 2, H, P, D)."""
        return self.prefix_table if self.prefix_table is not None else (self.mlp or self.virtual)()

    def activations(self, prefix_index: Tensor | None = None) -> PrefixActivations:
        """The tensors that the model reads."""
        if prefix_index is not None:
            raise ValueError("prefix_index needs a PrefixBank; this is one prefix for all rows")
        offset = self.position_offset
        infix = self.place == "infix"
        return PrefixActivations(self.table(), offset, offset, gate=self.gate, infix=infix)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that its file holds, by name."""
        gate = {} if self.gate is None else {"gate": self.gate}
        return {"prefix_table": self.table()} | gate

    def sizes(self) -> dict[str, int]:
        """The sizes of its model that follow from the tensors."""
        L, _, H, _, D = self.table().shape
        return {"n_layer": L, "n_head": H, "head_dim": D}

    def settings(self) -> dict:
        """The settings that must be equal when its training continues."""
        return {"position_offset": self.position_offset, "place": self.place}

    def check_fit(self, config: GPT2Config | BARTConfig) -> None:
        """ValueError if a model of this config cannot use it."""
        own, wanted = self.sizes(), (config.n_layer, config.n_head, config.head_dim)
        if tuple(own.values()) != wanted:
            raise ValueError(
                "{} layers with {} heads of {} do not fit the model, which has {} with {} of {}: "
                "made for another base model (grouped-query attention, where a prefix has fewer "
                "heads, is not GPT-2's)".format(*own.values(), *wanted)
            )
        if self.position_offset >= config.n_positions:
            places = f"the {config.n_positions} positions of the model"
            raise ValueError(f"position_offset {self.position_offset} leaves no room in {places}")

    @torch.no_grad()
    def export(self) -> "Prefix":
        """A copy with the table alone, which is what is kept after training (section 4.3)."""
        gate = None if self.gate is None else self.gate.detach()
        copy = Prefix.from_table(self.table(), self.position_offset, gate, self.place)
        copy.base, copy.linearisation = self.base, self.linearisation
        copy.max_source = self.max_source
        copy.parametrisation, copy.n_trained = self.parametrisation, self.n_trained
        return copy

    @torch.no_grad()
    def project(self) -> None:
        """Set negative entries of the gate to 0, after an optimizer step."""
        if self.gate is not None:
            self.gate.clamp_(min=0)

    def bind(self, model: GPT2 | BART) -> None:
        """Bind this prefix to `model`, which is also the model that reads virtual tokens."""
        self.base = fingerprint(model)
        if self.virtual is not None:
            self.virtual.model_reference.model = model

    def check_base(self, model: GPT2 | BART) -> None:
        """ValueError if this prefix belongs to another model than `model`."""
        if not isinstance(model, GPT2):
            other = model.config.family
            raise ValueError(f"this prefix is for a GPT-2 and cannot be used with a {other}")
        check_base(self.base, model, "prefix")
