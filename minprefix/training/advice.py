"""Advice to the user: about the data before a run, and about the run after it.

Read `data_warnings`, `describe` and `verdict`; each returns sentences for the user.
"""

from collections import Counter
from collections.abc import Sequence

from minprefix.data.batches import encode_prompt
from minprefix.data.examples import Example
from minprefix.generation.config import LONGEST
from minprefix.training.config import LEAST_STEPS

NOTABLE = 0.05  # share of a dev loss; smaller changes are not reported
FALLING = 0.25  # last share of a run; if the loss still falls there, the run was too short


def pairs_of(examples: Sequence[Example]) -> Counter[tuple[str, str]]:
    """How often each (source, target) pair occurs."""
    return Counter((example.source, target) for example in examples for target in example.targets)


def count_phrase(n: int, total: int, what: str, singular: str = "is", plural: str = "are") -> str:
    """A phrase such as "1 of 83 sources is"."""
    return f"{n} of {total} {what} {singular if n == 1 else plural}"


def data_warnings(
    tokenizer, train: Sequence[Example], dev: Sequence[Example], longest_target: int,
    max_source: int | None, linearisation: str,
) -> list[str]:  # fmt: skip
    """Warnings about surprising or wrong data; [] if there is nothing to report.

    Args:
        longest_target: number of tokens of the longest target.
        max_source: number of tokens to which sources are cut.
    """
    found, train_pairs, dev_pairs = [], pairs_of(train), pairs_of(dev)
    if repeated := train_pairs.total() - len(train_pairs):
        total = train_pairs.total()
        copies = count_phrase(repeated, total, "training pairs", "repeats", "repeat")
        found.append(f"{copies} another one, and so counts more than the others")
    if both := sum(dev_pairs[pair] for pair in dev_pairs.keys() & train_pairs.keys()):
        found.append(
            f"{count_phrase(both, dev_pairs.total(), 'dev pairs')} also in the training data: "
            "the dev loss looks better than it is"
        )
    most = LONGEST  # unless the checkpoint says otherwise
    if longest_target > most:
        found.append(
            f"the longest target has {longest_target} tokens, and texts end after {most} by "
            f"default: generate and evaluate with --max-new-tokens {longest_target}"
        )
    if max_source is not None:
        lengths = [len(encode_prompt(tokenizer, e.source, linearisation)) - 1 for e in train]
        if cut := sum(length > max_source for length in lengths):
            found.append(f"{count_phrase(cut, len(train), 'sources')} cut to {max_source} tokens")
    return found


def nothing_learned(measured: Sequence[tuple[int, float]]) -> str:
    """The warning for a run in which the start had the lowest dev loss; "" for other runs."""
    if len(measured) < 2 or min(measured, key=lambda pair: pair[1])[0] > 0:
        return ""
    steps, way = measured[-1][0], "try a smaller --lr, or look at the data"
    if steps < LEAST_STEPS:
        way = f"{steps} steps are few, so try more first (or a smaller --lr)"
    return (
        f"training never brought the dev loss below the {measured[0][1]:.3f} that it had at the "
        f"start: nothing was learned; {way}"
    )


def verdict(
    measured: Sequence[tuple[int, float]], stopped: bool, dev_pairs: int, resume_command: str
) -> tuple[list[str], list[str]]:
    """Which weights were kept, why, and what to do next: (statements, warnings).

    Args:
        measured: (step, dev loss in nats per target token) of each evaluation, the first at step 0.
        stopped: whether the run ended early.
        dev_pairs: number of pairs in each evaluation; the fewer, the noisier the dev loss.
        resume_command: the command that resumes the run.
    """
    if not measured:
        return ["Kept: the weights of the last step, as there is no dev data."], []
    best_step, best = min(measured, key=lambda pair: pair[1])
    last_step, last = measured[-1]
    said = [f"Kept: step {best_step}, which has the lowest dev loss, {best:.3f} nats per token."]
    if stopped:
        said.append(
            f"Stopped at step {last_step}: the dev loss had not fallen since step {best_step}."
        )
    if nothing_learned(measured):
        return said, []
    if (rise := last / best - 1) > NOTABLE:
        why = "overfitting"
        if rise < dev_pairs**-0.5:  # about the standard error of the mean loss
            why = f"with {dev_pairs} dev pairs this may be chance"
        said.append(
            f"Dev loss was best at step {best_step} and rose by {100 * rise:.0f} % after it "
            f"({why}); the weights that are kept are those before the rise."
        )
        return said, []
    earlier = [loss for step, loss in measured if step <= (1 - FALLING) * last_step]
    if not stopped and earlier and min(earlier) > (1 + NOTABLE) * best:
        fall = f"{100 * (1 - best / min(earlier)):.0f} %"
        return said, [
            f"dev loss was still falling at the end, by {fall} in the last quarter: "
            f"more steps may help: {resume_command} --steps {2 * last_step}"
        ]
    return said, []
