"""The scores in the tables of the prefix-tuning paper, as the official scripts compute them.

Read `official_scores`; SUITES has the columns of each data set. The source of each suite, and what
it was compared with:

    e2e     tuetschek/e2e-metrics 1b9c4d8 [1], its default (Perl) mode. All five columns agree with
            its output to 8 digits on five sets, one of them the published TGen baseline.
    webnlg  webnlg-automatic-evaluation [2], the copy in Yale-LILY/dart: texts are split at every
            character that is not a letter or digit, lower-cased, and converted to ASCII; at most
            three references. BLEU by multi-bleu.perl -lc, METEOR 1.5, TER by tercom 0.7.25. All
            three agree with the published files of two systems on the 21 entries with 7 triples:
            METEOR and TER in all digits, BLEU in its two digits. Whole test sets and unseen
            categories were not compared.
    dart    run_eval_on_dart.sh [3], with the same three programs; its reference files are split and
            lower-cased in the same way, but keep their accents. They do not belong to v1.1.1 (issue
            6 there), and we have no official figures, so these columns were not compared.
    xsum    the package rouge-score, which the paper names: F1 with stemming, as in transformers'
            summarisation examples of that time [4], but with the plain mean instead of the median
            of bootstrap samples, which is random and close to it. Not compared.

DART's MoverScore, BERTScore and BLEURT need models of their own and are not computed.
[1] https://github.com/tuetschek/e2e-metrics
[2] https://gitlab.com/webnlg/webnlg-automatic-evaluation
[3] https://github.com/Yale-LILY/dart/tree/master/evaluation
[4] https://github.com/huggingface/transformers, examples/seq2seq/utils.py of version 3
"""

import re
import sys
from collections.abc import Callable, Sequence

from minprefix.checks import check_choice
from minprefix.data.examples import Example
from minprefix.data.rows import E2E_FIELDS
from minprefix.data.splits import CATEGORIES, seen_categories
from minprefix.data.triples import DART_CATEGORY
from minprefix.metrics.e2e import cider, nist, rouge_l_max
from minprefix.metrics.meteor import meteor, why_unavailable
from minprefix.metrics.ptb import ptb_lines
from minprefix.metrics.quick import check_references, corpus_bleu, streams

Texts = Sequence[str]
References = Sequence[Sequence[str]]

# Columns as the paper's tables 1 and 2 name them. BLEU, R-1, R-2, R-L and E2E's MET: 0 to 100; MET
# and TER (lower is better) of WebNLG and DART: 0 to 1, TER can exceed it; NIST, CIDEr: 0 to 15, 10.
SUITES = {
    "e2e": ("BLEU", "NIST", "MET", "R-L", "CIDEr"),
    "webnlg": tuple(f"{name} {part}" for name in ("BLEU", "MET", "TER") for part in "SUA"),
    "dart": ("BLEU", "MET", "TER"),
    "xsum": ("R-1", "R-2", "R-L"),
}
METRICS = ("quick", *SUITES, "auto")  # the choices of `methods.evaluate.measure`
MAX_REFERENCES = 3  # for WebNLG and DART: the scripts use the first three


def _e2e(outputs: Texts, references: References) -> dict[str, float]:
    scores = {"BLEU": corpus_bleu(outputs, references), "NIST": nist(outputs, references)}
    tokens = iter(ptb_lines([text for texts in references for text in texts]))
    references = [[next(tokens) for _ in texts] for texts in references]
    outputs = ptb_lines(outputs)
    if not why_unavailable():
        scores["MET"] = 100 * meteor(outputs, references)
    scores["R-L"] = 100 * rouge_l_max(outputs, references)
    return scores | {"CIDEr": cider(outputs, references)}


def _split(text: str) -> str:
    """Put blanks around each character that is not a letter, digit or underscore."""
    return " ".join(re.sub(r"(\W)", r" \1 ", text).split())


def _webnlg_output(text: str) -> str:
    from text_unidecode import unidecode  # imported here, because most commands compute no score

    return _split(unidecode(unidecode(text.strip()).lower()))


def _webnlg_reference(text: str) -> str:
    from text_unidecode import unidecode

    return unidecode(_split(text).lower())


def _lower(text: str) -> str:
    return _split(text).lower()


def _multi_bleu(outputs: Texts, references: References) -> float:
    """BLEU-4 of split texts in percent, as by multi-bleu.perl -lc: not smoothed, so it is 0 without
    a common 4-gram.

    An output with fewer than three references gets empty ones, as in the scripts' files. For a very
    short output, the closest reference length is then 0.
    """
    from sacrebleu.metrics import BLEU

    padded = [[*texts, *[""] * (MAX_REFERENCES - len(texts))] for texts in references]
    bleu = BLEU(lowercase=True, tokenize="none", smooth_method="none", force=True)
    return bleu.corpus_score(outputs, streams(padded)).score


def _edits(outputs: Texts, references: References) -> list[tuple[float, float]]:
    """(fewest edits to a reference, mean reference length) of each output, by sacrebleu's TER."""
    from sacrebleu.metrics import TER

    ter = TER()  # tercom's defaults: ignore case, split at blanks
    scores = [ter.sentence_score(o, list(r)) for o, r in zip(outputs, references, strict=True)]
    return [(score.num_edits, score.ref_length) for score in scores]


def _translation_scores(
    outputs: Texts, references: References, parts: dict[str, list[int]]
) -> dict[str, float]:
    """BLEU, MET and TER of each part of the split texts (its name -> indices of the outputs)."""
    edits = _edits(outputs, references)
    columns: dict[str, dict[str, float]] = {"BLEU": {}, "MET": {}, "TER": {}}
    for name, numbers in parts.items():
        part = [outputs[i] for i in numbers], [references[i] for i in numbers]
        columns["BLEU"][name] = _multi_bleu(*part)
        if not why_unavailable():
            columns["MET"][name] = meteor(*part)
        changes, length = (sum(edits[i][k] for i in numbers) for k in (0, 1))
        columns["TER"][name] = changes / length if length else float(changes > 0)
    return {
        f"{column} {name}".strip(): value
        for column, values in columns.items()
        for name, value in values.items()
    }


def _webnlg(
    outputs: Texts, references: References, groups: Sequence[str] | None
) -> dict[str, float]:
    parts = {"A": list(range(len(outputs)))}
    if groups is not None:
        for number, group in enumerate(groups):
            check_choice(f"group {number}", group, CATEGORIES)
        known = seen_categories(groups)
        seen = [i for i, group in enumerate(groups) if group in known]
        unseen = [i for i, group in enumerate(groups) if group not in known]
        parts = {name: p for name, p in (("S", seen), ("U", unseen)) if p} | parts
    outputs = [_webnlg_output(text) for text in outputs]
    references = [[_webnlg_reference(t) for t in r[:MAX_REFERENCES]] for r in references]
    return _translation_scores(outputs, references, parts)


def _dart(outputs: Texts, references: References) -> dict[str, float]:
    outputs = [_lower(text) for text in outputs]
    references = [[_lower(text) for text in texts[:MAX_REFERENCES]] for texts in references]
    return _translation_scores(outputs, references, {"": list(range(len(outputs)))})


def _xsum(outputs: Texts, references: References) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = {"R-1": "rouge1", "R-2": "rouge2", "R-L": "rougeL"}
    scorer = RougeScorer(list(kinds.values()), use_stemmer=True)
    scores = [
        scorer.score_multi(texts, output) for output, texts in zip(outputs, references, strict=True)
    ]
    return {
        name: 100 * sum(score[kind].fmeasure for score in scores) / len(scores)
        for name, kind in kinds.items()
    }


def suite_of(examples: Sequence[Example]) -> str:
    """The suite for examples of this form: "e2e", "webnlg" or "dart"; else "quick"."""
    if all(e.table and {f.lower() for f, _ in e.table} <= _E2E_NAMES for e in examples):
        return "e2e"
    groups = {example.group for example in examples}
    if groups <= {*CATEGORIES}:
        return "webnlg"
    return "dart" if groups == {DART_CATEGORY} else "quick"


_E2E_NAMES = {name.lower() for name in E2E_FIELDS.values()}


def official_scores(
    outputs: Texts,
    references: References,
    suite: str = "e2e",
    groups: Sequence[str] | None = None,
    note: Callable[[str], object] = lambda text: print(text, file=sys.stderr),
) -> dict[str, float]:
    """The columns of SUITES[suite], in the paper's scale; METEOR only if Java and its jar exist.

    Score a test set as a whole: NIST and CIDEr weight n-grams by how rare they are in its
    references (CIDEr of one output is 0). The texts must not be tokenised: each suite tokenises and
    lower-cases them itself.

    Args:
        references: one non-empty list for each output; WebNLG and DART use the first three.
        groups: WebNLG's category of each output, for the columns S (seen in training), U (unseen)
            and A (all); without groups, and for an empty part, these columns are left out.
        note: is called with the line that says why METEOR is left out.
    Raises:
        ValueError: unknown suite or category, lengths that differ, or a value that is not a text.
        OSError: METEOR's program failed.
    """
    check_choice("suite", suite, tuple(SUITES))
    check_references(outputs, references)
    if groups is not None:
        if suite != "webnlg":
            raise ValueError(f"groups need the suite webnlg, got {suite}")
        if len(groups) != len(outputs):
            raise ValueError(f"got {len(outputs)} outputs and {len(groups)} groups")
    outputs = [" ".join(output.split("\n")) for output in outputs]
    references = [[" ".join(text.split("\n")) for text in texts] for texts in references]
    if suite != "xsum" and (problem := why_unavailable()):
        note(problem)
    if suite == "webnlg":
        return _webnlg(outputs, references, groups)
    return {"e2e": _e2e, "dart": _dart, "xsum": _xsum}[suite](outputs, references)
