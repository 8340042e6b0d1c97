"""Sets of triples: the examples from WebNLG's XML and DART's JSON and XML."""

import json

import pytest
from conftest import SHARED
from test_data import DART, DART_XML, XML, needs_shared, write

from minprefix.data.examples import Example
from minprefix.data.load import LINEARISATIONS, load_examples


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_xml_has_an_example_per_entry(tmp_path, split):
    ship, bird = load_examples(write(tmp_path, "a.xml", XML), split)
    assert ship.source == 'Blue_Heron : builtIn : Köln | Köln : country : "D & E"'
    assert ship.targets == ("Built in Köln.", "It build.")  # the empty <lex> is no text
    assert (ship.group, bird.group) == ("Ship", "Bird")
    assert (ship.where, ship.table) == (f"{tmp_path}/a.xml:Id1", None)


def test_xml_original_code_leads_with_a_bar_and_trains_on_good_texts(tmp_path):
    path = write(tmp_path, "a.xml", XML)
    (ship,) = load_examples(path, "train", linearisation="original-code")
    assert ship.source == ' | Blue_Heron : builtIn : Köln | Köln : country : "D & E"'
    assert ship.targets == ("Built  in    Köln.",)
    scored = load_examples(path, "test", linearisation="original-code")
    assert [len(example.targets) for example in scored] == [2, 1]


def test_dart_json_and_xml_are_one_set_of_examples(tmp_path):
    table, wren = load_examples(write(tmp_path, "dart.json", json.dumps(DART)))
    paper = "Blue Heron : BUILT_In : Köln | [TABLECONTEXT] : [TITLE] : Ships"
    targets = ("Built in Köln.", "A ship of Köln.")  # the blank text is no text
    assert table == Example(paper, targets, None, f"{tmp_path}/dart.json:row 1", "MISC")
    assert wren.source == "Wren : MASS : "
    (same,) = load_examples(write(tmp_path, "a.xml", DART_XML), "train")
    assert same == Example(paper, targets, None, f"{tmp_path}/a.xml:Id1", "MISC")


def test_dart_original_code_has_lower_case_relations_and_no_leading_bar(tmp_path):
    exact = {"linearisation": "original-code"}
    table, _ = load_examples(write(tmp_path, "dart.json", json.dumps(DART)), "train", **exact)
    assert table.source == "Blue Heron : built_in : Köln | [TABLECONTEXT] : [title] : Ships"
    assert table.targets == ("Built  in Köln.", "A ship of Köln.")
    (same,) = load_examples(write(tmp_path, "a.xml", DART_XML), "train", **exact)
    assert (same.source, same.targets) == (table.source, table.targets)  # none is marked good


def test_dart_sets_without_a_text_are_counted_in_a_warning(tmp_path, caplog):
    without = [{**DART[0], "annotations": []}, {**DART[1], "annotations": [{"text": ""}]}, DART[1]]
    path = write(tmp_path, "dart.json", json.dumps(without))
    assert [example.where for example in load_examples(path)] == [f"{path}:row 3"]
    told = f"empty texts: 1 (the first: {path}:row 2); inputs without a text: 2 "
    assert f"{path}: skipped: {told}(the first: {path}:row 1)" in caplog.text


@needs_shared
@pytest.mark.parametrize(
    "split,linearisation,entries,texts,categories",
    [
        ("train", "paper", 6_940, 18_102, 10),
        ("train", "original-code", 6_935, 18_025, 10),  # 77 texts to fix; 5 entries have no other
        ("dev", "paper", 872, 2_268, 10),
        ("test", "original-code", 1_862, 4_928, 15),
    ],
)
def test_webnlg_counts(split, linearisation, entries, texts, categories):
    examples = load_examples(SHARED / "data/webnlg", split, linearisation=linearisation)
    assert len(examples) == entries
    assert sum(len(example.targets) for example in examples) == texts
    assert len({example.group for example in examples}) == categories


@needs_shared
@pytest.mark.parametrize("linearisation", LINEARISATIONS)
@pytest.mark.parametrize("split,sets,texts", [("dev", 2_768, 6_980), ("test", 5_097, 12_551)])
def test_dart_counts(split, sets, texts, linearisation):
    examples = load_examples(SHARED / "data/dart", split, linearisation=linearisation)
    assert len(examples) == sets
    assert sum(len(example.targets) for example in examples) == texts  # test: 12,552, one is empty
    relations = [e.source.split(" | ")[0].split(" : ")[1] for e in examples]
    upper = sorted(r for r in relations if r != r.lower())
    assert (upper == []) == (linearisation == "original-code"), upper[:3]
