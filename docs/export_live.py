"""Writes the files that the live page loads: the weights in int8, the prefixes in fp16.

    python -m docs.export_live steps --runs DIR   # writes docs/interactive/steps.safetensors
    python -m docs.export_live site --out DIR     # all other files; part of `make docs`

For `steps`, DIR has the evaluated steps of e2e-P10, see `docs/train_prefixes.py`. `site` packs
mini's weights, its tokenizer and the prefixes in `docs/prefixes/`. If a prefix is missing, it is
left out, and the page does not offer it. Prefixes are tables (L, 2, H, P, D) by name: "e2e-P10",
"e2e-P10/0125".

Every matrix W (n_out, n_in) of the model is stored as integers and one scale for each output,

    scale[o] = max_i |W[o, i]| / 127,   W[o, i] ~ scale[o] * round(W[o, i] / scale[o]),

and `dequantised` is the model with these weights, with which the page and its tests agree.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import find, load
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import load_tensors, save_tensors

PAGE = Path(__file__).parent / "interactive"
TRAINED = Path(__file__).parent / "prefixes"
STEPS = PAGE / "steps.safetensors"
EVALUATED = "e2e-P10"  # the prefix whose training steps are shown
COPIED = ("config.json", "vocab.json", "merges.txt")
LOADED = (*COPIED, "mini.safetensors", "prefixes.safetensors", STEPS.name)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (n_out, n_in) -> int8 of the same shape, and scales (n_out,) in fp32."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def as_rows(name: str, weight: Tensor) -> Tensor:
    """A matrix as (n_out, n_in): those of layers are stored as [in, out], embeddings are not."""
    return weight.T if name.startswith("h.") else weight


def weights() -> dict[str, Tensor]:
    """mini's tensors for the page: matrices in int8 with scales, the rest in fp32."""
    model, _ = load("mini")
    kept = {}
    for name, x in model.state_dict().items():
        if x.dim() == 2:
            kept[name], kept[name.replace(".weight", ".scale")] = quantised(as_rows(name, x))
        else:
            kept[name] = x.float()
    return kept


def dequantised() -> tuple[GPT2, object]:
    """(model, tokenizer): mini in fp64, with the weights of the page."""
    model, tokenizer = load("mini", dtype=torch.float64)
    kept, own = weights(), model.state_dict()
    for name, x in own.items():
        if x.dim() == 2:
            whole, scale = kept[name].double(), kept[name.replace(".weight", ".scale")].double()
            x.copy_(as_rows(name, whole * scale[:, None]))
    return model, tokenizer


def halved(paths: dict[str, Path]) -> dict[str, Tensor]:
    """The tables of prefix files in fp16, by name."""
    tables = {name: Prefix.load(path).table().detach().half() for name, path in paths.items()}
    for name, table in tables.items():
        if not table.isfinite().all():
            raise ValueError(f"{paths[name]}: a value is too large for fp16")
    return tables


def write_steps(runs: Path) -> None:
    """Write STEPS from the folder of the evaluated steps."""
    paths = {f"{EVALUATED}/{path.stem}": path for path in sorted(runs.glob("*.safetensors"))}
    if not paths:
        raise ValueError(f"{runs}: no prefix files there; docs/train_prefixes.py makes them")
    save_tensors(STEPS, halved(paths))
    print(f"{STEPS}: {len(paths)} prefixes, {STEPS.stat().st_size:,} bytes")


def trained() -> dict[str, Tensor]:
    """The prefixes that were trained to the end, in fp16."""
    return halved({path.stem: path for path in sorted(TRAINED.glob("*.safetensors"))})


def write_site(out: Path) -> None:
    """Write all files of LOADED to the folder of the page."""
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out / "mini.safetensors", weights())
    save_tensors(out / "prefixes.safetensors", trained())
    for path in [*(find("mini") / name for name in COPIED), STEPS]:
        if path.parent != out:
            shutil.copy(path, out / path.name)


def prefixes() -> dict[str, Prefix]:
    """All prefixes of the page in fp64, with the values that the page uses; text token t is at
    position P + t."""
    tables = trained() | load_tensors(STEPS)[0]
    return {n: Prefix.from_table(x.double(), position_offset=x.shape[3]) for n, x in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("steps", help="pack the evaluated steps of e2e-P10")
    steps.add_argument("--runs", type=Path, default=Path("runs/prefixes", EVALUATED, "steps"))
    site = commands.add_parser("site", help="what the page's worker loads")
    site.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "steps":
        write_steps(args.runs)
    else:
        write_site(args.out)


if __name__ == "__main__":
    main()
