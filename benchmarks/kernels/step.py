"""The launches of one training step, counted without a GPU: kernels, bytes, and a time from them.

    python -m benchmarks.kernels.step [--out FILE.csv] [--batch-size 10] [--seq-len 128]

The step is that of `Trainer` with graphs: GPT-2 medium in bf16 and a prefix of 10 out of an MLP,
loss at every position, on the "meta" device, which has shapes and no memory. Our kernels are
recorded (`kernels.launch.recorded`), PyTorch's operators are counted as the dispatcher meets them:
one launch each, none for a view. The norm of the gradient and AdamW, both fused over all tensors,
are known without a count (`UPDATE`).

Bytes are those of each tensor that a kernel reads or writes, once. The time is what follows from
them where nothing else does: the larger of bytes / 4.8 TB/s (an H200's memory) and FLOPs / 700
TFLOP/s (bf16 products there), and 2 us for each launch. It is a floor that ignores caches, not a
measurement. Then the memory: what the backward pass keeps, and what stays.

Two forms: with the kernels of `cross_entropy.py` and `layer_norm.py`, and without
(MINPREFIX_FUSED=0). The rows `before` of the committed CSV were counted by this file at ba81a61,
the last commit without them.
"""

import argparse
import os
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import kernels
from benchmarks.machine import add_row, machine
from benchmarks.peft.run import RANDOM
from kernels import attention
from kernels.launch import Launch, recorded
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.losses import GPU_CHUNK
from minprefix.prefix.prefix import Prefix
from minprefix.training import graphs
from minprefix.training.blocks import wrap_blocks

BYTES_A_SECOND, FLOPS_A_SECOND, LAUNCH_US = 4.8e12, 700e12, 2.0
SMALL_US = 10.0  # kernels that take less together are not told apart
GATHERS = {"embedding", "index_select", "index", "gather"}  # read what they write, not the table
OVERWRITES = {"zero_", "fill_", "copy_"}  # do not read what they write
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
           "_unsafe_view", "detach", "alias"}  # launch nothing, as views  # fmt: skip


# norm (2, and 5 of single numbers), clipping (2), step numbers (1), AdamW (2). In fp32 the gradient
# is read, is read and written, and is read with weight and moments, which are written
UPDATE = {"launches": 12, "bytes": 4 * (1 + 2 + 4 + 3)}
OWN = {"attention": attention.forward, "attention_backward": attention.attention_backward}


class Count(TorchDispatchMode):
    """Launches, bytes and FLOPs of each operator of PyTorch, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])

    def add(self, name: str, n_bytes: float, flops: float = 0) -> None:
        for i, x in enumerate((1, n_bytes, flops)):
            self.found[name][i] += x

    def __torch_dispatch__(self, function: Any, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if function.namespace == "minprefix":
            return OWN[name](*args)  # whose launches are recorded
        result = function(*args, **kwargs)
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if function.is_view or name in NOTHING or not outputs:
            return result
        if name in GATHERS:
            inputs = outputs
        elif name in OVERWRITES:
            inputs = inputs[1:]
        counter = flop_registry.get(function.overloadpacket)
        flops = counter(*args, **kwargs, out_val=result) if counter else 0
        self.add(name, sum(map(size, inputs + outputs)), flops)
        return result


def tensors(x: Any) -> list[torch.Tensor]:
    """Those in nested lists of arguments."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [y for part in x for y in tensors(part)]
    return [x] if isinstance(x, torch.Tensor) else []


def size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def bytes_of(launch: Launch) -> int:
    """What our kernel reads and writes; logits are both."""
    found = sum(map(size, tensors(launch.arguments)))
    logits = launch.arguments.get("logits_ptr")
    return found + (0 if logits is None else size(logits))


def training_step(
    config: GPT2Config, batch_size: int, seq_len: int, fused: bool
) -> tuple[Count, dict[str, int]]:
    """What one step launches, and its bytes of memory by what they are."""
    kept: dict[int, int] = {}  # storages that the backward pass reads

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.device("meta"):
        model = GPT2(config).to(torch.bfloat16).requires_grad_(False).eval()
        prefix = Prefix(config, 10, parametrisation="mlp")
        ids = torch.empty(batch_size, seq_len, dtype=torch.long)
        lengths, at = torch.empty(batch_size).long(), torch.empty(ids.numel()).long()
    if fused:
        model.pad_head()
    wrap_blocks(model, fused=fused)

    def losses(batch, acts):
        return model.token_losses(batch.input_ids, batch.labels, batch.at, prefix=acts)

    batch = graphs.Padded(ids, ids, lengths, at, lengths, torch.empty(len(at), device="meta"))
    bucket = batch_size, seq_len, len(at)
    with (
        patch.dict(os.environ, {"MINPREFIX_FUSED": str(int(fused))}),
        patch.object(kernels, "takes", lambda x: True),
        patch.object(graphs, "padded", lambda batch, longest: batch),
        # autocast does not know the device
        patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()),
        patch.object(torch, "is_autocast_enabled", lambda device: False),
    ):
        passes = graphs.GraphedPasses(losses, prefix.activations(), seq_len)
        passes.batches[bucket] = batch
        passes.replays[bucket] = lambda: passes._pass(bucket)
        keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with recorded("sm_90") as launches, Count() as count, keeping:
            acts = prefix.activations()
            passes.begin(acts, 1.0)
            passes.add(batch)
            torch.autograd.backward(graphs.leaves(acts), passes.end()[1])
    for launch in launches:
        count.add(launch.kernel.fn.__name__.strip("_"), bytes_of(launch))
    n_trained = sum(x.numel() for x in prefix.parameters())
    count.found["norm and AdamW"] = [UPDATE["launches"], UPDATE["bytes"] * n_trained, 0]
    weights = {x.untyped_storage()._cdata: size(x) for x in model.parameters()}
    own = {x.untyped_storage()._cdata for x in prefix.parameters()}
    return count, {
        "weights": sum(weights.values()),
        "prefix, gradient, moments": 4 * 4 * n_trained,
        "kept for the backward pass": sum(
            n for x, n in kept.items() if x not in weights and x not in own
        ),
        "logits": min(len(at), GPU_CHUNK) * len(model.head_weights()[0]) * 2,
    }


def microseconds(launches: float, n_bytes: float, flops: float) -> float:
    work = max(n_bytes / BYTES_A_SECOND, flops / FLOPS_A_SECOND)
    return 1e6 * work + LAUNCH_US * launches


def summed(name: str, rows: list[tuple]) -> tuple:
    """One row of the sums of several."""
    return name, *(sum(row[i] for row in rows) for i in range(1, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the launches of a training step.")
    parser.add_argument("--out", type=Path, help="also put the rows into this CSV")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=128)
    args = parser.parse_args()
    L, H, C = RANDOM["random-medium"]
    config = GPT2Config(n_layer=L, n_head=H, n_embd=C)
    for form in ("plain", "fused"):
        count, memory = training_step(config, args.batch_size, args.seq_len, form == "fused")
        rows = [(name, *found, microseconds(*found)) for name, found in count.found.items()]
        rows.sort(key=lambda row: -row[-1])
        small = [row for row in rows if row[-1] < SMALL_US]
        rows = [row for row in rows if row not in small]
        rows += [summed("others", small), summed("all", rows + small)]
        print(f"{form}: B {args.batch_size}, T {args.seq_len}")
        for name, launches, n_bytes, flops, us in rows:
            print(f"  {name:32} {launches:5.0f} launches {n_bytes / 1e6:9.1f} MB "
                  f"{flops / 1e9:8.1f} GFLOP {us:8.1f} us")  # fmt: skip
            row = {"B": args.batch_size, "T": args.seq_len, "form": form, "kernel": name}
            row |= {"launches": int(launches), "mb": round(n_bytes / 1e6, 1)}
            row |= {"gflop": round(flops / 1e9, 1), "us": round(us, 1)}
            if args.out:
                machine_row = {name: machine()[name] for name in ("torch", "commit")}
                add_row(args.out, row | machine_row, ("B", "T", "form", "kernel"))
        total = sum(memory.values())
        print("  memory, MiB:", ", ".join(f"{name} {n >> 20}" for name, n in memory.items()),
              f"= {total >> 20}")  # fmt: skip


if __name__ == "__main__":
    main()
