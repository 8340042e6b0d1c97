"""The command `score`: official scores of text files, without a model.

The outputs are one per line. References have one of two forms:

    one file        in the format of the official E2E scorer [1]: one reference per line, and a
                    blank line between those of different outputs. Without blank lines, there is one
                    reference for each output, or all belong to a single output.
    several files   in the format of WebNLG [2] and DART: reference0, reference1, ..., each with a
                    line for each output, which is blank if the output has fewer references; or a
                    folder with these files.

[1] https://github.com/tuetschek/e2e-metrics
[2] https://gitlab.com/webnlg/webnlg-automatic-evaluation
"""

import re
import sys
from pathlib import Path

from minprefix.checks import check_choice
from minprefix.cli.commands import ScoreOptions
from minprefix.cli.parse import WrongUsage
from minprefix.data.splits import CATEGORIES
from minprefix.files import read_text
from minprefix.metrics.official import official_scores
from minprefix.metrics.quick import check_tokenizer, corpus_bleu, rouge_l, script_note


def _lines(path: Path) -> list[str]:
    """The lines of a text file, without line ends; the last line end does not begin a line."""
    text = read_text(path).removeprefix("\ufeff")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if all(line.startswith('{"') for line in lines):
        raise ValueError(
            f"{path}: JSON lines, as evaluate --outputs writes them; expected texts, one per line"
        )
    return lines


def read_groups(path: Path, outputs: list[str], outputs_file: Path) -> list[list[str]]:
    """The references of each output from one file; ValueError if they do not fit the outputs."""
    lines = _lines(path)
    groups: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    groups = [group for group in groups if group]
    if len(groups) == len(outputs):
        return groups
    if len(groups) == 1 and len(groups[0]) == len(outputs):
        return [[line] for line in groups[0]]
    several = "group" if len(groups) == 1 else "groups"
    raise ValueError(
        f"{outputs_file} has {len(outputs)} outputs (lines), {path} has {len(lines)} lines in "
        f"{len(groups)} {several} (between blank lines); expected a group for each output, or a "
        "line for each and no blank lines"
    )


def _number(path: Path) -> int:
    """The number K of a file named ...referenceK, for sorting; -1 for other names."""
    named = re.search(r"reference(\d+)(?:\.\w+)?$", path.name)
    return int(named[1]) if named else -1


def read_columns(paths: list[Path], outputs: list[str], outputs_file: Path) -> list[list[str]]:
    """The references of each output from several files, which have one line for each output."""
    columns = []
    for path in sorted(paths, key=_number):
        lines = read_text(path).removeprefix("\ufeff").replace("\r\n", "\n")
        columns.append(lines.removesuffix("\n").split("\n") if lines else [""] * len(outputs))
        if len(columns[-1]) != len(outputs):
            raise ValueError(
                f"{outputs_file} has {len(outputs)} outputs (lines), {path} has {len(columns[-1])}"
            )
    references = [[text for text in texts if text.strip()] for texts in zip(*columns, strict=True)]
    if [] in references:
        raise ValueError(f"output {references.index([]) + 1} has no reference in any file")
    return references


def read_references(paths: list[Path], outputs: list[str], outputs_file: Path) -> list[list[str]]:
    """The references of each output, in order."""
    if len(paths) == 1 and paths[0].is_dir():
        found = [path for path in paths[0].glob("reference*") if _number(path) >= 0]
        if not found:
            raise ValueError(f"{paths[0]}: no files reference0, reference1, ... in this folder")
        return read_columns(found, outputs, outputs_file)
    if len(paths) > 1:
        return read_columns(paths, outputs, outputs_file)
    return read_groups(paths[0], outputs, outputs_file)


def read_categories(options: ScoreOptions, n_outputs: int) -> list[str]:
    """The category of each output; ValueError if they do not fit the outputs."""
    path = options.groups
    assert path is not None
    groups = [line.strip() for line in _lines(path)]
    if len(groups) != n_outputs:
        raise ValueError(
            f"{options.outputs_file} has {n_outputs} outputs (lines), {path} has {len(groups)}"
        )
    for number, group in enumerate(groups, 1):
        check_choice(f"{path}:{number}: the category", group, CATEGORIES)
    return groups


def run(options: ScoreOptions) -> dict:
    if not options.references_files:
        raise WrongUsage(
            f"give the references of {options.outputs_file}: a file, several files or a folder"
        )
    if options.groups and options.metrics != "webnlg":
        raise WrongUsage(f"--groups needs --metrics webnlg, got {options.metrics}")
    outputs = _lines(options.outputs_file)
    references = read_references([*options.references_files], outputs, options.outputs_file)
    tokenizer = options.score_tokenizer
    check_tokenizer(options.metrics, tokenizer)
    texts = (text for group in references for text in group)
    if note := script_note(texts, options.metrics, tokenizer):
        print(note, file=sys.stderr)
    groups = read_categories(options, len(outputs)) if options.groups else None
    if options.metrics == "quick":
        both = outputs, references, tokenizer
        scores = {"bleu": corpus_bleu(*both), "rouge_l": rouge_l(*both)}
    else:
        scores = official_scores(outputs, references, options.metrics, groups)
    return {"outputs": len(outputs)} | scores
