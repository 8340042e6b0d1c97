"""The prefix: the only parameters that prefix-tuning trains.

Eq. (3) of Li & Liang 2021 [1]: activations at the prefix positions are read from the table P_theta,
all others come from the frozen model,

    h_i = P_theta[i, :]  if i in P_idx,  else  LM(z_i, h_<i).

h_i is one key and one value per layer and head, so the table has shape (L, 2, H, P, D). It is a
parameter itself, or what an MLP or the model itself makes of fewer parameters
(`parametrisations.py`); these train better or show what a table adds, and are dropped afterwards
(`Prefix.export`). Read `Prefix`, then `PrefixBank` (many prefixes in one batch).

P_idx is the beginning of the sequence, or for an infix [x; INFIX; y] (section 7.2) the places
between source and target: before the bos of the frame source, bos, target, eos, and in general
before the last token of a prompt, whatever padding stands behind the row. Tokens before it stand at
t and do not see it, the others at t + offset and do. The authors' code [2] has it at the same
place, but there the frozen model reads P more embeddings (wte2) after each source, and their keys
and values are added to the MLP's; so what an infix holds depends on the source, and such a state
dict is no table. Here the activations are free, as eq. (3) has them.

Shapes use the letters of the README's table. Order of rows, widths and the random start are those
of the authors' code: flat feature ((2 l + kv) H + h) D + d, kv = 0 the key.

[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprefix.checks import check_choice
from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2, GPT2Config, PrefixActivations
from minprefix.models.weights import check_base, fingerprint, need_gpt2
from minprefix.prefix.parametrisations import PrefixMLP, VirtualTokens, token_activations

PARAMETRISATIONS = ("table", "mlp", "embedding", "embedding-mlp")
PLACES = ("prefix", "infix")
INITS = ("random", "words", "prompt")


@dataclass(frozen=True)
class PrefixConfig:
    """How a prefix is made before training; `make_prefix` follows it."""

    prefix_len: int | None = None  # P; None = 10 at random, the number of BPE tokens of init_text
    parametrisation: str = "mlp"  # "table" (direct), "mlp", "embedding" (-only) or "embedding-mlp"
    place: str = "prefix"  # "prefix", or "infix": between source and target
    mid_dim: int = 512  # hidden width of the MLP; the paper's: 512 table-to-text, 800 summaries
    init: str = "random"  # or "words" (their activations), or "prompt" (equal to a hard prompt)
    init_text: str = "table-to-text:"  # the words or the prompt
    gate: bool = False  # per layer and head, starts at 0: step 0 is the frozen model
    position_offset: int | None = None  # token t stands at t + this; None = P; 0: gate, BART
    sites: tuple[str, ...] = ()  # BART: "encoder", "decoder" or "cross" attention; none = all

    def __post_init__(self):
        check_form(self.parametrisation, self.place)
        check_choice("init", self.init, INITS)
        object.__setattr__(self, "sites", tuple(self.sites))  # a list in config.json
        if (self.init, self.place) == ("prompt", "infix"):
            raise ValueError("init 'prompt' needs place 'prefix': after a source, a prompt's "
                             "activations are others for each source")  # fmt: skip
        if self.prefix_len is not None and self.prefix_len < 1:
            raise ValueError(f"prefix_len must be at least 1, got {self.prefix_len}")
        if self.init == "prompt" and self.prefix_len is not None:
            raise ValueError(
                f"init 'prompt' takes prefix_len from the text, got prefix_len {self.prefix_len}"
            )
        if self.mid_dim < 1:
            raise ValueError(f"mid_dim must be at least 1, got {self.mid_dim}")


def check_form(parametrisation: str, place: str) -> None:
    """ValueError for names that do not exist or do not go together."""
    check_choice("parametrisation", parametrisation, PARAMETRISATIONS)
    check_choice("place", place, PLACES)
    if place == "infix" and parametrisation.startswith("embedding"):
        raise ValueError(
            f"parametrisation {parametrisation!r} needs place 'prefix': after a source, the keys "
            "and values of virtual tokens are others for each source"
        )


def word_ids(tokenizer, words: str, prefix_len: int | None) -> list[int]:
    """The words' BPE tokens, repeated or cut to prefix_len; None = as many as there are.

    Raises:
        ValueError: no words, or a length below 1.
    """
    ids = tokenizer.encode(words)
    if not ids:
        raise ValueError("no words to start the prefix from: the text is empty")
    prefix_len = len(ids) if prefix_len is None else prefix_len
    if prefix_len < 1:
        raise ValueError(f"prefix_len must be at least 1, got {prefix_len}")
    return [ids[i % len(ids)] for i in range(prefix_len)]


class Prefix(nn.Module):
    """One prefix for one model. Make it with `random`, `from_words`, `from_prompt` or `load`.

    Attributes:
        prefix_table: (L, 2, H, P, D) parameter; None while an MLP (`mlp`) or virtual tokens
            (`virtual`) compute it. Read `table()`.
        place: "prefix" or "infix".
        gate: (L, H) parameter >= 0 on the prefix's softmax terms, or None.
        position_offset: token t stands at position t + offset, in training and in generation.
        base: fingerprint of the model that it belongs to; "" = not known.
        linearisation: the frame it was trained in (`batches.encode_prompt`), which `generate` then
            puts around a text; "" = none, texts go in as they are.
        max_source: to how many tokens its sources were cut, and are by `generate`; None = never.
        init_residual: what initialisation from words left over in the MLP, largest |difference|.
        parametrisation, n_trained: how it is or was trained, and the number of parameters that
            took; "" and 0 = not known. `export` and files keep them.
    """

    def __init__(
        self, config: GPT2Config, prefix_len: int, parametrisation: str = "table",
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
        self.base, self.linearisation, self.max_source = "", "", None
        self.init_residual = 0.0
        self.prefix_table = self.mlp = self.virtual = None
        if parametrisation == "mlp":
            self.mlp = PrefixMLP(config, prefix_len, mid_dim)
        elif parametrisation == "table":
            shape = (config.n_layer, 2, config.n_head, prefix_len, config.head_dim)
            self.prefix_table = nn.Parameter(torch.zeros(shape))
        else:
            width = mid_dim if parametrisation == "embedding-mlp" else None
            self.virtual = VirtualTokens(config, prefix_len, width)
        self.gate = nn.Parameter(torch.zeros(config.n_layer, config.n_head)) if gate else None
        self.parametrisation = parametrisation
        self.n_trained = sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def random(cls, config: GPT2Config, prefix_len: int, seed: int, **options) -> "Prefix":
        """A table of N(0, 1), as in the authors' code and PEFT; else as `RowMLP.init_weights` and
        `VirtualTokens.init_weights` say.

        Args:
            options: parametrisation ("table"), mid_dim, gate, position_offset, place.
        """
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
        """The activations that the model itself has on `words` (section 7.4).

        P is the number of their BPE tokens; with another prefix_len the tokens repeat or are cut.
        A table holds the activations exactly; an MLP is fitted to them (see `init_residual`);
        virtual tokens begin as the words' embeddings. An infix, too, begins with the activations of
        the words alone, at positions 0 .. P-1: those after a source are others for each source.
        """
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
        """Begin with this table (L, 2, H, P, D); the largest |difference| that an MLP leaves."""
        if self.mlp is not None:
            return self.mlp.fit_last_layer(table)
        self.prefix_table.copy_(table)
        return 0.0

    @classmethod
    def from_prompt(cls, model: GPT2, tokenizer, prompt: str, **options) -> "Prefix":
        """A prefix that is exactly a hard prompt: the same logits as with `prompt` before the text.

        The prompt's tokens stand at 0 .. P-1 and the text after them, so P and the offset are
        the number of tokens. An MLP holds the activations to rounding.
        """
        if options.get("place", "prefix") != "prefix":
            raise ValueError(f"a prompt stands before the text, got place {options['place']!r}")
        if "prefix_len" in options:
            raise ValueError(f"a prompt gives its own prefix_len, got {options['prefix_len']}")
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
        L, _, H, P, D = table.shape
        # the model's own limit is checked when the prefix is used
        config = GPT2Config(n_layer=L, n_head=H, n_embd=H * D, n_positions=position_offset + 1)
        options = {"gate": gate is not None, "position_offset": position_offset, "place": place}
        prefix = cls(config, P, **options).to(table)
        prefix.prefix_table.copy_(table)
        if gate is not None:
            prefix.gate.copy_(gate)
        return prefix

    @classmethod
    def load(cls, path) -> "Prefix":
        """Read a prefix file; see `checkpoint.load_prefix`."""
        from minprefix.prefix.files import load_prefix

        return load_prefix(path)

    def save(self, path) -> None:
        """Write what is needed to use the prefix, without the MLP; see `checkpoint.save_prefix`."""
        from minprefix.prefix.files import save_prefix

        save_prefix(path, self)

    def table(self) -> Tensor:
        """P_theta: (L, 2, H, P, D)."""
        return self.prefix_table if self.prefix_table is not None else (self.mlp or self.virtual)()

    def activations(self, prefix_index: Tensor | None = None) -> PrefixActivations:
        """What the model reads."""
        if prefix_index is not None:
            raise ValueError("prefix_index needs a PrefixBank; this is one prefix for all rows")
        offset = self.position_offset
        infix = self.place == "infix"
        return PrefixActivations(self.table(), offset, offset, gate=self.gate, infix=infix)

    @torch.no_grad()
    def export(self) -> "Prefix":
        """A copy that holds the table alone: what is kept after training (section 4.3)."""
        gate = None if self.gate is None else self.gate.detach()
        copy = Prefix.from_table(self.table(), self.position_offset, gate, self.place)
        copy.base, copy.linearisation = self.base, self.linearisation
        copy.max_source = self.max_source
        copy.parametrisation, copy.n_trained = self.parametrisation, self.n_trained
        return copy

    @torch.no_grad()
    def project(self) -> None:
        """Back to gate >= 0, after an optimiser step."""
        if self.gate is not None:
            self.gate.clamp_(min=0)

    def bind(self, model: GPT2) -> None:
        """Remember that this prefix belongs to `model`, which virtual tokens are then read by."""
        self.base = fingerprint(model)
        if self.virtual is not None:
            self.virtual.borrowed.model = model

    def check_base(self, model: GPT2) -> None:
        """ValueError if this prefix belongs to another model than `model`."""
        need_gpt2(model, "this prefix")
        check_base(self.base, model, "prefix")


class PrefixBank:
    """Several prefixes for one model, in memory, mixed freely in one batch (section 8.2).

    `model(ids, prefix=bank, prefix_index=index)`: row b uses prefix index[b], -1 = none. Lengths,
    position offsets, gates and places may differ: each row is computed as it would be alone.
    """

    def __init__(self, prefixes: list[Prefix]):
        if not prefixes:
            raise ValueError("a bank needs at least one prefix")
        for prefix in prefixes:
            if not isinstance(prefix, Prefix):
                raise ValueError(f"a bank is of GPT-2's prefixes, got a {type(prefix).__name__}")
        self.prefixes = list(prefixes)

    def activations(self, prefix_index: Tensor | None = None) -> PrefixActivations:
        """Tables padded to the longest, (L, 2, N, H, P, D). No index: row b uses prefix b."""
        tables = [prefix.table() for prefix in self.prefixes]
        if len({(*t.shape[:3], t.shape[4]) for t in tables}) > 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in tables)
            raise ValueError(f"prefixes of one bank must fit one model, their tables are {shapes}")
        device, N = tables[0].device, len(tables)
        lens = torch.tensor([prefix.prefix_len for prefix in self.prefixes], device=device)
        P = max(prefix.prefix_len for prefix in self.prefixes)
        table = torch.stack([F.pad(t, (0, 0, 0, P - t.shape[-2])) for t in tables], dim=2)
        if prefix_index is None:
            prefix_index = torch.arange(N, device=device)
        elif prefix_index.device.type == "cpu" and prefix_index.numel():
            if prefix_index.min() < -1 or prefix_index.max() >= N:
                raise ValueError(
                    f"prefix_index must lie in [-1, {N - 1}], got {prefix_index.tolist()}"
                )
        offsets = torch.tensor([prefix.position_offset for prefix in self.prefixes], device=device)
        infix = [prefix.place == "infix" for prefix in self.prefixes]  # (N,)
        row = prefix_index.clamp(min=0)
        return PrefixActivations(
            table,
            position_offset=torch.where(prefix_index >= 0, offsets[row], 0),
            max_offset=max(prefix.position_offset for prefix in self.prefixes),
            gate=self._gates(table),
            index=prefix_index,
            lens=lens,
            infix=torch.tensor(infix, device=device)[row] if any(infix) else False,
        )

    def _gates(self, table: Tensor) -> Tensor | None:
        """(L, N, H), 1 where a prefix has no gate; None if none has."""
        if all(prefix.gate is None for prefix in self.prefixes):
            return None
        ones = table.new_ones(table.shape[0], table.shape[3])
        gates = [ones if prefix.gate is None else prefix.gate for prefix in self.prefixes]
        return torch.stack(gates, dim=1)

    def check_base(self, model: GPT2) -> None:
        """ValueError if one of the prefixes belongs to another model than `model`."""
        for prefix in self.prefixes:
            prefix.check_base(model)


def make_prefix(model: GPT2, tokenizer, config: PrefixConfig, seed: int) -> Prefix:
    """The prefix that `config` describes, on the model's device and bound to the model; of a BART
    it is a `BARTPrefix`."""
    if isinstance(model, BART):
        from minprefix.prefix.bart import make_bart_prefix

        return make_bart_prefix(model, tokenizer, config, seed)
    if config.sites:
        raise ValueError(f"sites {', '.join(config.sites)} are BART's; GPT-2 has one attention")
    options = {
        "parametrisation": config.parametrisation,
        "mid_dim": config.mid_dim,
        "gate": config.gate,
        "position_offset": config.position_offset,
        "place": config.place,
    }
    if config.init == "prompt":
        if config.position_offset is None and not config.gate:
            del options["position_offset"]  # the prompt's length
        return Prefix.from_prompt(model, tokenizer, config.init_text, seed=seed, **options)
    if config.init == "words":
        return Prefix.from_words(
            model, tokenizer, config.init_text, config.prefix_len, seed=seed, **options
        )
    prefix = Prefix.random(model.config, config.prefix_len or 10, seed, **options)
    prefix.bind(model)
    return prefix.to(model.wte.weight.device)
