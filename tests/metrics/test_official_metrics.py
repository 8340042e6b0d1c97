"""Suites of official scores: by hand, against published WebNLG figures, and on the command line."""

import json
import re

import pytest

from minprefix.cli.commands import COMMANDS
from minprefix.data.examples import Example
from minprefix.data.load import load_examples
from minprefix.methods.evaluate import measure
from minprefix.metrics import official as official_metrics
from minprefix.metrics.meteor import meteor, why_unavailable
from minprefix.metrics.official import (
    SUITES,
    _lower,
    _webnlg_output,
    _webnlg_reference,
    official_scores,
    suite_of,
)
from minprefix.metrics.quick import score

OUTPUTS = ["The Inn is cheap.", "Zed, a bar", "Café Orme’s bar is old"]
REFERENCES = [["The inn is cheap."], ["Zed is a bar.", "A bar: Zed"], ["Cafe Orme's bar is new"]]
GROUPS = ["Food", "Artist", "City"]


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def quiet(monkeypatch):
    """No METEOR: the fast part of a suite."""
    monkeypatch.setattr(official_metrics, "why_unavailable", lambda: "left out")


def test_without_java_there_is_one_clear_note_and_all_else(no_java, capsys):
    scores = official_scores(OUTPUTS, REFERENCES, "e2e")
    assert tuple(scores) == ("BLEU", "NIST", "R-L", "CIDEr")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("METEOR is left out: it needs Java (the command java)")
    assert tuple(official_scores(OUTPUTS, REFERENCES, "xsum")) == SUITES["xsum"]
    assert capsys.readouterr().err == ""  # ROUGE alone misses nothing
    with pytest.raises(OSError, match="METEOR is left out: it needs Java"):
        meteor(["a"], [["a"]])


def test_a_missing_jar_and_a_broken_one_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MINPREFIX_METEOR", str(tmp_path / "no.jar"))
    assert "its jar: " in why_unavailable() and "no.jar is not a file" in why_unavailable()
    program = tmp_path / "java"  # stands for a Java that fails
    program.write_text("#!/bin/sh\necho 'Invalid or corrupt jarfile' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "bad.jar").write_text("no jar")
    monkeypatch.setenv("MINPREFIX_METEOR", str(tmp_path / "bad.jar"))
    with pytest.raises(OSError, match=r"METEOR \(.*bad.jar\) failed: Invalid or corrupt jarfile"):
        meteor(["a"], [["a"]])


def test_meteor_of_equal_and_of_strange_texts():
    if why_unavailable():
        pytest.skip(why_unavailable())
    assert meteor(["a cat sat", "é"], [["no", "a cat sat"], ["é"]]) == 1
    assert meteor(["", "||| x"], [["a"], ["b"]]) == 0
    # A stem and a synonym count less than the word itself, but both count.
    stem, none = (meteor([text], [["the cats sat down"]]) for text in ("the cat sat", "the ox sat"))
    assert 0 < none < stem < 1


def test_tokens_of_webnlg_and_dart():
    # Split at each character that is no letter or digit; ASCII. An output is made ASCII first, so
    # that the dots of "…" part too; a reference last.
    text = "Café–Bar's  £5 (½)… A_b"
    assert _webnlg_output(text) == "cafe - bar ' s ps5 ( 1 / 2 ) . . . a_b"
    assert _webnlg_reference(text) == "cafe - bar ' s PS 5 ( 1/2 ) ... a_b"
    assert _lower(text) == "café – bar ' s £ 5 ( ½ ) … a_b"


def test_webnlg_parts(quiet):
    scores = official_scores(OUTPUTS, REFERENCES, "webnlg", GROUPS)
    assert set(scores) == {f"{name} {part}" for name in ("BLEU", "TER") for part in "SUA"}
    # S is the first and the third text: 5 tokens and 7 of which one differs ("old", "new").
    assert scores["TER S"] == pytest.approx(1 / 12, rel=1e-12)
    # U: "zed , a bar" to "a bar : zed" takes two moves, or one and a change: 2 edits; the mean of 5
    # and 4 tokens is 4.5.
    assert scores["TER U"] == pytest.approx(2 / 4.5, rel=1e-12)
    assert scores["TER A"] == pytest.approx(3 / 16.5, rel=1e-12)
    # Of S: words 11/12, pairs 9/10, triples 7/8, fours 5/6; as long as the references.
    bleu = 100 * (11 / 12 * 9 / 10 * 7 / 8 * 5 / 6) ** 0.25
    assert scores["BLEU S"] == pytest.approx(bleu, rel=1e-12)
    assert scores["BLEU U"] == 0  # no common fours, and multi-bleu does not smooth
    alone = official_scores(OUTPUTS[::2], REFERENCES[::2], "webnlg", GROUPS[::2])
    assert alone["BLEU S"] == alone["BLEU A"] == scores["BLEU S"] and "BLEU U" not in alone
    assert set(official_scores(OUTPUTS, REFERENCES, "webnlg")) == {"BLEU A", "TER A"}


def test_three_references_count_and_missing_ones_are_empty(quiet):
    # The fourth reference equals the output, but is not looked at.
    references = [["p q", "r s", "t u", "a b c d"]]
    assert official_scores(["a b c d"], references, "dart") == {"BLEU": 0, "TER": 2}
    # An output of 4 words with a reference of 9: "no reference" (0 words) is closer than 9, so
    # there is no penalty for brevity. multi-bleu.perl reads the empty lines in the same way.
    references = [["a b c d e f g h i"]]
    assert official_scores(["a b c d"], references, "webnlg")["BLEU A"] == pytest.approx(100)


def test_dart_keeps_accents(quiet):
    same, other = (
        official_scores([t], [["a b c d é"]], "dart")["TER"] for t in ("a b c d é", "a b c d e")
    )
    assert (same, other) == (0, 1 / 5)
    assert official_scores(["a b c d e"], [["a b c d é"]], "webnlg")["TER A"] == 0


def test_xsum_by_hand():
    # Stems: cats = cat. Words 2 of 3 and of 4; pairs 1 of 2 and of 3; in order 2.
    scores = official_scores(["The cats ran"], [["the cat is old"]], "xsum")
    expected = {"R-1": 200 * 2 / 7, "R-2": 200 * 1 / 5, "R-L": 200 * 2 / 7}
    assert scores == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("team", ["ADAPT_Centre", "UPF-TALN"])
def test_webnlg_equals_the_published_figures_of_two_systems(shared, team):
    """All figures of the 21 entries with 7 triples, as the challenge's scripts printed them."""
    folder = shared / "data" / "webnlg-metrics-check"
    if not folder.is_dir():
        pytest.skip("needs the published WebNLG outputs in ../shared, which are not here")
    expected = json.loads((folder / "expected.json").read_text())[team]
    outputs = (folder / f"{team}_7size.txt").read_text().splitlines()
    examples = load_examples(shared / "data" / "webnlg", "test")
    examples = [example for example in examples if example.source.count(" | ") == 6]
    scores = measure(outputs, examples, "webnlg")
    assert set(scores) >= {"BLEU S", "BLEU A", "TER S", "TER A"}  # all 21 are of seen categories
    assert scores["BLEU A"] == pytest.approx(expected["BLEU"], abs=0.005)  # two digits are printed
    assert scores["TER A"] == pytest.approx(expected["TER"], rel=1e-15)
    if why_unavailable() is None:
        assert scores["MET A"] == pytest.approx(expected["METEOR"], rel=1e-12)


def read_triples(folder) -> list[Example]:
    """DART's two layouts, as their readers give them."""
    triples = [{"tripleset": [["Zed", "IS", "a bar"]], "annotations": [{"text": "Zed is a bar."}]}]
    (folder / "dart.json").write_text(json.dumps(triples))
    (folder / "dart.xml").write_text(
        '<benchmark><entries><entry category="MISC" eid="Id1"><modifiedtripleset><mtriple>Zed | is '
        '| a bar</mtriple></modifiedtripleset><lex comment="e2e" lid="Id1">Zed is a bar.</lex>'
        "</entry></entries></benchmark>"
    )
    return [example for n in ("json", "xml") for example in load_examples(folder / f"dart.{n}")]


def test_auto_takes_the_suite_of_the_data(quiet, tmp_path):
    table = Example("", ("Zed is a bar.",), (("name", "Zed"), ("Type", "bar")))
    film = Example("", ("Zed is a film.",), (("title", "Zed"),))
    webnlg, dart = (Example("", ("Zed.",), None, "", group) for group in ("Food", "MISC"))
    assert [suite_of([e]) for e in (table, webnlg, dart)] == ["e2e", "webnlg", "dart"]
    assert suite_of(read_triples(tmp_path)) == "dart"
    assert suite_of([film]) == suite_of([table, film]) == suite_of([webnlg, dart]) == "quick"
    assert measure(["a"], [film], "auto") == score(["a"], [film])
    assert set(measure(["Zed."], [webnlg], "auto")) == {"BLEU S", "BLEU A", "TER S", "TER A"}
    assert set(measure(["Zed."], [dart], "auto")) == {"BLEU", "TER"}
    assert set(measure(["a"], [table], "auto")) == {"BLEU", "NIST", "R-L", "CIDEr"}


@pytest.mark.parametrize(
    "args,message",
    [
        ((["a"], [["a"]], "bleu"), "suite must be one of e2e, webnlg, dart, xsum, got 'bleu'"),
        ((["a"], [], "e2e"), "got 1 and 0"),
        ((["a"], [[None]], "e2e"), r"references of output 0 must be a list of texts, got \[None\]"),
        ((["a"], [["a"]], "e2e", ["Food"]), "groups need the suite webnlg, got e2e"),
        ((["a"], [["a"]], "webnlg", []), "got 1 outputs and 0 groups"),
        ((["a"], [["a"]], "webnlg", ["Bar"]), "group 0 must be one of Airport, .* got 'Bar'"),
    ],
)
def test_wrong_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        official_scores(*args, note=lambda text: None)
    with pytest.raises(ValueError, match="metrics must be one of quick, e2e"):
        measure(["a"], [Example("", ("a",))], "bleu")


def write(path, *lines: str):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_command_score(cli, tmp_path, no_java):
    outputs = write(tmp_path / "out.txt", "zed is a bar", "", "ada is old")
    references = write(
        tmp_path / "ref.txt", "Zed is a bar", "A bar", "", "", "Bo", "", "Ada is old", ""
    )
    out, err = cli("score", outputs, references, "--metrics", "e2e", "--json")
    texts = (
        ["zed is a bar", "", "ada is old"],
        [["Zed is a bar", "A bar"], ["Bo"], ["Ada is old"]],
    )
    assert json.loads(out) == {"outputs": 3} | official_scores(*texts, note=lambda text: None)
    assert "METEOR is left out" in err
    groups = write(tmp_path / "groups.txt", *GROUPS)
    out, _ = cli("score", outputs, references, "--metrics", "webnlg", "--groups", groups, "--json")
    assert json.loads(out)["TER U"] == 1
    out, _ = cli("score", outputs, references, "--json")
    assert json.loads(out) == {"outputs": 3} | {
        name: value
        for name, value in score(texts[0], [Example("", tuple(r)) for r in texts[1]]).items()
    }
    out, _ = cli("score", outputs, references, "--metrics", "xsum")
    assert "R-1" in out and "100" not in out.split()[0]


def test_score_and_evaluate_have_the_same_default():
    assert {cls.metrics for cls in (COMMANDS["score"], COMMANDS["evaluate"])} == {"quick"}


def test_references_without_blank_lines_are_one_for_each(cli, tmp_path, quiet):
    outputs = write(tmp_path / "out.txt", "a b c d", "e f g h")
    references = write(tmp_path / "ref.txt", "a b c d", "e f g h")
    out, _ = cli("score", outputs, references, "--metrics", "dart", "--json")
    assert json.loads(out) == {"outputs": 2, "BLEU": pytest.approx(100), "TER": 0}


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n"])
def test_one_output_with_several_references(cli, tmp_path, quiet, end):
    """Without a blank line the number of outputs says what the lines are."""
    outputs = write(tmp_path / "out.txt", "ada is old now")
    (tmp_path / "ref.txt").write_bytes(("ada\nada is old now\nbo" + end).encode())
    out, _ = cli("score", outputs, tmp_path / "ref.txt", "--metrics", "quick", "--json")
    assert json.loads(out) == {"outputs": 1, "bleu": pytest.approx(100), "rouge_l": 100}


def test_a_file_for_each_reference(cli, tmp_path, quiet):
    """reference0 ... referenceK as WebNLG has them: a blank line where an output has fewer."""
    outputs = write(tmp_path / "out.txt", "a b c d", "e f g h")
    folder = tmp_path / "refs"
    folder.mkdir()
    for n in range(11):
        line = "a b c d" if n == 2 else "x y z"
        write(folder / f"reference{n}", line, "e f g h" if n == 0 else "")
    (folder / "notes.txt").write_text("not a reference")
    (folder / "reference11").write_text("")  # nothing for any output
    out, _ = cli("score", outputs, folder, "--metrics", "webnlg", "--json")
    assert json.loads(out)["BLEU A"] == pytest.approx(100)  # number 2 is among the first three
    files = sorted(folder.glob("reference*"), reverse=True)  # their numbers decide
    assert cli("score", outputs, *files, "--metrics", "webnlg", "--json")[0] == out
    short = write(tmp_path / "reference1", "only one line")
    _, err = cli("score", outputs, folder / "reference0", short, code=1)
    assert re.search("out.txt has 2 outputs .*, .*reference1 has 1", err)
    (folder / "reference0").write_text("x\n\n")
    _, err = cli("score", outputs, folder, code=1)
    assert "output 2 has no reference" in err
    (tmp_path / "empty").mkdir()
    _, err = cli("score", outputs, tmp_path / "empty", code=1)
    assert "empty: no files reference0, reference1, ... in this folder" in err


@pytest.mark.parametrize(
    "outputs,references,message",
    [
        ("a\nb\n", "a\n\nb\n\nc\n", "has 2 outputs .* has 5 lines in 3 groups"),
        ("a\nb\n", "a\nb\nc\n", "has 2 outputs .* has 3 lines in 1 group .*no blank"),
        ('{"source": "a", "text": "b"}\n', "b\n", "out.txt: JSON lines, .* one per line"),
        ("\n", "a\n", "out.txt: the file is empty"),
    ],
)
def test_wrong_files(cli, tmp_path, quiet, outputs, references, message):
    (tmp_path / "out.txt").write_text(outputs)
    (tmp_path / "ref.txt").write_text(references)
    _, err = cli("score", tmp_path / "out.txt", tmp_path / "ref.txt", code=1)
    assert err.count("\n") == 1 and re.search(message, err), err


def test_wrong_groups(cli, tmp_path, quiet):
    two = write(tmp_path / "out.txt", "a", "b")
    groups = write(tmp_path / "groups.txt", "Food", "Fool")

    def refused(message: str, metrics: str, code: int) -> None:
        argv = ("score", two, two, "--metrics", metrics, "--groups", groups)
        _, err = cli(*argv, code=code)
        assert err.count("\n") == 1 and re.search(message, err), err

    refused("--groups needs --metrics webnlg, got quick", "quick", 2)
    refused("--groups needs --metrics webnlg, got e2e", "e2e", 2)
    refused("groups.txt:2: the category must be one of Airport.* got 'Fool'", "webnlg", 1)
    write(groups, "Food")
    refused("out.txt has 2 outputs .lines., .*groups.txt has 1$", "webnlg", 1)


def test_evaluate_prints_the_official_columns(cli, tmp_path, tiny_folder, no_java):
    data = tmp_path / "test.jsonl"
    row = {"table": {"name": "Zed", "type": "bar"}, "text": "Zed is a bar."}
    data.write_text(json.dumps(row) + "\n")
    options = ("--data", data, "--linearisation", "paper", "--max-new-tokens", 3, "--json")
    out, err = cli("evaluate", "--model", tiny_folder, *options, "--metrics", "auto")
    assert list(json.loads(out)) == ["tables", "BLEU", "NIST", "R-L", "CIDEr"]
    assert "METEOR is left out" in err
    out, _ = cli("evaluate", "--model", tiny_folder, *options)
    assert list(json.loads(out)) == ["tables", "bleu", "rouge_l", "slot_coverage"]
