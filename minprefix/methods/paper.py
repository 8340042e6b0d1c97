"""The hyper-parameters of the paper: v1 Table 5 [1] = ACL Table 6 [2], for GPT-2 medium and BART.

[1] https://arxiv.org/abs/2101.00190v1   [2] https://aclanthology.org/2021.acl-long.353
"""

from typing import Any

# (the paper's name of the method, data set): lr, epochs, batch size, prefix length. EMB-n and
# INFIX-n are missing because they are trained like PREFIX.
PAPER = {
    ("PREFIX", "e2e"): (8e-5, 5, 10, 5),
    ("PREFIX", "webnlg"): (5e-5, 5, 5, 5),
    ("PREFIX", "dart"): (5e-5, 10, 5, 10),
    ("PREFIX", "xsum"): (5e-5, 30, 14, 100),
    ("ADAPTER (3%)", "e2e"): (5e-5, 5, 5, None),
    ("ADAPTER (0.1%)", "e2e"): (8e-5, 10, 5, None),
    ("ADAPTER (3%)", "webnlg"): (5e-5, 5, 5, None),
    ("ADAPTER (0.1%)", "webnlg"): (5e-5, 10, 5, None),
    ("ADAPTER (3%)", "dart"): (5e-5, 5, 5, None),
    ("ADAPTER (0.1%)", "dart"): (8e-5, 5, 5, None),
    ("FT-FULL", "e2e"): (5e-5, 5, 10, None),
    ("FT-FULL", "webnlg"): (1e-5, 10, 6, None),
    ("FT-FULL", "dart"): (1e-5, 10, 6, None),
    ("FT-TOP2", "e2e"): (5e-5, 5, 10, None),
    ("FT-TOP2", "webnlg"): (5e-5, 10, 9, None),
    ("FT-TOP2", "dart"): (5e-5, 5, 5, None),
}
NAMES = {
    "prefix": "PREFIX", "adapter": "ADAPTER (3%)", "finetune": "FT-FULL", "ft-top": "FT-TOP2",
}  # fmt: skip


def paper_settings(method: str, data: str) -> tuple[dict[str, Any], int | None]:
    """Fields of TrainConfig for a method on a data set, and the prefix length of PREFIX.

    Raises:
        ValueError: the paper reports none for them.
    """
    found = PAPER.get((NAMES[method], data))
    if found is None:
        known = sorted(name for paper_name, name in PAPER if paper_name == NAMES[method])
        raise ValueError(f"no preset {data} for method {method}: choose from {', '.join(known)}")
    lr, epochs, batch_size, prefix_len = found
    return {"lr": lr, "epochs": epochs, "batch_size": batch_size, "warmup_steps": 0}, prefix_len
