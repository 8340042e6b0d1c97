"""How many kernels a step of GPT-2 medium's shape launches on a GPU, counted without one.

    python -m benchmarks.kernels.launches [--out FILE.csv] [--version NAME]

Everything runs on the CPU, as it would on a GPU: the launches of our kernels are recorded instead
of made (`kernels.launch.recorded`), all other operators are counted as PyTorch dispatches them
(`Count`). An operator that makes a view or allocates launches nothing, any other counts as one
kernel: some launch more (a sort, a sum by parts), so the number is a lower bound. Layers, heads and
widths are GPT-2 medium's; vocabulary and MLP are small, since they change no count.

Columns: `triton`, our kernels; `other`, those of PyTorch; `waits`, tensors that the host asks for.
`calls` is what the host launches itself: with CUDA graphs one replay and what is not captured.
us_bytes and us_launches are the time of the weights' bytes at GBS and of the launches at LAUNCH_US
each: what remains where kernels do nothing else. A step of generation is the difference of
two generations with a different number of tokens.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.inputs
from benchmarks.machine import add_row, machine
from kernels.launch import recorded
from minprefix.generation import fast
from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate_ids
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.prefix import Prefix

KEY = ("version", "work", "B", "beams", "sampling", "graphs")
GBS = 4100.0  # of a large copy on an H200 (benchmarks/gpu)
LAUNCH_US = 2.0  # from the start of a kernel in a CUDA graph to the start of the next, at least
MEDIUM_BYTES = 2 * 354_823_168  # bf16 weights of GPT-2 medium
NO_KERNEL = {"_unsafe_view", "lift_fresh", "detach", "empty", "empty_like", "empty_strided",
             "new_empty", "new_empty_strided", "result_type", "device"}  # fmt: skip


class Count(TorchDispatchMode):
    """Counts the operators that launch a kernel, by name; `captured`: those inside `graph`."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.captured, self.launches = Counter(), Counter(), []
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.dropout.default and not args[2]:
            return args[0]  # its Python form would copy
        with self:  # an operator that is made of others counts as those
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        before, name = len(self.launches), func._schema.name.split("::")[1]
        if name in ("mm", "addmm"):  # not computed: it takes a CPU long
            result = args[-2].new_zeros(len(args[-2]), args[-1].shape[1])
        else:
            result = func(*args, **kwargs)
        if func.namespace == "minprefix":
            self.add("triton", len(self.launches) - before)
            for x in result:  # nothing has written it
                x.zero_()
        elif name == "_local_scalar_dense":
            self.add("waits", 1)
        elif name not in NO_KERNEL and not views(func):
            self.add(name, 1)
        return result

    def add(self, name: str, n: int) -> None:
        self.all[name] += n
        self.captured[name] += n * self.inside

    @contextmanager
    def graph(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False


def views(func) -> bool:
    """Whether an operator's result is a view of its input."""
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def count(call: Callable[[Count], object], target: str = "sm_90") -> Count:
    """What `call(counter)` launches."""
    counter = Count()
    on_gpu = patch.object(kernels, "on_triton", lambda q: q.shape[-1] in kernels.HEAD_DIMS)
    unchecked = patch.object(kernels.inputs, "check_int", lambda *_, **__: None)  # as on a GPU
    with on_gpu, unchecked, recorded(target) as counter.launches, counter:
        call(counter)
    return counter


def medium() -> tuple[GPT2, Prefix]:
    config = GPT2Config(n_layer=24, n_head=16, n_embd=1024, n_inner=64, vocab_size=1000)
    model = GPT2(config).init_weights(0).bfloat16().eval()
    return model, Prefix.random(config, 10, seed=0)


def generate_row(model: GPT2, prefix: Prefix, B: int, graphs: bool, **options) -> dict:
    """Launches of a token, or of a step of all beams."""

    def texts(n: int) -> Count:
        config = GenerationConfig(max_new_tokens=n, **options)
        fast.KEPT.clear()

        def call(counter: Count) -> None:
            def capture(run, *_):
                def replay():
                    with counter.graph():
                        return run()

                return replay

            with (
                patch.object(fast, "uses_graphs", lambda device: graphs),
                patch.object(fast, "capture", capture),
            ):
                prompts = [[1 + b] * 128 for b in range(B)]
                generate_ids(
                    model, prompts, config, eos_id=model.config.vocab_size - 1, prefix=prefix
                )

        return count(call)

    few, more = texts(9), texts(13)
    step = {name: (more.all[name] - few.all[name]) / 4 for name in more.all}
    inside = {name: (more.captured[name] - few.captured[name]) / 4 for name in more.all}
    outside = sum(step.values()) - sum(inside.values())
    sizes = {"work": "generate", "B": B, "beams": options.get("num_beams", 1)}
    sizes |= {"sampling": int("do_sample" in options), "graphs": int(graphs)}
    return sizes | columns(step, outside + graphs if graphs else outside, MEDIUM_BYTES)


def columns(step: dict[str, float], calls: float, moved: float) -> dict:
    """A row's numbers: a step's launches by name, the host's `calls`, the bytes `moved`."""
    other = {name: n for name, n in step.items() if name not in ("triton", "waits")}
    total = step.get("triton", 0) + sum(other.values())
    names = sorted(other.items(), key=lambda one: -one[1])
    return {
        "triton": round(step.get("triton", 0), 1), "other": round(sum(other.values()), 1),
        "waits": round(step.get("waits", 0), 1), "launches": round(total, 1),
        "calls": round(calls, 1), "us_bytes": round(moved / GBS / 1e3),
        "us_launches": round(LAUNCH_US * total),
        "most": " ".join(f"{name} {n:g}" for name, n in names[:8] if n),
    }  # fmt: skip


def generate_rows() -> Iterator[dict]:
    """B 1, with graphs and without; B 32; 5 beams of 16 prompts; a sampled token."""
    model, prefix = medium()
    sampling = {"do_sample": True, "top_k": 50, "top_p": 0.9}
    yield generate_row(model, prefix, 1, graphs=False)
    for B, options in ((1, {}), (32, {}), (16, {"num_beams": 5}), (1, sampling)):
        yield generate_row(model, prefix, B, graphs=True, **options)


PARTS: dict[str, Callable[[], Iterator[dict]]] = {"generate": generate_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the launches of a step, without a GPU.")
    parser.add_argument("--out", type=Path, help="also put the rows into this CSV")
    parser.add_argument("--version", default="now", help="the name of what is counted (now)")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    args = parser.parse_args()
    torch.manual_seed(0)
    for part in args.part:
        for row in PARTS[part]():
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            if args.out:
                add_row(args.out, {"version": args.version} | row | machine(), KEY)


if __name__ == "__main__":
    main()
