"""Scores of generated texts: BLEU, ROUGE-L and slot coverage, each from 0 to 100.

Read `score`, then `slot_coverage`. BLEU is that of sacrebleu [1] and equals the official E2E
scorer's [3]. ROUGE-L is that of the package rouge-score [2], which differs from the official one
(other tokens, another F). `official.py` has the paper's scores. The default tokenizer is for texts
in Latin letters; TOKENIZERS has others, and `script_note` says when one is needed.
[1] https://github.com/mjpost/sacrebleu   [2] https://github.com/google-research/google-research/tree/master/rouge
[3] https://github.com/tuetschek/e2e-metrics
Both packages are imported only when a score is computed.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from minprefix.checks import check_choice
from minprefix.data.examples import Example

# How a text states a yes/no field: {field: (yes, no)}. A yes inside a no does not count. The
# patterns match text from `_plain`: lower case, with blanks for hyphens ("kid friendly").
_CHILDREN = r"\b(?:famil(?:y|ies)|kids?|child|children)\b"
YES_NO_PHRASES = {
    "family friendly": (
        # children are welcome; suitable for the whole family, welcomes families, bring the kids
        rf"{_CHILDREN} (?:are )?(?:friendly|welcome)"
        rf"|\b(?:welcom\w+|for|bring|allows)(?: \w+){{0,3}} {_CHILDREN}",
        # not a family friendly pub, doesn't welcome children; children are not welcome; adults only
        rf"(?:\b(?:no|not|non|never|without|unsuitable)\b(?! only| far)|n['’]t\b)"
        rf"(?: [\w'’]+){{0,4}} {_CHILDREN}(?: (?:friendly|welcome))?"
        rf"|{_CHILDREN} (?:(?:are |is )?not\b|aren['’]t\b|free\b)"
        r"|\badults? only\b|\b(?:for|only|to)(?: an)? adults?\b",
    )
}

_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)

# sacrebleu's names of ways to split a text. 13a: Latin letters; ROUGE-L then uses rouge-score's own
# tokens. intl: any script with blanks between words. zh: single Chinese characters, and 13a for the
# rest. char: single characters, for example for Japanese or Thai.
TOKENIZERS = ("13a", "intl", "zh", "char")
LAST_LATIN = "\u024f"  # letters up to here are Latin (and a few signs that count as letters)


def _check_lengths(outputs: Sequence[str], others: Sequence, name: str) -> None:
    if not outputs or len(outputs) != len(others):
        raise ValueError(
            f"outputs and {name} must have equal lengths above 0, got {len(outputs)} and "
            f"{len(others)}"
        )
    for number, output in enumerate(outputs):
        if not isinstance(output, str):
            raise ValueError(f"output {number} must be a string, got {output!r}")


def check_references(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    _check_lengths(outputs, references, "references")
    for number, texts in enumerate(references):
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(
                f"references of output {number} must be a list of texts, got {texts!r}"
            )


def lower_ascii(text: str) -> str:
    """Lower-case A-Z and nothing else, as the Perl script mteval-v13a in [3] does."""
    return text.translate(_LOWER)


def streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """References in sacrebleu's order: all first ones, all second ones, ...; None for a missing
    one."""
    most = max(len(texts) for texts in references)
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]


def check_tokenizer(metrics: str, tokenizer: str) -> None:
    """ValueError for an unknown tokenizer, or for one with official scores, which set their own."""
    check_choice("the tokenizer of scores", tokenizer, TOKENIZERS)
    if metrics != "quick" and tokenizer != "13a":
        raise ValueError(f"{metrics} uses its own tokenizer: {tokenizer} needs --metrics quick")


def script_note(texts: Iterable[str], metrics: str, tokenizer: str = "13a") -> str | None:
    """A warning if scores of these texts would be about 0 because of their script, else None."""
    letters = [c for text in texts for c in text if c.isalpha()]
    if tokenizer != "13a" or 2 * sum(c > LAST_LATIN for c in letters) <= len(letters):
        return None
    why = (
        "ROUGE-L counts a-z and 0-9 only, and BLEU finds words between blanks"
        if metrics == "quick"
        else f"the official scores of {metrics} are for English, and some of them are 0 here"
    )
    todo = "--metrics quick --score-tokenizer intl (zh or char for a script without spaces)"
    return f"most letters of these texts are not Latin: {why}; {todo} scores them"


def corpus_bleu(
    outputs: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a"
) -> float:
    """BLEU-4 of the corpus in percent: sacrebleu, lower-cased, with the closest reference length.

    Outputs may have different numbers of references, but at least one each.

    Args:
        tokenizer: one of TOKENIZERS.
    """
    from sacrebleu.metrics import BLEU

    check_references(outputs, references)
    check_tokenizer("quick", tokenizer)
    lower = lower_ascii if tokenizer == "13a" else str.lower
    outputs = [lower(output) for output in outputs]
    references = [[lower(text) for text in texts] for texts in references]
    # force: do not warn about tokenised texts, such as the E2E files of the paper's code.
    return BLEU(tokenize=tokenizer, force=True).corpus_score(outputs, streams(references)).score


class _Words:
    """A tokenizer for rouge-score: sacrebleu's tokens without those of punctuation only."""

    def __init__(self, tokenizer: str):
        from sacrebleu.metrics import BLEU

        self.split = BLEU(tokenize=tokenizer, force=True).tokenizer

    def tokenize(self, text: str) -> list[str]:
        """The tokens that contain a letter, mark or digit of any script."""
        tokens = self.split(text.lower()).split()
        return [t for t in tokens if any(unicodedata.category(c)[0] in "LMN" for c in t)]


def rouge_l(
    outputs: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a"
) -> float:
    """ROUGE-L in percent: mean F1 of the longest common subsequence with the best reference.

    Without stemming, as in the official E2E scorer.

    Args:
        tokenizer: one of TOKENIZERS; with "13a", tokens are runs of a-z and 0-9.
    """
    from rouge_score.rouge_scorer import RougeScorer

    check_references(outputs, references)
    check_tokenizer("quick", tokenizer)
    words = None if tokenizer == "13a" else _Words(tokenizer)
    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=words)
    scores = [
        scorer.score_multi(texts, output)["rougeL"].fmeasure
        for output, texts in zip(outputs, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


def _plain(text: str) -> str:
    """Lower case, with one blank for each run of white space and hyphens."""
    return re.sub(r"[\s-]+", " ", text.casefold()).strip()


def _says(text: str, field: str, value: str, blanks: bool = True) -> bool | None:
    """Whether the `_plain` text states a field's value; None if that cannot be determined."""
    field, value = _plain(field), _plain(value)
    if value not in ("yes", "no"):
        if not blanks:
            return value in text
        return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None
    if field not in YES_NO_PHRASES:
        return None
    yes, no = YES_NO_PHRASES[field]
    if value == "no":
        return re.search(no, text) is not None
    return re.search(yes, re.sub(no, "", text)) is not None


def slot_coverage(
    outputs: Sequence[str], tables: Sequence[Sequence[tuple[str, str]]], tokenizer: str = "13a"
) -> float:
    """The percentage of all values in the tables that the outputs state.

    A value counts as stated if it occurs as whole words, ignoring case, and with hyphens equal to
    white space ("fast-food"). For "yes" and "no", the phrases of YES_NO_PHRASES count; fields that
    are not in it are left out. Only words are compared, not their meaning: "5 stars" does not state
    "5 out of 5", and one "high" states two fields with this value. Texts written by people
    therefore score below 100.

    Args:
        tables: one for each output, as in `Example.table`: (field, value) pairs.
        tokenizer: one of TOKENIZERS; zh and char are for scripts without blanks, in which a value
            may begin anywhere.
    Raises:
        ValueError: lengths that differ, or no value that can be searched for.
    """
    _check_lengths(outputs, tables, "tables")
    blanks = tokenizer in ("13a", "intl")
    stated = [
        _says(_plain(output), field, value, blanks)
        for output, table in zip(outputs, tables, strict=True)
        for field, value in table
    ]
    told = [answer for answer in stated if answer is not None]
    if not told:
        raise ValueError(f"none of the {len(stated)} values in the tables can be searched for")
    return 100 * sum(told) / len(told)


@dataclass(frozen=True)
class Facts:
    """The faults of a text, compared with its table."""

    missing: tuple[tuple[str, str], ...]  # (field, value) only in the table
    wrong: tuple[tuple[str, str], ...]  # (field, value) only in the text


def known_values(examples: Sequence[Example]) -> dict[str, tuple[str, ...]]:
    """The values of each field in the tables of the examples."""
    found: dict[str, dict[str, None]] = {}
    for example in examples:
        for field, value in example.table or ():
            found.setdefault(field, {})[value] = None
    return {field: tuple(values) for field, values in found.items()}


def facts(text: str, table: Sequence[tuple[str, str]], known: dict[str, tuple[str, ...]]) -> Facts:
    """Missing and wrong facts of a text, found in the same way as by `slot_coverage`.

    A wrong fact is a value in `known`, of any field, that the text states outside of the table's
    own values. Facts that are not in `known` are not found.

    Args:
        table: (field, value) pairs, as in `Example.table`.
        known: the possible values of the fields, see `known_values`.
    """
    plain, own = _plain(text), [_plain(value) for _, value in table]
    rest = plain
    for value in sorted(own, key=len, reverse=True):
        rest = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "|", rest)
    missing = tuple((f, v) for f, v in table if _says(plain, f, v) is False)
    wrong = []
    for field, values in known.items():
        for value in values:
            says_no = _plain(value) in ("yes", "no")
            if (field, value) in table or (not says_no and _plain(value) in own):
                continue
            if _says(plain if says_no else rest, field, value):
                wrong.append((field, value))
    return Facts(missing, tuple(wrong))


def score(
    outputs: Sequence[str], examples: Sequence[Example], tokenizer: str = "13a"
) -> dict[str, float]:
    """bleu and rouge_l against the examples' targets; slot_coverage if all examples have tables."""
    _check_lengths(outputs, examples, "examples")
    references = [example.targets for example in examples]
    scores = {
        "bleu": corpus_bleu(outputs, references, tokenizer),
        "rouge_l": rouge_l(outputs, references, tokenizer),
    }
    tables = [example.table for example in examples if example.table is not None]
    if len(tables) == len(examples):
        scores["slot_coverage"] = slot_coverage(outputs, tables, tokenizer)
    return scores
