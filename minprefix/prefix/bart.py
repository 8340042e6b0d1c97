"""The prefix of a BART: a table for each of its three attentions, any of which may be left out.

This is eq. (3) of Li & Liang 2021 [1] with z = [PREFIX; x; PREFIX'; y]: at a prefix position, the
encoder, the decoder's self-attention and cross attention each read their own keys and values, as in
the authors' code [2]. Each is a `prefix.Prefix` with its own MLP; all have the same P. Positions of
source and target begin at 0, as without a prefix and as in [2]; with another position_offset, token
t of either is at t + offset.

Unlike in a decoder, no prefix is exactly equal to a hard prompt: the encoder reads in both
directions, so the activations of words depend on the source after them, and cross attention reads
the encoder's result. Initialisation from words (`BARTPrefix.from_words`) therefore uses the
activations of the words alone; it is only a start.

For the same reason, embedding-only has no table: the embeddings of P virtual tokens are placed
before the source, at positions 0 .. P-1, and go through the encoder with it
(`BARTActivations.virtual`); the decoder reads them through cross attention. Read `BARTPrefix`, then
`word_activations`.

[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning, seq2seq/
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minprefix.checks import check_choice
from minprefix.models.activations import BARTActivations
from minprefix.models.bart import BART
from minprefix.models.base import evaluating
from minprefix.models.config import SITES, BARTConfig
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import check_base, fingerprint
from minprefix.prefix.config import PARAMETRISATIONS
from minprefix.prefix.parametrisations import Recorder, VirtualTokens, word_ids
from minprefix.prefix.prefix import Prefix


def check_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """The sites in the order of SITES, each once; empty = all. ValueError for unknown ones."""
    for site in sites:
        check_choice("sites", site, SITES)
    return tuple(site for site in SITES if site in sites) or SITES


class BARTPrefix(nn.Module):
    """One prefix for one BART. Make it with `random`, `from_words`, `from_tables` or `load`.

    Attributes:
        sites: a `Prefix` (table or MLP, gate) for each site that has one.
        virtual: `VirtualTokens` for embedding-only, which has no sites.
        source_offset: token t of a source whose encoder has no prefix is at t + this; None =
            position_offset. With PEFT's prefixes it is 0, and only the target is shifted by P.
        prefix_len, position_offset, base, linearisation, max_source, init_residual,
            parametrisation, n_trained: as in `Prefix`.
    """

    family = BARTConfig.family  # of the model that reads it
    sites: Any  # nn.ModuleDict of Prefix
    virtual: Any  # VirtualTokens or None
    place, gate = "prefix", None  # fixed here, unlike in GPT-2's; gates belong to the sites

    def __init__(
        self, config: BARTConfig, prefix_len: int, sites: Sequence[str] = SITES,
        parametrisation: str = "table", mid_dim: int = 512, gate: bool = False,
        position_offset: int | None = None,
    ):  # fmt: skip
        super().__init__()
        check_choice("parametrisation", parametrisation, PARAMETRISATIONS)
        tokens = parametrisation.startswith("embedding")
        if tokens and (gate or check_sites(sites) != SITES):
            raise ValueError(
                f"parametrisation {parametrisation!r} has neither gate nor sites: virtual tokens "
                f"stand before the source; got gate {gate}, sites {', '.join(sites)}"
            )
        if prefix_len < 1:
            raise ValueError(f"prefix_len must be at least 1, got {prefix_len}")
        if position_offset is None:
            position_offset = prefix_len if tokens else 0
        if not max(0, prefix_len * tokens) <= position_offset < config.n_positions:
            raise ValueError(
                f"position_offset {position_offset} (prefix length {prefix_len}) must lie in "
                f"[{prefix_len * tokens}, {config.n_positions}), the positions of the model"
            )
        self.prefix_len, self._offset = prefix_len, position_offset
        self.source_offset: int | None = None
        self.base, self.linearisation = "", ""
        self.max_source: int | None = None
        self.init_residual = 0.0
        self.parametrisation, self.virtual, self.sites = parametrisation, None, nn.ModuleDict()
        if tokens:
            width = mid_dim if parametrisation == "embedding-mlp" else None
            self.virtual = VirtualTokens(config, prefix_len, width)
        else:
            for site in check_sites(sites):
                self.sites[site] = Prefix(
                    config.at(site), prefix_len, parametrisation, mid_dim, gate, position_offset
                )
        self.n_trained = sum(parameter.numel() for parameter in self.parameters())

    @property
    def position_offset(self) -> int:
        return self._offset

    @position_offset.setter
    def position_offset(self, offset: int) -> None:
        self._offset = offset
        for part in self.sites.values():
            part.position_offset = offset

    @classmethod
    def random(cls, config: BARTConfig, prefix_len: int, seed: int, **options) -> "BARTPrefix":
        """`Prefix.random` for each site, one after the other with the same generator.

        Args:
            options: sites, parametrisation ("table"), mid_dim, gate, position_offset.
        """
        if not isinstance(config, BARTConfig):
            found = type(config).__name__
            raise ValueError(f"a BARTPrefix needs the BARTConfig of its model, got a {found}")
        prefix = cls(config, prefix_len, **options)
        generator = torch.Generator().manual_seed(seed)
        for part in prefix.sites.values():
            part.init_weights(generator)
        if prefix.virtual is not None:
            prefix.virtual.init_weights(generator)
        return prefix

    @classmethod
    def from_words(
        cls, model: BART, tokenizer, words: str = "summarize", prefix_len: int | None = None,
        seed: int = 0, **options,
    ) -> "BARTPrefix":  # fmt: skip
        """Start from the activations of `words` alone, at all sites; see the module's header.

        P is the number of their BPE tokens; with another prefix_len the tokens repeat or are cut.
        Tables hold `word_activations`, MLPs are fitted to them (`init_residual` is the largest
        difference at any site), and virtual tokens start as the words' embeddings.
        """
        if not isinstance(model, BART):
            raise ValueError(f"a BARTPrefix is for BART only, got a {type(model).__name__}")
        ids = word_ids(tokenizer, words, prefix_len)
        tables = word_activations(model, ids)
        prefix = cls.random(model.config, len(ids), seed, **options).to(tables["cross"])
        residuals = [part.fit_table(tables[site]) for site, part in prefix.sites.items()]
        if prefix.virtual is not None:
            embd = model.wte.weight[ids].detach().to(tables["cross"])  # (P, C)
            residuals.append(prefix.virtual.fit(embd))
        prefix.init_residual = max(residuals)
        prefix.bind(model)
        return prefix

    @classmethod
    @torch.no_grad()
    def from_tables(
        cls, tables: dict[str, Tensor], position_offset: int = 0,
        gates: dict[str, Tensor] | None = None, virtual: Tensor | None = None,
    ) -> "BARTPrefix":  # fmt: skip
        """A prefix that holds copies of tables (L, 2, H, P, D) and gates (L, H), by site; or of
        the embeddings of virtual tokens, (P, C)."""
        if virtual is not None:
            P, C = virtual.shape
            config = BARTConfig(n_embd=C, n_head=1, n_positions=position_offset + 1)
            options: Any = {"parametrisation": "embedding", "position_offset": position_offset}
            prefix = cls(config, P, **options).to(virtual)
            prefix.virtual.fit(virtual)
            return prefix
        L, _, H, P, D = next(iter(tables.values())).shape
        layers = {site: len(table) for site, table in tables.items()}
        # the model's own limit is checked when the prefix is used
        config = BARTConfig(
            n_encoder_layer=layers.get("encoder", L), n_layer=L, n_head=H, n_embd=H * D,
            n_positions=position_offset + 1,
        )  # fmt: skip
        prefix = cls(config, P, tuple(tables), position_offset=position_offset)
        for site, table in tables.items():
            gate = None if not gates else gates[site]
            prefix.sites[site] = Prefix.from_table(table, position_offset, gate)
        prefix.n_trained = sum(parameter.numel() for parameter in prefix.parameters())
        return prefix

    @classmethod
    def load(cls, path) -> "BARTPrefix":
        """Read a prefix file; see `files.load_prefix`. ValueError if it is for GPT-2."""
        from minprefix.prefix.files import load_prefix

        prefix = load_prefix(path)
        if not isinstance(prefix, cls):
            raise ValueError(f"{path}: a prefix of GPT-2, not of BART")
        return prefix

    def save(self, path) -> None:
        """Write what is needed to use the prefix, without the MLPs; see `files.save_prefix`."""
        from minprefix.prefix.files import save_prefix

        save_prefix(path, self)

    def tables(self) -> dict[str, Tensor]:
        """P_theta by site: (L, 2, H, P, D)."""
        return {site: part.table() for site, part in self.sites.items()}

    def gates(self) -> dict[str, Tensor]:
        """The gates by site: (L, H); {} without gates."""
        return {site: part.gate for site, part in self.sites.items() if part.gate is not None}

    def activations(self, prefix_index: Tensor | None = None) -> BARTActivations:
        """What the model reads."""
        if prefix_index is not None:
            raise ValueError("prefix_index needs a bank, which BART prefixes do not have")
        sites = {site: part.activations() for site, part in self.sites.items()}
        virtual = None if self.virtual is None else self.virtual.embeddings()
        offset = self.position_offset if self.source_offset is None else self.source_offset
        return BARTActivations(sites, offset, virtual)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that its file holds, by name."""
        if self.virtual is not None:
            return {"virtual_embd": self.virtual.embeddings()}
        tensors = {f"{site}.prefix_table": table for site, table in self.tables().items()}
        return tensors | {f"{site}.gate": gate for site, gate in self.gates().items()}

    def sizes(self) -> dict[str, int | str]:
        """The sizes of its model (the number of layers is the decoder's, if it has a table there),
        and its sites; unknown for virtual tokens."""
        sizes = {"n_layer": 0, "n_head": 0, "head_dim": 0}
        for part in self.sites.values():
            sizes = part.sizes()
        return sizes | {"sites": ",".join(self.sites)}

    def settings(self) -> dict:
        """The settings that must be equal when its training continues."""
        settings = {"position_offset": self.position_offset, "place": self.place}
        return settings | {"sites": list(self.sites)}

    def check_fit(self, config: BARTConfig) -> None:
        """ValueError if a model of this config cannot use it."""
        for site, part in self.sites.items():
            try:
                part.check_fit(config.at(site))
            except ValueError as error:
                raise ValueError(f"{site}, {error}") from error

    @torch.no_grad()
    def export(self) -> "BARTPrefix":
        """A copy with only the tables, or the embeddings."""
        virtual = None if self.virtual is None else self.virtual.embeddings()
        copy = BARTPrefix.from_tables(self.tables(), self.position_offset, self.gates(), virtual)
        copy.source_offset = self.source_offset
        copy.base, copy.linearisation = self.base, self.linearisation
        copy.max_source = self.max_source
        copy.parametrisation, copy.n_trained = self.parametrisation, self.n_trained
        return copy

    def project(self) -> None:
        """Set negative entries of the gates to 0, after an optimizer step."""
        for part in self.sites.values():
            part.project()

    def bind(self, model: GPT2 | BART) -> None:
        """Bind this prefix to `model`."""
        self.base = fingerprint(model)

    def check_base(self, model: GPT2 | BART) -> None:
        """ValueError if this prefix belongs to another model than `model`."""
        if not isinstance(model, BART):
            other = model.config.family
            raise ValueError(f"this prefix is for a BART and cannot be used with a {other}")
        check_base(self.base, model, "prefix")


@torch.no_grad()
def word_activations(model: BART, ids: list[int]) -> dict[str, Tensor]:
    """The model's keys and values of the tokens `ids` alone, by site: (L, 2, H, P, D), at least
    fp32, without dropout.

    The encoder reads the tokens at positions 0 .. P-1. The decoder also reads them there, with the
    encoder's result as its source, which cross attention reads.
    """
    words = torch.tensor([ids], device=model.wte.weight.device)
    encoder: Any = Recorder(words.device)
    decoder: Any = Recorder(words.device)
    with evaluating(model):
        source = model.with_keys(model.encode(words, recorder=encoder))
        model.hidden_states(words, source=source, cache=decoder)
    tables = {"encoder": encoder.table(), "decoder": decoder.table(), "cross": source.kv[:, :, 0]}
    return {
        site: x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        for site, x in tables.items()
    }
