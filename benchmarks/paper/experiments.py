"""The runs of each table and figure of the paper, in its order.

An experiment is a list of cells. A cell is a run with the name of its row or curve in the paper and
its place x in the figure. A run that two experiments share is run once (`Run.id`). `presets.py` has
the settings of runs. Tables and figures are numbered as in v1; in the ACL version the numbers of
tables are larger by one (v1 Table 1 = ACL Table 2).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.paper.presets import GRID, GRID_LOW, METHODS, MINI, SWEEP_SUBSET, SWEPT_SIZE, Plan
from benchmarks.paper.run import Run
from minprefix.generation.config import GenerationConfig

TABLE1 = ("FT-FULL", "FT-TOP2", "ADAPTER (3%)", "ADAPTER (0.1%)", "PREFIX")
TABLE1_MINI = (*TABLE1[:-1], "ADAPTER (0.35%)", "PREFIX")
TABLE4 = (
    "DISCRETE", "DISCRETE AROUND", "EMB-1", "EMB-10", "EMB-20", "INFIX-1", "INFIX-10", "INFIX-20",
    "PREFIX",
)  # fmt: skip
LENGTHS = (1, 5, 10, 20, 40)  # ACL A.2
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, None)  # ACL Figure 6; None, all data, is ours
TASK_WORDS = ("summarize", "table-to-text:")
OTHER_WORDS = ("active", "elephant", "banana", "beautiful", "divide", "keep")
INITS = ("random", *OTHER_WORDS, *TASK_WORDS)  # Figure 5
SWEEP_TABLES = 200  # dev inputs by which a setting is judged


@dataclass(frozen=True)
class Cell:
    """One run and its place in the table or figure."""

    name: str  # row or curve
    run: Run
    x: str = ""  # place on the x axis; "" in tables


def table1_names(plan: Plan) -> tuple[str, ...]:
    """The rows of table 1; `mini` has one more, an adapter of the same size as its prefix."""
    return TABLE1_MINI if plan.model == "mini" else TABLE1


def table1(plan: Plan) -> list[Cell]:
    """Table 1 (ACL 2): five methods on three data sets."""
    return [
        Cell(name, plan.run(data, name, seed))
        for data in ("e2e", "webnlg", "dart")
        for name in table1_names(plan)
        for seed in plan.seeds
    ]


def table3(plan: Plan) -> list[Cell]:
    """Table 3 (ACL 4) and section 6.4: topics that are not in training, on WebNLG (columns U)."""
    return [cell for cell in table1(plan) if cell.run.data == "webnlg"]


def table4(plan: Plan) -> list[Cell]:
    """Table 4 (ACL 5): embedding-only and infix, and also searched discrete prompts.

    DISCRETE has tokens before the table, a special case of the embeddings of EMB-10. DISCRETE
    AROUND has the same number of tokens, three of them after the table, as in an instruction.
    """
    return [Cell(name, plan.run("e2e", name, seed)) for name in TABLE4 for seed in plan.seeds]


def low_data_cells(plan: Plan, make: Callable[[int, int], Cell]) -> list[Cell]:
    """One cell for each subset and seed."""
    return [make(subset, seed) for subset in plan.subsets for seed in plan.low_seeds]


def figure3(plan: Plan) -> list[Cell]:
    """Figure 3: E2E with few training pairs."""

    def at(name: str, size: int):
        return low_data_cells(
            plan,
            lambda subset, seed: Cell(
                name, plan.run("e2e", name, seed, size=size, subset=subset), str(size)
            ),
        )

    return [c for size in plan.sizes for name in ("FT-FULL", "PREFIX") for c in at(name, size)]


def figure4(plan: Plan) -> list[Cell]:
    """Figure 4: prefix length."""
    return [
        Cell("PREFIX", plan.run(plan.length_data, "PREFIX", seed, prefix={"prefix_len": P}), str(P))
        for P in LENGTHS
        for seed in plan.seeds
    ]


def figure5(plan: Plan) -> list[Cell]:
    """Figure 5: initialisation with 100 training pairs; the same length for all. Then all data."""

    def start(init: str) -> dict:
        return {"init": "random"} if init == "random" else {"init": "words", "init_text": init}

    cells = []
    for init in INITS[:: 4 if plan.quick else 1]:
        cells += low_data_cells(
            plan,
            lambda subset, seed, init=init: Cell(
                init,
                plan.run("e2e", "PREFIX", seed, size=100, subset=subset, prefix=start(init)),
                "100",
            ),
        )
    cells += [
        Cell(init, plan.run("e2e", "PREFIX", seed, prefix=start(init)), "all")
        for init in ("random", "table-to-text:")
        for seed in plan.seeds
    ]
    return cells


def share_run(plan: Plan, name: str, seed: int, share: float | None) -> Run:
    """A run on a share of the data, which differs for each seed; None is the run of table 1."""
    part = {} if share is None else {"share": share, "subset": seed}
    return plan.run("e2e", name, seed, **part)


def figure6(plan: Plan) -> list[Cell]:
    """ACL Figure 6: parts of E2E's training data, the prefix from a random start."""
    return [
        Cell(name, share_run(plan, name, seed, share), f"{share or 1:.0%}")
        for share in SHARES[:: 2 if plan.quick else 1]
        for name in ("FT-FULL", "PREFIX")
        for seed in plan.seeds
    ]


EXPERIMENTS = {
    "table1": table1,
    "table3": table3,
    "table4": table4,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
}
# Parts of the paper that are not run here, for the report.
NOT_HERE = {
    "table1": "– not tested: MoverScore, BERTScore and BLEURT of DART, as they need models.",
    "table3": "– not tested: BART on XSum, news-to-sports and within-news ([v1] Tables 2, 3).",
    "figure3": "– not tested: low data on XSum with BART.",
    "figure4": "– not tested: the prefix length on XSum with BART.",
}


def full_trials(plan: Plan, data: str, names: tuple[str, ...], judged: dict) -> list[Cell]:
    """All data: four learning rates for each method."""
    steps = 6 if plan.quick else plan.steps or MINI["steps"]
    return [
        Cell(name, plan.run(data, name, 0, train={"lr": lr, "steps": steps}, **judged))
        for name in names
        for lr in GRID[METHODS[name]["method"]]
    ]


def low_trials(plan: Plan, judged: dict) -> list[Cell]:
    """Low data: four learning rates x two numbers of steps, on a subset used by no figure."""
    cells = []
    for size in sorted(set(SWEPT_SIZE.values()))[: 1 if plan.quick else None]:
        low = {"size": size, "subset": SWEEP_SUBSET} | judged
        starts = [("FT-FULL", {}), ("PREFIX", {})]
        if size == 100:  # figure 5
            starts += [("PREFIX", {"init": "random"})]
        for name, init in starts:
            rates, most = GRID_LOW[METHODS[name]["method"]]
            for lr in rates:
                for steps in (6,) if plan.quick else most:
                    train = {"lr": lr, "steps": steps, "eval_every": max(1, steps // 10)}
                    run = plan.run("e2e", name, 0, train=train, prefix=init, **low)
                    cells.append(Cell(f"{name} random" if init else name, run))
    return cells


def sweep(plan: Plan) -> list[Cell]:
    """The trials that choose the settings of `mini` on the dev set, equally many for each method.

    Trials that most tables and figures need come first. Each decodes SWEEP_TABLES inputs of the
    official dev set greedily.
    """
    plan = replace(plan, sweep=None)
    greedy = GenerationConfig(max_new_tokens=plan.decoding().max_new_tokens, num_beams=1)
    judged = {"split": "dev", "tables": SWEEP_TABLES, "decoding": greedy}
    if plan.quick:
        judged["tables"] = 8
    first = ("FT-FULL", "PREFIX") if plan.quick else ("PREFIX", "FT-FULL", "EMB-10", "INFIX-10")
    all_names = first if plan.quick else table1_names(plan)
    rest = tuple(name for name in all_names if name not in first)
    return [
        *full_trials(plan, "e2e", first, judged),
        *low_trials(plan, judged),
        *full_trials(plan, "e2e", rest, judged),
        *full_trials(plan, "webnlg", all_names, judged),
        *full_trials(plan, "dart", all_names, judged),
    ]


def restaurants_for(cells: list[Cell]) -> list[Cell]:
    """The same on the embedded tables instead of E2E, for a try without downloads."""
    return [
        replace(cell, run=replace(cell.run, data="restaurants"))
        for cell in cells
        if cell.run.data == "e2e"
    ]
