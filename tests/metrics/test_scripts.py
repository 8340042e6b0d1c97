"""Quick scores for scripts other than Latin, and the note if a score would be 0 for them."""

import json

import pytest

from minprefix.data.examples import Example
from minprefix.methods.evaluate import measure
from minprefix.metrics.quick import (
    TOKENIZERS,
    corpus_bleu,
    rouge_l,
    score,
    script_note,
    slot_coverage,
)

TEXTS = {  # script: (a tokenizer that serves it, a text of at least 4 tokens, half of the text)
    "Russian": ("intl", "Кафе «Орёл» стоит у реки, в центре города.", "Кафе «Орёл» стоит у"),
    "Hindi": ("intl", "यह होटल नदी के किनारे है।", "यह होटल नदी के"),
    "Greek": ("intl", "Το εστιατόριο είναι δίπλα στο ποτάμι.", "Το εστιατόριο είναι δίπλα"),
    "Chinese": ("zh", "这家餐厅在河边，价格便宜。", "这家餐厅在河"),
    "Japanese": ("char", "このレストランは川のそばにあります。", "このレストランは川の"),
    "Thai": ("char", "ร้านอาหารอยู่ริมแม่น้ำ", "ร้านอาหารอยู่"),
}


@pytest.mark.parametrize("script", TEXTS)
def test_equal_texts_of_any_script_score_100(script):
    tokenizer, text, half = TEXTS[script]
    assert rouge_l([text], [[text]]) == 0  # why there is an option
    for metric in (corpus_bleu, rouge_l):
        assert metric([text], [["x", text]], tokenizer) == pytest.approx(100)
        assert 0 < metric([half], [[text]], tokenizer) < 90
        assert metric([text.upper()], [[text]], tokenizer) == pytest.approx(100)


def test_rouge_l_of_russian_by_hand():
    # common: кафе, у, реки; P = 3/4, R = 3/5; punctuation is no token
    got = rouge_l(["Кафе у синей реки!"], [["кафе стоит, у самой реки"]], "intl")
    assert got == pytest.approx(200 / 3, rel=1e-12)
    # two of three characters, in order
    assert rouge_l(["河边好"], [["河边。便宜"]], "zh") == pytest.approx(100 * 4 / 7, rel=1e-12)


def test_latin_texts_keep_their_scores_and_have_no_note():
    text, other = "Café Orme’s bar is near the Ÿ quay.", "Café Orme’s bar is old."
    assert score([text], [Example("", (other,))]) == score([text], [Example("", (other,))], "13a")
    assert script_note([text, "", "12 ½"], "quick") is None
    assert script_note([text, TEXTS["Greek"][1][:9]], "quick") is None  # a few letters of another


@pytest.mark.parametrize("script", TEXTS)
def test_another_script_is_told_of_in_one_line(script, capsys):
    tokenizer, text, _ = TEXTS[script]
    examples = [Example("", (text,))]
    assert measure([text], examples)["rouge_l"] == 0
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "--score-tokenizer intl" in note and len(note) < 260
    assert measure([text], examples, "quick", tokenizer)["bleu"] == pytest.approx(100)
    assert capsys.readouterr().err == ""
    assert measure([text], examples, "xsum") == {"R-1": 0, "R-2": 0, "R-L": 0}
    assert "the official scores of xsum are for English" in capsys.readouterr().err


def test_slots_of_a_script_without_blanks():
    tables = [[("名字", "河边"), ("价格", "贵")]]
    assert slot_coverage(["我在河边吃饭"], tables) == 0
    assert slot_coverage(["我在河边吃饭"], tables, "zh") == 50


def test_tokenizers_are_quick_scores_alone(cli, tmp_path):
    path = tmp_path / "out.txt"
    path.write_text(TEXTS["Chinese"][1] + "\n", encoding="utf-8")
    out, err = cli("score", path, path, "--metrics", "quick", "--json")
    assert json.loads(out)["bleu"] == 0 and err.count("\n") == 1 and "not Latin" in err
    quick = ("--metrics", "quick", "--score-tokenizer", "zh", "--json")
    out, err = cli("score", path, path, *quick)
    assert json.loads(out) == {"outputs": 1, "bleu": pytest.approx(100), "rouge_l": 100}
    assert err == ""
    for command in (("score", path, path), ("evaluate",)):
        _, err = cli(*command, "--metrics", "xsum", "--score-tokenizer", "zh", code=1)
        assert "xsum uses its own tokenizer: zh needs --metrics quick" in err
    with pytest.raises(ValueError, match=f"must be one of {', '.join(TOKENIZERS)}, got 'en'"):
        rouge_l(["a"], [["a"]], "en")
