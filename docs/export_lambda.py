"""Numbers of the interactive page: what share of its attention a trained prefix takes.

For each prefix length of LENGTHS a prefix is trained on the restaurant tables with the frozen
`mini`, and for each layer, head and token of one unseen table and its text this writes

    lse_P = log Z_P, Z_P = sum over the prefix of exp(scale <q_t, k_p>), and lse_S = log Z_S over
    the tokens up to t. With a gate g: r = g exp(lse_P - lse_S), lambda = r / (1 + r),

the last line being computed in the browser. All lse are of the model with gate 1. Those of a layer
depend on the layers below it alone, so lambda at g is exact where only that layer has the gate g.

    python -m docs.export_lambda            # measure again, with the prefixes that are kept
    python -m docs.export_lambda --train    # train them first: minutes

Kept: `interactive/prefixes.safetensors` (the tables in fp16, "prefix_P" (L, 2, H, P, D)), measured
as they are kept, in fp64: whoever measures again gets the numbers of `interactive/data.js`.
"""

import argparse
import base64
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import minprefix
from kernels import prefix_attention
from minprefix.cli.demo import TRAIN
from minprefix.data.batches import encode_pair
from minprefix.data.load import load_examples
from minprefix.files import write_text
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import load_tensors, save_tensors
from minprefix.training.trainer import Trainer

FOLDER = Path(__file__).parent / "interactive"
PREFIXES, DATA = FOLDER / "prefixes.safetensors", FOLDER / "data.js"
LENGTHS = (1, 2, 5, 10)  # P
CONFIG = replace(TRAIN, steps=100, batch_size=8)  # a minute each on two quiet cores
TEST_TABLE = 9  # which of the test tables is shown, from 0
NATS = 3e-3  # unit of the integers in data.js, in nats: lambda to 0.001
BEGIN = "window.PREFIX_DATA = "


def train_prefixes() -> None:
    """One prefix for each length, as the demo trains them but shorter; writes PREFIXES."""
    model, tokenizer = minprefix.load("mini")
    train, dev = (load_examples("restaurants", split) for split in ("train", "dev"))
    tensors, losses = {}, {}
    for prefix_len in LENGTHS:
        prefix = make_prefix(model, tokenizer, PrefixConfig(prefix_len, init="words"), seed=0)
        with tempfile.TemporaryDirectory() as out:
            result = Trainer(model, tokenizer, CONFIG, train, dev, out, prefix).run()
            kept = Prefix.load(Path(out) / "prefix.safetensors")
        tensors[f"prefix_{prefix_len}"] = kept.table().half()
        losses[f"dev_loss_{prefix_len}"] = f"{result['best_dev_loss']:.3f}"
        steps = {"steps": str(CONFIG.steps), "batch_size": str(CONFIG.batch_size)}
        save_tensors(PREFIXES, tensors, losses | steps | {"precision": CONFIG.precision})


@torch.no_grad()
def layer_queries(model: GPT2, ids: Tensor, prefix: Prefix | None) -> list[Tensor]:
    """q, k and v of each layer as the model computes them with the prefix: L of (3, B, H, T, D)."""
    found, H = [], model.config.n_head

    def keep(_, __, qkv: Tensor) -> None:
        B, T, _ = qkv.shape
        found.append(qkv.view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4))

    hooks = [block.attn.c_attn.register_forward_hook(keep) for block in model.h]
    try:
        model(ids, prefix=prefix)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def log_sums(model: GPT2, ids: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor]:
    """log Z_P and log Z_S of each layer, head and token of one row: two (L, H, T), in nats.

    Args:
        ids: (1, T) int.
    """
    lse_p, lse_s, table = [], [], prefix.table()
    for layer, (q, k, v) in enumerate(layer_queries(model, ids, prefix)):
        none = q.new_empty(q.shape[1], 0, q.shape[3])  # (H, 0, D)
        prefix_k, prefix_v = table[layer][:, None]  # (1, H, P, D)
        lse_s.append(prefix_attention(q, k, v, none, none, return_lse=True)[1][0])
        _, lse = prefix_attention(q, prefix_k, prefix_v, none, none, causal=False, return_lse=True)
        lse_p.append(lse[0])
    return torch.stack(lse_p), torch.stack(lse_s)


def kept_prefix(prefix_len: int) -> Prefix:
    """The kept prefix of this length, in fp64, its text standing at P + t."""
    table = load_tensors(PREFIXES)[0][f"prefix_{prefix_len}"].double()
    return Prefix.from_table(table, position_offset=prefix_len)


def shown_row(tokenizer) -> tuple[list[int], int]:
    """What the model reads: table, bos and text (T ids), and how many are table and bos."""
    example = load_examples("restaurants", "test")[TEST_TABLE]
    row = encode_pair(tokenizer, example.source, example.targets[0])
    return row.ids[:-1], row.prompt_len


def packed(x: Tensor) -> str:
    """(L, H, T) in nats as base64 of little-endian int16, in units of NATS."""
    units = (x / NATS).round()
    if units.abs().max() >= 2**15:
        raise ValueError(f"{x.abs().max().item():.1f} nats do not fit int16 in units of {NATS}")
    return base64.b64encode(units.numpy().astype("<i2").tobytes()).decode()


def unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `packed`, as the browser does it: nats, of this shape."""
    return np.frombuffer(base64.b64decode(text), "<i2").reshape(shape) * NATS


def measure() -> dict:
    """All that the page shows, from the kept prefixes."""
    model, tokenizer = minprefix.load("mini", dtype=torch.float64)
    ids, prompt_len = shown_row(tokenizer)
    trained = load_tensors(PREFIXES)[1]
    prefixes = []
    for prefix_len in LENGTHS:
        lse_p, lse_s = log_sums(model, torch.tensor([ids]), kept_prefix(prefix_len))
        loss = float(trained[f"dev_loss_{prefix_len}"])  # nats per target token
        prefixes.append(
            {"P": prefix_len, "dev_loss": loss, "lse_p": packed(lse_p), "lse_s": packed(lse_s)}
        )
    return {
        "layers": model.config.n_layer,
        "heads": model.config.n_head,
        "nats": NATS,
        "steps": int(trained["steps"]),
        "batch_size": int(trained["batch_size"]),
        "tokens": [tokenizer.decode([i]) if i != tokenizer.bos_id else "[bos]" for i in ids],
        "prompt_len": prompt_len,
        "prefixes": prefixes,
    }


def read_data() -> dict:
    """What data.js holds."""
    text = DATA.read_text(encoding="utf-8")
    return json.loads(text.split(BEGIN, 1)[1].rstrip().removesuffix(";"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/interactive/data.js.")
    parser.add_argument("--train", action="store_true", help="train the prefixes anew first")
    if parser.parse_args().train:
        train_prefixes()
    made = "// Made by python -m docs.export_lambda, which says what the numbers are.\n"
    write_text(DATA, f"{made}{BEGIN}{json.dumps(measure(), ensure_ascii=False, indent=1)};\n")
    print(f"{DATA}: {DATA.stat().st_size:,} bytes, {PREFIXES}: {PREFIXES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
