"""Writes the results of a benchmark: bench.csv, profile.csv, kernels.csv and figures."""

import sys
from pathlib import Path

from benchmarks.machine import add_row, machine, read_rows
from benchmarks.peft.peers import Task
from benchmarks.peft.pictures import draw, draw_profile, fixed
from benchmarks.peft.traces import Kernels, kernel_rows, kernels_of, of_one, parts_of, traced

KEY = ("work", "model", "device", "dtype", "data", "labels", "mlp", "B", "T", "P", "beams", "new",
       "method")  # fmt: skip
SHOWN = ("B", "T", "P", "beams", "method", "ms", "tokens_per_s", "peak_mib", "percent", "ratio",
         "note")  # fmt: skip
LONGEST = 12  # kernels of a table that are also printed


class Results:
    """The files of a folder, and the rows of this run."""

    def __init__(self, folder: Path, common: dict, versions: dict):
        self.path, self.common, self.versions = folder / "bench.csv", common, versions
        self.rows: list[dict] = []
        folder.mkdir(parents=True, exist_ok=True)

    def picture(self, name: str) -> Path:
        """The path of a figure, one for each model and dtype."""
        model = Path(self.common["model"]).name
        return self.path.with_name(f"{name}-{model}-{self.common['dtype']}.png")

    def add(self, sizes: dict, method: str, columns: dict) -> None:
        """Write a row immediately, and print it."""
        row = self.common | sizes | {"method": method, "ms": "", "note": ""} | columns
        add_row(self.path, row | self.versions | machine(), KEY)
        self.rows.append({name: row.get(name, "") for name in SHOWN})
        cells = (f"{name} {value}" for name, value in self.rows[-1].items() if value != "")
        print("  ".join(cells), file=sys.stderr, flush=True)

    def draw(self) -> None:
        """Plot all rows of this model, dtype and device."""
        same = ("model", "dtype", "device")
        here = [self.common[name] for name in same]
        rows = [row for row in read_rows(self.path) if [row[name] for name in same] == here]
        draw(rows, self.picture("bench"), ", ".join(here))

    def add_kernels(self, sizes: dict, found: Kernels, total: float | None) -> None:
        """Write kernels.csv for one step or token of ours, which takes `total` microseconds."""
        for n, row in enumerate(kernel_rows(found, total)):
            whole = self.common | sizes | {"method": "minprefix"} | row | machine()
            add_row(self.path.with_name("kernels.csv"), whole, (*KEY, "kernel"))
            if n < LONGEST:
                print(f"{row['us']:10} us {row['share']:5} %  {row['count']:>6} x {row['kernel']}",
                      file=sys.stderr)  # fmt: skip

    def profile_steps(self, task: Task, sizes: dict, methods: dict, rows: dict) -> None:
        """Profile one training step: write profile.csv and its figure for each method, and
        kernels.csv."""
        drawn = []
        for name, method in methods.items():
            run, ms = traced(method.step, task.device)
            if task.device.startswith("cuda"):
                ms = rows[name]["ms"]  # without the profiler
            parts = parts_of(run, task.device, task.model.config.vocab_size, ms)
            drawn.append(self.common | sizes | {"method": name} | parts)
            add_row(self.path.with_name("profile.csv"), drawn[-1] | machine(), KEY)
            if name == "minprefix":
                self.add_kernels(sizes, kernels_of(run, task.device), 1e3 * ms)
        title = f"{self.common['model']}, {task.dtype}, {task.device}: {fixed(sizes)}"
        draw_profile(drawn, self.picture("profile"), title)

    def profile_token(self, task: Task, sizes: dict, method, prompts: list, row: dict) -> None:
        """Write kernels.csv for a step of generation, from the difference between all tokens and
        the first half of them."""
        found = []
        for n in (sizes["new"], sizes["new"] // 2):
            method.texts(prompts, n)  # records its graphs
            run, _ = traced(lambda n=n: method.texts(prompts, n), task.device)
            found.append(kernels_of(run, task.device))
        steps_per_s = row.get("decode_tokens_per_s", 0) / task.batch_size
        total = 1e6 / steps_per_s if steps_per_s else None
        self.add_kernels(sizes, of_one(*found, sizes["new"] - sizes["new"] // 2), total)
