"""Counts the kernel launches of a step with GPT-2 medium's shape, and their bytes, without a GPU.

    python -m benchmarks.kernels.launches [--out FILE.csv] [--part train generate]

The code runs as on a GPU with graphs, but the launches of our kernels are recorded instead of
executed (`kernels.launch.recorded`), and PyTorch's operators are counted when they are dispatched
(`Count`). A view or an allocation launches nothing, and any other operator counts as one kernel.
Some launch more (a sort, a sum in parts), so the number is a lower bound. Each tensor that a kernel
reads or writes counts once with all its bytes, a cache with all its columns. `us` is the time that
follows from bytes, FLOPs and launches alone (`microseconds`); it ignores caches and is not a
measurement.

A training step is that of `Trainer`, bf16, a prefix of 10 out of an MLP, loss at every position, on
the "meta" device, which has shapes and no memory; with the kernels of `cross_entropy.py` and
`layer_norm.py`, "fused", and without, "plain" (MINPREFIX_FUSED=0). The norm of the gradient and
AdamW, both fused over all tensors, are known without a count (`UPDATE`). A step of generation is
the difference of two generations with a different number of tokens; "few rows" and "some rows" with
the kernels of these names, whose programs each read all positions, which counts as if from memory,
"fused" without. (Without graphs the blocks are PyTorch's, and only attention is ours.)

Columns: `triton`, launches of our kernels; `other`, launches of PyTorch's; `waits`, tensors that
the host reads; `calls`, launches by the host itself: a replay, and everything that is not captured.
The rows "before" in the committed CSV were counted at the commits that they name, before most of
these kernels existed; their bytes, which included only weights, are left out.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import kernels.inputs
from benchmarks.machine import add_row, machine
from benchmarks.peft.run import RANDOM
from kernels import attention, few_rows, some_rows
from kernels.launch import Launch, cdiv, recorded
from minprefix.generation import fast
from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate_ids
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.losses import GPU_CHUNK
from minprefix.prefix.prefix import Prefix
from minprefix.training import graphs
from minprefix.training.blocks import wrap_blocks

KEY = ("form", "work", "B", "T", "beams", "sampling", "graphs")
TARGET = "sm_90"
BYTES_A_SECOND, FLOPS_A_SECOND = 4.8e12, 700e12  # an H200's memory, and bf16 products there
LAUNCH_US = 2.0  # least time between the starts of two kernels in a CUDA graph
SMALL_US = 10.0  # kernels that together take less are not printed separately
NOTHING = {"_unsafe_view", "alias", "detach", "device", "empty", "empty_like", "empty_strided",
           "lift_fresh", "new_empty", "new_empty_strided",
           "result_type"}  # launch nothing, as views  # fmt: skip
GATHERS = {"embedding", "index_select", "index", "gather"}  # read what they write, not the table
OVERWRITES = {"zero_", "fill_", "copy_"}  # do not read what they write
# norm (2, and 5 of single numbers), clipping (2), step numbers (1), AdamW (2). In fp32, a gradient
# is read for the norm, read and written for clipping, and read by AdamW with weight and moments,
# which are also written
UPDATE = {"launches": 12, "bytes": 4 * (1 + 2 + 4 + 3)}
OWN = {"attention": attention.forward, "attention_append": attention.forward_append,
       "attention_backward": attention.attention_backward}  # fmt: skip
MEDIUM = dict(zip(("n_layer", "n_head", "n_embd"), RANDOM["random-medium"], strict=True))


class Count(TorchDispatchMode):
    """Launches, bytes and FLOPs by the name of the kernel; `captured`, the launches in `graph`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
        self.own: list[Launch] = []
        self.waits = self.captured = 0
        self.inside = False

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func is torch.ops.aten.dropout.default and not args[2]:
            return args[0]  # its Python form would copy
        with self:  # a composite operator counts as its parts
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        if func.namespace == "minprefix":
            result = OWN[name](*args)  # whose launches are recorded
            for x in result:  # nothing has written it
                x.zero_()
            return result
        if name == "new_empty":  # a result of ours, which nothing writes
            return func(*args, **kwargs).zero_()
        if name in ("mm", "addmm") and args[-1].device.type == "cpu":  # it would take long
            result = args[-2].new_zeros(len(args[-2]), args[-1].shape[1])
        else:
            result = func(*args, **kwargs)
        self.waits += name == "_local_scalar_dense"
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if func.is_view or name in NOTHING or not outputs:
            return result
        if name in GATHERS:
            inputs = outputs
        elif name in OVERWRITES:
            inputs = inputs[1:]
        counter = flop_registry.get(func.overloadpacket)
        flops = counter(*args, **kwargs, out_val=result) if counter else 0
        self.add(name, sum(map(size, inputs + outputs)), flops)
        self.captured += self.inside
        return result

    def add(self, name: str, n_bytes: float, flops: float = 0) -> None:
        for i, x in enumerate((1, n_bytes, flops)):
            self.found[name][i] += x

    @contextmanager
    def graph(self) -> Iterator[None]:
        """Launches within the block belong to a replay."""
        before, self.inside = len(self.own), True
        yield
        self.captured, self.inside = self.captured + len(self.own) - before, False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the launches within the block, as on a GPU."""
        on_gpu = patch.object(kernels, "takes", lambda x: True)
        unchecked = patch.object(kernels.inputs, "check_int", lambda *_, **__: None)
        with on_gpu, unchecked, recorded(TARGET) as self.own, self:
            yield
        for one in self.own:
            self.add(one.kernel.fn.__name__.strip("_"), bytes_of(one))


def tensors(x: Any) -> list[torch.Tensor]:
    """The tensors in nested lists of arguments."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [y for part in x for y in tensors(part)]
    return [x] if isinstance(x, torch.Tensor) else []


def size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def bytes_of(launch: Launch) -> int:
    """What our kernel reads and writes; logits are both, and positions and the parameters of a norm
    are read by each program of `few_rows.py` and `some_rows.py` that needs them."""
    a = launch.arguments
    found = sum(map(size, tensors(a)))
    if launch.kernel is few_rows._few_rows_kernel:
        shared = [a[name] for name in ("x_ptr", "gain_ptr", "shift_ptr") if a[name] is not None]
        found += (launch.programs - 1) * sum(map(size, shared))
    if launch.kernel is some_rows._some_rows_kernel:
        found += (cdiv(a["outputs"], launch.tile.block_n) - 1) * size(a["x_ptr"])
    return found + (size(a["logits_ptr"]) if "logits_ptr" in a else 0)


def training_step(
    config: GPT2Config, batch_size: int, seq_len: int, fused: bool
) -> tuple[Count, dict[str, int]]:
    """The launches of one step, and its memory in bytes by purpose."""
    kept: dict[int, int] = {}  # storages that the backward pass reads
    count = Count()

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

    def replay() -> torch.Tensor:
        with count.graph():
            return passes._pass(bucket)

    batch = graphs.Padded(ids, ids, lengths, at, lengths, torch.empty(len(at), device="meta"))
    bucket = batch_size, seq_len, len(at)
    with (
        patch.dict(os.environ, {"MINPREFIX_FUSED": str(int(fused))}),
        patch.object(graphs, "padded", lambda batch, longest: batch),
        # autocast does not know the device
        patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()),
        patch.object(torch, "is_autocast_enabled", lambda device: False),
    ):
        passes = graphs.GraphedPasses(losses, prefix.activations(), seq_len)
        passes.batches[bucket], passes.replays[bucket] = batch, replay
        keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with count.counting(), keeping:
            acts = prefix.activations()
            passes.begin(acts, 1.0)
            passes.add(batch)
            torch.autograd.backward(graphs.leaves(acts), passes.end()[1])
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


def token(model: GPT2, prefix: Prefix, B: int, graphed: bool, **options) -> Count:
    """The launches of one token for B rows, or of one step of all their beams."""

    def texts(n: int) -> Count:
        count = Count()

        def capture(run: Callable[[], Any], *_) -> Callable[[], Any]:
            def replay() -> Any:
                with count.graph():
                    return run()

            return replay

        fast.KEPT.clear()
        with (
            patch.object(fast, "uses_graphs", lambda device: graphed),
            patch.object(fast, "capture", capture),
            count.counting(),
        ):
            prompts, eos_id = [[1 + b] * 128 for b in range(B)], model.config.vocab_size - 1
            config = GenerationConfig(max_new_tokens=n, **options)
            generate_ids(model, prompts, config, eos_id=eos_id, prefix=prefix)
        return count

    model.pad_head()  # as the first text would
    few, more = texts(9), texts(13)
    one = Count()
    for name, (launches, *moved) in more.found.items():
        less = few.found.get(name, [0, 0, 0])
        if launches > less[0]:
            both = zip((launches, *moved), less, strict=True)
            one.found[name] = [(x - y) / 4 for x, y in both]
    one.own = more.own[: (len(more.own) - len(few.own)) // 4]
    one.waits, one.captured = (more.waits - few.waits) // 4, (more.captured - few.captured) // 4
    return one


def microseconds(launches: float, n_bytes: float, flops: float) -> float:
    work = max(n_bytes / BYTES_A_SECOND, flops / FLOPS_A_SECOND)
    return 1e6 * work + LAUNCH_US * launches


def columns(count: Count, graphed: bool) -> dict:
    """The numbers of a row, and the names of the most frequent kernels."""
    launches, n_bytes, flops = (sum(x[i] for x in count.found.values()) for i in range(3))
    names = sorted(count.found.items(), key=lambda one: -one[1][0])
    return {
        "triton": len(count.own), "other": round(launches - len(count.own), 1),
        "waits": count.waits, "launches": round(launches, 1),
        "calls": round(launches - count.captured + graphed, 1), "mb": round(n_bytes / 1e6, 1),
        "gflop": round(flops / 1e9, 1),
        "us": round(sum(microseconds(*x) for x in count.found.values()), 1),
        "most": " ".join(f"{name} {x[0]:g}" for name, x in names[:8]),
    }  # fmt: skip


def show(count: Count) -> None:
    """Print the kernels of a step by their computed time."""
    rows = [(name, *found, microseconds(*found)) for name, found in count.found.items()]
    small = [row for row in rows if row[-1] < SMALL_US]
    rows = sorted((row for row in rows if row not in small), key=lambda row: -row[-1])
    for name, part in (("others", small), ("all", rows + small)):
        rows.append((name, *(sum(row[i] for row in part) for i in range(1, 5))))
    for name, launches, n_bytes, flops, us in rows:
        print(f"  {name:32} {launches:5.0f} launches {n_bytes / 1e6:9.1f} MB "
              f"{flops / 1e9:8.1f} GFLOP {us:8.1f} us")  # fmt: skip


def train_rows() -> Iterator[tuple[dict, Count]]:
    """B 10 and B 64, each in two forms."""
    for B in (10, 64):
        for form in ("plain", "fused"):
            count, memory = training_step(GPT2Config(**MEDIUM), B, 128, form == "fused")
            yield {"form": form, "work": "train", "B": B, "T": 128, "graphs": 1}, count
            print("  memory, MiB:", ", ".join(f"{name} {n >> 20}" for name, n in memory.items()),
                  f"= {sum(memory.values()) >> 20}")  # fmt: skip


def generate_rows() -> Iterator[tuple[dict, Count]]:
    """B 1, with graphs and without; B 8 and 32; 5 beams of 4 and of 16 prompts; a sampled token."""
    config = GPT2Config(**MEDIUM)
    with torch.device("meta"):
        model = GPT2(config).bfloat16().eval()
    model = model.to_empty(device="cpu")  # its weights are never used in products
    for weight in model.parameters():
        weight.data.zero_()
    prefix = Prefix.random(config, 10, seed=0)
    sampling = {"do_sample": True, "top_k": 50, "top_p": 0.9}
    for B, graphed, options in (
        (1, False, {}), (1, True, {}), (8, True, {}), (32, True, {}), (4, True, {"num_beams": 5}),
        (16, True, {"num_beams": 5}), (1, True, sampling),
    ):  # fmt: skip
        beams = options.get("num_beams", 1)
        sizes = {"work": "generate", "B": B, "beams": beams, "graphs": int(graphed)}
        sizes["sampling"] = int("do_sample" in options)
        few, some = kernels.FEW_ROWS, kernels.SOME_ROWS
        for form, low, *most in (
            ("fused", 0, 0, 0), ("few rows", 1, few, 0), ("some rows", few + 1, few, some),
        ):  # fmt: skip
            if form == "fused" or (graphed and low <= B * beams <= max(most)):
                limits = dict(zip(("FEW_ROWS", "SOME_ROWS"), most, strict=True))
                with patch.multiple(kernels, **limits):
                    yield sizes | {"form": form}, token(model, prefix, B, graphed, **options)


PARTS: dict[str, Callable[[], Iterator]] = {"train": train_rows, "generate": generate_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the launches of a step, without a GPU.")
    parser.add_argument("--out", type=Path, help="also put the rows into this CSV")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    args = parser.parse_args()
    on = {name: machine()[name] for name in ("torch", "commit")}
    for part in args.part:
        for sizes, count in PARTS[part]():
            row = dict.fromkeys(KEY, "") | sizes | columns(count, bool(sizes["graphs"]))
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            show(count)
            if args.out:
                add_row(args.out, row | on, KEY)


if __name__ == "__main__":
    main()
