"""Checks of settings that several packages share."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from minprefix.limits import Limit

Config = TypeVar("Config")
LARGEST = 2**53  # integers up to it are exact in JSON


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError listing the choices if `value` is not among them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {repr(value)[:60]}")


def check_at_least_one(config, *names: str) -> None:
    """ValueError naming a field of the config that is below 1. All these checks accept None."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        check_exact(name, value)


def check_positive(config, *names: str) -> None:
    """ValueError naming a field that is not positive and finite."""
    for name in names:
        if (value := getattr(config, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_not_negative(config, *names: str) -> None:
    """ValueError naming a field that is negative or not finite."""
    for name in names:
        if (value := getattr(config, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        check_exact(name, value)


def check_exact(name: str, value: Any) -> None:
    """ValueError for an integer that `from_saved` would refuse when the run is continued."""
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError(f"{name} must be at most 2**53, got {value}")


def check_limit(config, name: str, limit: Limit) -> None:
    """ValueError naming a field that is larger than the limit."""
    if (value := getattr(config, name)) is not None:
        limit.check(value, name)


def from_saved(kind: type[Config], saved: Mapping[str, Any]) -> Config:
    """A config dataclass from the values in a file.

    Raises:
        ValueError: an unknown field, or a value of another type than the field's.
    """
    hints, names = get_type_hints(kind), {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in saved.items():
        if name not in names:
            raise ValueError(f"there is no setting {str(name)[:40]!r}")
        many = get_origin(hints[name]) is tuple
        kinds = {list, tuple} if many else {*(get_args(hints[name]) or (hints[name],))}
        fits = type(value) in kinds | ({int} if float in kinds else set())
        if many and fits:
            fits = all(type(part) is get_args(hints[name])[0] for part in value)
        if not fits or (type(value) is int and abs(value) > LARGEST):
            raise ValueError(f"{name} is {str(value)[:40]!r}")
    return kind(**saved)
