"""Checks of the saved state of a search before it is used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minprefix.files import read_json
from minprefix.methods.config import SearchConfig
from minprefix.training.run_folder import checked_state
from minprefix.training.state import check_number, float_of

MOST_LEVELS = 3  # the minibatch is doubled at most this often


def read_older(path: Path, keys: Sequence[str]) -> dict:
    """The state in the search.json of an older version; ValueError if it is damaged."""
    state = read_json(path)
    state["step"] = state.get("step_done", 0)
    state = checked_state(path, state, keys)
    if not isinstance(state["settings"], dict):
        raise ValueError(f"{path}: damaged, not the settings of a search")
    state["settings"]["after"] = state["settings"].pop("behind", 0)
    return state


def check_search(state: dict, config: SearchConfig, vocab_size: int) -> None:
    """ValueError if an entry of a state that does not belong to `Loop` is impossible.

    Args:
        state: with the keys `search.STATE`.
        config: of the search that is continued.
    """
    check_number("spent", state["spent"], 0, 10**15)
    check_number("level", state["level"], 0, MOST_LEVELS)
    check_number("refused", state["refused"], 0, 10**9)
    check_prompt("best_prompt", state["best_prompt"], config, vocab_size)
    chains, before = state["chains"], state["before"]
    if not isinstance(chains, list) or not 1 <= len(chains) <= config.chains:
        raise ValueError(f"chains must be a list of 1 to {config.chains} prompts")
    for chain in chains:
        if not isinstance(chain, list | tuple) or len(chain) != 2:
            raise ValueError("a chain is not a prompt with its loss")
        check_prompt("the prompt of a chain", chain[0], config, vocab_size)
        check_number("the loss of a chain", float_of(chain[1]), 0, 1e6, float)
    if not isinstance(before, dict) or not all(isinstance(name, str) for name in before):
        raise ValueError("before is not a dictionary of losses")
    for name, loss in before.items():
        check_number(name[:40], float_of(loss), 0, 1e6, float)


def check_prompt(name: str, ids: Any, config: SearchConfig, vocab_size: int) -> None:
    """ValueError if it is not a list of `prompt_len` token ids."""
    if not isinstance(ids, list) or len(ids) != config.prompt_len:
        raise ValueError(f"{name} is not a list of {config.prompt_len} token ids")
    for token in ids:
        check_number(f"a token id of {name}", token, 0, vocab_size - 1)
