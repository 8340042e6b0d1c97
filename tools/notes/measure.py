"""The data card's figures: sizes, lengths, variety, and how much summaries copy from documents.

`python -m tools.notes.measure` prints them as two Markdown tables. ROUGE is that of `score
--metrics xsum`; the baselines use a part of the document as its summary. Read `baselines` first: if
the first sentence scored high, the task would be mere copying.
"""

import random
import re
from collections.abc import Callable
from itertools import pairwise

from minprefix.data.examples import Example
from minprefix.data.load import load_examples
from minprefix.metrics.official import official_scores
from minprefix.models.tokenizer import Tokenizer
from minprefix.models.weights import ASSETS
from tools.notes.make import SPLITS
from tools.notes.names import DAYS, HE, MONTHS, SHE, SURNAMES, TOWNS
from tools.notes.telling import SMALL, sentences

NAMES = {*DAYS, *MONTHS, *HE, *SHE}.union(*TOWNS.values(), *SURNAMES.values())


def shape(sentence: str) -> str:
    """The sentence with a blank form for each name and number."""
    words = re.findall(r"[^\W\d]+|[\d,.]*\d", sentence)
    return " ".join(
        "_" if w in NAMES or w[0].isdigit() or w.lower() in SMALL[1:] else w.lower() for w in words
    )


def bigrams(text: str) -> list[tuple[str, str]]:
    words = re.findall(r"\w+", text.lower())
    return list(pairwise(words))


def novelty(examples: list[Example]) -> float:
    """Percentage of the summaries' bigrams that are not in their documents."""
    new = total = 0
    for example in examples:
        known = set(bigrams(example.source))
        found = bigrams(example.targets[0])
        new, total = new + sum(pair not in known for pair in found), total + len(found)
    return 100 * new / total


def rouge(outputs: list[str], examples: list[Example]) -> dict[str, float]:
    return official_scores(outputs, [list(e.targets) for e in examples], "xsum")


def best_sentence(example: Example) -> str:
    """The sentence of the document with the highest ROUGE-L."""
    return max(sentences(example.source), key=lambda text: rouge([text], [example])["R-L"])


def baselines(examples: list[Example]) -> dict[str, dict[str, float]]:
    """ROUGE (R-1, R-2, R-L, percent) of parts of the documents as summaries."""
    rng = random.Random(0)
    ways: dict[str, Callable[[Example], str]] = {
        "first sentence": lambda e: sentences(e.source)[0],
        "first two sentences": lambda e: " ".join(sentences(e.source)[:2]),
        "random sentence": lambda e: rng.choice(sentences(e.source)),
        "best sentence (oracle)": best_sentence,
        "whole document": lambda e: e.source,
    }
    return {name: rouge([way(e) for e in examples], examples) for name, way in ways.items()}


def figures(examples: list[Example], tokenizer: Tokenizer) -> dict[str, float]:
    """The data card's figures for one split; lengths in tokens of mini."""
    parts = [sentence for example in examples for sentence in sentences(example.source)]
    found: dict[str, float] = {
        "notes": len(examples),
        "topics": len({example.group for example in examples}),
        "distinct summaries": len({example.targets for example in examples}),
        "sentences": len(parts),
        "distinct sentences": len(set(parts)),
        "distinct sentence shapes": len({shape(part) for part in parts}),
        "distinct summary shapes": len({shape(example.targets[0]) for example in examples}),
        "sentences per document, mean": len(parts) / len(examples),
        "new bigrams in summaries, %": novelty(examples),
    }
    for name, texts in (
        ("document", [example.source for example in examples]),
        ("summary", [example.targets[0] for example in examples]),
    ):
        lengths = sorted(len(tokenizer.encode(text)) for text in texts)
        found |= {
            f"tokens per {name}, least": lengths[0],
            f"tokens per {name}, mean": sum(lengths) / len(lengths),
            f"tokens per {name}, most": lengths[-1],
        }
    return found


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown: a column for each key, a row for each figure."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in next(iter(columns.values())):
        cells = (f"{values[name]:.4g}" for values in columns.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report() -> tuple[str, str]:
    """The two tables of the data card."""
    splits = {split: load_examples("notes", split) for split in SPLITS}
    tokenizer = Tokenizer.from_folder(ASSETS / "mini")
    scores = baselines(splits["test"])
    by_kind = {
        kind: {name: score[kind] for name, score in scores.items()}
        for kind in ("R-1", "R-2", "R-L")
    }
    return table({name: figures(e, tokenizer) for name, e in splits.items()}), table(by_kind)


if __name__ == "__main__":
    print("\n\n".join(report()))
