"""The command `score`: official scores of two text files, without a model.

Files as the official E2E scorer takes them [1]: one output a line; references one a line, a blank
line between those of different outputs. Where there is no blank line each output has one reference.
[1] https://github.com/tuetschek/e2e-metrics
"""

from pathlib import Path

from minprefix.cli.commands import ScoreOptions
from minprefix.files import read_text
from minprefix.metrics.official import official_scores
from minprefix.metrics.quick import corpus_bleu, rouge_l


def _lines(path: Path) -> list[str]:
    """The lines of a text file without their ends; a last line end begins no further line."""
    text = read_text(path).removeprefix("\ufeff")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def read_references(path: Path) -> list[list[str]]:
    """The references of each output, in order."""
    groups: list[list[str]] = [[]]
    lines = _lines(path)
    for line in lines:
        if line.strip():
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    groups = [group for group in groups if group]
    return groups if all(len(g) < len(lines) for g in groups) else [[line] for line in lines]


def run(options: ScoreOptions) -> dict:
    outputs, references = _lines(options.outputs_file), read_references(options.references_file)
    if len(outputs) != len(references):
        raise ValueError(
            f"{options.outputs_file} has {len(outputs)} outputs (lines), "
            f"{options.references_file} references of {len(references)} (between blank lines)"
        )
    groups = [line.strip() for line in _lines(options.groups)] if options.groups else None
    if options.metrics == "quick":
        if groups:
            raise ValueError("--groups go with --metrics webnlg, not with quick")
        scores = {"bleu": corpus_bleu(outputs, references), "rouge_l": rouge_l(outputs, references)}
    else:
        scores = official_scores(outputs, references, options.metrics, groups)
    return {"outputs": len(outputs)} | scores
