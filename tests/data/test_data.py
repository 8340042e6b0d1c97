"""Data: the examples from each kind of file, and the errors.

All samples are written here by hand; tests on the real data sets need the folder `shared` next to
the checkout and are skipped without it.
"""

import json
import tempfile
from pathlib import Path

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from minprefix.data import load as data
from minprefix.data.examples import Example
from minprefix.data.load import LINEARISATIONS, data_folder, load_examples

MINI = Path(data.__file__).parents[1] / "assets" / "mini"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here")
quick = settings(deadline=None, derandomize=True, max_examples=40)

MR = "name[Blue Door], eatType[tea room], priceRange[£5-10], familyFriendly[no], near[Quay, East]"
CSV = (
    f'mr,ref\r\n"{MR}",A  tea\troom. \r\nname[Odo],"Odo,\r\nin town"\r\n"{MR}",Closed to kids.\r\n'
)
XML = """<?xml version="1.0" encoding="UTF-8"?>
<benchmark><entries>
 <entry category="Ship" eid="Id1" size="2">
  <originaltripleset><otriple>unused | x | y</otriple></originaltripleset>
  <modifiedtripleset>
   <mtriple>Blue_Heron | builtIn | Köln</mtriple><mtriple>Köln | country | "D &amp; E"</mtriple>
  </modifiedtripleset>
  <lex comment="good" lid="Id1">Built  in
   Köln.</lex><lex comment="toFix" lid="Id2">It build.</lex><lex comment="good" />
 </entry>
 <entry category="Bird" eid="Id2" size="1">
  <modifiedtripleset><mtriple>Wren | mass | 9</mtriple></modifiedtripleset>
  <lex comment="toFix" lid="Id1">Wren 9.</lex>
 </entry>
</entries></benchmark>
"""

DART = [
    {
        "tripleset": [["Blue Heron", "BUILT_In", "Köln"], ["[TABLECONTEXT]", "[TITLE]", "Ships"]],
        "subtree_was_extended": False,
        "annotations": [
            {"source": "x_lily", "text": "Built  in\nKöln."},
            {"source": "y", "text": " "},
            {"source": "y", "text": "A ship of Köln."},
        ],
    },
    {"tripleset": [["Wren", "MASS", ""]], "annotations": [{"source": "y", "text": "A wren."}]},
]
DART_XML = """<benchmark><entries><entry category="MISC" eid="Id1" size="2"><modifiedtripleset>
  <mtriple>Blue Heron | BUILT_In | Köln</mtriple><mtriple>[TABLECONTEXT] | [TITLE] | Ships</mtriple>
 </modifiedtripleset><lex comment="x_lily" lid="Id1">Built  in
Köln.</lex><lex comment="y" lid="Id2"> </lex><lex comment="y" lid="Id3">A ship of Köln.</lex>
</entry>
</entries></benchmark>
"""


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_renames_orders_and_groups_by_input(tmp_path):
    door, odo = load_examples(write(tmp_path, "a.csv", CSV))
    fields = "name : Blue Door | type : tea room | price : £5-10 | family friendly : no"
    assert door.source == fields + " | near : Quay, East"
    assert door.targets == ("A tea room.", "Closed to kids.")
    assert door.table[1:3] == (("type", "tea room"), ("price", "£5-10"))
    assert (door.where, odo.where) == (f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:3")
    assert odo == Example("name : Odo", ("Odo, in town",), (("name", "Odo"),), odo.where)


def test_csv_original_code_says_type_and_keeps_white_space(tmp_path):
    door, odo = load_examples(write(tmp_path, "a.csv", CSV), linearisation="original-code")
    assert door.source.startswith("name : Blue Door | Type : tea room | price")
    assert door.targets[0] == "A  tea\troom. "
    assert odo.targets == ("Odo, in town",)  # a line break cannot stay


def test_csv_order_of_the_mr_does_not_matter_and_line_numbers_count_line_breaks(tmp_path):
    text = '\ufeff"ref","mr"\n"a\nb","area[x], name[N]"\n"c","name[N], area[x]"\n\n"d","name[M]"\n'
    first, second = load_examples(write(tmp_path, "a.csv", text))
    assert (first.source, first.targets) == ("name : N | area : x", ("a b", "c"))
    assert second.where == f"{tmp_path}/a.csv:6"


def test_txt_white_space(tmp_path):
    path = write(
        tmp_path, "a.txt", "name : X |  Type : pub||It is . \r\n\nname : X |  Type : pub||X"
    )
    assert load_examples(path)[0] == Example(
        "name : X |  Type : pub", ("It is .", "X"), None, f"{tmp_path}/a.txt:1"
    )
    path = write(tmp_path, "b.txt", " name : X || It is . \r\n")
    exact = load_examples(path, linearisation="original-code")[0]
    assert (exact.source, exact.targets) == (" name : X ", (" It is . ",))


def test_jsonl_tables_and_sources(tmp_path):
    rows = [
        {"table": {"b": "1 \n 2", "a": "x"}, "text": ["one", "two "], "id": 7},
        {"source": " Long\ntext ", "target": "short"},
        {"table": {"b": "1 2", "a": "x"}, "text": "three"},
    ]
    path = write(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    table, source = load_examples(path)
    assert table.source == "b : 1 2 | a : x" and table.table == (("b", "1 2"), ("a", "x"))
    assert table.targets == ("one", "two", "three")
    assert source == Example("Long\ntext", ("short",), None, f"{tmp_path}/a.jsonl:3")
    assert load_examples(path, linearisation="original-code")[1].source == " Long\ntext "


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@quick
@given(
    st.lists(st.tuples(st.dictionaries(TEXTS, TEXTS, min_size=1, max_size=3), TEXTS), min_size=1)
)
def test_jsonl_drops_no_row_and_keeps_the_order(rows):
    lines = [json.dumps({"table": table, "text": text}) for table, text in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "a.jsonl", "\n".join(lines))
        examples = load_examples(path, linearisation="original-code")
        normal = load_examples(path)
    assert sum(len(example.targets) for example in examples) == len(rows)
    assert len({example.table for example in examples}) == len(examples)
    numbers = [int(example.where.rpartition(":")[2]) for example in examples]
    assert numbers == sorted(numbers)
    assert sorted(t for e in normal for t in e.targets) == sorted(
        " ".join(t.split()) for _, t in rows
    )


BROKEN = {
    "a.jsonl": [
        (b"", "a.jsonl: the file is empty"),
        (b" \n", "a.jsonl: the file is empty"),
        (b'{"source": "a", "target": "b"}\n{"source"', "a.jsonl:2: JSON, column 10: Expecting"),
        (b'{"source": "a", "target": "b\xff"}', "a.jsonl:1: .*byte 0xff"),
        (b"[1]", r"a.jsonl:1: expected a JSON object, got \['1'\]"),
        (b"[" * 100_000, "a.jsonl:1: JSON: maximum recursion depth"),
        (b'{"table": {"a": "b"}}', "a.jsonl: 1 inputs without a text .* `generate --data`"),
        (b'{"text": "b"}', r"a.jsonl:1: needs the columns of one of: mr, ref; .* \['text'\]"),
        (
            b'{"source": "a", "target": "b", "document": "c", "summary": "d"}',
            "has more than one of: source, target; document, summary",
        ),
        (b'{"table": {"a": "b", "a": "c"}, "text": "d"}', "'a' occurs twice"),
        (b'{"table": {"a": {}}, "text": "d"}', r"table\['a'\] must be a string, got {}"),
        (b'{"table": {"": "b"}, "text": "d"}', "a field's name is empty"),
        (b'{"table": {}, "text": "d"}', "table must be an object with fields"),
        (b'{"table": ["a"], "text": "d"}', "table must be an object with fields"),
        (b'{"table": {"a": "b"}, "text": []}', "a.jsonl: 1 inputs without a text"),
        (b'{"source": "a", "target": {}}', "target must be a string, got {}"),
        (
            b'{"source": "", "target": "b"}',
            "the file has no examples; skipped: rows without an input: 1 ",
        ),
        (b'{"document": [], "summary": "b"}', r"document must be a string, got \[\]"),
        (b'{"document": "a", "summary": " "}', "1 inputs without a text"),
        (b'{"document": "a", "summary": "b", "url": {}}', "url must be a string, got {}"),
        (
            b'{"document": "a", "summary": "b", "topic": [1]}',
            r"topic must be a string, got \['1'\]",
        ),
        (b'{"source": "a", "target": "\\ud800"}', "half of a surrogate pair"),
    ],
    "a.csv": [
        (b"", "a.csv: the file is empty"),
        (b"mr,ref\n", "the file has no examples"),
        (b"MR\nname[a]\n", "a.csv: 1 inputs without a text"),
        (b"name[a],b\n", r"a.csv:1: needs the columns of one of: mr, ref; .*\['name\[a\]', 'b'\]"),
        (b"mr,ref,REF\nname[a],b,c\n", "a.csv:1: a column name occurs twice"),
        (b"mr,ref\nname[a],b\nname[a]\n", "a.csv:3: 2 columns expected, got 1"),
        (b'mr,ref\nname[a],"b', "a.csv:2: broken CSV: unexpected end"),
        (b"mr,ref\nname[a], \n", "a.csv: 1 inputs without a text"),
        (b"mr,ref\nname[a,b\n", r"a.csv:2: expected field\[value\], .* got 'name\[a'"),
        (
            b"mr,ref\nname[ ],b\n",
            "the file has no examples; skipped: empty cells: 1 .*; rows without an inp",
        ),
        (b"mr,ref\nname[a] tail,b\n", "a.csv:2: expected field"),
        (b"mr,ref\nplace[a],b\n", "a.csv:2: the unknown field 'place'"),
        (b"mr,ref\nname[\xe9],b\n", "a.csv:2: .*byte 0xe9"),
    ],
    "a.txt": [
        (b"\n\n", "a.txt: the file is empty"),
        (b"a||b\nc d\n", r"a.txt:2: expected source\|\|target, got 0"),
        (b"a||b||c", r"got 2 '\|\|'"),
        (b"a|| ", "a.txt: 1 inputs without a text"),
        (b"a\nb", "a.txt: 2 inputs without a text"),
        (
            b"||b",
            "the file has no examples; skipped: rows without an input: 1 .the first: .*a.txt:1",
        ),
    ],
    "a.xml": [
        (b"", "a.xml: the file is empty"),
        (b"<a>\n<b></a>", "a.xml:2: broken XML: mismatched tag"),
        (b"<a>\n\xff</a>", "a.xml:2: broken XML: not well-formed"),
        (b'<?xml version="1.0" encoding="no-such"?><a/>', "a.xml:1: broken XML: unknown encoding"),
        (b"<a/>", "the file has no examples"),
        (
            b'<a><entry eid="Id9"><lex>t</lex></entry></a>',
            "skipped: rows without an input: 1 .*a.xml:Id9",
        ),
        (b"<a><entry><mtriple>a | b | c</mtriple></entry></a>", "a.xml: 1 inputs without"),
        (b"<a><entry><mtriple>a | b</mtriple></entry></a>", r"subject \| relation \| object"),
        (b"<a><entry><mtriple>a |  | c</mtriple></entry></a>", "a part of the triple .* is empty"),
    ],
    "a.json": [
        (b"", "a.json: the file is empty"),
        (b"{}", r"a.json: needs the columns of one of: .*; has \[\]"),
        (b"7", "a.json: expected a list of rows, got str"),
        (b"[]", "the file has no examples"),
        (b"[\n1", "a.json:2: not valid JSON"),
        (b"[" * 100_000, "a.json: JSON: maximum recursion depth"),
        (b"[1]", "a.json:row 1: expected a JSON object, got '1'"),
        (b'[{"tripleset": []}]', r"tripleset must be a list of triples, got \[\]"),
        (b'[{"tripleset": [], "annotations": []}]', r"tripleset must be a list of triples, got"),
        (b'[{"tripleset": [["a", "b"]], "annotations": []}]', r"object\], got \['a', 'b'\]"),
        (b'[{"tripleset": [["a", "b", {}]], "annotations": []}]', "must be a string, got {}"),
        (b'[{"tripleset": [["a", "b", "c"]], "annotations": ["d"]}]', "annotations must be a list"),
        (b'[{"tripleset": [["a", "b", "c"]], "annotations": [{}]}]', "1 inputs without a text"),
        (b'{"entries": [{"1": {"lexicalisations": []}}]}', "entry 1: expected an object with mod"),
        (b'{"entries": [7]}', "a.json:entry 1: expected an object with modifiedtripleset"),
    ],
    "a.yaml": [(b"{}", "a.yaml: unknown type of file; accepted are .jsonl, .json")],
}


@pytest.mark.parametrize(
    "name,content,message", [(name, *case) for name, cases in BROKEN.items() for case in cases]
)
def test_broken_files_are_refused_with_the_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_folders_are_recognised_by_their_files(tmp_path):
    write(tmp_path, "e2e/trainset.csv", CSV)
    write(tmp_path, "e2e/testset_w_refs.csv", "mr,ref\nname[T],t\n")
    write(tmp_path, "nlg/train/1triples/b.xml", XML)
    write(tmp_path, "nlg/train/2triples/a.xml", XML)
    write(tmp_path, "nlg/test/testdata_with_lex.xml", XML)
    write(tmp_path, "nlg/test/testdata_unseen_with_lex.xml", XML)
    write(tmp_path, "paper/src1_valid.txt", "a||b")
    write(tmp_path, "own/dev.jsonl", '{"source": "a", "target": "b"}')
    assert len(load_examples(tmp_path / "e2e", "train")) == 2
    assert load_examples(str(tmp_path / "e2e"), "test")[0].source == "name : T"
    places = [example.where for example in load_examples(tmp_path / "nlg", "train")]
    ends = ("1triples/b.xml:Id1", "1triples/b.xml:Id2", "2triples/a.xml:Id1", "2triples/a.xml:Id2")
    assert places == [f"{tmp_path}/nlg/train/{end}" for end in ends]
    assert len(load_examples(tmp_path / "nlg", "test")) == 2
    assert load_examples(tmp_path / "paper", "dev") == [
        Example("a", ("b",), None, f"{tmp_path}/paper/src1_valid.txt:1")
    ]
    assert load_examples(tmp_path / "own", "dev")[0].where == f"{tmp_path}/own/dev.jsonl:1"
    for name in ("train.json", "dev.json", "dev.xml", "test.xml"):
        write(tmp_path, f"dart/dart-v1.1.1-full-{name}", DART_XML if "xml" in name else "[]")
    with pytest.raises(ValueError, match="dart: the file has no examples"):  # of two forms the JSON
        load_examples(tmp_path / "dart", "dev")
    assert len(load_examples(tmp_path / "dart", "test")) == 1
    write(tmp_path, "hub/validation.jsonl", '{"document": "a", "summary": "b", "id": "7"}')
    assert load_examples(tmp_path / "hub", "dev")[0].id == "7"
    write(tmp_path, "own/devset.csv", CSV)
    with pytest.raises(ValueError, match="more than one of them: devset.csv, dev.jsonl"):
        load_examples(tmp_path / "own", "dev")
    with pytest.raises(
        ValueError,
        match=r"one of test.jsonl, test.json, test.csv, or of the official files "
        r"testset_w_refs.csv or testset.csv, .*; "
        r"this one has none of them, but dev.jsonl: give a file itself",
    ):
        load_examples(tmp_path / "own", "test")
    with pytest.raises(ValueError, match="is a folder: give a split"):
        load_examples(tmp_path / "own")


def test_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*missing.jsonl"):
        load_examples(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="split must be one of train, dev, test, got 'valid'"):
        load_examples(tmp_path, "valid")
    with pytest.raises(ValueError, match="linearisation must be one of .* got 'x'"):
        load_examples(tmp_path, linearisation="x")


def test_a_name_stands_for_what_was_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="e2e is not in .*: run `python -m minprefix data"):
        load_examples("e2e", "train")
    assert data_folder("e2e") == tmp_path / "cache/minprefix/data/e2e"
    write(data_folder("e2e"), "devset.csv", CSV)
    assert len(load_examples("e2e", "dev")) == 2
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder("xsum") == tmp_path / ".cache/minprefix/data/xsum"
    with pytest.raises(ValueError, match="must be one of e2e, webnlg, dart, xsum, got 'x'"):
        data_folder("x")


def test_embedded_restaurants(monkeypatch, tmp_path):
    write(tmp_path / "restaurants", "dev.jsonl", '{"table": {"name": "X"}, "text": "X."}')
    monkeypatch.setattr(data, "ASSETS", tmp_path)
    assert load_examples("restaurants", "dev")[0].source == "name : X"


@needs_shared
@pytest.mark.parametrize("linearisation", LINEARISATIONS)
@pytest.mark.parametrize(
    "split,rows,inputs", [("train", 42_061, 4_862), ("dev", 4_672, 547), ("test", 4_693, 630)]
)
def test_e2e_counts(split, rows, inputs, linearisation):
    examples = load_examples(SHARED / "data/e2e", split, linearisation=linearisation)
    targets = [target for example in examples for target in example.targets]
    assert (len(targets), len(examples)) == (rows, inputs)
    assert [target for target in targets if "\n" in target or "\r" in target] == []
    doubled = sum("  " in target for target in targets)
    assert doubled == 0 if linearisation == "paper" else split != "train" or 5_700 < doubled < 5_900
