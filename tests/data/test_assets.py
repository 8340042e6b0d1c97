"""The embedded data agrees with its description in minprefix/assets/restaurants/README.md."""

import csv
import json
import re
from pathlib import Path

import pytest

from tools.restaurants import make, words

FIELDS = ["name", "type", "food", "price", "customer rating", "area", "family friendly", "near"]
CLOSED_VALUES = {
    "type": words.TYPES,
    "food": words.CUISINES + words.DISHES,
    "price": list(words.PRICES),
    "customer rating": list(words.RATINGS),
    "area": list(words.AREAS),
}
E2E = Path(__file__).resolve().parents[3] / "shared" / "data" / "e2e"


def read(split: str) -> list[dict]:
    text = (make.HERE / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


ROWS = {split: read(split) for split in make.SPLITS}
PAIRS = [(row["table"], text) for rows in ROWS.values() for row in rows for text in row["text"]]


def places(split: str) -> set[str]:
    """All names that a split's tables mention, as `name` or as `near`."""
    return {
        row["table"][key] for row in ROWS[split] for key in ("name", "near") if key in row["table"]
    }


def family_answer(text: str) -> str | None:
    """yes, no or nothing, by the phrases that the data card lists; "no" is looked for first."""
    card = (make.HERE / "README.md").read_text(encoding="utf-8")
    for answer in ("no", "yes"):
        (phrases,) = re.findall(rf"^- {answer}: (.*)$", card, re.MULTILINE)
        if any(phrase in text.lower() for phrase in phrases.split("; ")):
            return answer
    return None


def test_files_are_what_make_writes():
    for split, rows in make.build().items():
        written = (make.HERE / f"{split}.jsonl").read_bytes()
        assert written == make.to_lines(rows).encode("utf-8"), f"{split}: run make.py again"


def test_data_card_has_the_true_figures():
    card = (make.HERE / "README.md").read_text(encoding="utf-8")
    assert make.format_figures(ROWS) in card, "copy the output of make.py --counts"


def test_sizes():
    for split, size in make.SPLITS.items():
        assert len(ROWS[split]) == size["tables"]
        assert {len(row["text"]) for row in ROWS[split]} == {size["references"]}
    assert sum(len(row["text"]) for row in ROWS["train"]) >= 2000


def test_tables_have_the_paper_s_fields_and_are_distinct():
    tables = [row["table"] for rows in ROWS.values() for row in rows]
    for table in tables:
        assert list(table) == [field for field in FIELDS if field in table]
        assert "name" in table and 3 <= len(table) <= 8
    assert len({json.dumps(table) for table in tables}) == len(tables)


def test_no_reference_occurs_twice():
    texts = [text for _, text in PAIRS]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("held_out, seen", [("test", "train"), ("test", "dev"), ("dev", "train")])
def test_held_out_names_are_new(held_out, seen):
    text = make.to_lines(ROWS[seen])
    assert not [name for name in places(held_out) if name in text]


def test_references_say_each_slot():
    for table, text in PAIRS:
        for field, value in table.items():
            if field == "family friendly":
                assert family_answer(text) == value, text
            else:
                assert value.lower() in text.lower(), f"{field}: {value} is not in: {text}"


def test_references_say_nothing_else():
    for table, text in PAIRS:
        text = text.replace(table["name"], "").replace(table.get("near", table["name"]), "")
        for field, values in CLOSED_VALUES.items():
            said = {value for value in values if re.search(rf"\b{value}\b", text)}
            assert said <= {table.get(field)}, f"{said} is not in the table: {text}"
        if "family friendly" not in table:
            assert family_answer(text) is None, text


def test_references_are_well_formed():
    for _, text in PAIRS:
        assert re.fullmatch(r"[A-ZÉ].*[.?]", text) and "  " not in text, text
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", text), text
        assert not re.search(r"[.?] [a-z]|\s[,.?]|[,.?][,.?]|[,.?]\w", text), text


def test_there_are_letters_beyond_ascii():
    assert [name for name, rows in ROWS.items() if make.to_lines(rows).isascii()] == []


@pytest.mark.skipif(not E2E.exists(), reason="the E2E data is not beside this checkout")
def test_nothing_comes_from_e2e():
    def normalise(text):
        return " ".join(text.lower().split())

    sentences, names = set(), set()
    for path in sorted(E2E.glob("*.csv")):
        with path.open(encoding="utf-8-sig", newline="") as file:
            for meaning, *references in list(csv.reader(file))[1:]:
                sentences.update(normalise(text) for text in references)
                names.update(re.findall(r"(?:name|near)\[(.*?)\]", meaning))
    assert len(sentences) > 1000 and len(names) > 30  # the files were understood
    assert not sentences & {normalise(text) for _, text in PAIRS}
    assert not names & (places("train") | places("dev") | places("test"))
