"""The embedded table-to-text data: invented restaurants, written by rule.

`python -m tools.restaurants.make` rewrites train.jsonl, dev.jsonl and test.jsonl in the assets,
byte for byte the same each time; with --counts it prints the data card's figures. A line is
{"table": {field: value, ...}, "text": [reference, ...]} with the eight fields of the E2E challenge
[1] under the names in Li & Liang 2021 [2]. No sentence comes from E2E. Read `build`, then
`write_reference`, which divides a table's facts among one to three sentences, distributes the facts
of a sentence over the slots of a frame, and repeats this until the text reads well.
[1] https://arxiv.org/abs/1706.09254   [2] https://arxiv.org/abs/2101.00190
"""

import argparse
import collections
import itertools
import json
import pathlib
import random
import re
from dataclasses import dataclass

from tools.restaurants.words import (
    AREAS,
    CUISINES,
    DISHES,
    FOLLOW_UPS,
    INVITATIONS,
    LANDMARK_PATTERNS,
    LATE_TYPE,
    NAME_PATTERNS,
    NEAR,
    OPENERS,
    OTHER_NOUNS,
    PHRASES,
    PRE,
    PRICES,
    RATINGS,
    TYPES,
)

HERE = pathlib.Path(__file__).parents[2] / "minprefix" / "assets" / "restaurants"
SEED = 2021
SPLITS = {  # references per table differ: several are needed to score a test sentence
    "train": {"tables": 800, "references": 3, "names": 400, "landmarks": 120},
    "dev": {"tables": 80, "references": 4, "names": 60, "landmarks": 25},
    "test": {"tables": 100, "references": 5, "names": 75, "landmarks": 35},
}
FIELD_WEIGHTS = {  # relative frequency of each field in tables
    "type": 4, "food": 3, "price": 2, "customer rating": 2, "area": 2, "family friendly": 2,
    "near": 2,
}  # fmt: skip
FIELD_COUNTS = {2: 6, 3: 16, 4: 26, 5: 28, 6: 17, 7: 7}  # fields besides the name: weight
SENTENCE_COUNTS = {1: (1,), 2: (1, 1, 2), 3: (1, 1, 2), 4: (1, 2, 2, 3), 5: (2, 2, 3), 6: (2, 3, 3)}
DRY_NOUNS = ("pub", "coffee shop", "wine bar", "tea room")  # "a Thai tea room" would mislead
BEFORE_NOUN = ("price word", "price amount", "yes", "no", "place", "food")  # the order of kinds
BEHIND_NOUN = ("meal word", "meal amount", "food", "place", "rating word", "rating score",
               "price word", "price amount", "yes", "no")  # fmt: skip
MOST_FACTS = {"np": 4, "called": 3, "vps": 3, "clauses": 2, "scene": 2}  # in a slot
MOST_SENTENCE_WORDS, MOST_REFERENCE_WORDS = 28, 40
AT_MOST_ONCE = """with where that at by for from in is are has it customers customer prices there
you can serving offering serves offers called children families""".split()  # in a sentence
AWKWARD = re.compile(
    # something more hangs on a relative clause, on a neighbour, on "by customers" or "on the menu"
    r"\b(that|where|rated)\b[^,.?]*\b(that|where|rated|serving|offering|with|charging)\b"
    r"|(near|to|from) (([A-Z]\S*|&) )+(that|where|rated|with|charging|for)\b"
    r"|\b(serving|offering)\b[^,.?]* (that|rated|charging)\b"
    rf"|(pounds|prices|rating|reviews|meal|area|{'|'.join(AREAS)}) (that|where|rated|charging)\b"
    r"|(by customers|on the menu) (?!and|but)\w|(rating|reviews|prices|\d|pounds) (a short|round)"
    # "it" may mean the menu or the meal
    r"|^(?!It )(?![^,]*\bthere\b)[^,]* (and|but) ([\w ]* )?it\b|(and|but) you (can|will) find it"
    # ", and a and b"; nobody eats cuisine; pancakes are not mid-range
    r"|, and (?!it )[^,.]* (and|but) "
    rf"|\b(eat|order|wants?|[Ff]ancy) [^,.?]*\bcuisine|mid-range ({'|'.join(DISHES)})\b"
    # "The pub The Fox", "A pub, The Fox ...", "The place The Fox", "..., a place, ..."
    rf"|^The ({'|'.join(TYPES)}) The |^An? ({'|'.join(TYPES)}), "
    rf"|\b[Tt]he ({'|'.join(OTHER_NOUNS)}) [A-Z]|\b[Aa]n? ({'|'.join(OTHER_NOUNS)})[,.?]"
)


@dataclass(frozen=True)
class Fact:
    """One or two fields of a table that are expressed together."""

    kind: str  # a key of PHRASES
    slots: dict[str, str]  # the values for its phrases
    pre: str = ""  # the words before a noun, if it can stand there
    mood: int = 0  # +1 praises, -1 deters

    def say(self, role: str, rng: random.Random, there: str = "") -> str:
        return rng.choice(PHRASES[self.kind][role]).format(**self.slots, there=there)


def state_place(table: dict[str, str], rng: random.Random) -> Fact:
    area = rng.choice(AREAS[table["area"]]) if "area" in table else ""
    ways = NEAR[:3] if area else NEAR  # "in the old town a short walk from" would need a comma
    near = f"{rng.choice(ways)} {table['near']}" if "near" in table else ""
    pre = "" if near else rng.choice(PRE.get(table["area"], ("",)))
    return Fact("place", {"place": f"{area} {near}".strip()}, pre)


def state_menu(table: dict[str, str], rng: random.Random) -> list[Fact]:
    """Food and price: as one fact in half of the cases that have both."""
    facts, slots = [], {}
    if "food" in table:
        food = table["food"]
        pre = food if food in CUISINES or food == "seafood" else ""
        suffix = rng.choice((" food", " food", " dishes", " cuisine")) if food in CUISINES else ""
        slots["food"] = food + suffix
        facts.append(Fact("food", slots, pre))
    if "price" in table:
        slots["price"] = table["price"]
        slots["priced"] = rng.choice(PRE.get(table["price"], ("",)))
        unit = "amount" if "pounds" in table["price"] else "word"
        facts.append(Fact(f"price {unit}", slots, slots["priced"], PRICES[table["price"]]))
        if "food" in table and rng.random() < 0.5:
            return [Fact(f"meal {unit}", slots, mood=PRICES[table["price"]])]
    return facts


def state_facts(table: dict[str, str], rng: random.Random) -> list[Fact]:
    """The facts of a part of a table besides name and type, in random order."""
    facts = state_menu(table, rng)
    if table.keys() & {"area", "near"}:
        facts.append(state_place(table, rng))
    if "customer rating" in table:
        rating = table["customer rating"]
        kind = "rating score" if "out of" in rating else "rating word"
        facts.append(Fact(kind, {"rating": rating}, mood=RATINGS[rating]))
    if "family friendly" in table:
        answer = table["family friendly"]
        facts.append(Fact(answer, {}, rng.choice(PRE[answer]), 1 if answer == "yes" else -1))
    rng.shuffle(facts)
    return facts


def join(parts: list[str], facts: list[Fact]) -> str:
    """Join parts in prose; "but" joins two if one of them praises and the other deters."""
    contrast = len(parts) == 2 and facts[0].mood * facts[1].mood < 0
    head = ", ".join(parts[:-1])
    return f"{head} {'but' if contrast else 'and'} {parts[-1]}" if head else parts[0]


def noun_phrase(noun: str, tail: str, facts: list[Fact], rng: random.Random) -> str:
    """The noun with up to two facts before it and the others after it."""
    before, behind = [], []
    for fact in facts:
        fits = fact.pre and len(before) < 2 and (fact.kind != "food" or noun not in DRY_NOUNS)
        (before if fits and rng.random() < 0.6 else behind).append(fact)
    before.sort(key=lambda fact: BEFORE_NOUN.index(fact.kind))
    behind.sort(key=lambda fact: BEHIND_NOUN.index(fact.kind))
    withs = [fact for fact in behind if "with" in PHRASES[fact.kind]]
    if len(withs) < 2 and rng.random() < 0.5:
        withs = []
    texts = [fact.say("post", rng) for fact in behind if fact not in withs]
    if withs:  # before the place, which may end in another restaurant's name
        text = "with " + join([fact.say("with", rng) for fact in withs], withs)
        texts.insert(behind[0].kind.startswith(("food", "meal")), text)
    words = [fact.pre for fact in before] + [noun + tail] + texts
    return " ".join(words)


def fill_slot(slot: str, name: str, noun: str, facts: list[Fact], rng: random.Random) -> str:
    """The text of a slot that takes any number of facts."""
    if slot in ("np", "called"):
        return noun_phrase(noun, f" called {name}" if slot == "called" else "", facts, rng)
    if slot == "vps":
        return join([fact.say("vps", rng) for fact in facts], facts)
    there = "" if slot == "scene" else " there"
    clauses = [fact.say("clauses", rng, there) for fact in facts]
    if len(facts) == 2 and facts[0].mood * facts[1].mood < 0 and rng.random() < 0.5:
        return f"although {clauses[0]}, {clauses[1]}"
    return join(clauses, facts)


def fill(frame: str, name: str, noun: str, facts: list[Fact], rng: random.Random) -> str | None:
    """The frame with each fact in one of its slots, or None if they do not fit."""
    parts, rest = {"name": name, "noun": noun}, list(facts)
    slots = re.findall(r"{(\w+)}", frame)
    for slot in slots:
        role = "lead" if slot == "before" else slot
        if role not in ("front", "where", "want", "lead"):
            continue
        fact = next((fact for fact in rest if role in PHRASES[fact.kind]), None)
        if fact is None:
            return None
        rest.remove(fact)
        parts[slot], _, parts["after"] = fact.say(role, rng).partition("|")
    open_slots = [slot for slot in slots if slot in MOST_FACTS]
    if rest and not open_slots:
        return None
    cut = rng.randint(0, len(rest)) if len(open_slots) == 2 else len(rest)
    for slot, share in zip(open_slots, (rest[:cut], rest[cut:]), strict=False):
        if not (slot in ("np", "called") or share) or len(share) > MOST_FACTS[slot]:
            return None
        if slot == "scene" and any(fact.kind.split()[0] in ("rating", "place") for fact in share):
            return None
        parts[slot] = fill_slot(slot, name, noun, share, rng)
    sentence = re.sub(r"[, ]+([.,])", r"\1", frame.format(**parts))
    sentence = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", sentence)
    return sentence[0].upper() + sentence[1:]


def reads_well(sentences: list[str], table: dict[str, str]) -> bool:
    """Whether no sentence repeats itself or runs on, and the type is named once or twice."""
    if sum(len(sentence.split()) for sentence in sentences) > MOST_REFERENCE_WORDS:
        return False
    for sentence in sentences:
        words = collections.Counter(re.findall(r"[a-z]+", sentence.lower()))
        if words.total() > MOST_SENTENCE_WORDS or any(words[word] > 1 for word in AT_MOST_ONCE):
            return False
        if AWKWARD.search(sentence):
            return False
    # "The pub ... This pub ..." starts twice in the same way
    starts = {re.sub("^(The|This) (?=[a-z])", "- ", text).split()[0] for text in sentences}
    again = re.findall("located|situated|stands|found|find|provides", " ".join(sentences).lower())
    mentions = " ".join(sentences).count(table.get("type", ""))
    if len(starts) < len(sentences) or len(set(again)) < len(again):
        return False
    return "type" not in table or mentions in (1, 2)


def write_reference(
    table: dict[str, str], taken: dict[str, str], rng: random.Random
) -> tuple[str, str]:
    """An unused opener, and a text that begins with it and states the whole table."""
    moods = (RATINGS.get(table.get("customer rating"), 0), PRICES.get(table.get("price"), 0))
    inviting = min(moods) >= 0 and len(taken.keys() & set(INVITATIONS)) < 2
    openers = [frame for frame in OPENERS + INVITATIONS * inviting if frame not in taken]
    while True:
        fields = [field for field in table if field not in ("name", "type")]
        rng.shuffle(fields)
        count = rng.choice(SENTENCE_COUNTS[len(fields)])
        cuts = [0, *sorted(rng.sample(range(1, len(fields)), count - 1)), len(fields)]
        noun = table.get("type") or rng.choice(OTHER_NOUNS)
        frame = opener = rng.choice(openers)
        sentences = []
        for start, end in itertools.pairwise(cuts):
            part = {field: table[field] for field in fields[start:end]}
            sentence = fill(frame, table["name"], noun, state_facts(part, rng), rng)
            if sentence is None:
                break
            sentences.append(sentence)
            late = "type" in table and noun not in " ".join(sentences)
            frame = rng.choice(FOLLOW_UPS + (LATE_TYPE,) * 2 * late)
        if len(sentences) == count and reads_well(sentences, table):
            return opener, " ".join(sentences)


def invent_names(patterns: tuple, count: int, rng: random.Random) -> list[str]:
    """Distinct names, none of which contains another, so that no name occurs in two splits."""
    names = []
    while len(names) < count:
        ((pattern, _, first, second),) = rng.choices(patterns, [pattern[1] for pattern in patterns])
        name = pattern.format(rng.choice(first), rng.choice(second))
        halves = set(re.split(" & ", name))
        if len(halves) == name.count("&") + 1 and not any(name in n or n in name for n in names):
            names.append(name)
    return names


def write_table(names: list[str], landmarks: list[str], rng: random.Random) -> dict[str, str]:
    """A restaurant with 2 to 7 fields besides its name, in the paper's order of fields."""
    name, neighbour = rng.sample(names, 2)
    (count,) = rng.choices(list(FIELD_COUNTS), list(FIELD_COUNTS.values()))
    chosen = set()
    while len(chosen) < count:
        chosen.update(rng.choices(list(FIELD_WEIGHTS), list(FIELD_WEIGHTS.values())))
    values = {
        "type": rng.choice(TYPES),
        "food": rng.choice(CUISINES + DISHES),
        "price": rng.choice(list(PRICES)),
        "customer rating": rng.choice(list(RATINGS)),
        "area": rng.choice(list(AREAS)),
        "family friendly": rng.choice(("yes", "no")),
        "near": neighbour if rng.random() < 0.35 else rng.choice(landmarks),
    }
    return {"name": name} | {field: values[field] for field in values if field in chosen}


def build() -> dict[str, list[dict]]:
    """All splits; no table and no reference occurs twice."""
    rng = random.Random(SEED)
    names, landmarks = (
        iter(invent_names(patterns, sum(split[key] for split in SPLITS.values()), rng))
        for patterns, key in ((NAME_PATTERNS, "names"), (LANDMARK_PATTERNS, "landmarks"))
    )
    splits, seen = {}, set()
    for split, size in SPLITS.items():
        own_names = list(itertools.islice(names, size["names"]))
        own_landmarks = list(itertools.islice(landmarks, size["landmarks"]))
        rows = splits[split] = []
        while len(rows) < size["tables"]:
            table = write_table(own_names, own_landmarks, rng)
            drafts = {}
            while len(drafts) < size["references"]:
                opener, text = write_reference(table, drafts, rng)
                drafts[opener] = text
            new = {json.dumps(table), *drafts.values()}
            if not new & seen:
                seen |= new
                rows.append({"table": table, "text": list(drafts.values())})
    return splits


def to_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def measure(rows: list[dict]) -> dict[str, float]:
    """The data card's figures for one split."""
    texts = [text for row in rows for text in row["text"]]
    lengths = [len(text.split()) for text in texts]
    sentences = [len(re.findall(r"[.?]", text)) for text in texts]
    tables = [row["table"] for row in rows]
    return {
        "tables": len(rows),
        "pairs": len(texts),
        "distinct names": len({table["name"] for table in tables}),
        "distinct `near`": len({table["near"] for table in tables if "near" in table}),
        "fields per table besides the name, mean": sum(len(t) - 1 for t in tables) / len(tables),
        "words per reference, mean": sum(lengths) / len(texts),
        "words per reference, least": min(lengths),
        "words per reference, most": max(lengths),
        "sentences per reference, mean": sum(sentences) / len(texts),
        "different words": len({w for t in texts for w in re.findall(r"[^\W\d]+", t.lower())}),
    }


def format_figures(splits: dict[str, list[dict]]) -> str:
    """The figures as a Markdown table, a column per split."""
    figures = {split: measure(rows) for split, rows in splits.items()}
    lines = [f"| | {' | '.join(figures)} |", f"|---|{'---|' * len(figures)}"]
    for name in figures["train"]:
        cells = (f"{figures[split][name]:.4g}" for split in figures)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rewrite the embedded restaurant data.")
    parser.add_argument("--counts", action="store_true", help="print the data card's table instead")
    options = parser.parse_args()
    splits = build()
    if options.counts:
        print(format_figures(splits))
        return
    for split, rows in splits.items():
        (HERE / f"{split}.jsonl").write_text(to_lines(rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
