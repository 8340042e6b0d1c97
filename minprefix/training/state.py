"""Checks of a saved state before any of it is loaded.

A state may belong to another run, be damaged, or come from someone else, and an optimizer does not
check it: a fused AdamW writes out of bounds if a moment is smaller than its weight. Each value is
therefore compared with what the run expects, and tensors are copied into the memory layout of the
run. The settings of the optimizer (its `param_groups`) come from the run, never from the file.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}


def check_number(name: str, value: Any, low: float, high: float, kind: Any = int) -> None:
    """ValueError naming the value if it is not of this type or not in [low, high]."""
    if type(value) is not kind or not low <= value <= high:
        raise ValueError(f"{name} is {str(value)[:40]}, expected {low:g} to {high:g}")


def check_progress(state: dict, most: int) -> None:
    """ValueError if the settings, step, losses or seconds in a state are impossible.

    Args:
        most: the last step, for settings without a number of steps.
    """
    settings = state["settings"]
    try:
        json.dumps(settings)
    except (TypeError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError("settings are not those of a run")
    ends, step = (settings.get("steps"), settings.get("most_steps")), state["step"]
    check_number("step", step, 0, max((n for n in ends if type(n) is int), default=most))
    check_number("seconds", float_of(state["seconds"]), 0, 1e12, float)
    check_number("counted_from", state.get("counted_from", 0), 0, step)
    if type(state["best"]) is not float or math.isnan(state["best"]):
        raise ValueError(f"best is {str(state['best'])[:40]}, expected a loss")
    if "measured" not in state:  # written by an older version
        return
    if not isinstance(state["measured"], list):
        raise ValueError("measured is not a list of steps and losses")
    before, losses = 0, [math.inf]
    for pair in state["measured"]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[1]) is not float:
            raise ValueError(f"measured has {str(pair)[:40]}, expected a step and a loss")
        check_number("a step of measured", pair[0], before, step)
        if not math.isfinite(pair[1]):
            raise ValueError(f"measured has the loss {pair[1]}")
        before = pair[0]
        losses.append(pair[1])
    if state["best"] != min(losses):
        raise ValueError(f"best is {state['best']}, but the lowest loss is {min(losses)}")


def float_of(value: Any) -> Any:
    """An integer as a float (for JSON files of older versions); anything else unchanged."""
    return float(value) if type(value) is int else value


def checked_copy(name: str, found: Any, like: Tensor) -> Tensor:
    """A copy of `found` with the shape, dtype, layout and device of `like`.

    ValueError if the shape or dtype differs, or if a value is not finite.
    """
    if type(found) not in (Tensor, nn.Parameter) or found.layout != torch.strided or found.is_meta:
        raise ValueError(f"{name} is not a tensor with values")
    theirs, ours = (f"{tuple(x.shape)} {str(x.dtype)[6:]}" for x in (found, like))
    if theirs != ours:
        raise ValueError(f"{name} is {theirs}, this run needs {ours}")
    if not torch.isfinite(found).all():
        raise ValueError(f"{name} holds values that are not finite numbers")
    return torch.empty_like(like, requires_grad=False).copy_(found.detach())


def check_keys(name: str, found: Any, wanted) -> None:
    """ValueError naming a key that is missing or unexpected."""
    if not isinstance(found, dict):
        raise ValueError(f"{name} is not a dictionary")
    if differing := set(found) ^ set(wanted):
        key = min(map(str, differing))[:60]
        known = "has an unknown" if key in map(str, found) else "lacks"
        raise ValueError(f"{name} {known} {key}")


def checked_weights(module: nn.Module, found: Any) -> dict[str, Tensor]:
    """The weights for `module.load_state_dict`; ValueError if they do not fit the module."""
    ours = module.state_dict()
    check_keys("trained", found, ours)
    return {name: checked_copy(name, found[name], like) for name, like in ours.items()}


def checked_optimizer_state(optimizer: torch.optim.Optimizer, found: Any, step: int) -> dict:
    """The argument of `optimizer.load_state_dict` after `step` steps; ValueError if it is wrong."""
    if not isinstance(found, dict) or "state" not in found:
        raise ValueError("optimizer lacks state")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    check_keys("optimizer", found["state"], range(len(weights)) if step else ())
    names, states = MOMENTS[type(optimizer)], {}
    for number, theirs in found["state"].items():
        like = dict.fromkeys(names, weights[number])
        if isinstance(optimizer, torch.optim.AdamW):  # it counts steps itself
            like["step"] = torch.zeros((), device=weights[number].device)
        where = f"optimizer {number}"
        check_keys(where, theirs, like)
        states[number] = {n: checked_copy(f"{where} {n}", theirs[n], x) for n, x in like.items()}
        if "step" in like and states[number]["step"] != step:
            raise ValueError(f"{where} has made {states[number]['step']:g} steps, the run {step}")
        if "exp_avg_sq" in like and states[number]["exp_avg_sq"].min() < 0:
            raise ValueError(f"{where} exp_avg_sq holds values below 0")
    return {"state": states, "param_groups": optimizer.state_dict()["param_groups"]}
