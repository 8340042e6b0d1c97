"""Checks of settings that several packages share."""

import math


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError that lists the choices if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_at_least_one(config, *names: str) -> None:
    """ValueError that names a field of the config below 1; None passes, here and below."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_positive(config, *names: str) -> None:
    """ValueError that names a field that is not positive and finite."""
    for name in names:
        if (value := getattr(config, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_not_negative(config, *names: str) -> None:
    """ValueError that names a field that is negative or not finite."""
    for name in names:
        if (value := getattr(config, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
