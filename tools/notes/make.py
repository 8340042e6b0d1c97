"""The embedded summarisation data: invented notes from small towns, written by rule.

`python -m tools.notes.make` rewrites train.jsonl, dev.jsonl and test.jsonl in the assets, byte for
byte the same each time; with --show N it prints some pairs instead. `measure.py` has the data
card's figures. A line has XSum's keys [1] and a topic:
{"document": ..., "summary": ..., "id": ..., "topic": "news/council"}.
Read `telling.Story`, one of the scenarios in `council.py`, then `build` here: a scenario first
draws its facts; document and summary are then written from the same facts by different templates.
[1] https://github.com/EdinburghNLP/XSum
"""

import argparse
import json
import pathlib
import random
from dataclasses import dataclass

from tools.notes import business, council, life, nature, roads, sport, weather
from tools.notes.telling import Draw, Story, tell

HERE = pathlib.Path(__file__).parents[2] / "minprefix" / "assets" / "notes"
SEED = 2018  # the year of XSum
SPLITS = {"train": 1400, "dev": 150, "test": 250}  # notes
SCENARIOS = (
    council.vote, council.survey, business.results, business.site, roads.crash, roads.works,
    weather.storm, weather.record, life.festival, life.prize, life.school, nature.count,
    nature.rescue, sport.football, sport.race, sport.injury, sport.coach,
)  # fmt: skip


@dataclass(frozen=True)
class Note:
    """A note, with information for tests that is not in the file."""

    story: Story
    document: str
    summary: str
    stated: set[str]  # the facts that the summary names


def build() -> dict[str, list[Note]]:
    """All splits; the scenarios alternate, and no facts, document or summary occur twice."""
    seen, splits = set(), {}
    for split, size in SPLITS.items():
        rng = random.Random(f"{SEED} {split}")
        notes = splits[split] = []
        while len(notes) < size:
            scenario = SCENARIOS[len(notes) % len(SCENARIOS)]
            story = scenario(Draw(rng, split))
            note = Note(story, *tell(story, rng))
            new = {note.document, note.summary, str(story.facts)}
            if not new & seen:
                seen |= new
                notes.append(note)
        rng.shuffle(notes)
    return splits


def rows(split: str, notes: list[Note]) -> list[dict]:
    return [
        {
            "document": note.document,
            "summary": note.summary,
            "id": f"{split}-{number}",
            "topic": note.story.topic,
        }
        for number, note in enumerate(notes, 1)
    ]


def to_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rewrite the embedded notes.")
    parser.add_argument("--show", type=int, metavar="N", help="print N pairs of train instead")
    options = parser.parse_args()
    splits = {split: rows(split, notes) for split, notes in build().items()}
    if options.show:
        for row in splits["train"][: options.show]:
            print(f"[{row['topic']}] {row['document']}\n  => {row['summary']}\n")
        return
    for split, found in splits.items():
        (HERE / f"{split}.jsonl").write_text(to_lines(found), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
