"""Metrics: values computed by hand, and which values count as stated."""

import pytest

from minprefix.data.examples import Example
from minprefix.data.load import load_examples
from minprefix.metrics.quick import (
    Facts,
    corpus_bleu,
    facts,
    known_values,
    rouge_l,
    score,
    slot_coverage,
)


def test_bleu_by_hand():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 and 1 of 2 match; 5 words against 5: no length penalty.
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert corpus_bleu(["a b c d x"], [["a b c d e"]]) == pytest.approx(expected, rel=1e-12)
    assert corpus_bleu(["A B c, D."], [["z", "a b C, d."]]) == pytest.approx(100, rel=1e-12)


def test_bleu_takes_any_number_of_references_per_output():
    outputs = ["the inn lies by the old bridge", "a quiet bar for adults only"]
    references = [["no", "the inn lies by the old bridge", "x y"], ["a quiet bar for adults only"]]
    assert corpus_bleu(outputs, references) == pytest.approx(100, rel=1e-12)
    # A text counts for its own output only.
    swapped = corpus_bleu(outputs, [references[0], ["the inn lies by the old bridge"]])
    assert swapped < 80


def test_bleu_of_empty_outputs_is_low_and_not_an_error():
    assert corpus_bleu(["", "a"], [["a b c d e"], ["a b c d e"]]) < 1
    assert corpus_bleu([""], [["a b c d"]]) == 0


def test_rouge_l_by_hand():
    # Longest common subsequence a b d: P = 3/4, R = 3/5, F1 = 2 * 0.45 / 1.35 = 2/3.
    assert rouge_l(["a b x d"], [["a b c d e"]]) == pytest.approx(200 / 3, rel=1e-12)
    # The best reference counts, then the mean over outputs; no stemming.
    assert rouge_l(["A, b!", "cats"], [["q", "a b"], ["cat"]]) == pytest.approx(50, rel=1e-12)
    assert rouge_l([""], [["a"]]) == 0


def coverage(text: str, *table: tuple[str, str]) -> float:
    return slot_coverage([text], [table])


@pytest.mark.parametrize(
    "text,value,stated",
    [
        ("Meet at THE  Old\nMill.", "The Old Mill", True),
        ("Meet at the old mills.", "The Old Mill", False),  # whole words only
        ("a highly rated bar", "high", False),
        ("prices are high.", "high", True),
        ("it serves fast-food", "Fast food", True),
        ("for £20-25 each", "£20-25", True),
        ("for £20-250 each", "£20-25", False),
        ("rated 15 out of 5", "5 out of 5", False),
        ("the Café Orme's terrace", "café orme", True),
        ("costs $5 (about)", "$5 (about)", True),
        ("", "x", False),
    ],
)
def test_slot_values_are_whole_words(text, value, stated):
    assert coverage(text, ("field", value)) == (100 if stated else 0)


@pytest.mark.parametrize(
    "text,yes,no",
    [
        ("Zed is a family-friendly bar.", 100, 0),
        ("Zed is kid friendly.", 100, 0),
        ("a child - friendly place", 100, 0),
        ("Zed warmly welcomes families.", 100, 0),
        ("Children are welcome at Zed.", 100, 0),
        ("It is suitable for the whole family.", 100, 0),
        ("you can bring the children", 100, 0),
        ("Not far from the inn, it is good for kids.", 100, 0),
        ("It is not far from Elm Hall, families are welcome", 100, 0),
        ("Not only is Zed children friendly, it is cheap.", 100, 0),
        ("Zed is not family-friendly.", 0, 100),
        ("Zed isn't a very kid friendly bar.", 0, 100),
        ("a non-family-friendly bar", 0, 100),
        ("It does not welcome children", 0, 100),
        ("Children are not welcome there.", 0, 100),
        ("It is unsuitable for families.", 0, 100),
        ("an adults-only bar", 0, 100),
        ("Only adults are welcome.", 0, 100),
        ("Zed caters to adults", 0, 100),
        ("a kid-free bar", 0, 100),
        ("Zed is a bar in town.", 0, 0),
        ("Zed is friendly. The family owns it. It is not cheap.", 0, 0),
    ],
)
def test_family_friendly_counts_by_polarity(text, yes, no):
    assert coverage(text, ("family friendly", "yes")) == yes
    assert coverage(text, ("family friendly", "no")) == no


def test_slot_coverage_is_a_share_of_all_values():
    tables = [(("name", "Zed"), ("area", "east")), (("name", "Ada"), ("parking", "yes"))]
    # parking has no phrases, so 3 values count; Zed and Ada are stated.
    assert slot_coverage(["Zed", "Ada"], tables) == pytest.approx(200 / 3, rel=1e-12)
    with pytest.raises(ValueError, match="none of the 1 values"):
        coverage("parking", ("parking", "yes"))


def test_slot_coverage_of_the_embedded_references():
    """They state every value, by other words for a few ("moderately priced": 99.6 % measured)."""
    examples = load_examples("restaurants", "test")
    pairs = [(target, example.table) for example in examples for target in example.targets]
    friendly = [
        (text, [cell]) for text, table in pairs for cell in table if cell[0] == "family friendly"
    ]
    assert slot_coverage(*zip(*friendly, strict=True)) == 100
    assert slot_coverage(*zip(*pairs, strict=True)) > 99


def test_score_has_slot_coverage_only_with_tables():
    table = Example("name : Zed", ("Zed is a bar in town.", "A bar"), (("name", "Zed"),))
    plain = Example("Zed", ("Zed is a bar in town.",))
    outputs = ["zed is a bar in town ."]
    assert score(outputs, [table]) == pytest.approx(
        {"bleu": 100, "rouge_l": 100, "slot_coverage": 100}, rel=1e-12
    )
    assert set(score(outputs, [plain])) == {"bleu", "rouge_l"}
    assert set(score(outputs * 2, [plain, table])) == {"bleu", "rouge_l"}


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: corpus_bleu([], []), "references must have equal lengths above 0, got 0 and 0"),
        (lambda: corpus_bleu(["a"], []), "got 1 and 0"),
        (lambda: rouge_l(["a"], [["a"], ["b"]]), "got 1 and 2"),
        (lambda: rouge_l(["a"], [[]]), r"references of output 0 must be a list of texts, got \[\]"),
        (lambda: corpus_bleu(["a"], ["a"]), "references of output 0 must be .* got 'a'"),
        (lambda: corpus_bleu([None], [["a"]]), "output 0 must be a string, got None"),
        (lambda: slot_coverage(["a"], []), "outputs and tables must .* got 1 and 0"),
        (lambda: score(["a"], []), "outputs and examples must .* got 1 and 0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_and_wrong_facts_of_a_text():
    """A value counts as wrong if another table has it and this one does not."""
    tables = (
        (("name", "The Mill"), ("price", "cheap"), ("rating", "low"), ("family friendly", "yes")),
        (("name", "The Wrestlers"), ("price", "high"), ("rating", "high"), ("food", "Thai")),
        (("name", "Mill"), ("family friendly", "no")),
    )
    known = known_values([Example("x", ("y",), table) for table in tables])
    assert known["rating"] == ("low", "high")
    table = tables[0]

    found = facts("The Mill is a cheap, kid friendly place with a low rating.", table, known)
    assert found == Facts((), ())
    found = facts(
        "The Mill is high priced, not family friendly and serves Thai food.", table, known
    )
    assert found.missing == (("price", "cheap"), ("rating", "low"), ("family friendly", "yes"))
    assert found.wrong == (
        ("price", "high"), ("rating", "high"), ("family friendly", "no"), ("food", "Thai"),
    )  # fmt: skip
    # the table's own value contains another table's, and a value of one field serves any other
    assert facts("The Mill.", table, known).wrong == ()
    assert facts("The Wrestlers is high.", tables[1], known).wrong == ()
