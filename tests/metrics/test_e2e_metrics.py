"""NIST, ROUGE-L and CIDEr: by hand, and against the official E2E scorer's 8 digits."""

import json
import math
import random

import pytest
from conftest import SHARED

from minprefix.cli.score import _lines, read_references
from minprefix.metrics.e2e import NIST_BETA, _lcs, cider, nist, rouge_l_max
from minprefix.metrics.meteor import why_unavailable
from minprefix.metrics.official import official_scores

CHECK = SHARED / "data" / "e2e-metrics-check"
SETS = ("example", "edge", "copy", "dev-loo", "tgen-test")
COLUMNS = {  # ours -> the official figure's names, its factor
    "BLEU": (("BLEU_mteval_rules_recomputed", "BLEU_python"), 100),
    "NIST": (("NIST_pooled_recomputed",), 1),
    "R-L": (("ROUGE_L",), 100),
    "CIDEr": (("CIDEr",), 1),
}


@pytest.fixture(scope="module")
def official(shared):
    return json.loads((CHECK / "expected.json").read_text())["sets"]


def scores_of(expected: dict) -> dict[str, float]:
    path = CHECK / expected["output_file"]
    references = read_references([CHECK / expected["refs_file"]], _lines(path), path)
    return official_scores(_lines(path), references, "e2e")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_all_five_columns_equal_the_official_ones(official, name, monkeypatch):
    expected = official[name]
    if why_unavailable() is None and name not in (
        "example",
        "edge",
    ):  # the others' METEOR is slow: below
        monkeypatch.setattr("minprefix.metrics.official.why_unavailable", lambda: "not here")
    scores = scores_of(expected)
    for column, (names, factor) in COLUMNS.items():
        figure = next(expected[key] for key in names if key in expected)
        # Its 8 digits: half of the last one, and a little for another order of the sums.
        assert scores[column] / factor == pytest.approx(figure, abs=5.1e-9), column
    if "MET" in scores:
        assert scores["MET"] / 100 == pytest.approx(expected["METEOR"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copy", "dev-loo", "tgen-test"])
def test_meteor_equals_the_official_one(official, name):
    if why_unavailable():
        pytest.skip(why_unavailable())
    # 8 digits are known; 1e-6 is the required bound.
    assert scores_of(official[name])["MET"] / 100 == pytest.approx(
        official[name]["METEOR"], abs=1e-6
    )


def test_nist_by_hand():
    # 3 reference words, each once: log2(3) bits per word; a b is sure after a, so 0 bits. Two
    # thirds of the length halve it.
    assert nist(["A b"], [["a b c"]]) == pytest.approx(math.log2(3) / 2, rel=1e-12)
    assert nist(["x"], [["a b c"]]) == nist([""], [["a b c"]]) == 0


def test_nist_takes_the_pooled_reference_length():
    # 9 reference words: a, b, c once, d and e three times each. Hits: a, b, c of log2(9) bits, d of
    # log2(9 / 3); all hit bigrams are sure. 9 words / 4 references * 2 outputs = 4.5 words, of
    # which the outputs have 4; the mean of each output's references would give 5.
    bits = (3 * math.log2(9) + math.log2(3)) / 4
    penalty = math.exp(-NIST_BETA * math.log(4 / 4.5) ** 2)
    references = [["a b c"], ["d e", "d e", "d e"]]
    assert nist(["a b c", "d"], references) == pytest.approx(bits * penalty, rel=1e-12)


def test_nist_clips_hits_by_the_reference_that_has_most():
    # "a" counts twice, the third is too many: 2 hits of log2(4 / 3) bits, "a a" of log2(3 / 1).
    value = 2 / 3 * math.log2(4 / 3) + 1 / 2 * math.log2(3)
    assert nist(["a a a"], [["a", "a a", "b"]]) == pytest.approx(value, rel=1e-12)


def slow_lcs(a: list[str], b: list[str]) -> int:
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def test_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(200):
        a, b = (draw.choices("abcd", k=draw.randrange(90)) for _ in range(2))
        assert _lcs(a, b) == slow_lcs(a, b)


def test_rouge_l_takes_the_best_precision_and_the_best_recall():
    # a b d of a b x d: P 3/4, R 3/5; a b: P 2/4, R 2/2. The best of each: 3/4 and 1.
    expected = 2.44 * 0.75 * 1 / (1 + 1.44 * 0.75)
    references = [["a b c d e", "a b"], ["q"]]
    assert rouge_l_max(["a b x d"], references[:1]) == pytest.approx(expected, rel=1e-12)
    assert rouge_l_max(["a b x d", ""], references) == pytest.approx(expected / 2, rel=1e-12)
    assert rouge_l_max([""], [["", "a"]]) == 1  # one empty token, as in the official code


def test_cider_by_hand():
    # All idf are ln 2 and cancel. x y z for x y: words 2 / (sqrt 3 sqrt 2), pairs 1 / sqrt 2, one
    # pair too many; p q for p q: words and pairs 1, no longer n-grams: 10 * 2 / 4.
    first = 10 / 4 * (2 / math.sqrt(6) + 1 / math.sqrt(2)) * math.exp(-1 / 72)
    references = [["x y"], ["p q"]]
    assert cider(["x y z", "p q"], references) == pytest.approx((first + 5) / 2, rel=1e-12)
    # x x for x y: the second x is clipped: 1 * 1 / (2 sqrt 2); no pair hits.
    clipped = 10 / 4 / (2 * math.sqrt(2))
    assert cider(["x x", "p q"], references) == pytest.approx((clipped + 5) / 2, rel=1e-12)
    # The mean over references: the second one shares nothing.
    references = [["x y", "u v"], ["p q"]]
    assert cider(["x y", "p q"], references) == pytest.approx((2.5 + 5) / 2, rel=1e-12)


def test_cider_weighs_rare_words_and_one_output_alone_is_0():
    # "x" is in both outputs' references: idf 0. "y" decides alone: cosine 1 in words; x y is rare.
    assert cider(["x y", "x q"], [["x y"], ["x q"]]) == pytest.approx(5, rel=1e-12)
    assert cider(["x", "q"], [["x y"], ["x q"]]) == pytest.approx(10 / 4 / 2 * math.exp(-1 / 72))
    assert cider(["a b c d e"], [["a b c d e"]]) == 0
