"""Notes about roads and the weather: four scenarios. See `telling.Story` for the parts.

Written for this project.
"""

from minprefix.assets.notes.names import DAYS, MONTHS
from minprefix.assets.notes.telling import Draw, Story

LOADS = {  # what lies on the road: the same in other words
    "thousands of oranges": "fruit",
    "cans from a dozen dairy farms": "milk",
    "sacks of potatoes": "vegetables",
    "new washing machines": "household goods",
    "boxes of herring": "fish",
    "barrels of beer": "drink",
    "hundreds of live chickens": "poultry",
    "planks and beams": "timber",
}
CAUSES = {  # what the driver says: the same from outside
    "a deer had jumped out of the trees": "[an animal|a deer] on the road",
    "it had been impossible to see the bend against the light": "low sun",
    "nothing had happened when the pedal was pressed on the hill": "brake failure",
    "the surface had been frozen under the bridge": "ice",
    "a tyre had burst on the bend": "a [damaged|burst] tyre",
    "a wasp had got into the cab": "an insect",
}


def crash(d: Draw) -> Story:
    """A lorry loses its load: how long the road is closed follows from two times of day."""
    load, said = d.pick(list(LOADS)), d.pick(list(CAUSES))
    facts = {
        "town": d.town(), "far": d.town(), "driver": d.person(), "age": d.number(24, 62),
        "load": load, "goods": LOADS[load], "said": said, "cause": CAUSES[said],
        "closed": d.number(5, 7), "opened": d.number(9, 12), "day": d.pick(DAYS[:5]),
        "queue": d.number(3, 11), "a": d.person(), "officer": d.person(), "men": d.number(13, 30),
        "limit": d.pick((30, 40, 50)), "farm": d.surname(),
    }  # fmt: skip
    if d.chance():
        injury = (
            "{driver}, the driver, was taken to hospital with a broken [arm|leg].",
            "{driver}, who is {age}, was alone in the cab and broke [an arm|a leg].",
        )
        summary = (
            "A lorry driver was [hurt|injured] and a road near {town} [blocked|shut] for {time} "
            "hours [when|after] a vehicle full of {goods} overturned because of {cause}.",
            "{cause} [caused|led to] a crash that injured a lorry driver and left {goods} on a "
            "road near {town}, which was shut for {time} hours.",
        )
    else:
        injury = (
            "{driver}, the driver, climbed out without a scratch.",
            "Nobody was hurt, not even {driver}, who was at the wheel.",
        )
        summary = (
            "A road near {town} was [blocked|shut] for {time} hours after a lorry [carrying|full "
            "of] {goods} overturned because of {cause}, but [no one|nobody] was injured.",
            "A driver escaped unharmed when {cause} [caused|led to] a crash that left {goods} on a "
            "road near {town}, which was shut for {time} hours.",
        )
    parts = {
        "open": (
            "People on their way to work in {town} had to be patient on {day} morning.",
            "{a} heard a long crash while making the morning tea at {farm}'s Farm near {town}.",
            "School buses from {far} to {town} arrived late or not at all on {day}.",
            "It was a strange {day} morning for [drivers in|people who drive to] {town}.",
        ),
        "lorry": (
            "A lorry [on its way to|coming from] {far} had [tipped|turned] over on the main road, "
            "and {load} lay [across|all over] both lanes.",
            "On the road from {far}, a lorry had ended on its side, and {load} covered the ground.",
        ),
        "hours": (
            "Police closed the road at {closed} and [let the first cars through|opened it again] "
            "at {opened}.",
            "From {closed} [o'clock|in the morning] until {opened} nobody could get through.",
        ),
        "said": (
            "The driver [told the police|said later] that {said}.",
            "Asked how it had happened, the driver said that {said}.",
        ),
        "injury": injury,
    }
    return Story(
        "news/traffic",
        facts,
        parts,
        orders=(
            "open lorry injury said hours", "open lorry hours injury said",
            "open lorry hours said injury", "open lorry said injury hours",
        ),
        extras=(
            "The queue was {queue} miles long.",
            "{men} [volunteers|firefighters] helped to clear up.",
            "The speed limit there is {limit} miles an hour.",
            "{officer} of the county police thanked all those who had waited so calmly.",
            "A child on one of the buses made a drawing of it for the school wall.",
        ),
        summary=summary,
        derived={"time": "opened - closed"},
    )  # fmt: skip


FINDS = {  # what holds the work up: the same in short
    "rust had eaten much deeper into the steel than anybody had thought": "[hidden|bad] rust",
    "an old wall had come to light under the road": "the discovery of [ruins|an ancient wall]",
    "swallows had built their nests in the arches": "[nesting|protected] birds",
    "the river had risen and carried away part of the scaffolding": "high water",
    "the right stone came from a quarry that was closed": "a shortage of stone",
    "something that looked like a bomb lay in the mud": "a [suspected|possible] bomb",
}
HELP = {  # what makes it quicker, likewise
    "the men had been able to work outside all winter": "mild weather",
    "parts of it had been made in a factory beforehand": "ready-made parts",
    "the firm had brought in a second crane": "an extra crane",
    "hundreds of people from the town had lent a hand": "local volunteers",
}
NAMES = "Mill|King's|Abbey|Weaver's|Priory|Tanner's|Market|Castle|Queen's|Church|Long|Old".split(
    "|"
)


def works(d: Draw) -> Story:
    """A bridge opens later than planned, or earlier: two months and two sums are compared."""
    late = d.chance(0.7)
    reason = d.pick(list(FINDS if late else HELP))
    gap = d.number(2, 5)
    months = d.months(gap)
    low, high = d.number(2, 5), d.number(6, 9)
    facts = {
        "town": d.town(), "far": d.town(), "name": d.pick(NAMES), "reason": reason,
        "cause": (FINDS if late else HELP)[reason], "planned": months[not late],
        "now": months[late], "gap": gap, "budget": low if late else high,
        "cost": high if late else low, "engineer": d.person(), "a": d.person(),
        "cars": d.number(2100, 9800, 100), "years": d.number(60, 190, 10),
        "shop": d.pick(("baker", "florist", "butcher", "hairdresser", "greengrocer")),
    }  # fmt: skip
    if late:
        summary = (
            "The [reopening|return] of {town}'s {name} Bridge has been put back by {gap} months "
            "because of {cause}, and [costs have risen|the price has gone up].",
            "{cause} will keep {name} Bridge in {town} closed for {gap} months longer than planned "
            "and make the work more expensive.",
        )
        extra = "{a} has started a list of all the excuses that were given."
    else:
        summary = (
            "{name} Bridge in {town} will reopen {gap} months [early|ahead of time], and for less "
            "money than planned, thanks to {cause}.",
            "{cause} [helped|helped workers] to finish repairs to {name} Bridge in {town} {gap} "
            "months early and more cheaply than expected.",
        )
        extra = "{a} has promised to bake a cake for all the workers."
    parts = {
        "open": (
            "Drivers between {town} and {far} have [got used to|learned to live with] a long way "
            "round.",
            "{a}, a {shop} in {town}, has looked out at a fence since the spring of last year.",
            "{cars} cars a day used to pass where there is now a fence in {town}.",
            "{engineer} spread out a large drawing for the reporters in {town}.",
        ),
        "bridge": (
            "{name} Bridge, which is {years} years old, is being [rebuilt|repaired].",
            "{name} Bridge has been closed for repairs for more than a year.",
        ),
        "when": (
            "It was [meant|supposed] to open in {planned}, but the new date is {now}.",
            "The sign beside it still says {planned}; the right word is now {now}.",
            "The [official|new] date is {now}, not {planned} as first announced.",
        ),
        "money": (
            "The [cost|bill] was first put at {budget} million pounds and is now {cost} million.",
            "Instead of {budget} million pounds, the town will pay {cost} million.",
        ),
        "why": (
            "{engineer}, the engineer in charge, explained that {reason}.",
            "The engineers [reported|told the council] that {reason}.",
        ),
    }
    return Story(
        "news/traffic",
        facts,
        parts,
        orders=(
            "open bridge when why money", "open bridge why when money", "open bridge money why when",
            "open bridge when money why",
        ),
        extras=(
            "Until then, buses go by the ring road.",
            "The paint will be the same dark green as before.",
            "A small ferry takes walkers across for nothing.",
            extra,
        ),
        summary=summary,
        claims=("cost > budget" if late else "cost < budget",),
    )  # fmt: skip


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
            "Few people in {town} slept [well|much] on {day} night.",
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


# What a month may be: what is measured; what comes of it and the same in short.
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
LEVELS = {  # least and most of the average, of the second most extreme figure and of the extreme
    "wettest": ((60, 90), (140, 160), (161, 190)),
    "driest": ((48, 70), (21, 32), (3, 20)),
    "sunniest": ((150, 190), (215, 235), (236, 269)),
}


def record(d: Draw) -> Story:
    """A month's figure beside the record and the average: is it a new record or not?"""
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
            "There has never been a {other} {month} in {town}, which has {impact}.",
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
            "In {town}, everybody [talks|is talking] about the weather.",
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
