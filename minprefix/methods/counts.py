"""How many parameters each method of the paper trains and keeps, from the shapes of a model.

Nothing is loaded: modules are built without memory and counted, so the numbers are those of the
code that trains. For GPT-2 medium, the paper's numbers are added: "345M", "250K" for E2E (length 5)
and "500K" for DART (length 10) from footnote 7 of its ACL version, and the percentages from its
tables [1]. For BART large they belong to its two prefixes for XSum. The paper does not give their
lengths, but 100, the length in its appendix, and 5 give these percentages.

[1] https://aclanthology.org/2021.acl-long.353
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from minprefix.methods.adapters import Adapter, bottleneck_for, count
from minprefix.methods.config import DESIGNS
from minprefix.methods.top_layers import TopLayers
from minprefix.models.config import OFFICIAL, BARTConfig, GPT2Config
from minprefix.models.weights import shapes_of
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix

BART_LENGTHS, BART_MID = (5, 100, 200), 800  # 200: the paper's figure 4, XSum; width of the MLPs
BART_PAPER = {"prefix, P = 5": "0.1%", "prefix, P = 100": "2%"}
SHARES = (0.03, 0.001)  # the paper's adapters
LENGTHS = (5, 10)  # the paper's prefixes: E2E and WebNLG, DART
PAPER = {"fine-tuning": "345M", "adapter 3%": "3%", "adapter 0.1%": "0.1%",
         "prefix, P = 5": "250K", "prefix, P = 10": "500K"}  # fmt: skip


def bart_rows(config: BARTConfig) -> list[dict]:
    """`method_rows` for a BART: fine-tuning, and a prefix in all three attentions."""
    total = count(shapes_of(config))
    found = [("fine-tuning", total, total)]
    for length in BART_LENGTHS:
        with torch.device("meta"):
            table = count(BARTPrefix(config, length))
            mlp = count(BARTPrefix(config, length, parametrisation="mlp", mid_dim=BART_MID))
        found.append((f"prefix, P = {length}", mlp, table))
    rows: list[dict] = []
    for method, trained, kept in found:
        percent = round(100 * kept / total, 4)
        rows.append({"method": method, "trained": trained, "kept": kept, "percent": percent})
    if replace(config, linearisation="", max_source=None) == OFFICIAL["facebook/bart-large"][0]:
        rows = [row | {"paper": BART_PAPER.get(row["method"], "")} for row in rows]
    return rows


def gpt2_rows(config: GPT2Config) -> list[dict]:
    """`method_rows` for a GPT-2."""
    model: Any = shapes_of(config)
    rows: list[dict] = []
    total = count(model)

    def add(method: str, trained: int, kept: int, said: str = "") -> None:
        percent = round(100 * kept / total, 4)
        row = {"method": method, "trained": trained, "kept": kept, "percent": percent}
        rows.append(row | {"paper": PAPER.get(said or method, "")})

    add("fine-tuning", total, total)
    n_top = min(2, config.n_layer)
    for embedding in (False, True):
        name = f"FT-top{n_top}" + (" with the embedding" if embedding else "")
        n = count(TopLayers(model, n_top, embedding))
        add(name, n, n)
    for design in DESIGNS:
        for share in SHARES:
            width = bottleneck_for(config, share, design)
            with torch.device("meta"):
                n = count(Adapter(config, width, design))
            said = f"adapter {share * 100:g}%"
            add(f"{said}, {design}, bottleneck {width}", n, n, said)
    for length in LENGTHS:
        with torch.device("meta"):
            options: Any = {"position_offset": 0}  # P may be larger than a tiny model's positions
            table = count(Prefix(config, length, **options))
            mlp = count(Prefix(config, length, parametrisation="mlp", **options))
        add(f"prefix, P = {length}", mlp, table)
    if replace(config, linearisation="", max_source=None) != OFFICIAL["gpt2-medium"][0]:
        rows = [{name: x for name, x in row.items() if name != "paper"} for row in rows]
    return rows


ROWS: dict[str, Callable[[Any], list[dict]]] = {"GPT-2": gpt2_rows, "BART": bart_rows}


def method_rows(config: GPT2Config | BARTConfig) -> list[dict]:
    """For each method: parameters trained, parameters kept for use, and the latter in percent of
    the model; for GPT-2 medium and BART large also the paper's numbers."""
    return ROWS[config.family](config)
