"""PTB tokens against the Java tokeniser: by hand, from a file, and by running it."""

import subprocess
from pathlib import Path

import pytest

from minprefix.metrics.meteor import _jar, why_unavailable
from minprefix.metrics.ptb import _DROPPED, ptb_lines

# Each right side is what Stanford's PTBTokenizer 3.4.1 printed, less the signs that are dropped.
CASES = [
    ("Zed is a cheap, family-friendly pub.", "zed is a cheap family-friendly pub"),
    ("It's £20-25 or €30 (approx.)!", "it 's # 20-25 or $ 30 -lrb- approx -rrb-"),
    ("can't cannot won't I'm they'd gonna", "ca n't can not wo n't i 'm they 'd gon na"),
    ("'single' “double” \"plain\" dogs’ inn 's", "single double plain dogs inn 's"),
    ("in the center., near", "in the center. near"),
    ("on Rd. 5 out of 5.. 3.family", "on rd. 5 out of 5 3 family"),
    ("food.A shop french,family-friendly", "food.a shop french,family-friendly"),
    ("20£-30£ -25 .6 3/5 5of5 1,000.50", "20 # -30 # -25 .6 3/5 5of5 1,000.50"),
    ("well--known – dash… wait.... what?!", "well known dash wait what ?!"),
    ("No. 5 no. one Dr. J. K. Smith, U.S. p.m.", "no. 5 no one dr. j. k. smith u.s. p.m."),
    ("Pa. is a state, my pa. is not", "pa. is a state my pa is not"),
    ("ra'ayat o'clock d'oeuvre D'Souza a'b", "ra'ayat o'clock d'oeuvre d'souza a b"),
    ("AT&T R&D b&b C++ a/b and/or", "at&t r&d b & b c++ a/b and/or"),
    ("1 1/2 cups, half ½", "1\xa01/2 cups half 1/2"),
    (":) at www.a.com or a@b.com", ":-rrb- at www.a.com or a@b.com"),
    ("", ""),
    ("...", ""),
]


@pytest.mark.parametrize("text,tokens", CASES)
def test_tokens(text, tokens):
    assert ptb_lines([text]) == [tokens]


def test_a_letter_keeps_its_full_stop_unless_a_sentence_begins_after_it():
    assert ptb_lines(["Serie B. The end", "Serie B. and so on"]) == [
        "serie b the end",
        "serie b. and so on",
    ]
    # The next line is the next text of the file, as for the official tokeniser.
    assert ptb_lines(["Serie B.", "The end"])[0] == "serie b"
    assert ptb_lines(["Serie B.", "Next"])[0] == "serie b."


def test_line_breaks_are_blanks():
    assert ptb_lines(["a\nb\r\nc"]) == ["a b c"]


@pytest.mark.parametrize("name", ["devel-conc", "baseline-output", "test-refs", "tgen-test-output"])
def test_all_tokens_of_the_official_files(shared, name):
    folder = shared / "data" / "e2e-metrics-check"
    plain, tokenised = (
        [line for line in (folder / file).read_text(encoding="utf-8").split("\n") if line]
        for file in (f"{name}.txt", f"{name}.ptb.txt")
    )
    assert len(plain) == len(tokenised) >= 10
    assert ptb_lines(plain) == tokenised


def java_lines(jar: Path, texts: list[str]) -> list[str]:
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(t + "\n" for t in texts).encode()
    done = subprocess.run(command, input=text, capture_output=True, check=True)
    lines = done.stdout.decode().removesuffix("\n").split("\n")
    return [" ".join(t for t in line.rstrip(" ").split(" ") if t not in _DROPPED) for line in lines]


def test_the_same_tokens_as_java(shared):
    """References of E2E and WebNLG, from both: seen once over all 74,991 distinct ones, equal."""
    if why_unavailable():
        pytest.skip(why_unavailable())
    jar = _jar().parents[1] / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    if not jar.is_file():
        pytest.skip("pycocoevalcap's tokeniser is not here")
    from minprefix.data.load import load_examples

    examples = load_examples(shared / "data" / "e2e", "dev")
    examples += load_examples(shared / "data" / "webnlg", "test")
    texts = [text for example in examples for text in example.targets]
    texts += [text for text, _ in CASES if text]
    assert ptb_lines(texts) == java_lines(jar, texts)
