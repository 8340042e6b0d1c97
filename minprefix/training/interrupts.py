"""Ctrl-C, SIGTERM and SIGHUP during a run: the current step is finished and the state saved.

Read `deferred_interrupt`, which `loop.Loop.run` uses.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP: the current step was finished and the state saved. Or a second
    Ctrl-C, which stopped the run at once.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


@contextmanager
def resume_hint(command: str) -> Iterator[None]:
    """Within the block, the message of an interrupted run ends with the command that resumes it."""
    advice = f"Continue with: {command}"
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(f"{stop}. {advice}", stop.number) from None
    except KeyboardInterrupt:  # before the first step
        raise Interrupted(f"interrupted. {advice}") from None


# SIGTERM: what schedulers and containers send; SIGHUP: a closed terminal (not on Windows)
ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


@contextmanager
def deferred_interrupt(saved_step: Callable[[], int]) -> Iterator[Callable[[], int]]:
    """Within the block the first Ctrl-C, SIGTERM or SIGHUP only sets a flag, so that the step can
    finish. Yields a function that reads the flag: the number of the signal, or 0.

    A second Ctrl-C stops at once with an `Interrupted` that names the `saved_step`, even if PyTorch
    was writing a file and turned the interrupt into a RuntimeError. Outside the main thread this
    does nothing.
    """
    seen: list[int] = []
    at_once = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    previous = {number: signal.getsignal(number) for number in ENDING}
    previous = {n: old for n, old in previous.items() if old != signal.SIG_IGN}  # as nohup does

    def note(number, frame):
        nonlocal at_once
        if seen and number == signal.SIGINT:
            at_once = True
            signal.signal(number, previous[number])
            raise KeyboardInterrupt
        seen.append(number)
        again = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
        with suppress(OSError):  # the terminal may be gone
            print(f"\nFinishing this step{again}.", file=sys.stderr, flush=True)

    for number in previous:
        signal.signal(number, note)
    try:
        yield lambda: seen[0] if seen else 0
    except BaseException:
        if not at_once:
            raise
        raise Interrupted(f"stopped at once; the last saved step is {saved_step()}") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
