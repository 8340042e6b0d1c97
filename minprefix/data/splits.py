"""Selects examples: topics seen or unseen in training, and small subsets for low-data experiments.

Extrapolation (section 6.4 and appendix A.1 of [1]; ACL version): `choose` splits WebNLG by category
and XSum by the topic in an article's URL. Low data (6.3, A.2): `low_data`. The docstring of each
function says what [1] leaves open and what we chose.
[1] https://arxiv.org/abs/2101.00190
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from minprefix.checks import check_choice
from minprefix.data.examples import Example
from minprefix.data.triples import DART_CATEGORY

# WebNLG 2017's categories in training and dev; [1] says 9, the files have these 10. The test set
# has five more.
SEEN = (
    "Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam",
    "University", "WrittenWork",
)  # fmt: skip
UNSEEN = ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")
# WebNLG 2020 (release 3.0): its training set has those five and one more, its test set three more.
SEEN_2020, UNSEEN_2020 = (*SEEN, *UNSEEN, "Company"), ("Film", "MusicalWork", "Scientist")
CATEGORIES = (*SEEN_2020, *UNSEEN_2020)

TOPICS = ("seen", "unseen", "news-to-sports", "within-news")  # the choices of `choose`
# for within-news; XSum has no council or traffic, the embedded notes have no world or UK
TRAINING_NEWS = ("news/world", "news/uk", "news/business", "news/council", "news/traffic")

# 5 subsets of each size and 2 seeds for each subset: 10 models a size
LOW_DATA_SIZES, LOW_DATA_SUBSETS, LOW_DATA_SEEDS = (50, 100, 200, 500), 5, 2
DEV_PART = 0.3  # dev pairs per training pair


def seen_categories(groups: Iterable[str]) -> tuple[str, ...]:
    """WebNLG's categories in training, for the year to which `groups` belong.

    That is 2020 if one of them is not in 2017, which holds for each split of 2020; else 2017.
    """
    return SEEN_2020 if set(groups) & {*CATEGORIES} - {*SEEN, *UNSEEN} else SEEN


def _by_category(examples: Sequence[Example], topics: str) -> list[Example]:
    """The examples of seen or unseen categories; ValueError if an example has no category."""
    for example in examples:
        if not example.group or example.group == DART_CATEGORY:
            raise ValueError(
                f"{example.where}: the example has no category, so it is neither seen nor unseen"
            )
    known = seen_categories(example.group for example in examples)
    return [e for e in examples if (e.group in known) == (topics == "seen")]


def choose(examples: Sequence[Example], topics: str | None, split: str) -> list[Example]:
    """The examples of one split that belong to `topics`; None = all.

        topics            of      train, dev                 test
        "seen", "unseen"  WebNLG  that part                  that part (training has no unseen one)
        "news-to-sports"  XSum    news                       sport
        "within-news"     XSum    news: world, UK, business  all other news
        The last two also apply to the embedded notes, which imitate XSum: see TRAINING_NEWS.

    Articles of other sections of the BBC are in neither part. Our choice: the official splits stay
    apart (training uses train's articles, testing test's), regions count as world or UK
    (`articles.bbc_topic`), and dev has the topics of train.

    Raises:
        ValueError: no example has a topic (for XSum only the authors' archive has URLs), or none
            belongs to `topics`.
    """
    if topics is None:
        return list(examples)
    check_choice("topics", topics, TOPICS)
    check_choice("split", split, ("train", "dev", "test"))
    if topics in ("seen", "unseen"):
        return _require_examples(_by_category(examples, topics), topics, split)
    if not any(example.group for example in examples):
        where = examples[0].where if examples else "no examples"
        raise ValueError(
            f"{where}: no article has a URL, so its topic is unknown; the files of the hub have "
            "no URLs, but `python -m minprefix data xsum` makes JSON lines that have them"
        )

    def chosen(group: str) -> bool:
        news = group.split("/")[0] == "news"
        if topics == "news-to-sports":
            return group.split("/")[0] == "sport" if split == "test" else news
        return news and (group in TRAINING_NEWS) != (split == "test")

    return _require_examples(
        [example for example in examples if chosen(example.group)], topics, split
    )


def _require_examples(examples: list[Example], topics: str, split: str) -> list[Example]:
    """`examples`; ValueError if there are none."""
    if not examples:
        raise ValueError(f"the split {split} has no examples for the topics {topics}")
    return examples


def subset(examples: Sequence[Example], size: int, subset_seed: int) -> list[Example]:
    """Sample `size` of the (source, target) pairs without replacement; they keep their order.

    [1] samples rows of the data but does not say how. Our choice: sort the pairs by the hash
    sha256("subset_seed index") and take the first `size`. The result depends on the order of the
    data and the seed, not on a library, and a smaller subset is part of a larger one.
    """
    total = sum(len(example.targets) for example in examples)
    if not 1 <= size <= total:
        raise ValueError(f"size must be 1 to {total}, the number of pairs, got {size}")
    order = sorted(range(total), key=lambda i: _digest(f"{subset_seed} {i}"))
    chosen, index, found = set(order[:size]), 0, []
    for example in examples:
        here = range(index, index := index + len(example.targets))
        kept = [t for i, t in zip(here, example.targets, strict=True) if i in chosen]
        if kept:
            found.append(replace(example, targets=tuple(kept)))
    return found


HELD_OUT = 0.1  # share of the examples that becomes dev data if there is none
HELD_OUT_MOST = 200  # examples


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training and dev examples: holds out a tenth of the examples, at least 2 and at most 200.

    They are chosen by a hash of their sources, so each run holds out the same ones, whatever the
    order of the data. With fewer than 4 examples none is held out.
    """
    size = min(HELD_OUT_MOST, max(2, round(HELD_OUT * len(examples))))
    if len(examples) < 2 * size:
        return list(examples), []
    chosen = set(sorted((e.source for e in examples), key=_digest)[:size])
    return (
        [example for example in examples if example.source not in chosen],
        [example for example in examples if example.source in chosen],
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def low_data(
    train: Sequence[Example], dev: Sequence[Example], size: int, subset_seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and dev pairs of one low-data run: `size` pairs, and 30 % of that number.

    [1] uses sizes 50, 100, 200 and 500, 5 subsets of each, and a dev split of 30 % of the training
    size (for early stopping). Our choice: the dev pairs, at least one, come from the official dev
    set; without a dev set there are none.

    Raises:
        ValueError: the data has too few pairs.
    """
    chosen = subset(train, size, subset_seed)
    dev_size, there = max(1, round(DEV_PART * size)), sum(len(example.targets) for example in dev)
    if 0 < there < dev_size:
        raise ValueError(
            f"{size} training pairs need {dev_size} dev pairs, but dev has only {there}"
        )
    return chosen, subset(dev, dev_size, subset_seed) if dev else []
