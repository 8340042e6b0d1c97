"""Writes a model card for a prefix, whose folder is then ready for `huggingface-cli upload`.

It is a README.md in the hub's format [1]: front matter (base model, tags, metrics), then a
description of the prefix and how to load it. Read `write_card`.
[1] https://huggingface.co/docs/hub/model-cards
"""

import json
from pathlib import Path
from typing import Any

from minprefix.files import write_text

PREFIX_FILE = "prefix.safetensors"  # in a folder that a command makes
OURS = """
```python
import minprefix

model, tokenizer = minprefix.load({model})
prefix = minprefix.{kind}.load("{file}")
print(minprefix.generate(model, tokenizer, ["a table or a text"], prefix=prefix))
```
"""
PEFTS = """
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({model})
model = PeftModel.from_pretrained(model, "this folder")
```
"""


def write_card(
    folder: Path, prefix: Any, base_model: str | None, peft: str | None = None,
    metrics: dict[str, float] | None = None,
) -> bool:  # fmt: skip
    """Write README.md into the prefix's folder unless it exists; returns whether it was written.

    Args:
        base_model: the model's name or folder; None = unknown.
        peft: the kind of a PEFT folder; None = a folder with PREFIX_FILE.
        metrics: numbers by name, such as the loss on the dev set.
    """
    path = folder / "README.md"
    if path.exists():
        return False
    write_text(path, card(prefix, base_model, peft, metrics or {}))
    return True


def card(
    prefix: Any, base_model: str | None, peft: str | None, metrics: dict[str, float]
) -> str:  # fmt: skip
    """The text of README.md."""
    name = base_model if base_model and not Path(base_model).is_absolute() else None
    head = [f"base_model: {json.dumps(name)}"] if name else []
    head += [f"library_name: {'peft' if peft else 'minprefix'}", "tags:", "- prefix-tuning"]
    head += [] if peft else ["- minprefix"]
    if prefix.family == "BART" or prefix.linearisation:
        head.append(
            f"pipeline_tag: {'summarization' if prefix.family == 'BART' else 'text-generation'}"
        )
    if metrics:
        head += ["metrics:", *(f"- {json.dumps(metric)}" for metric in metrics)]
    frame = prefix.linearisation or "none: texts are used as they are"
    facts = {
        "base model": name or base_model or "not known",
        "base model's fingerprint": prefix.base or "not known",
        "positions": prefix.prefix_len,
        "first token of a text at position": prefix.position_offset,
        "trained as": prefix.parametrisation or "not known",
        "trained parameters": prefix.n_trained or "not known",
        "frame of the text": frame,
    } | metrics
    rows = [f"| {what} | {value} |" for what, value in facts.items()]
    model = json.dumps(name or base_model or "the base model")
    how = PEFTS if peft else OURS
    how = how.format(model=model, kind=type(prefix).__name__, file=PREFIX_FILE)
    return "\n".join([
        "---", *head, "---", "", f"# A prefix for {name or 'a ' + prefix.family}", "",
        "Prefix-tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190): keys and values that "
        "every layer of the frozen base model reads before the text.", "",
        "| | |", "|---|---|", *rows, "", "## How to load it", how,
    ])  # fmt: skip
