"""The embedded notes agree with their description in minprefix/assets/notes/README.md."""

import json
import random
import re

import pytest

from minprefix.data.load import load_examples
from minprefix.data.splits import choose
from minprefix.models.tokenizer import Tokenizer
from minprefix.models.weights import ASSETS
from tools.notes import make, measure
from tools.notes.names import SURNAMES, TOWNS
from tools.notes.telling import (
    SMALL,
    Draw,
    Person,
    Story,
    evaluate,
    names_in,
    polish,
    sentences,
    spell,
    tell,
)

SPLITS = make.build()
NOTES = [note for notes in SPLITS.values() for note in notes]


def numbers(text: str) -> set[int]:
    """The numbers in a text, in digits or words (except "one", which may be a pronoun)."""
    words = re.findall(r"\d[\d,]*|[a-z]+", text.lower())
    small = {word: number for number, word in enumerate(SMALL) if number > 1}
    found = {int(word.replace(",", "")) for word in words if word[0].isdigit()}
    return found | {small[word] for word in words if word in small}


def all_facts(story: Story) -> dict:
    return story.facts | {n: evaluate(formula, story.facts) for n, formula in story.derived.items()}


def operands(story: Story, formula: str) -> set[str]:
    """The drawn facts that a formula is about, through derived ones."""
    found = set()
    for name in names_in(formula):
        found |= operands(story, story.derived[name]) if name in story.derived else {name}
    return found


def test_files_are_what_make_writes():
    for split, notes in SPLITS.items():
        written = (make.HERE / f"{split}.jsonl").read_bytes()
        lines = make.to_lines(make.rows(split, notes))
        assert written == lines.encode("utf-8"), f"{split}: run make.py again"


def test_data_card_has_the_true_figures():
    card = (make.HERE / "README.md").read_text(encoding="utf-8")
    for table in measure.report():
        assert table in card, "copy the output of measure.py"


def test_sizes():
    assert {split: len(notes) for split, notes in SPLITS.items()} == make.SPLITS
    assert make.SPLITS["train"] >= 1000
    assert sum((make.HERE / f"{split}.jsonl").stat().st_size for split in SPLITS) < 1.5e6


def test_nothing_comes_twice():
    assert len({note.document for note in NOTES}) == len(NOTES)
    assert len({note.summary for note in NOTES}) == len(NOTES)
    assert len({str(note.story.facts) for note in NOTES}) == len(NOTES)


@pytest.mark.parametrize("held_out, seen", [("test", "train"), ("test", "dev"), ("dev", "train")])
def test_held_out_names_are_new(held_out, seen):
    text = make.to_lines(make.rows(seen, SPLITS[seen]))
    names = TOWNS[held_out] + SURNAMES[held_out]
    assert not [name for name in names if re.search(rf"\b{name}\b", text)]
    for note in SPLITS[held_out]:
        assert any(town in note.summary for town in TOWNS[held_out]), note.summary


def test_what_a_summary_is_about_is_in_the_document():
    """Of facts that have no other words: the event, the place, the team, the animal."""
    for note in NOTES:
        facts = note.story.facts
        for name in note.stated & {"race", "animal", "town", "far", "us", "them", "club", "team"}:
            assert facts[name] in note.document, f"{name}: {note.summary} <- {note.document}"
        if note.story.topic == "news/culture":
            event = facts.get("books_left", facts["kind"])  # a comic is one of the comics
            assert event in note.document, f"{note.summary} <- {note.document}"


def test_numbers_of_a_summary_are_in_the_document_or_derived():
    derived_ones = 0
    for note in NOTES:
        story, known = note.story, numbers(note.document)
        rules = {n: evaluate(story.derived[n], story.facts) for n in story.derived}
        for number in numbers(note.summary) - known:
            (rule,) = [n for n in rules if rules[n] == number and n in note.stated][:1] or [None]
            assert rule, f"{number} comes from nowhere: {note.summary} <- {note.document}"
        for name in note.stated & set(rules):  # also where the number happens to be there
            derived_ones += 1
            for operand in operands(story, name):
                fact = story.facts[operand]
                there = fact in known if isinstance(fact, int) else fact in note.document
                assert there, f"{operand} is not in: {note.document}"
    assert derived_ones > len(NOTES) / 5


# What a summary says, where its document says it (each number a group), and what is done with them.
READINGS = {
    "a road is shut": (
        r"(\w+) hours",
        r"(?:road at|From) (\w+)(?: and [a-z ]+ at| o'clock until| in the morning until) (\w+)",
        lambda closed, opened: opened - closed,
    ),
    "an animal is stuck": (
        r"(\w+) hours",
        r"[Ss]ince (\w+) o'clock.* (?:It was|struck) (\w+) when",
        lambda start, end: end - start,
    ),
    "homes without power": (
        r"([\d,]+) (?:homes|houses|households)",
        r"([\d,]+) homes [^.]*? ([\d,]+) (?:lost|more|others)",
        lambda homes, more: homes + more,
    ),
    "visitors": (
        r"([\d,]{4,})",
        r"([\d,]+) \w+(?: came)? on Friday, ([\d,]+) on Saturday and ([\d,]+) on",
        lambda *days: sum(days),
    ),
    "games without": (
        r"(\w+) games",
        r"(?:won|lost) (\w+) games and drawn (\w+)",
        lambda *games: sum(games),
    ),
    "jobs": (
        r"(\d+) (?:jobs|people)",
        r"(\d+) (?:people|workers) (?!will be|will have)[a-z ]+? (\d+) (?:at|in) ",
        lambda *jobs: sum(jobs),
    ),
}


@pytest.mark.parametrize("name", READINGS)
def test_derived_numbers_by_reading_the_document(name):
    in_summary, in_document, rule = READINGS[name]
    read = 0
    for note in NOTES:
        said, given = re.search(in_summary, note.summary), re.search(in_document, note.document)
        if said and given and note.story.derived:
            operands = [max(numbers(group)) for group in given.groups()]
            assert numbers(said[1]) == {rule(*operands)}, f"{note.summary} <- {note.document}"
            read += 1
    assert read > 30


def test_claims_hold_and_can_be_checked_in_the_document():
    for note in NOTES:
        for claim in note.story.claims:
            assert evaluate(claim, all_facts(note.story)), f"{claim}: {note.summary}"
            for operand in operands(note.story, claim):
                assert note.story.facts[operand] in numbers(note.document), (claim, note.document)


@pytest.mark.parametrize(
    "words, claimed",
    [
        (r"\b(more|fewer|less|risen|grown|fallen|dropped|gone down|halved|doubled)\b", True),
        (r"\b(record|sunnier|wetter|drier|ahead of|strongest|fastest)\b", True),
        (r"\b(rejected|turned down|approved|agreed)\b", True),
    ],
)
def test_comparisons_in_summaries_are_claims(words, claimed):
    found = [note for note in NOTES if re.search(words, note.summary)]
    assert {bool(n.story.claims or n.story.derived) for n in found} == {claimed}


def test_names_of_a_summary_are_in_the_document():
    for note in NOTES:
        for name in re.findall(r"(?<=\w )[A-Z]\w+", note.summary):
            assert re.search(rf"\b{name}\b", note.document), f"{name}: {note.document}"


def test_no_sentence_has_all_that_the_summary_says():
    for note in NOTES:
        facts = all_facts(note.story)
        needed = {
            spell(facts[n]) if isinstance(facts[n], int) else getattr(facts[n], "last", facts[n])
            for n in note.stated
        }
        for part in sentences(note.document):
            there = [re.search(rf"\b{re.escape(fact)}\b", part) for fact in needed]
            assert not all(there), f"{part} has {needed}"


def test_text_is_well_formed():
    for text in [part for n in NOTES for part in [*sentences(n.document), n.summary]]:
        assert re.fullmatch(r"[A-Z\d].*[.?]", text) and "  " not in text, text
        assert not re.search(r"[\[\]{}|]", text), text
        assert not re.search(
            r"\b[Aa] (?!one|uni|use)[aeiouAEIOU]|\b[Aa]n (?!hour)[^aeiouAEIOU81]", text
        ), text
        assert not re.search(r"\s[,.?]|[,.?][,.?]|s's\b|\b(\w+) \1\b", text), text
        assert text.isascii() or "é" in text


def test_lengths_fit_a_small_model():
    tokenizer = Tokenizer.from_folder(ASSETS / "mini")
    for note in NOTES:
        assert 60 <= len(tokenizer.encode(note.document)) <= 200, note.document
        assert 10 <= len(tokenizer.encode(note.summary)) <= 45, note.summary


def test_a_part_of_the_document_is_no_summary():
    scores = measure.baselines(load_examples("notes", "dev"))
    assert 15 < scores["first sentence"]["R-L"] < 35
    assert scores["best sentence (oracle)"]["R-L"] < 45
    assert scores["random sentence"]["R-L"] < scores["first sentence"]["R-L"]


def test_they_load_as_articles_and_part_by_topic():
    train, test = load_examples("notes", "train"), load_examples("notes", "test")
    row = json.loads((make.HERE / "train.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert (train[0].source, train[0].targets) == (row["document"], (row["summary"],))
    assert (train[0].id, train[0].group) == ("train-1", row["topic"])
    groups = {e.group for e in choose(test, "news-to-sports", "test")}
    assert {group.split("/")[0] for group in groups} == {"sport"} and len(groups) > 5
    assert {e.group.split("/")[0] for e in choose(train, "news-to-sports", "train")} == {"news"}
    near = {e.group for e in choose(train, "within-news", "train")}
    far = {e.group for e in choose(test, "within-news", "test")}
    assert near == {"news/council", "news/business", "news/traffic"}
    assert far == {"news/weather", "news/culture", "news/nature", "news/school"}


def test_how_a_story_is_told():
    facts = {"p": Person("Emma", "Nash"), "a": 3, "b": 1200, "animal": "owl", "lions": "Lions"}
    story = Story(
        "news/x", facts,
        parts={"open": "a {animal} met {p}.", "x": "{p} had {a} [eggs|eggs].", "y": "{b} came."},
        orders=("open x y",), extras=("{p.he} is {a:d}.",),
        summary="{lions}'s {p} saw {total} [[|]things|things].", derived={"total": "a + b"},
    )  # fmt: skip
    document, summary, stated = tell(story, random.Random(0))
    told = sentences(document)
    assert told[:2] == ["An owl met Emma Nash.", "Nash had three eggs."]
    assert sorted(told[2:]) == ["1,200 came.", "She is 3."]
    assert summary == "Lions' Emma Nash saw 1,203 things." and stated == {"lions", "p", "total"}
    assert polish("a 80 mile walk , a hour. an end") == "An 80 mile walk, a hour. An end"


def test_nobody_is_drawn_twice_for_one_story():
    draw = Draw(random.Random(0), "dev")
    people = [draw.person() for _ in range(10)]
    assert len({person.last for person in people}) == len({person.first for person in people}) == 10
    assert len({draw.town() for _ in range(10)}) == 10
