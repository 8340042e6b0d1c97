"""Settings of each method: the paper's for official models, and for mini the best on the dev set.

Read `METHODS` (how the methods differ), `PAPER` in methods/paper.py, `GRID` (the trials of the
sweep for mini), then `Plan.run`, which makes a `Run` from them. A Plan holds the user's choices;
the tables and figures are functions of it (`experiments.py`).

Numbers are from Li & Liang 2021, arXiv v1 Table 5 [1] and ACL appendix A.2, Tables 6 and 8 [2].

[1] https://arxiv.org/abs/2101.00190v1   [2] https://aclanthology.org/2021.acl-long.353
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.paper.results import pick, quality, read_rows
from benchmarks.paper.run import Run
from minprefix.data.splits import LOW_DATA_SEEDS, LOW_DATA_SIZES, LOW_DATA_SUBSETS
from minprefix.generation.config import GenerationConfig
from minprefix.methods.config import BaselineConfig, SearchConfig
from minprefix.methods.paper import PAPER
from minprefix.methods.search.search import GRADIENT_COST
from minprefix.prefix.config import PrefixConfig
from minprefix.training.config import TrainConfig

SWEEP = Path(__file__).parents[2] / "benchmarks" / "paper" / "sweep-mini.csv"
LOW_INIT, LOW_LEN = "table-to-text:", 6  # [2] A.2: the start and length of low-data prefixes
EMBEDDING = "embedding-mlp"  # the authors' code also trains virtual tokens through an MLP


def emb(n: int) -> dict:
    return {"method": "prefix", "prefix": {"parametrisation": EMBEDDING, "prefix_len": n}}


def infix(n: int) -> dict:
    return {"method": "prefix", "prefix": {"place": "infix", "prefix_len": n}}


# By the paper's name: the training method, and differences from the defaults of its configs. The
# paper's narrow adapter keeps as many parameters as its prefix, 0.1 % of GPT-2 medium; the prefix
# of `mini` is 0.35 % of the model, so for mini there is also an adapter of that size.
METHODS = {
    "FT-FULL": {"method": "finetune"},
    "FT-TOP2": {"method": "ft-top", "baseline": {"top_layers": 2}},
    "ADAPTER (3%)": {"method": "adapter", "baseline": {"adapter_share": 0.03}},
    "ADAPTER (0.1%)": {"method": "adapter", "baseline": {"adapter_share": 0.001}},
    "ADAPTER (0.35%)": {"method": "adapter", "baseline": {"adapter_share": 0.0035}},
    "PREFIX": {"method": "prefix", "prefix": {}},
    "EMB-1": emb(1), "EMB-10": emb(10), "EMB-20": emb(20),
    "INFIX-1": infix(1), "INFIX-10": infix(10), "INFIX-20": infix(20),
    "DISCRETE": {"method": "search", "after": 0},
    "DISCRETE AROUND": {"method": "search", "after": 3},
}  # fmt: skip

# [2] A.2, Table 8, low data: lr, batch; most update steps by size (tuned there in 100 .. 600)
PAPER_LOW = {"lr": 5e-5, "batch_size": 10}
PAPER_LOW_STEPS = {
    "PREFIX": {50: 200, 100: 200, 200: 200, 500: 400},
    "FT-FULL": {50: 100, 100: 100, 200: 200, 500: 400},
}

# no warm-up and no early stop, as in the paper; dev pairs of an evaluation, at most
PLAIN = {"warmup_steps": 0, "patience": 0, "eval_every": 200, "eval_pairs": 1000}
# mini: the same for all methods, so that their effort is equal
MINI = {"steps": 2500, "batch_size": 16}
MINI_LEN = 10  # prefix length
EVAL_PAIRS = 500  # dev pairs in an evaluation
MINI_LOW = {"batch_size": 10}
# mini: four learning rates for each method, by what it trains; chosen on the dev set
GRID = {
    "finetune": (2e-4, 5e-4, 1e-3, 2e-3),
    "ft-top": (1e-3, 2e-3, 5e-3, 1e-2),
    "adapter": (2e-3, 5e-3, 1e-2, 2e-2),
    "prefix": (5e-4, 1e-3, 2e-3, 5e-3),
}
# mini, low data: learning rates x most steps, for each method; chosen on the dev set
GRID_LOW = dict.fromkeys(("finetune", "prefix"), ((1e-4, 3e-4, 1e-3, 3e-3), (100, 400)))
NO_SWEEP = "no sweep"  # in the scale of rows whose learning rate is the default
SWEPT = "e2e"  # data sets without a sweep use the settings chosen on this one
SWEPT_SIZE = {50: 100, 100: 100, 200: 100, 500: 500}  # low data: size -> size of the sweep it uses
SWEEP_SUBSET = 100  # the seed of a separate subset, not one of those that are reported

QUICK = {"steps": 12, "batch_size": 8, "eval_every": 12, "eval_pairs": 16}
QUICK_TABLES = 16


def family(name: str) -> str:
    """The method whose settings are used: INFIX-10 for INFIX-20, and EMB-10 for EMB-n."""
    kind = name.split("-")[0]
    return f"{kind}-10" if kind in ("EMB", "INFIX") else name


@dataclass(frozen=True)
class Plan:
    """The user's choices for all experiments. See `presets` for a model's settings."""

    model: str = "mini"  # "mini", or an official model: a name or a folder
    quick: bool = False  # about a minute for each, for a quick try and for tests
    seeds: tuple[int, ...] = (0, 1, 2)  # of experiments on all data
    low_seeds: tuple[int, ...] = tuple(range(LOW_DATA_SEEDS))  # of each subset of low data
    subsets: tuple[int, ...] = tuple(range(LOW_DATA_SUBSETS))
    sizes: tuple[int, ...] = LOW_DATA_SIZES  # training pairs
    steps: int | None = None  # instead of the preset's; for low data, the maximum
    beams: int | None = None  # None = 5 as in the paper, 1 with quick
    precision: str = "auto"  # of training
    batch_size: int = 64  # tables decoded at a time
    length_data: str = "dart"  # for figure 4: the paper's, or another one if it is missing
    sweep: Path | None = SWEEP  # trials on the dev set; None = use the defaults
    swept: bool = False  # whether a model other than mini uses mini's settings and `sweep`

    @property
    def presets(self) -> str:
        return "mini" if self.model == "mini" or self.quick or self.swept else "paper"

    @property
    def scale(self) -> str:
        """How the runs differ from the preset."""
        words = ["quick"] if self.quick else []
        if self.steps is not None:
            words.append(f"{self.steps} steps")
        return ", ".join(words) or f"preset ({self.presets})"

    def scale_of(self, run: Run) -> str:
        """`scale` for the run's row. It also says if its settings were not chosen on a dev set, or
        by trials of another length or on another data set."""
        if run.train is None or self.quick:
            return self.scale
        if run.train.lr is None:
            return f"{self.scale}, {NO_SWEEP}"
        if self.presets == "paper" or self.sweep is None or run.size or run.split == "dev":
            return self.scale
        rows = pick(read_rows(self.sweep), size="")
        here = pick(rows, data=run.data, method=run.method)
        other = {row["steps"] for row in here or rows} - {str(run.train.steps)}
        where = "" if run.data == SWEPT or here else f" on {SWEPT}"
        if not other and not where:
            return self.scale
        steps = f"{'/'.join(sorted(other))}-step " if other else ""
        return f"{self.scale}, rates of {steps}trials{where}"

    def decoding(self) -> GenerationConfig:
        beams = self.beams or (1 if self.quick else 5)
        return GenerationConfig(max_new_tokens=40 if self.quick else 100, num_beams=beams)

    def run(self, data: str, name: str, seed: int, *, size: int | None = None, **changes) -> Run:
        """The run of a method in `METHODS`.

        Args:
            size: number of training pairs in low data, with a prefix from words; None = all.
            changes: fields of the run; "prefix" holds changes to its PrefixConfig, "train" to
                its TrainConfig.
        """
        method = METHODS[name]
        prefix = dict(changes.pop("prefix", {}))
        trained = dict(changes.pop("train", {}))
        tables = QUICK_TABLES if self.quick else None
        fixed = {"tables": tables, "decoding": self.decoding(), "batch_size": self.batch_size}
        run = Run(data, self.model, size=size, **fixed | changes)
        if method["method"] == "search":
            return replace(run, search=self.search(seed, method["after"]))
        settings, length = self.settings(data, name, size, prefix.get("init"))
        train = TrainConfig(
            method=method["method"], seed=seed, precision=self.precision, samples=0,
            **PLAIN | settings | trained,
        )  # fmt: skip
        run = replace(run, train=train)
        if method["method"] == "prefix":
            start = {"init": "words", "init_text": LOW_INIT} if size else {}
            config = {"prefix_len": length, "init": "random"} | start | method["prefix"] | prefix
            return replace(run, prefix=PrefixConfig(**config))
        if "baseline" in method:
            return replace(run, baseline=BaselineConfig(**method["baseline"]))
        return run

    def search(self, seed: int, after: int) -> SearchConfig:
        """The search for a discrete prompt.

        For mini it may evaluate as many rows as a training run and the four trials for its learning
        rate together, where the gradient of a row counts as `GRADIENT_COST`. For official models,
        `--steps` does not change it.

        after: how many of its tokens come after the table (instead of the bos).
        """
        if self.quick:
            return SearchConfig(
                prompt_len=4, after=after, steps=2, candidates=8, starts=8, batch_size=8,
                judge_rows=16, eval_pairs=16, seed=seed,
            )  # fmt: skip
        if self.presets == "paper":
            return SearchConfig(after=after, seed=seed, precision=self.precision)
        trainings = 1 + len(GRID["prefix"])
        rows = (self.steps or MINI["steps"]) * MINI["batch_size"]
        return SearchConfig(
            after=after, seed=seed, precision=self.precision, eval_pairs=EVAL_PAIRS,
            budget=GRADIENT_COST * trainings * rows,
        )  # fmt: skip

    def settings(self, data: str, name: str, size: int | None, init: str | None):
        """Fields of TrainConfig, and the prefix length."""
        if self.quick:
            return QUICK | {"steps": self.steps or QUICK["steps"]}, LOW_LEN if size else MINI_LEN
        if self.presets == "paper":
            return self._paper(data, name, size)
        chosen = self._chosen(data, name, size, init)
        steps = self.steps or MINI["steps"]
        if size:
            steps = min(steps, chosen.pop("steps", 200))
            return MINI_LOW | {"steps": steps, "eval_every": max(1, steps // 10)} | chosen, LOW_LEN
        chosen.pop("steps", None)
        every = {"eval_every": max(1, steps // 5), "eval_pairs": EVAL_PAIRS}
        return MINI | every | chosen | {"steps": steps}, MINI_LEN

    def _paper(self, data: str, name: str, size: int | None):
        if size:
            by_size = PAPER_LOW_STEPS["FT-FULL" if name == "FT-FULL" else "PREFIX"]
            steps = min(by_size.get(size, 400), self.steps or 400)
            return PAPER_LOW | {"steps": steps, "eval_every": 20}, LOW_LEN
        kind = name if (name, data) in PAPER else "PREFIX"
        lr, epochs, batch, length = PAPER[kind, data]
        steps = {} if self.steps is None else {"steps": self.steps}
        many = {"lr": lr, "epochs": epochs, "batch_size": batch, "eval_every": 1000}
        return many | steps, length

    def _chosen(self, data: str, name: str, size: int | None, init: str | None) -> dict:
        """lr (and, in low data, steps) with the best dev BLEU in the sweep; {} without a sweep.

        A data set without trials uses the settings chosen on `SWEPT`. Failed trials count as
        finished.

        Raises:
            ValueError: the sweep has not finished all trials of the method.
        """
        if self.sweep is None:
            return {}
        size = SWEPT_SIZE.get(size, 100) if size else None
        name = family(name) + (" random" if init == "random" and size else "")
        grid = (GRID_LOW if size else GRID).get(METHODS[name.removesuffix(" random")]["method"], ())
        trials = math.prod(map(len, grid)) if size else len(grid)
        for swept in (data, SWEPT):
            rows = pick(read_rows(self.sweep), data=swept, name=name, size=str(size or ""))
            rows = [row for row in rows if not row.get("problem", "").startswith("not tested")]
            tried = {(r["lr"], r["steps"]) for r in rows if r.get("problem") != "not finished"}
            if rows and len(tried) < trials:
                raise ValueError(
                    f"{self.sweep}: {len(tried)} of {trials} trials of {name} on {swept}"
                    f"{f', {size} pairs,' if size else ''} are finished: run sweep again"
                )
            scored = [row for row in rows if quality(row) is not None]
            if scored:
                best = max(scored, key=quality)
                found = {"lr": float(best["lr"])}
                return found | ({"steps": int(best["steps"])} if size else {})
        return {}
