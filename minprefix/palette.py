"""The colours of all figures. Each has one meaning, which legends or markers also show."""

PREFIX = "#d9822b"  # the prefix, and our own results
PALE = "#f0c08f"  # a second series of the same kind
TEXT = "#3b6ea5"  # the frozen model by itself: its tokens, its prompts, attention without a prefix
OTHER = "#5b8c5a"  # what the prefix is compared with: fine-tuning, another library
FAINT = "#b8b8b8"  # everything else
PARTS = ("#4a1486", "#6a51a3", "#807dba", "#9e9ac8", "#bcbddc")  # parts of a sum (a step's time)
INK = "#333333"  # marks, axes and the paper's own numbers


def colour_of(method: str) -> str:
    """The colour of a method, given its name in a table or CSV."""
    name = method.lower()
    if "prefix" in name or name.startswith("ours"):
        return PREFIX
    if name == "compiled":  # ours, by torch.compile
        return PALE
    if name.startswith(("hard", "examples", "frozen", "discrete")):
        return TEXT
    return OTHER if name.startswith(("fine", "ft-full", "peft")) else FAINT
