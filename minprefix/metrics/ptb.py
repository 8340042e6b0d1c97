"""The English tokens for METEOR, ROUGE-L and CIDEr in the E2E scorer, without Java.

The official scorer [1] runs Stanford's PTBTokenizer 3.4.1 [2] with -preserveLines -lowerCase, then
drops most punctuation. This file gives the same result for restaurant, WebNLG and DART texts. Read
`ptb_lines`; `_PATTERNS` holds the rules: at each place the longest match is the next token. Unlike
[2], it has no rules for XML, e-mail headers and the marks of other scripts, and it differs in a few
rare words ("dunno"). It does not distinguish left and right quotes, because both are dropped.
[1] https://github.com/tuetschek/e2e-metrics   [2] https://nlp.stanford.edu/software/tokenizer.html
"""

import re
from collections.abc import Sequence

_WORD = r"[^\W_]"  # a letter or a digit
_LETTER = r"[^\W\d_]"
_QUOTE = "['’‘`]"
_INITIALS = rf"[A-Za-z](?:\.[A-Za-z])+(?!{_LETTER})"  # U.S, p.m; the last full stop follows

# Words whose full stop belongs to them: in any case, or only as names ("Pa.", but "my pa .").
_SHORT = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri"
    "|ala|ariz|calif|colo|conn|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn"
    "|va|vt|wisc?|wyo|inc|cos?|corp|ltd|plc|dept|assn|univ|intl|jr|sr|bros|esq|ed|etc|al|seq|adv|cf|assoc"
    "|bldg|rd|blvd|sq|ct|ft|est|tel|mr|mrs|ms|drs?|profs?|sens?|reps?|lt|col|gen|govs?|adm|rev"
    "|maj|sgt|cpl|pvt|mt|capt|ste?|ave|pres|hon|messrs|vs"
)
_SHORT_NAMES = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_SHORT_BEFORE_DIGITS = "ca|figs?|prop|nos?|arts?|pp|op"
# "Serie B. The": before one of these words, the full stop after a letter ends the sentence.
_STARTERS = (
    "A|About|According|Additionally|After|All|Also|Although|An|And|Any|A[sS]|At|But|For|From|He|Her"
    "|His|However|I|If|In|It|Many|More|Most|Now|Once|One|Other|Our|She|Since|So|Some|Such"
    "|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)
_PATTERNS = [
    # french,family-friendly   20-25   U.S.-based
    rf"{_WORD}(?:{_WORD}|[.,])*(?:-(?:{_WORD}+|{_INITIALS}\.))+",
    # pub   5of5   d'oeuvre   o'clock   a_b   do (n't)
    rf"(?:[dol]{_QUOTE})?(?:{_WORD}+?(?=n{_QUOTE}t(?!\w))|{_WORD}+(?:_{_WORD}+)*)",
    # friendly.Located   yes!no
    rf"{_LETTER}{_WORD}*(?:[.!?]{_LETTER}{_WORD}*)+",
    # ra'ayat   ma'am   D'Artagnan
    rf"{_LETTER}+(?-i:[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]){_LETTER}*",
    rf"(?-i:[A-HJ-XZn]){_QUOTE}{_LETTER}{{3,}}",
    # u.s.   center., near   rd.   no. 5   c. (no sentence begins after it)
    rf"{_INITIALS}\.",
    rf"{_LETTER}+\.(?=[,;:])",
    rf"(?:{_SHORT}|(?-i:{_SHORT_NAMES}))\.",
    rf"(?:{_SHORT_BEFORE_DIGITS})\.(?=\s?\d)",
    rf"{_LETTER}\.(?!\s+(?-i:{_STARTERS})\s)",
    # 3/5   1 1/2   1,000.50   .6   -25   and/or
    r"(?:\d{1,4}[- \xa0])?\d{1,4}/\d{1,4}",
    r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)",
    rf"{_WORD}+(?:-{_LETTER}+){{0,2}}(?:/{_WORD}+(?:-{_LETTER}+){{0,2}}){{1,2}}",
    # 's   n't   'em   '90s   't is
    rf"['’](?:s|m|d|re|ve|ll|em|n['’]?|cause|[2-9]0s)(?!{_WORD})|['’]\d\d(?=\s)",
    rf"n{_QUOTE}t(?!\w)",
    rf"{_QUOTE}t(?=is\b|was\b)",
    # AT&T   C++   US$   #tag   www.a.com   me@a.com   <br>   &amp;
    r"(?-i:[A-Z]+(?:(?:&amp;|[&+])[A-Z]+)+)|C\+\+|C#|(?-i:F#)",
    r"(?-i:US|HK|NT|NZ|[ACMRS])\$",
    rf"[@#]{_LETTER}\w*",
    r"(?:(?:https?|ftp)://|www\.)[^\s\"<>|()]*[^\s\"<>|.!?(){},-]",
    r"[\w.+-]+@(?:[\w-]+\.)+[a-z]{2,}",
    r"<[^\s<>][^<>]*>|&(?:amp|lt|gt|quot|nbsp|#\d+);",
    # :-)   ^_^   runs of the same sign
    r"(?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z]))|[-^x=~<>]_[-^x=~<>]",
    r"[?!]+|\.{2,}|-{2,}|\*+|_+",
    r"\S",
]
_TOKENS = [re.compile(pattern, re.IGNORECASE) for pattern in _PATTERNS]
_PLAIN = re.compile(r"[A-Za-z]+(?=\s|,\s|$)")  # only letters: most tokens, so it is tried first

_PARTS = {
    "cannot": ["can", "not"], "gonna": ["gon", "na"], "gotta": ["got", "ta"],
    "wanna": ["wan", "na"], "lemme": ["lem", "me"], "gimme": ["gim", "me"],
}  # fmt: skip
_SIGNS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¢": "cents", "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&nbsp;": "''",
    "…": "...", "–": "--", "—": "--", "―": "--",
} | dict.fromkeys(("'", "’", "‘", "`", '"', "“", "”", "«", "»"), "''")  # fmt: skip
# [1] drops these; the names of brackets, which [2] writes in lower case, are not among them.
_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))


def _spelling(token: str) -> list[str]:
    """The tokens of one match: in lower case, with the names of signs."""
    token = token.lower()
    if token in _PARTS:
        return _PARTS[token]
    if token in _SIGNS:
        return [_SIGNS[token]]
    if "&amp;" in token:
        token = token.replace("&amp;", "&")
    if len(token) > 1 and token.strip(".-") == "":
        return ["..." if token[0] == "." else "--"]
    if token[0] in "’n" and token[1:2] in "’'smdrvl":  # ’s, n’t
        token = token.replace("’", "'")
    if token[0] in "<>:;=":
        return ["".join(_SIGNS.get(sign, sign) for sign in token)]
    if "/" in token and " " in token:
        token = token.replace(" ", "\xa0")  # 1 1/2 is one token
    return [token]


def _tokens(text: str, following: str) -> list[str]:
    """The tokens of `text`; `following` is the next line, which one rule needs."""
    tokens, place = [], 0
    context = f"{text}\n{following} "
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        if (match := _PLAIN.match(text, place)) is None:
            found = (pattern.match(context, place) for pattern in _TOKENS)
            match = max((match for match in found if match), key=re.Match.end)
        tokens += _spelling(match[0])
        place = match.end()
    return [token for token in tokens if token not in _DROPPED]


def ptb_lines(texts: Sequence[str]) -> list[str]:
    """The tokens of each text, joined by blanks; line breaks count as blanks.

    The texts are treated as lines of one file: whether the last word of a line keeps its full stop
    ("Serie B.") can depend on the first word of the next line.
    """
    lines = [" ".join(text.split("\n")) for text in texts]
    pairs = zip(lines, [*lines[1:], ""], strict=True)
    return [" ".join(_tokens(line, following)) for line, following in pairs]
