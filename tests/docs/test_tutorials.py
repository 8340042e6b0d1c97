"""Every tutorial and every file of solutions runs as a script; every tutorial has the same frame.

The frame, which the site relies on, too (jupytext percent format):

    first cell      markdown: the file's one `# ` title, then paragraphs that begin with the
                    bold words of TOP
    sections        `## `; the last three are those of END
    ## Exercises    a numbered list; exercise n is solved by `exercise_n` in the file of the same
                    name in tutorials/solutions/
    ## References   by URL

Each also has a list of common mistakes, cells to predict, exercises with a grade and a hint, and
code within 80 columns.
"""

import ast
import math
import multiprocessing
import re
from pathlib import Path

import jupytext
import pytest
from scripts import run_script

import minprefix
from minprefix.data.load import load_examples
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
SOLUTIONS = sorted((ROOT / "tutorials" / "solutions").glob("[0-9]*.py"))
TOP = ("What you will learn", "What to know first", "Running time", "Sources")
END = ["Recap", "Exercises", "References"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "matplotlib.pyplot"])  # not Triton: 04 chooses its mode
HANGS = 1800  # s: a script that takes longer will not end; how long one may take is not tested


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "tutorials"))


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS + SOLUTIONS, ids=name)
def test_runs_from_any_folder(path: Path, tmp_path: Path, monkeypatch):
    """In a fork of a process that has imported PyTorch, with this one's folder and sys.path."""
    output, folder = tmp_path / "output", tmp_path / "empty"
    folder.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(path.parent)
    process = FORKS.Process(target=run_script, args=(str(path), str(output)))
    process.start()
    process.join(HANGS)
    if process.is_alive():
        process.kill()
        process.join()
    tail = "\n".join(output.read_text("utf-8").splitlines()[-40:])
    assert process.exitcode == 0, (
        f"{name(path)} ended with {process.exitcode}; its last lines:\n{tail}"
    )
    assert not list(folder.iterdir()), "it left files where it was started"


def solved(solution: str) -> set[int]:
    """Numbers of the exercises in a file of solutions: exercise_n, a heading or comment `n. `."""
    functions = [x.name for x in ast.parse(solution).body if isinstance(x, ast.FunctionDef)]
    named = re.findall(r"\d+", " ".join(x for x in functions if x.startswith("exercise")))
    return {int(n) for n in named + re.findall(r"^# (?:## )?(\d+)\. ", solution, re.MULTILINE)}


def frame_problems(text: str, solution: str | None) -> list[str]:
    """What in a tutorial's text differs from the frame above; `solution`: its solutions' text."""
    problems = []
    cells = jupytext.reads(text, fmt="py:percent").cells
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    headings = re.findall(r"^(#+) (.+)$", "\n\n".join(prose), re.MULTILINE)
    titles = [words for marks, words in headings if marks == "#"]
    sections = [words for marks, words in headings if marks == "##"]

    first = cells[0].source if cells and cells[0].cell_type == "markdown" else ""
    if not first.startswith("# ") or len(titles) != 1:
        problems.append(f"the first cell begins with the one `# ` title; titles: {titles}")
    leads = re.findall(r"^\*\*(.+?)[.:]?\*\*", first, re.MULTILINE)
    if tuple(leads) != TOP:
        problems.append(f"the first cell's bold words are {leads}, not {TOP}")
    if sections[-3:] != END:
        problems.append(f"the last sections are {sections[-3:]}, not {END}")
        return problems

    by_section = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", "\n\n".join(prose), re.M))
    if "https://" not in by_section["References"]:
        problems.append("no URL under References")
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", by_section["Exercises"], re.MULTILINE)]
    if numbers != list(range(1, len(numbers) + 1)) or not 3 <= len(numbers) <= 5:
        problems.append(f"exercises are numbered {numbers}, not 1 to 3, 4 or 5")
    if solution is None:
        return [*problems, "there is no file of solutions"]
    if unsolved := sorted(set(numbers) - solved(solution)):
        problems.append(f"the solutions lack exercises {unsolved}")
    return problems


@pytest.mark.parametrize("path", TUTORIALS, ids=name)
def test_frame(path: Path):
    solution = path.parent / "solutions" / path.name
    text = solution.read_text(encoding="utf-8") if solution.exists() else None
    problems = frame_problems(path.read_text(encoding="utf-8"), text)
    assert not problems, "\n".join(problems)


def teaching_problems(text: str) -> list[str]:
    """What a tutorial lacks."""
    cells = jupytext.reads(text, fmt="py:percent").cells
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    code = [line for cell in cells if cell.cell_type == "code" for line in cell.source.split("\n")]
    problems = [f"wider than 80 columns: {line}" for line in code if len(line) > 80]
    if "\n## Common mistakes\n> - " not in prose:
        problems.append("no list of common mistakes")
    if prose.count("**Predict.**") != prose.count("**Answer.**") or "**Predict.**" not in prose:
        problems.append("each **Predict.** has its **Answer.**, and there is one")
    exercises = prose[prose.rindex("## Exercises") : prose.rindex("Solutions:")]
    for exercise in re.split(r"\n(?=\d\. )", exercises)[1:]:
        if not re.match(r"\d\. \*(Easy|Medium|Hard)\.\* ", exercise) or "*Hint:*" not in exercise:
            problems.append(f"no grade or no hint: {exercise[:40]!r}")
    return problems


@pytest.mark.parametrize("path", TUTORIALS, ids=name)
def test_what_teaches_is_there(path: Path):
    problems = teaching_problems(path.read_text(encoding="utf-8"))
    assert not problems, "\n".join(problems)


def test_teaching_problems_are_seen():
    text = TUTORIALS[0].read_text(encoding="utf-8")
    for old, new, told in (
        ("# ## Common mistakes", "# ## Mistakes", "mistakes"),
        ("**Answer.**", "Answer.", "Predict"),
        ("*Easy.* ", "", "no grade"),
        ("*Hint:*", "Hint:", "no hint"),
        ("import minprefix\n", f"import minprefix{' ' * 80}# wide\n", "80 columns"),
    ):
        assert old in text
        problems = teaching_problems(text.replace(old, new, 1))
        assert len(problems) == 1 and told in problems[0], (old, problems)


@pytest.mark.slow
def test_the_short_loop_is_the_trainers(monkeypatch, tmp_path: Path):
    monkeypatch.syspath_prepend(ROOT / "tutorials")
    from short_training import train

    model, tokenizer = minprefix.load("mini")
    model.requires_grad_(False)
    examples = [e for e in load_examples("restaurants", "train") if len(e.table) == 3][:6]
    steps, lr, warmup = 3, 0.05, 2
    one, two = (Prefix.random(model.config, 2, seed=0) for _ in range(2))
    losses = list(train(model, tokenizer, examples, one, steps=steps, lr=lr, warmup=warmup))
    config = TrainConfig(
        steps=steps, lr=lr, warmup_steps=warmup, batch_size=8, precision="fp32", samples=0,
        log_every=1,
    )  # fmt: skip
    Trainer(model, tokenizer, config, examples, [], tmp_path, two).run(progress=False)
    logged = [entry["loss"] for entry in read_log(tmp_path) if "loss" in entry]
    assert losses == pytest.approx(logged, rel=1e-5)  # fp32: a mean, and a sum that is divided
    start = Prefix.random(model.config, 2, seed=0).table()
    assert (one.table() - two.table()).norm() < 1e-3 * (one.table() - start).norm()


def test_every_file_of_solutions_has_its_tutorial():
    assert [path.name for path in SOLUTIONS] == [path.name for path in TUTORIALS]


def test_animation_of_tutorial_4_ends_with_the_weights_under_the_last_maximum(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    from pictures_attention import weights_svg

    svg = weights_svg([("prefix", [0.5, 1.0]), ("0..1", [3.0, 2.0]), ("2..2", [2.5])])
    for tile, end in enumerate((math.exp(1.0 - 3.0), 1.0, 1.0)):  # under m = 3
        steps = re.search(rf"@keyframes b{tile}{{(.*?)}}}}", svg)[1] + "}"
        found = re.findall(r"([^{}]+){transform:scaleY\(([\d.]+)\)}", steps)
        times = [float(x.rstrip("%")) for at, _ in found for x in at.split(",")]
        assert times == sorted(set(times)) and times[-1] == 100  # none replaces another
        assert float(found[-2][1]) == pytest.approx(end, abs=1e-3)


GOOD = """# %% [markdown]
# # Counting
# **What you will learn.** To count.
#
# **What to know first.** Nothing.
#
# **Running time.** Seconds.
#
# **Sources.** [1].

# %%
print(1)

# %% [markdown]
# ## Recap
# One.
# ## Exercises
# 1. Count to two.
# 2. Count to three.
# 3. Count to four.
#
# ## References
# [1] https://example.org
"""
SOLVED = "def exercise_1(): ...\ndef exercise_2(): ...\ndef exercise_3(): ...\n"


def test_frame_problems_are_seen():
    assert frame_problems(GOOD, SOLVED) == []
    for old, new, told in (
        ("# # Counting", "# ## Counting", "title"),
        ("# One.", "# # One", "title"),
        ("**Running time.**", "Running time.", "bold words"),
        ("# ## Recap", "# ## The end", "last sections"),
        ("https://", "", "no URL"),
        ("# 2. Count", "# 3. Count", "numbered"),
    ):
        assert old in GOOD
        problems = frame_problems(GOOD.replace(old, new, 1), SOLVED)
        assert len(problems) == 1 and told in problems[0], (old, problems)
    assert frame_problems(GOOD, None) == ["there is no file of solutions"]
    assert "exercises [2]" in frame_problems(GOOD, SOLVED.replace("exercise_2", "two"))[0]
    assert frame_problems(GOOD, "def exercises_1_and_2(): ...\n# ## 3. Three\n") == []
