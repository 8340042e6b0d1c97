"""Splits by topic and small subsets: their examples, and that they are reproducible."""

import itertools

import pytest
from conftest import SHARED
from test_data import needs_shared

from minprefix.data.examples import Example
from minprefix.data.load import load_examples
from minprefix.data.splits import (
    CATEGORIES,
    LOW_DATA_SEEDS,
    LOW_DATA_SIZES,
    LOW_DATA_SUBSETS,
    SEEN,
    UNSEEN_2020,
    choose,
    low_data,
    subset,
)


def example(group: str, targets: int = 1) -> Example:
    return Example(group, tuple(f"{group} {n}" for n in range(targets)), None, "f:1", group)


def groups(examples) -> list[str]:
    return [example.group for example in examples]


def pairs(examples) -> list[tuple[str, str]]:
    return [(example.source, target) for example in examples for target in example.targets]


def test_webnlg_parts_by_category():
    city, artist = example("City"), example("Artist")
    assert choose([city, artist], "seen", "test") == [city]
    assert choose([city, artist], "unseen", "test") == [artist]
    assert choose([city, artist], None, "test") == [city, artist]
    with pytest.raises(ValueError, match="the split train has no examples for the topics unseen"):
        choose([city], "unseen", "train")
    for none in ("", "MISC"):  # DART's
        with pytest.raises(ValueError, match="f:1: the example has no category"):
            choose([city, example(none)], "seen", "test")


def test_webnlg_2020_has_categories_of_its_own():
    """What 2017 had not seen, 2020 trains on; each of its splits has one that 2017 lacks."""
    examples = [example(name) for name in CATEGORIES]
    assert groups(choose(examples, "unseen", "test")) == list(UNSEEN_2020)
    assert groups(choose(examples, "seen", "test")) == [*CATEGORIES[: -len(UNSEEN_2020)]]
    train = [example("Artist"), example("Company")]
    assert choose(train, "seen", "train") == train


def test_xsum_parts_by_topic():
    articles = [
        example(group)
        for group in ("news/uk", "sport/golf", "news", "news/health", "news/world", "newsround", "")
    ]
    news = ["news/uk", "news", "news/health", "news/world"]
    for split in ("train", "dev"):
        assert groups(choose(articles, "news-to-sports", split)) == news
        assert groups(choose(articles, "within-news", split)) == ["news/uk", "news/world"]
    assert groups(choose(articles, "news-to-sports", "test")) == ["sport/golf"]
    assert groups(choose(articles, "within-news", "test")) == ["news", "news/health"]


def test_topics_need_urls_and_known_names():
    with pytest.raises(
        ValueError, match="f:1: no article has a URL.*python -m minprefix data xsum"
    ):
        choose([example(""), example("")], "within-news", "train")
    with pytest.raises(ValueError, match="no examples for the topics news-to-sports"):
        choose([example("news")], "news-to-sports", "test")
    with pytest.raises(ValueError, match="topics must be one of seen, unseen.* got 'sports'"):
        choose([example("news")], "sports", "test")
    with pytest.raises(ValueError, match="split must be one of .* got 'valid'"):
        choose([example("news")], "seen", "valid")


def test_subsets_are_pairs_in_their_order_and_nest():
    examples = [example(f"{n}", targets=n % 4 + 1) for n in range(60)]
    everything = pairs(examples)
    small, large = (pairs(subset(examples, size, 3)) for size in (20, 50))
    assert (len(small), len(large)) == (20, 50)
    assert [pair for pair in everything if pair in small] == small
    assert set(small) < set(large) < set(everything)
    assert pairs(subset(examples, len(everything), 0)) == everything
    assert pairs(subset(examples, 20, 4)) != small
    for size in (0, len(everything) + 1):
        with pytest.raises(ValueError, match=f"size must be 1 to 150, .* got {size}"):
            subset(examples, size, 0)


def test_subsets_are_the_same_for_ever():
    """By sha256sum of "0 0" to "0 999": no library's random numbers decide."""
    examples = [example(f"{n}") for n in range(1000)]
    assert groups(subset(examples, 5, 0)) == ["61", "341", "793", "798", "988"]


def test_low_data_settings_of_the_paper():
    train, dev = [example(f"t{n}") for n in range(600)], [example(f"d{n}") for n in range(200)]
    assert LOW_DATA_SUBSETS * LOW_DATA_SEEDS == 10
    sizes = [tuple(map(len, low_data(train, dev, size, 0))) for size in LOW_DATA_SIZES]
    assert sizes == [(50, 15), (100, 30), (200, 60), (500, 150)]
    assert low_data(train, [], 50, 0)[1] == []
    drawn = [frozenset(groups(low_data(train, dev, 50, s)[0])) for s in range(LOW_DATA_SUBSETS)]
    assert [(a, b) for a, b in itertools.combinations(drawn, 2) if a == b] == []


def test_too_small_a_split_is_named_with_its_own_number():
    train, dev = ([example(f"r{n}") for n in range(size)] for size in (150, 10))
    with pytest.raises(ValueError, match="size must be 1 to 150, .* got 1000"):
        low_data(train, dev, 1000, 0)
    with pytest.raises(ValueError, match="100 training pairs need 30 dev pairs, .* only 10"):
        low_data(train, dev, 100, 0)
    few, few_dev = low_data(train, dev, 1, 0)
    assert (len(pairs(few)), len(pairs(few_dev))) == (1, 1)


@needs_shared
def test_webnlg_seen_and_unseen_counts():
    examples = load_examples(SHARED / "data/webnlg", "test")
    parts = {name: choose(examples, name, "test") for name in ("seen", "unseen")}
    counts = {n: (len(part), sum(len(e.targets) for e in part)) for n, part in parts.items()}
    assert counts == {"seen": (971, 2_495), "unseen": (891, 2_433)}
    unseen = load_examples(SHARED / "data/webnlg/test/testdata_unseen_with_lex.xml")
    assert pairs(parts["unseen"]) == pairs(unseen)
    assert set(groups(load_examples(SHARED / "data/webnlg", "train"))) == set(SEEN)
