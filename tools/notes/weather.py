"""Notes about the weather: two scenarios. See `telling.Story` for the parts.

Written for this project.
"""

from tools.notes.names import DAYS, MONTHS
from tools.notes.telling import Draw, Story

HARM = {  # damage of a storm: the same in short
    "the roof of the sports hall landed in a field": "tore the roof off a [sports hall|building]",
    "the old lime tree on the green fell on three cars": "[crushed|damaged] parked cars",
    "the church lost its golden cock": "damaged a [church|place of worship]",
    "a dozen yachts broke loose in the harbour": "tore boats from their moorings",
    "a crane fell across the railway": "blocked a [train|railway] line",
    "waves carried away half of the pier": "destroyed part of a pier",
    "a circus tent flew into the river": "[blew away|destroyed] a circus tent",
}
STORMS = "Ada Boris Cora Dora Egon Flora Gilbert Hector Ines Jonas Kira Lena".split()


def storm(d: Draw) -> Story:
    """Wind speeds at three places, two numbers of homes without power, and what was broken."""
    harm = d.pick(list(HARM))
    slow, middle, fast = sorted(d.some(range(58, 104), 3))
    facts = {
        "town": d.town(), "low": d.town(), "mid": d.town(), "slow": slow, "middle": middle,
        "fast": fast, "harm": harm, "damage": HARM[harm], "homes": d.number(1100, 4900, 100),
        "more": d.number(200, 900, 100), "day": d.pick(DAYS), "a": d.person(), "b": d.person(),
        "calls": d.number(60, 480, 10), "name": d.pick(STORMS), "trees": d.number(13, 90),
        "time": d.number(2, 6),
    }  # fmt: skip
    parts = {
        "open": (
            "A storm kept {town} awake on {day} night.",
            "Strong winds [hit|reached] {town} on {day} and left their mark.",
            "{a} was at the window at {time} in the morning when the street lamps went out.",
            "Storm {name} reached the coast soon after dark on {day}.",
            "The clearing up began as soon as it was light [in {town}|on the coast].",
        ),
        "wind": (
            "Gusts of {slow} miles an hour were [measured|recorded] in {low}, {middle} in {mid} "
            "and {fast} in {town}.",
            "The wind reached {fast} miles an hour in {town}, {slow} in {low} and {middle} in "
            "{mid}.",
            "The wind blew at {middle} miles an hour in {mid}, at {fast} in {town} and at {slow} "
            "in {low}.",
        ),
        "harm": ("In {town}, {harm}.", "{b}, who lives in {town}, watched how {harm}."),
        "power": (
            "{homes} homes had no [electricity|power] during the night, and [another|a further] "
            "{more} lost it in the morning.",
            "The lights went out in {homes} homes at first and in {more} [more|others] later.",
        ),
    }
    return Story(
        "news/weather",
        facts,
        parts,
        orders=("open wind harm power", "open harm power wind", "open power harm wind",
                "open wind power harm"),
        extras=(
            "No one was [badly|seriously] hurt.",
            "The fire service was called {calls} times.",
            "Foresters counted {trees} fallen trees.",
            "Schools stayed closed until noon.",
            "The next few days will be calm and cold.",
        ),
        summary=(
            "Winds of [up to|as much as] {fast} miles an hour {damage} in {town} and left {all} "
            "homes in the dark.",
            "A storm that was strongest [at|in] {town} {damage} there and cut the power to {all} "
            "[houses|households].",
        ),
        derived={"all": "homes + more"},
        claims=("fast > middle", "fast > slow"),
    )  # fmt: skip


# Kinds of months: the measured quantity; a consequence and the same in short.
MONTHLY = {
    "wettest": ("millimetres of rain fell", {
        "cattle had to be brought down from the meadows by boat": "[stranded|cut off] cattle",
        "cellars in the lower town filled with water": "[flooded|soaked] houses",
        "potatoes rotted in the fields": "ruined a harvest",
        "the village fair had to be called off": "spoilt a local celebration",
    }),
    "driest": ("millimetres of rain fell", {
        "fish were carried to deeper water in buckets": "[threatened|endangered] wildlife",
        "nobody was allowed to use a hose in the garden": "brought a ban on watering",
        "the wheel of the old mill stood still": "stopped a water mill",
        "grass on the hills caught fire twice": "led to fires",
    }),
    "sunniest": ("hours of sunshine were counted", {
        "the ice cream shops sold out every afternoon": "pleased ice cream sellers",
        "the grapes were picked two weeks before their time": "brought an early harvest",
        "not a single hotel had a free bed": "filled hotels",
        "people slept on the beach": "brought people outdoors",
    }),
}  # fmt: skip
LEVELS = {  # ranges of the average, of the second most extreme value and of the extreme
    "wettest": ((60, 90), (140, 160), (161, 190)),
    "driest": ((48, 70), (21, 32), (3, 20)),
    "sunniest": ((150, 190), (215, 235), (236, 269)),
}


def record(d: Draw) -> Story:
    """A month's value, the record and the average: is it a new record or not?"""
    kind, is_record = d.pick(list(MONTHLY)), d.chance(0.6)
    fell, effects = MONTHLY[kind]
    effect = d.pick(list(effects))
    normal, second, first = (d.number(*level) for level in LEVELS[kind])
    facts = {
        "town": d.town(), "month": d.pick(MONTHS[4:9]), "kind": kind, "fell": fell,
        "other": {"wettest": "wetter", "driest": "drier", "sunniest": "sunnier"}[kind],
        "effect": effect, "impact": effects[effect], "since": d.number(1850, 1915),
        "year": d.number(1921, 1998), "now": first if is_record else second,
        "best": second if is_record else first, "normal": normal, "a": d.person(),
        "b": d.person(), "age": d.number(66, 92), "height": d.number(40, 400),
    }  # fmt: skip
    if is_record:
        past = (
            "The old record, {best}, [was set in|dates from] {year:d}.",
            "Until now, the record was {best}, from {year:d}.",
        )
        summary = (
            "The {kind} {month} [on record|since records began] has {impact} in {town}.",
            "There has never been a {other} {month} in {town}, and it has {impact}.",
        )
    else:
        past = (
            "The record of {best}, set in {year:d}, still stands, although no {month} since then "
            "[had come so near|was closer].",
            "In {year:d} it had been {best}, and no {month} in between had come so near to that.",
        )
        summary = (
            "The {kind} {month} since {year:d} has {impact} in {town}, but [it was no new record|"
            "the record stands].",
            "It has been {town}'s {kind} {month} since {year:d}, and it has {impact}.",
        )
    parts = {
        "open": (
            "{a}, who is {age}, walks to the weather station in {town} every morning.",
            "The weather in {town} has been written down every day since {since:d}.",
            "It has been an unusual {month} in {town}.",
            "This {month} was not like others in {town}.",
            "The [figures|numbers] for {month} came in from {town} [today|last night].",
        ),
        "now": ("In {month}, {now} {fell} in the town.", "{now} {fell} in the town in {month}."),
        "past": past,
        "normal": (
            "In a normal {month}, [the figure is|one would expect] {normal}.",
            "The average for {month} is {normal}.",
        ),
        "effect": ("{effect}.", "[As a result|After a while], {effect}."),
    }
    return Story(
        "news/weather",
        facts,
        parts,
        orders=("open now normal past effect", "open now effect past normal",
                "open now past normal effect", "open now normal effect past"),
        extras=(
            "The station stands {height} metres above the sea.",
            "{b}, who teaches geography, took a class to see the instruments.",
            "The forecast for the next weeks is uncertain.",
            "The oldest notebooks are kept in the town hall.",
        ),
        summary=summary,
        claims=("now < best" if (kind == "driest") == is_record else "now > best",),
    )  # fmt: skip
