"""NIST, ROUGE-L and CIDEr exactly as the official E2E scorer computes them.

Implements the metrics of tuetschek/e2e-metrics [1], commit 1b9c4d8, that no library computes in the
same way. `nist` takes raw texts, `rouge_l_max` and `cider` take texts tokenised by `ptb.ptb_lines`.
Units: NIST in bits per word, about 0 to 15; ROUGE-L from 0 to 1; CIDEr from 0 to 10.
NIST follows the default of [1], the Perl script mteval-v13a, which gave the published figures. With
`-p`, [1] runs a Python version, which uses another reference length and gives slightly lower
scores.
[1] https://github.com/tuetschek/e2e-metrics
[2] Doddington 2002, Automatic evaluation of machine translation quality using n-gram co-occurrence
[3] https://arxiv.org/abs/1411.5726 (CIDEr; CIDEr-D is its section 6.1)
"""

import math
from collections import Counter
from collections.abc import Sequence

from minprefix.metrics.quick import lower_ascii

NIST_ORDER, CIDER_ORDER = 5, 4  # longest n-grams
NIST_BETA = math.log(2) / math.log(1.5) ** 2  # outputs of 2/3 the length get half the score, [2]
CIDER_SIGMA = 6.0  # bigrams: width of the Gaussian penalty for a different length, [3]
ROUGE_BETA = 1.2  # recall weighs beta^2 times as much as precision


def _ngrams(tokens: Sequence[str], longest: int) -> list[Counter]:
    """[counts of 1-grams, of 2-grams, ...] of one text."""
    counts = []
    for n in range(1, longest + 1):
        counts.append(Counter(zip(*(tokens[i:] for i in range(n)), strict=False)))
    return counts


def nist(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST-5 of the corpus: n-gram hits, each weighted by its information in bits.

        info(w_1..w_n) = log2(count(w_1..w_{n-1}) / count(w_1..w_n))      over all references
        NIST = sum_n [sum of info over the hits / number of output n-grams]
               * exp(-beta ln^2 min(1, L_out / L_ref)),    beta = ln 2 / ln^2 1.5

    L_ref is pooled: all reference words / (number of references / number of outputs).
    Tokens are those of BLEU (13a, lower-cased). Source: [2]; pooled length: mteval-v13a in [1].
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    split = {
        text: tokenize(lower_ascii(text)).split()
        for text in {*outputs, *(text for texts in references for text in texts)}
    }
    grams = {text: _ngrams(tokens, NIST_ORDER) for text, tokens in split.items()}
    corpus = [Counter() for _ in range(NIST_ORDER)]
    for texts in references:
        for text in texts:
            for total, counts in zip(corpus, grams[text], strict=True):
                total.update(counts)
    ref_words = corpus[0].total()
    gained, possible = [0.0] * NIST_ORDER, [0] * NIST_ORDER
    for output, texts in zip(outputs, references, strict=True):
        for i in range(NIST_ORDER):
            most = Counter()
            for text in texts:
                most |= grams[text][i]
            possible[i] += grams[output][i].total()
            for gram, hits in (grams[output][i] & most).items():
                before = corpus[i - 1][gram[:-1]] if i else ref_words
                gained[i] += hits * math.log2(before / corpus[i][gram])
    if possible[0] == 0:
        return 0.0
    total = sum(bits / count for bits, count in zip(gained, possible, strict=True) if count)
    pooled = ref_words / sum(len(texts) for texts in references) * len(outputs)
    ratio = possible[0] / pooled if pooled else 1.0
    return total * math.exp(-NIST_BETA * math.log(min(1, ratio)) ** 2)


def _lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel: bit j of `row` is 0 where the LCS of a's words so far with b[: j + 1] is one more
    than with b[:j]. Source: Hyyro 2004, bit-parallel LCS-length computation revisited.
    """
    places: dict[str, int] = {}
    for j, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << j
    every = (1 << len(b)) - 1
    row = every
    for word in a:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & every
    return len(b) - row.bit_count()


def rouge_l_max(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L, the mean over outputs, from the highest precision and the highest recall.

        F = (1 + beta^2) P R / (R + beta^2 P),   P, R each the maximum over the references

    P and R may come from different references, as in [1]. Texts are split at each blank, so an
    empty text is one empty token.
    """
    scores = []
    for output, texts in zip(outputs, references, strict=True):
        words = output.split(" ")
        split = [text.split(" ") for text in texts]
        common = [_lcs(words, ref) for ref in split]
        precision = max(common) / len(words)
        recall = max(same / len(ref) for same, ref in zip(common, split, strict=True))
        weight = ROUGE_BETA**2
        if precision and recall:
            scores.append((1 + weight) * precision * recall / (recall + weight * precision))
        else:
            scores.append(0.0)
    return sum(scores) / len(scores)


def _vector(counts: list[Counter], idf: dict) -> tuple[list[dict], list[float]]:
    """tf-idf weights and norm per n; tf is the plain count, as in [1]."""
    weights = [{g: n * idf.get(g, idf[None]) for g, n in grams.items()} for grams in counts]
    return weights, [math.sqrt(sum(w * w for w in part.values())) for part in weights]


def cider(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D as [1] computes it: cosine of clipped tf-idf vectors, times 10, mean over outputs.

        10 / (4 m) sum_{refs r, n = 1..4} min(h, r) . r / (|h| |r|) * exp(-(l_h - l_r)^2 / (2 6^2))

    h, r: count * idf of each n-gram, idf = ln(number of outputs / number of outputs with the n-gram
    in one of their m references, at least 1); l counts *bigrams*. A single output scores 0, because
    then all idf are 0. Source: [3]; bigrams and plain counts as in the code of [1].
    """
    grams = {
        text: _ngrams(text.split(), CIDER_ORDER)
        for text in {*outputs, *(text for texts in references for text in texts)}
    }
    seen_in = Counter()
    for texts in references:
        seen_in.update({g for text in texts for counts in grams[text] for g in counts})
    idf = {g: math.log(len(outputs) / n) for g, n in seen_in.items()}
    idf[None] = math.log(len(outputs))  # for n-grams that are in no reference
    vectors = {text: _vector(counts, idf) for text, counts in grams.items()}
    total = 0.0
    for output, texts in zip(outputs, references, strict=True):
        hyp, hyp_norms = vectors[output]
        value = 0.0
        for text in texts:
            ref, ref_norms = vectors[text]
            gap = grams[output][1].total() - grams[text][1].total()
            near = math.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
            for n in range(CIDER_ORDER):
                dot = sum(min(w, ref[n][g]) * ref[n][g] for g, w in hyp[n].items() if g in ref[n])
                norms = hyp_norms[n] * ref_norms[n]
                value += near * (dot / norms if norms else dot)
        total += 10 * value / (CIDER_ORDER * len(texts))
    return total / len(outputs)
