"""Data in the formats of official releases and users: all formats of the same contents give the
same examples, and all readers count unusable parts in the same way."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SHARED
from test_data import needs_shared, write

from minprefix.data.examples import Example
from minprefix.data.load import load_examples
from minprefix.data.splits import choose
from minprefix.metrics.official import suite_of

CLEANED = (
    "mr,ref,fixed,orig_mr\n"
    '"name[Oak], area[riverside], area[city centre]",Oak is here and there.,1,"name[Oak]"\n'
    '"area[riverside], area[city centre], name[Oak]",Both for Oak.,0,"name[Oak]"\n'
    "name[Elm],Elm.,0,name[Elm]\n"
)


def test_a_field_of_the_cleaned_e2e_may_occur_twice(tmp_path):
    oak, elm = load_examples(write(tmp_path, "a.csv", CLEANED))
    assert oak.source == "name : Oak | area : riverside | area : city centre"
    assert oak.table == (("name", "Oak"), ("area", "riverside"), ("area", "city centre"))
    assert oak.targets == ("Oak is here and there.", "Both for Oak.")
    assert (elm.targets, suite_of([oak, elm])) == (("Elm.",), "e2e")


def test_the_cleaned_e2e_is_found_by_its_names(tmp_path):
    for name in ("train-fixed.no-ol.csv", "train-fixed.csv", "devel-fixed.no-ol.csv"):
        write(tmp_path, name, CLEANED)
    write(tmp_path, "test-fixed.csv", CLEANED.splitlines()[0] + "\nname[T],t,0,name[T]\n")
    counts = [len(load_examples(tmp_path, split)) for split in ("train", "dev", "test")]
    assert counts == [2, 2, 1]
    assert load_examples(tmp_path, "train")[0].where == f"{tmp_path}/train-fixed.no-ol.csv:2"


@needs_shared
def test_cleaned_e2e_counts(caplog):
    examples = load_examples(SHARED / "data/e2e-cleaned", "dev")
    assert (len(examples), sum(len(e.targets) for e in examples)) == (1_484, 4_299)
    twice = [e for e in examples if len(dict(e.table)) < len(e.table)]
    assert sum(len(e.targets) for e in twice) == 226 and not caplog.text


@needs_shared
def test_no_row_of_e2e_is_lost_in_the_cleaned_form(tmp_path):
    """The official training file of the cleaned data is not here: all of E2E's in its form."""
    with open(SHARED / "data/e2e/trainset.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(tmp_path / "train-fixed.no-ol.csv", "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["mr", "ref", "fixed", "orig_mr"])
        out.writerows([f"{r['mr']}, area[moon], area[sea]", r["ref"], 1, r["mr"]] for r in rows)
    examples = load_examples(tmp_path, "train")
    assert sum(len(example.targets) for example in examples) == len(rows) == 42_061
    assert all(len(dict(example.table)) < len(example.table) for example in examples)


def test_a_table_may_have_a_column_for_each_field(tmp_path, caplog):
    """In each kind of file; empty cells and row numbers are no fields, nor is the language."""
    lines = (
        ",Due Date,title,Text,language\n0,4 May,Emma,Back by 4 May.,en\n1,,Ulysses,No date.,en\n"
    )
    path = write(tmp_path, "a.csv", lines)
    emma, ulysses = load_examples(path)
    assert emma.source == "Due Date : 4 May | title : Emma" and emma.language == "en"
    assert (ulysses.table, ulysses.targets) == ((("title", "Ulysses"),), ("No date.",))
    assert f"{path}: the columns Due Date, title are the table's fields" in caplog.text
    row = {"title": "Emma", "due": 4, "target": "Back by 4."}
    (found,) = load_examples(write(tmp_path, "a.jsonl", json.dumps(row)))
    assert (found.source, found.targets) == ("title : Emma | due : 4", ("Back by 4.",))
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pytest.importorskip("pyarrow").Table.from_pylist([row]), tmp_path / "p.parquet"
    )
    assert load_examples(tmp_path / "p.parquet") == [
        replace(found, where=f"{tmp_path}/p.parquet:1")
    ]
    text = write(tmp_path, "inputs.csv", "title,text\nEmma,\n")
    assert [e.source for e in load_examples(text, references=False)] == ["title : Emma"]


def test_a_table_in_a_cell_may_be_json(tmp_path):
    cell = '"{""name"": ""Oak"", ""stars"": 5}"'
    (found,) = load_examples(write(tmp_path, "a.csv", f"table,text\n{cell},Oak has 5 stars.\n"))
    assert found.table == (("name", "Oak"), ("stars", "5"))
    with pytest.raises(ValueError, match=r"b.csv:2: table is not valid JSON \(.*: '\{name: Oak\}'"):
        load_examples(write(tmp_path, "b.csv", "table,text\n{name: Oak},Oak.\n"))


@pytest.mark.parametrize("separator, name", [(";", "';'"), ("\t", "a tab")])
def test_another_separator_is_named(tmp_path, separator, name):
    path = write(tmp_path, "a.csv", f"source{separator}target\na{separator}b\n")
    with pytest.raises(ValueError, match=f"a.csv:1: the separator looks like {name}"):
        load_examples(path)


ENRICHED = """<benchmark><entries><entry category="Airport" eid="Id7" size="2">
 <originaltripleset><otriple>unused | x | y</otriple></originaltripleset>
 <modifiedtripleset><otriple>A | b | C</otriple><mtriple>C | d | E</mtriple></modifiedtripleset>
 <lex comment="good" lid="Id1"><tree/><sortedtripleset><sentence ID="1">
  <striple>A | b | C</striple></sentence></sortedtripleset><references/>
  <text>A has
C. </text><template>AGENT-1 has PATIENT-1</template></lex>
 <lex comment="toFix" lid="Id2"><text>E it.</text><template>no</template></lex>
 <lex comment="good" lid="Id3"><text> </text><template>no</template></lex>
 <entitymap><entity>AGENT-1 | A</entity></entitymap>
</entry></entries></benchmark>"""
WEBNLG_JSON = {
    "entries": [
        {
            "1": {
                "category": "Airport", "size": "2", "xml_id": "Id7", "shape": "NA",
                "lexicalisations": [
                    {"comment": "good", "lang": "", "lex": "A has\nC. ", "xml_id": "Id1"},
                    {"comment": "toFix", "lang": "", "lex": "E it.", "xml_id": "Id2"},
                    {"comment": "good", "lang": "", "lex": "", "xml_id": "Id3"},
                ],
                "modifiedtripleset": [
                    {"object": "C", "property": "b", "subject": "A"},
                    {"object": "E", "property": "d", "subject": "C"},
                ],
                "originaltriplesets": {"originaltripleset": [[]]},
            }
        }
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", ["a.xml", "webnlg_release_v2.1_train.json"])
def test_enriched_webnlg_and_webnlg_as_json(tmp_path, name, caplog):
    content = ENRICHED if name.endswith("xml") else json.dumps(WEBNLG_JSON)
    path = write(tmp_path, name, content)
    (entry,) = load_examples(path, "train")
    assert (entry.source, entry.group) == ("A : b : C | C : d : E", "Airport")
    assert (entry.targets, entry.language) == (("A has C.", "E it."), "en")
    assert caplog.text.count(f"{path}: skipped: empty texts: 1 (the first: {path}:") == 1
    (exact,) = load_examples(path, "train", linearisation="original-code")
    assert (exact.source, exact.targets) == (" | A : b : C | C : d : E", ("A has C. ",))
    assert suite_of([entry]) == "webnlg"
    if name.endswith("json"):
        assert load_examples(tmp_path, "train") == [entry]
        write(tmp_path, name, json.dumps({"entries": list(WEBNLG_JSON["entries"][0].values())}))
        assert load_examples(path, "train") == [entry]


@needs_shared
def test_enriched_webnlg_has_the_texts_of_its_files(tmp_path):
    found = {}
    for path in sorted((SHARED / "data/webnlg-enriched").rglob("*.xml")):
        texts = [t for e in load_examples(path) for t in e.targets]
        assert len(texts) == path.read_text(encoding="utf-8").count("<text>")
        found[path.name] = found.get(path.name, 0) + len(texts)
    assert found["Airport.xml"] == 2 * (86 + 55) and found["Airport.de.xml"] == 86


def entry(eid: str, *texts: str, category: str = "Food") -> str:
    lexes = "".join(f"<lex comment='good' {text}</lex>" for text in texts)
    triple = f"<modifiedtripleset><mtriple>A | b | {eid}</mtriple></modifiedtripleset>"
    return f"<entry category='{category}' eid='{eid}' size='1'>{triple}{lexes}</entry>"


def benchmark(*entries: str) -> str:
    return f"<benchmark><entries>{''.join(entries)}</entries></benchmark>"


def test_the_language_of_a_text_is_never_ignored(tmp_path, caplog):
    """WebNLG 2020's Russian files hold both English and Russian texts."""
    both = entry("Id1", "lang='en'>It is.", "lang='ru'>Это так.", "lang='ru'>Да.")
    path = write(tmp_path, "a.xml", benchmark(both, entry("Id2", "lang='en'>No.")))
    with pytest.raises(
        ValueError, match="a.xml: the texts are in en, ru: choose one, such as --lang.* ru"
    ):
        load_examples(path)
    (russian,) = load_examples(path, language="ru")
    assert russian.targets == ("Это так.", "Да.")
    assert "examples in en: 2 (the first: " in caplog.text
    assert [e.targets for e in load_examples(path, language="en")] == [("It is.",), ("No.",)]
    with pytest.raises(ValueError, match="a.xml: no texts are in 'de'; the languages are en, ru"):
        load_examples(path, language="de")
    assert [e.source for e in load_examples(path, references=False)] == [
        "A : b : Id1",
        "A : b : Id2",
    ]

    write(tmp_path, "dev/1triples/Food.xml", benchmark(entry("Id1", ">It is.")))
    write(tmp_path, "dev/1triples/Food.de.xml", benchmark(entry("Id1", ">Ja.")))
    with pytest.raises(ValueError, match="the texts are in de, en: choose one"):
        load_examples(tmp_path, "dev")
    assert load_examples(tmp_path, "dev", language="de")[0].targets == ("Ja.",)

    rows = [{"source": "a", "target": t, "lang": lang} for t, lang in (("x", "fr"), ("y", "it"))]
    path = write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="rows.jsonl: the texts are in fr, it"):
        load_examples(path)
    assert load_examples(path, language="fr")[0].targets == ("x",)
    path = write(tmp_path, "none.jsonl", '{"source": "a", "target": "b"}')
    with pytest.raises(
        ValueError, match="no texts are in 'ru'; the languages are a language that is not n"
    ):
        load_examples(path, language="ru")


def test_webnlg_2020_by_its_names_and_categories(tmp_path):
    names = ("Company", "Artist", "Film")
    train, test = (
        benchmark(*(entry(f"Id{n}", ">T.", category=c) for n, c in enumerate(categories)))
        for categories in (names[:2], names)
    )
    write(tmp_path, "train/1triples/Company.xml", train)
    write(tmp_path, "test/rdf-to-text-generation-test-data-with-refs-en.xml", test)
    write(tmp_path, "test/semantic-parsing-test-data-with-refs-en.xml", test)
    write(tmp_path, "test/rdf-to-text-generation-test-data-without-refs-en.xml", test)
    examples = load_examples(tmp_path, "test")
    assert [e.group for e in choose(examples, "seen", "test")] == ["Company", "Artist"]
    assert [e.group for e in choose(examples, "unseen", "test")] == ["Film"]
    assert len(choose(load_examples(tmp_path, "train"), "seen", "train")) == 2
    assert suite_of(examples) == "webnlg"


def test_numbers_nulls_lists_and_empty_cells_of_tables(tmp_path, caplog):
    table = (
        '{"name": "X", "stars": 4.50, "seats": 12, "open": true, "owner": null, "note": " ",'
        ' "tax": NaN, "area": ["riverside", "", "centre"]}'
    )
    expected = (
        ("name", "X"), ("stars", "4.50"), ("seats", "12"), ("open", "true"),
        ("area", "riverside"), ("area", "centre"),
    )  # fmt: skip
    path = write(tmp_path, "a.jsonl", f'{{"table": {table}, "text": ["X.", null, " "]}}\n')
    (row,) = load_examples(path)
    assert (row.table, row.targets) == (expected, ("X.",))
    told = f"empty texts: 2 (the first: {path}:1); empty cells: 4 (the first: {path}:1)"
    assert [r.getMessage() for r in caplog.records] == [f"{path}: skipped: {told}"]
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parsed = [
        {"name": "X", "stars": 4.5, "seats": 12, "open": True, "area": ["riverside", "centre"]}
    ]
    parquet.write_table(pyarrow.table({"table": parsed, "text": [["X."]]}), tmp_path / "a.parquet")
    (same,) = load_examples(tmp_path / "a.parquet")
    assert same.table == tuple((f, "4.5" if f == "stars" else v) for f, v in expected)


E2E_MR = "name[Oak], eatType[pub]"
PAIRS = {
    ("mr", "ref"): E2E_MR,
    ("meaning_representation", "human_reference"): E2E_MR,
    ("table", "text"): {"name": "Oak"},
    ("source", "target"): "A long text.",
    ("document", "summary"): "A long text.",
    ("article", "highlights"): "A long text.",
    ("dialogue", "summary"): "A: Hi.\r\nB: Hello.",
    ("tripleset", "annotations"): [["Oak", "is", "pub"]],
}


def file_of(path: Path, rows: list[dict]) -> Path | None:
    """The rows in the form that the suffix of `path` names; None where it has none for them."""
    text = "\n".join(json.dumps(row) for row in rows)
    suffix = path.suffix
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        if not all(isinstance(v, str) for row in rows for v in row.values()):
            return None
        with path.open("w", encoding="utf-8", newline="") as file:
            out = csv.DictWriter(file, [*rows[0]])
            out.writeheader()
            out.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.stem == "list" else text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "lines.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_every_kind_of_row_in_every_kind_of_file(tmp_path, pair, name):
    """With its text; and its input alone, which `generate` takes and training refuses."""
    text = [{"text": "Short."}] if pair[1] == "annotations" else "Short."
    path = file_of(tmp_path / name, [{"id": "7", pair[0]: PAIRS[pair], pair[1]: text}])
    if path is None:
        pytest.skip("a table is no cell of a CSV")
    (row,) = load_examples(path)
    assert row.targets == ("Short.",) and row.source
    if "summary" in pair or "highlights" in pair:
        assert row.id == "7"
    file_of(path, [{pair[0]: PAIRS[pair]}])
    (alone,) = load_examples(path, references=False)
    assert (alone.source, alone.table, alone.targets) == (row.source, row.table, ())
    with pytest.raises(ValueError, match="1 inputs without a text .* `generate --data` writes one"):
        load_examples(path)


def test_triples_of_the_hub(tmp_path):
    """The hub's DART has the parts of all annotations side by side."""
    sets = {"tripleset": [["Oak", "IS", "pub"]], "annotations": {"source": ["a"], "text": ["Oak."]}}
    rows = [sets, sets, {**sets, "annotations": {"source": [], "text": []}}]
    found = load_examples(file_of(tmp_path / "a.parquet", rows))
    assert [e.where.rpartition(":")[2] for e in found] == ["1", "2"]  # equal sets stay apart
    assert (found[0].source, found[0].targets, found[0].group) == (
        "Oak : IS : pub",
        ("Oak.",),
        "MISC",
    )


def test_inputs_alone_beside_rows_with_texts_are_counted(tmp_path, caplog):
    rows = [{"source": "a", "target": "b"}, {"source": "c"}, {"source": "d", "target": ""}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [e.source for e in load_examples(path)] == ["a"]
    told = f"empty texts: 1 (the first: {path}:3); inputs without a text: 2 (the first: {path}:2)"
    assert f"{path}: skipped: {told}" in caplog.text
    assert [e.source for e in load_examples(path, references=False)] == ["a", "c", "d"]


def test_test_sets_with_inputs_alone_are_found(tmp_path):
    write(tmp_path, "e2e/testset.csv", "MR\nname[T]\nname[U]\n")
    write(tmp_path, "nlg/test/testdata_no_lex.xml", benchmark(entry("Id1")))
    for folder, size in (("e2e", 2), ("nlg", 1)):
        assert len(load_examples(tmp_path / folder, "test", references=False)) == size
        with pytest.raises(ValueError, match=f"{size} inputs without a text"):
            load_examples(tmp_path / folder, "test")
    write(tmp_path, "e2e/testset_w_refs.csv", "mr,ref\nname[V],v\n")  # is taken before it
    assert [e.source for e in load_examples(tmp_path / "e2e", "test")] == ["name : V"]


def test_one_split_in_two_forms_is_not_guessed(tmp_path):
    write(tmp_path, "val.json", '[{"source": "a", "target": "b"}]')
    assert load_examples(tmp_path, "dev")[0].targets == ("b",)
    write(tmp_path, "val.csv", "source,target\na,c\n")
    with pytest.raises(ValueError, match=r"more than one of them: val.json, val.csv"):
        load_examples(tmp_path, "dev")


@needs_shared
def test_inputs_alone_are_those_of_the_files_with_texts():
    for folder, alone in (("e2e", "testset.csv"), ("webnlg", "test/testdata_no_lex.xml")):
        inputs = load_examples(SHARED / "data" / folder / alone, references=False)
        whole = load_examples(SHARED / "data" / folder, "test")
        assert sorted(e.source for e in inputs) == sorted(e.source for e in whole)


def test_lines_of_source_and_target(tmp_path):
    """XSum in the format of the paper's code: train.source, train.target, val.source, ..."""
    write(tmp_path, "val.source", "First  article.\n\nThird | one\n")
    write(tmp_path, "val.target", "One.\r\n \r\nThree. \r\n")
    first, third = load_examples(tmp_path, "dev")
    where = f"{tmp_path}/val.source"
    assert first == Example("First article.", ("One.",), None, f"{where}:1", "", f"{where}:1")
    assert (third.source, third.targets, third.where) == ("Third | one", ("Three.",), f"{where}:3")
    assert len(load_examples(tmp_path, "dev", references=False)) == 3
    exact = load_examples(tmp_path, "dev", linearisation="original-code")[0]
    assert (exact.source, exact.targets) == ("First  article.", ("One.",))
    write(tmp_path, "twice.source", "a\na\n")
    assert len(load_examples(tmp_path / "twice.source", references=False)) == 2
    with pytest.raises(ValueError, match="2 inputs without a text"):
        load_examples(tmp_path / "twice.source")
    write(tmp_path, "twice.target", "a\n")
    with pytest.raises(ValueError, match="twice.source has 2 lines, .*twice.target 1"):
        load_examples(tmp_path / "twice.source")


def test_generate_writes_a_text_for_each_input(cli, tmp_path, tiny_folder):
    path = write(tmp_path, "testset.csv", "MR\nname[T]\nname[U]\n")
    how = ("--model", tiny_folder, "--max-new-tokens", 3, "--device", "cpu")
    out, _ = cli("generate", *how, "--data", path, "--frame", "paper")
    assert out.count("\n") == 2
    asked, _ = cli("generate", *how, "--frame", "paper", "--json", "name : T", "name : U")
    assert [line.strip() for line in out.splitlines()] == [
        " ".join(text.splitlines()) for text in json.loads(asked)["texts"]
    ]
    for option in ("evaluate", "train"):
        more = ("--out", tmp_path / "run") if option == "train" else ("--linearisation", "paper")
        _, err = cli(option, "--model", tiny_folder, "--data", path, *more, code=1)
        assert "2 inputs without a text" in err and err.count("\n") == 1
    _, err = cli("generate", *how, "--data", path, "a prompt", code=2)
    assert "--data provides the prompts" in err
