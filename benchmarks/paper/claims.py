"""The paper's claims, each with a function that judges it by the rows of our runs.

Read `Verdict` and `decided`, then the claims in the order of the paper. If 0 is outside of the 95 %
interval of a mean difference (by Student's t, over seeds or subsets), its sign decides whether a
claim "holds here" or "does not hold here". Otherwise, and with a single pair, which has no
interval, it is undecided. A claim that two methods are alike holds only if the whole interval is
within `ALIKE`, and is undecided if the interval is wide. Without rows a claim is "not tested".

Sections and tables: [v1] https://arxiv.org/abs/2101.00190v1, [ACL]
https://aclanthology.org/2021.acl-long.353.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.paper.experiments import OTHER_WORDS, TASK_WORDS
from benchmarks.paper.presets import MINI_LEN, NO_SWEEP
from benchmarks.paper.results import Difference, Row, difference, gaps, mean_gap, mean_sd, pick

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds here", "does not hold here", "undecided", "not tested"
MARKS = {HOLDS: "✓", FAILS: "✗", UNDECIDED: "?", UNTESTED: "–"}
ONE_LENGTH = f"the learning rate was chosen at length {MINI_LEN} and used for all lengths"
# Numbers of parameters up to this ratio count as equal. The paper's pair on E2E and WebNLG, both
# "0.1 %" of GPT-2 medium, is our adapter of 368,784 and its prefix of 245,760: 1.5006.
SAME_SIZE = 1.6
UNITS = {"train_loss": "nats of training loss per token"}  # of columns that are not scores
ALIKE = 1.0  # BLEU, below the smallest gap that [v1] argues with (e2e: 69.7 against 68.2)


@dataclass(frozen=True)
class Verdict:
    """The judgement of a claim by our rows."""

    status: str
    numbers: str = ""

    @property
    def marked(self) -> str:
        """The status after its mark."""
        mark = next(sign for status, sign in MARKS.items() if self.status.startswith(status))
        return f"{mark} {self.status}"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, its source, and the function that judges it by our rows."""

    text: str  # a sentence without its full stop
    source: str
    judge: Callable[[Sequence[Row]], Verdict]
    lengths: bool = False  # whether it compares prefix lengths


def decided(gap: Difference) -> str:
    """The status of the claim that a difference is positive."""
    if gap.noise:
        return f"{UNDECIDED} (n = {gap.n})"
    return HOLDS if gap.mean > 0 else FAILS


def compare(a: Sequence[Row], b: Sequence[Row], column: str, what: str) -> Verdict:
    """Whether a is above b; `what` names the difference."""
    gap = difference(a, b, column)
    if gap is None:
        return Verdict(UNTESTED)
    return Verdict(decided(gap), f"{what} is {gap.text(UNITS.get(column, column))}")


def better(a: str, b: str, column: str = "BLEU", **where: str):
    """A judge: the rows called a are above those called b."""

    def judge(rows: Sequence[Row]) -> Verdict:
        rows = pick(rows, **where)
        return compare(pick(rows, name=a), pick(rows, name=b), column, f"{a} - {b}")

    return judge


def alike(
    judge: Callable[[Sequence[Row]], Difference | None], column: str, what: str, above: bool = False
):
    """A judge: the 95 % interval of a difference is within +-ALIKE or, with `above`, higher."""

    def judged(rows: Sequence[Row]) -> Verdict:
        gap = judge(rows)
        if gap is None:
            return Verdict(UNTESTED)
        numbers = f"{what} is {gap.text(column)}"
        if abs(gap.mean) + gap.margin < ALIKE:
            return Verdict(HOLDS, f"{numbers}; the 95 % interval is within {ALIKE:g} BLEU of 0")
        if above and gap.mean - gap.margin > -ALIKE:
            return Verdict(HOLDS, numbers)
        if gap.noise:
            wide = f"; the 95 % interval is ± {gap.margin:.2f}" if gap.error is not None else ""
            return Verdict(decided(gap), numbers + wide)
        return Verdict(FAILS, numbers)

    return judged


# Table 1 -----------------------------------------------------------------------------------------


def size_ratio(a: Sequence[Row], b: Sequence[Row]) -> float:
    """Ratio of the larger to the smaller number of kept parameters; infinite if rows lack it."""
    kept = [mean_sd(rows, "kept") for rows in (a, b)]
    return math.inf if None in kept else max(kept).mean / min(kept).mean


def nearest_adapter(rows: Sequence[Row]) -> str:
    """The adapter whose size is nearest to PREFIX's; "" without one."""
    prefix = pick(rows, name="PREFIX")
    names = dict.fromkeys(row["name"] for row in rows if row["name"].startswith("ADAPTER"))
    return min(names, key=lambda name: size_ratio(prefix, pick(rows, name=name)), default="")


def adapter_gap(rows: Sequence[Row]) -> Verdict:
    """Mean of PREFIX minus the adapter nearest to it in size, over the data sets on which both keep
    equally many parameters; the pairs are the seeds that all of these have."""
    found, said, unequal = [], [], []
    for data, column in ON.items():
        of = pick(rows, data=data)
        a, name = pick(of, name="PREFIX"), nearest_adapter(of)
        b = pick(of, name=name)
        if (gap := difference(a, b, column)) is not None:
            if size_ratio(a, b) > SAME_SIZE:
                kept = [mean_sd(rows, "kept") for rows in (a, b)]
                ours, theirs = (f"{k.mean:,.0f}" if k else "an unknown number" for k in kept)
                sizes = f"PREFIX keeps {ours} parameters, {name} {theirs}"
                unequal.append(f"{NAMES[data]} ({sizes}): {gap.text('BLEU')}")
                continue
            found.append(gaps(a, b, column))
            said.append(f"{NAMES[data]}, {name}: {gap.text('BLEU')}")
    if not found:
        if not unequal:
            return Verdict(UNTESTED)
        return Verdict(f"{UNTESTED}: unequal sizes", f"PREFIX - adapter: {'; '.join(unequal)}")
    seeds = set.intersection(*map(set, found))
    mean = mean_gap([fmean(of[seed] for of in found) for seed in sorted(seeds)])
    if mean is None:
        return Verdict(UNTESTED, f"no seed was run on all data sets; {'; '.join(said)}")
    left_out = [f"not counted, because the sizes differ: {one}" for one in unequal]
    numbers = f"PREFIX - adapter is {mean.text('BLEU')} on average; {'; '.join(said + left_out)}"
    return Verdict(decided(mean), numbers)


NAMES = {"e2e": "E2E", "webnlg": "WebNLG", "dart": "DART"}
ON = {"e2e": "BLEU", "webnlg": "BLEU A", "dart": "BLEU"}
SAID = {  # the numbers in v1
    "e2e": ("69.7 against 68.2", "68.1"),
    "webnlg": ("55.1 against 46.5", "36.0"),
    "dart": ("46.4 against 46.2", "41.0"),
}
TABLE1 = (
    *(
        Claim(
            f"On {NAMES[data]}, prefix-tuning is at least as good as fine-tuning "
            f"({SAID[data][0]} BLEU)",
            "[v1] section 6.1, Table 1",
            better("PREFIX", "FT-FULL", column, data=data),
        )
        for data, column in ON.items()
    ),
    Claim(
        "Prefix-tuning is better than adapters with as many parameters, by 4.1 BLEU on average",
        "[v1] section 6.1, Table 1",
        adapter_gap,
    ),
    *(
        Claim(
            f"On {NAMES[data]}, prefix-tuning is better than fine-tuning the top two layers "
            f"({SAID[data][1]} BLEU)",
            "[v1] section 6.1, Table 1",
            better("PREFIX", "FT-TOP2", column, data=data),
        )
        for data, column in ON.items()
    ),
)

# Table 3 -----------------------------------------------------------------------------------------


def adapters_extrapolate(rows: Sequence[Row]) -> Difference | None:
    a, b = pick(rows, name="ADAPTER (3%)"), pick(rows, name="PREFIX")
    return difference(a, b, "BLEU U")


TABLE3 = (
    Claim(
        "On unseen topics, prefix-tuning is better than fine-tuning (45.6 against 27.7 BLEU)",
        "[v1] section 6.4, Table 1, columns U",
        better("PREFIX", "FT-FULL", "BLEU U"),
    ),
    Claim(
        "On seen topics, fine-tuning is ahead (64.2 against 62.9 BLEU)",
        "[v1] Table 1, columns S",
        better("FT-FULL", "PREFIX", "BLEU S"),
    ),
    Claim(
        "On unseen topics, adapters are better than fine-tuning, too (48.3 against 27.7 BLEU)",
        "[v1] Table 1, columns U",
        better("ADAPTER (3%)", "FT-FULL", "BLEU U"),
    ),
    Claim(
        "Adapters, which also keep the model frozen, extrapolate as well as a prefix",
        "[v1] sections 6.4 and 8",
        alike(adapters_extrapolate, "BLEU U", "ADAPTER (3%) - PREFIX", above=True),
    ),
)

# Table 4 -----------------------------------------------------------------------------------------


def best_of(names: Sequence[str], above: str):
    """A judge: the rows `above` are above the best mean of the rows called `names`."""

    def judge(rows: Sequence[Row]) -> Verdict:
        means = {n: m.mean for n in names if (m := mean_sd(pick(rows, name=n), "BLEU"))}
        if not means:
            return Verdict(UNTESTED)
        best = max(means, key=means.get)
        return better(above, best)(rows)

    return judge


EMBS, INFIXES = ("EMB-1", "EMB-10", "EMB-20"), ("INFIX-1", "INFIX-10", "INFIX-20")
TABLE4 = (
    Claim(
        "Prefix-tuning is better than embedding-only tuning (69.7 against 62.2 BLEU at best)",
        "[v1] section 7.2, Table 4",
        best_of(EMBS, "PREFIX"),
        lengths=True,
    ),
    Claim(
        # by construction: equally many tokens in the same places, and tokens are embeddings
        "Embedding-only tuning is an upper bound for discrete prompts of as many tokens",
        "[v1] section 7.2",
        better("EMB-10", "DISCRETE"),
    ),
    Claim(
        "Embedding-only tuning is also better than discrete prompts with tokens after the table, "
        "which does not follow by construction",
        "[v1] section 7.2; the frame is ours",
        better("EMB-10", "DISCRETE AROUND"),
    ),
    Claim(
        "Prefix-tuning is better than infix-tuning (69.7 against 67.9 BLEU at best)",
        "[v1] section 7.3, Table 4",
        best_of(INFIXES, "PREFIX"),
        lengths=True,
    ),
)

# Figure 3 ----------------------------------------------------------------------------------------


def narrowing(rows: Sequence[Row]) -> Verdict:
    """The gap at the smallest size is larger than at the largest."""
    sizes = sorted({row["x"] for row in rows}, key=int)
    if len(sizes) < 2:
        return Verdict(UNTESTED)
    small, large = (
        gaps(pick(rows, name="PREFIX", x=x), pick(rows, name="FT-FULL", x=x), "BLEU")
        for x in (sizes[0], sizes[-1])
    )
    change = mean_gap([small[unit] - large[unit] for unit in small if unit in large])
    if change is None:
        return Verdict(UNTESTED)
    what = f"PREFIX - FT-FULL at {sizes[0]} pairs minus the same at {sizes[-1]}"
    return Verdict(decided(change), f"{what} is {change.text('BLEU')}")


def at_size(size: int) -> Claim:
    return Claim(
        f"With {size} training pairs, prefix-tuning is better than fine-tuning",
        "[ACL] section 6.3, Figure 3",
        better("PREFIX", "FT-FULL", x=str(size)),
    )


FIGURE3 = (
    Claim(
        "With few training pairs, prefix-tuning is better by 2.9 BLEU on average over the sizes",
        "[ACL] section 6.3, Figure 3",
        better("PREFIX", "FT-FULL"),
    ),
    *(at_size(size) for size in (50, 100, 200, 500)),
    Claim("The gap narrows with more data", "[ACL] section 6.3", narrowing),
)

# Figure 4 ----------------------------------------------------------------------------------------


def lengths(a: str, b: str, column: str = "BLEU"):
    """A judge: length a is above length b."""

    def at(rows: Sequence[Row], x: str) -> list[Row]:
        return [row | {"x": ""} for row in pick(rows, x=x)]  # x is compared, so it must not pair

    def judge(rows: Sequence[Row]) -> Verdict:
        return compare(at(rows, a), at(rows, b), column, f"length {a} - length {b}")

    return judge


FIGURE4 = (
    Claim(
        "Quality rises with the prefix length up to 10",
        "[ACL] section 7.1",
        lengths("10", "1"),
        lengths=True,
    ),
    Claim(
        "Beyond length 10 quality falls slightly: length 40 is worse than length 10",
        "[ACL] section 7.1",
        lengths("10", "40"),
        lengths=True,
    ),
    Claim(
        "Beyond length 10 the training loss continues to fall: it is lower at 40 than at 10",
        "[ACL] section 7.1",
        lengths("10", "40", "train_loss"),
        lengths=True,
    ),
)

# Figure 5 ----------------------------------------------------------------------------------------


def words(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Low-data rows that started from these words."""
    return [row for row in rows if row["x"] == "100" and row["name"] in names]


def words_beat_random(rows: Sequence[Row]) -> Verdict:
    real = words(rows, TASK_WORDS + OTHER_WORDS)
    return compare(real, words(rows, ("random",)), "BLEU", "words - random")


def random_varies_more(rows: Sequence[Row]) -> Verdict:
    """Compare the spread over subsets and seeds of random starts with that of the mean word."""
    sds = {}
    for name in ("random", *TASK_WORDS, *OTHER_WORDS):
        found = mean_sd(words(rows, (name,)), "BLEU")
        if found is not None and found.n > 1:
            sds[name] = found.sd
    chance = sds.pop("random", None)
    if chance is None or not sds:
        return Verdict(UNTESTED)
    mean = sum(sds.values()) / len(sds)
    runs = len(words(rows, ("random",)))
    numbers = (
        f"the standard deviation over {runs} runs is {chance:.2f} BLEU for random starts, and for "
        f"words {mean:.2f} BLEU on average; whether this is chance was not tested"
    )
    return Verdict(f"{UNDECIDED} (n = {runs})", numbers)


def task_words_beat_others(rows: Sequence[Row]) -> Verdict:
    task, other = words(rows, TASK_WORDS), words(rows, OTHER_WORDS)
    return compare(task, other, "BLEU", "task words - other words")


def full_data_start(rows: Sequence[Row]) -> Difference | None:
    rows = pick(rows, x="all")
    a, b = pick(rows, name="table-to-text:"), pick(rows, name="random")
    return difference(a, b, "BLEU")


FIGURE5 = (
    Claim(
        "With 100 pairs, real words are a better start than random numbers",
        "[ACL] section 7.4",
        words_beat_random,
    ),
    Claim("A random start varies more", "[ACL] section 7.4", random_varies_more),
    Claim(
        "Words of the task are slightly better than other words",
        "[ACL] section 7.4",
        task_words_beat_others,
    ),
    Claim(
        "With all data, the start makes no difference",
        "[ACL] section 7.4",
        alike(full_data_start, "BLEU", "words - random"),
    ),
)

# Figure 6 ----------------------------------------------------------------------------------------


def above_20(rows: Sequence[Row]) -> Verdict:
    rows = [row for row in rows if int(row["x"].rstrip("%")) > 20]
    return better("PREFIX", "FT-FULL")(rows)


FIGURE6 = (
    Claim(
        "With more than 20 % of the data, prefix-tuning is better than fine-tuning",
        "[ACL] Figure 6",
        above_20,
    ),
    Claim(
        "With 10 % of the data, prefix-tuning is at most as good as fine-tuning",
        "[ACL] Figure 6",
        better("FT-FULL", "PREFIX", x="10%"),
    ),
)

CLAIMS = {
    "table1": TABLE1,
    "table3": TABLE3,
    "table4": TABLE4,
    "figure3": FIGURE3,
    "figure4": FIGURE4,
    "figure5": FIGURE5,
    "figure6": FIGURE6,
}


def verdicts(experiment: str, rows: Sequence[Row]) -> list[tuple[Claim, Verdict]]:
    """The verdict on each claim of a table or figure. Quick runs do not test a claim."""
    done = [row for row in rows if not row.get("problem")]
    quick = any(row["scale"].startswith("quick") for row in done)
    swept = any(row["model"] == "mini" and NO_SWEEP not in row["scale"] for row in done)
    found = []
    for claim in CLAIMS[experiment]:
        status, numbers = (verdict := claim.judge(done)).status, verdict.numbers
        if quick and numbers:
            status = f"{UNTESTED} (a quick run)"
        elif claim.lengths and numbers and swept:
            numbers += f"; {ONE_LENGTH}"
        found.append((claim, Verdict(status, numbers)))
    return found


def judge(experiment: str, rows: Sequence[Row]) -> list[str]:
    """`verdicts` as one line for each claim: verdict, claim, source, and our numbers."""
    return [
        f"{said.marked}: {claim.text} ({claim.source})."
        + (f" Here, {said.numbers}." if said.numbers else "")
        for claim, said in verdicts(experiment, rows)
    ]
