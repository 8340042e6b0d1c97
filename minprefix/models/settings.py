"""The settings for generation in a checkpoint, with the names of transformers' `generate` [1].

transformers reads generation_config.json or, if it is missing, the same keys of config.json. So
does `read_settings`. Each key is obeyed (a field of `GenerationSettings`), harmless (`HARMLESS`: it
does not change tokens), or reported in one line (`not_followed`).
[1] https://huggingface.co/docs/transformers/main_classes/text_generation
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minprefix.files import brief, read_json
from minprefix.limits import BEAMS

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How `generate` chooses tokens unless its caller says otherwise; None = not given."""

    bos_token_id: int | None = None  # the first token of a text that starts from nothing
    eos_token_id: int | tuple[int, ...] | None = None  # the tokens that end a text; None = no token
    forced_bos_token_id: int | None = None  # the first token of a BART's text
    forced_eos_token_id: int | None = None  # the last of max_new_tokens
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # or "never": continue while a better text is possible
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    temperature: float = 1.0  # this and the next two apply if the caller requests sampling
    top_k: int = 0
    top_p: float = 1.0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # forbidden sequences; a lone eos is ignored
    suppress_tokens: tuple[int, ...] = ()  # never generated
    begin_suppress_tokens: tuple[int, ...] = ()  # never generated first
    stop_strings: tuple[str, ...] = ()

    def of_model(self) -> dict[str, Any]:
        """The fields that are not about generation, and the tokens that begin and end a text."""
        kept = ("bos_token_id", "eos_token_id")
        return {n: x for n, x in vars(self).items() if n not in NAMES or n in kept}

    def named_ids(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The tokens that each field names."""
        for name, value in vars(self).items():
            if name == "bad_words_ids":
                yield name, tuple(token for word in value for token in word)
            elif name.endswith("_token_id") or name.endswith("suppress_tokens"):
                ids = value if isinstance(value, tuple) else (value,)
                yield name, tuple(token for token in ids if token is not None)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else ids


NAMES = tuple(field.name for field in fields(GenerationSettings))
LENGTHS = ("max_length", "min_length")  # obeyed with a BART, whose prompt is not counted

# keys that do not change tokens: caches, returned values, speed, padding
HARMLESS = frozenset({
    "_from_model_config", "transformers_version", "pad_token_id", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "use_mtp", "compile_config",
    "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size",
    "decoder_start_token_id",  # read by `weights_bart.py`; a GPT-2 has no start
})  # fmt: skip

# the other keys, with the value that has no effect
NEUTRAL: dict[str, Any] = {
    "max_length": None, "min_length": 0, "max_time": None, "min_p": None, "top_h": None,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0,
    "renormalize_logits": False, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "sequence_bias": None, "token_healing": False,
    "guidance_scale": None, "watermarking_config": None, "num_return_sequences": 1,
    "encoder_no_repeat_ngram_size": 0, "penalty_alpha": None, "dola_layers": None,
    "diversity_penalty": 0.0, "num_beam_groups": 1, "constraints": None, "force_words_ids": None,
    "do_sample": False,  # sampling is requested by the caller
}  # fmt: skip


def file_of(folder: Path) -> Path:
    """The file with a checkpoint's settings for generation."""
    path = folder / "generation_config.json"
    return path if path.is_file() else folder / "config.json"


def read_settings(folder: Path, family: str, silent: dict[str, Any]) -> dict[str, Any]:
    """The fields of `GenerationSettings` from a checkpoint's file; `silent` has the defaults.

    Raises:
        ValueError: a value of the wrong type; names the file, the key and the value.
    """
    path = file_of(folder)
    raw = {key: value for key, value in read_json(path).items() if value is not None}
    if path.name == "config.json":
        # null means that there is none; a missing key means the family's default
        raw = {key: value for key, value in silent.items() if key not in read_json(path)} | raw
    if raw.get("forced_bos_token_id") is None and raw.get("force_bos_token_to_be_generated"):
        raw["forced_bos_token_id"] = raw.get("bos_token_id", silent.get("bos_token_id"))
    if family == "BART":  # its lengths include the start token, which is not new
        for long, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if long in raw and new not in raw and isinstance(raw[long], int):
                raw[new] = max(raw[long] - 1, int(new == "max_new_tokens"))
    else:  # transformers forces a first token only for texts of one token, not after a prompt
        raw.pop("forced_bos_token_id", None)
    values = {name: checked(path, name, raw[name]) for name in NAMES if name in raw}
    return values


def checked(path: Path, name: str, value: Any) -> Any:
    """A value converted to the type of its field; ValueError if that is impossible."""
    ids = (int,)
    error = ValueError(f"{path}: {name} is {brief(value)}")
    if name == "bad_words_ids":
        if not isinstance(value, list) or not all(
            isinstance(word, list) and word for word in value
        ):
            raise error
        return tuple(tuple(checked(path, "suppress_tokens", word)) for word in value)
    if name in ("suppress_tokens", "begin_suppress_tokens", "stop_strings"):
        kinds: tuple[type, ...] = (str,) if name == "stop_strings" else ids
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(type(entry) in kinds for entry in value):
            raise error
        return tuple(value)
    if name == "eos_token_id" and isinstance(value, list):
        if not value or not all(type(entry) is int for entry in value):
            raise error
        return tuple(value) if len(value) > 1 else value[0]
    if name == "early_stopping" and value == "never":
        return value
    field = GenerationSettings.__dataclass_fields__[name]
    default = getattr(GenerationSettings, name)
    kind = int if default is None else type(default)
    wanted = (int, float) if kind is float else (kind,)
    if type(value) not in wanted or not abs(value) < math.inf:
        raise error
    if name == "num_beams":
        BEAMS.check(value, path)
    least = {"max_new_tokens": 1, "num_beams": 1, "length_penalty": None}.get(field.name, 0)
    positive = name in ("temperature", "repetition_penalty", "top_p")
    if least is not None and (value < least or (positive and value <= 0)):
        raise error
    return value


def not_followed(folder: Path, family: str) -> list[str]:
    """Settings of a checkpoint that generation here does not obey, as "key value"."""
    path = file_of(folder)
    raw = read_json(path) if path.is_file() else {}  # nanoGPT has no such file
    followed = {*NAMES, *HARMLESS}
    if family == "BART":
        followed |= {*LENGTHS, "forced_bos_token_id"}
    else:
        followed -= {"forced_bos_token_id"}
    if path.name == "config.json":  # its other keys are about the model
        raw = {key: value for key, value in raw.items() if key in NEUTRAL or key in NAMES}
    odd = [
        f"{key} {value!r}"
        for key, value in raw.items()
        if key not in followed and value not in (None, NEUTRAL.get(key))
    ]
    return odd


def warn_not_followed(folder: Path, family: str) -> None:
    """Log one line that names the settings in `not_followed`."""
    if odd := not_followed(folder, family):
        log.warning("%s: generation here ignores %s", file_of(folder), ", ".join(odd))
