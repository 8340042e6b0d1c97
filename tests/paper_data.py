"""Small data sets in the official layouts, for the tests of the experiments."""

import csv
from pathlib import Path

from tests.conftest import WORDS

SEEN, UNSEEN = "Airport", "Artist"


def write_e2e(folder: Path) -> None:
    """E2E's CSVs: 120 training pairs, 40 dev pairs, 6 test tables with two texts each."""
    folder.mkdir(parents=True)

    def rows(numbers, texts: int):
        for n in numbers:
            name, food = f"{WORDS[n % 10]} {n}", WORDS[n // 10 % 10]
            for i in range(texts):
                said = ("serves", "offers")[i]
                yield f"name[{name}], food[{food}]", f"{name} {said} {food} food."

    files = {
        "trainset.csv": rows(range(120), 1),
        "devset.csv": rows(range(200, 240), 1),
        "testset_w_refs.csv": rows(range(300, 306), 2),
    }
    for name, pairs in files.items():
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows([("mr", "ref"), *pairs])


def write_webnlg(folder: Path) -> None:
    """WebNLG's XML: seen categories everywhere, an unseen one in the test set."""

    def entries(numbers, categories) -> str:
        return "".join(
            f'<entry category="{category}" eid="Id{n}"><modifiedtripleset><mtriple>{WORDS[n % 10]} '
            f"| place | {WORDS[n // 10]}</mtriple></modifiedtripleset>"
            f'<lex comment="good" lid="1">{WORDS[n % 10]} is in {WORDS[n // 10]}.</lex></entry>'
            for n in numbers
            for category in categories
        )

    files = {
        "train/1triples/one.xml": entries(range(30), [SEEN]),
        "dev/1triples/one.xml": entries(range(30, 36), [SEEN]),
        "test/testdata_with_lex.xml": entries(range(40, 44), [SEEN, UNSEEN]),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<benchmark><entries>{text}</entries></benchmark>")
