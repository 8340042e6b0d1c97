"""Checks of settings that several packages share."""


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError that lists the choices if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
