"""The paper's own numbers, for comparison in the report.

v1 is arXiv 2101.00190v1 (1 Jan 2021) [1], ACL the published version [2]. If both have a row, the
number is v1's, and that of ACL is under ACL. They are for GPT-2 medium. The paper's
figures have no numbers.

[1] https://arxiv.org/abs/2101.00190v1   [2] https://aclanthology.org/2021.acl-long.353
"""

E2E = ("BLEU", "NIST", "MET", "R-L", "CIDEr")
WEBNLG = tuple(f"{name} {part}" for name in ("BLEU", "MET", "TER") for part in "SUA")
DART = ("BLEU", "MET", "TER")

# v1 Table 1 (= ACL Table 2)
TABLE1 = {
    "e2e": {
        "FT-FULL": (68.2, 8.62, 46.2, 71.0, 2.47),
        "FT-TOP2": (68.1, 8.59, 46.0, 70.8, 2.41),
        "ADAPTER (3%)": (68.9, 8.71, 46.1, 71.3, 2.47),
        "ADAPTER (0.1%)": (66.3, 8.41, 45.0, 69.8, 2.40),
        "PREFIX": (69.7, 8.81, 46.1, 71.4, 2.49),
    },
    "webnlg": {
        "FT-FULL": (64.2, 27.7, 46.5, 0.45, 0.30, 0.38, 0.33, 0.76, 0.53),
        "FT-TOP2": (53.6, 18.9, 36.0, 0.38, 0.23, 0.31, 0.49, 0.99, 0.72),
        "ADAPTER (3%)": (60.4, 48.3, 54.9, 0.43, 0.38, 0.41, 0.35, 0.45, 0.39),
        "ADAPTER (0.1%)": (54.5, 45.1, 50.2, 0.39, 0.36, 0.38, 0.40, 0.46, 0.43),
        "PREFIX": (62.9, 45.6, 55.1, 0.44, 0.38, 0.41, 0.35, 0.49, 0.41),
    },
    "dart": {
        "FT-FULL": (46.2, 0.39, 0.46),
        "FT-TOP2": (41.0, 0.34, 0.56),
        "ADAPTER (3%)": (45.2, 0.38, 0.46),
        "ADAPTER (0.1%)": (42.4, 0.36, 0.48),
        "PREFIX": (46.4, 0.38, 0.46),
    },
}
# v1 Table 4 (= ACL Table 5), E2E
TABLE4 = {
    "PREFIX": TABLE1["e2e"]["PREFIX"],
    "EMB-1": (48.1, 3.33, 32.1, 60.2, 1.10),
    "EMB-10": (62.2, 6.70, 38.6, 66.4, 1.75),
    "EMB-20": (61.9, 7.11, 39.3, 65.6, 1.85),
    "INFIX-1": (67.9, 8.63, 45.8, 69.4, 2.42),
    "INFIX-10": (67.2, 8.48, 45.8, 69.9, 2.40),
    "INFIX-20": (66.7, 8.47, 45.8, 70.0, 2.42),
}
# ACL Tables 2 and 5, rows that differ from v1 (METEOR and TER of WebNLG left out)
ACL = {
    ("e2e", "FT-FULL"): "68.8 / 8.71 / 46.1 / 71.1 / 2.43",
    ("e2e", "PREFIX"): "70.3 / 8.82 / 46.3 / 72.1 / 2.46",
    ("webnlg", "FT-FULL"): "BLEU 64.7 / 26.7 / 45.7",
    ("webnlg", "ADAPTER (3%)"): "BLEU 60.5 / 47.9 / 54.8",
    ("webnlg", "PREFIX"): "BLEU 62.9 / 45.3 / 55.0",
}
COLUMNS = {"e2e": E2E, "webnlg": WEBNLG, "dart": DART}


def published(experiment: str, data: str, name: str) -> dict[str, float]:
    """The scores of a row in v1, by column; {} if it has none."""
    if experiment in ("table1", "table3"):
        numbers = TABLE1.get(data, {}).get(name, ())
    elif experiment == "table4" and data == "e2e":
        numbers = TABLE4.get(name, ())
    else:
        numbers = ()
    return dict(zip(COLUMNS.get(data, ()), numbers, strict=True)) if numbers else {}
