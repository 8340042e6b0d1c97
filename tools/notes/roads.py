"""Notes about roads: two scenarios. See `telling.Story` for the parts.

Written for this project.
"""

from tools.notes.names import DAYS
from tools.notes.telling import Draw, Story

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
CAUSES = {  # the cause in the driver's words: the same from outside
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
            "hours [when|after] {cause} caused a crash.",
            "{goods} blocked a road near {town} for {time} hours after a crash in which a driver "
            "was [hurt|injured].",
            "{cause} [caused|led to] a crash that injured a lorry driver near {town}.",
        )
    else:
        injury = (
            "{driver}, the driver, climbed out without a scratch.",
            "Nobody was hurt, not even {driver}, who was at the wheel.",
        )
        summary = (
            "A road near {town} was [blocked|shut] for {time} hours after a lorry [carrying|full "
            "of] {goods} overturned, but [no one|nobody] was injured.",
            "A driver escaped unharmed when {cause} [caused|led to] a crash that left {goods} on a "
            "road near {town}.",
            "{cause} was to blame when a lorry overturned near {town} and blocked the road for "
            "{time} hours.",
        )
    parts = {
        "open": (
            "A road near {town} was [blocked|shut] for much of {day} morning.",
            "Police in {town} had a [busy|difficult] {day} morning.",
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
            "A child made a drawing of it for the school wall.",
        ),
        summary=summary,
        derived={"time": "opened - closed"},
    )  # fmt: skip


FINDS = {  # why the work takes longer: the same in short
    "rust had eaten much deeper into the steel than anybody had thought": "[hidden|bad] rust",
    "an old wall had come to light under the road": "the discovery of [ruins|an ancient wall]",
    "swallows had built their nests in the arches": "[nesting|protected] birds",
    "the river had risen and carried away part of the scaffolding": "high water",
    "the right stone came from a quarry that was closed": "a shortage of stone",
    "something that looked like a bomb lay in the mud": "a [suspected|possible] bomb",
}
HELP = {  # why the work is faster: the same in short
    "the men had been able to work outside all winter": "mild weather",
    "parts of it had been made in a factory beforehand": "ready-made parts",
    "the firm had brought in a second crane": "an extra crane",
    "hundreds of people from the town had lent a hand": "local volunteers",
}
NAMES = "Mill Fisher's King's Abbey Priory Friar's Market Castle Queen's Church Long Old".split()


def works(d: Draw) -> Story:
    """A bridge opens later than planned, or earlier: two months and two sums are compared."""
    late = d.chance(0.7)
    reason = d.pick(list(FINDS if late else HELP))
    months = d.months(d.number(2, 5))
    earlier, later = ("planned", "now") if late else ("now", "planned")
    low, high = d.number(2, 5), d.number(6, 9)
    facts = {
        "town": d.town(), "far": d.town(), "name": d.pick(NAMES), "reason": reason,
        "cause": (FINDS if late else HELP)[reason], "planned": months[not late],
        "now": months[late], "budget": low if late else high,
        "cost": high if late else low, "engineer": d.person(), "a": d.person(),
        "cars": d.number(2100, 9800, 100), "years": d.number(60, 190, 10),
        "shop": d.pick(("baker", "florist", "butcher", "hairdresser", "greengrocer")),
    }  # fmt: skip
    if late:
        summary = (
            "The [reopening|return] of {town}'s {name} Bridge has been put back by {gap} months "
            "because of {cause}, and [costs have risen|the price has gone up].",
            "{town}'s {name} Bridge will reopen {gap} months late because of {cause}.",
            "{cause} will keep {name} Bridge in {town} closed for {gap} months longer than planned "
            "and make the work more expensive.",
        )
        wait = "[People|Drivers] in {town} will have to [be patient|wait] for {name} Bridge."
        extra = "{a}, who lives nearby, has started a list of all the excuses that were given."
    else:
        summary = (
            "{name} Bridge in {town} will reopen {gap} months [early|ahead of time], and for less "
            "money than planned, thanks to {cause}.",
            "{cause} [helped|helped workers] to finish repairs to {name} Bridge in {town} {gap} "
            "months early and more cheaply than expected.",
        )
        wait = "[People|Drivers] in {town} had not expected to have {name} Bridge back so soon."
        extra = "{a}, who lives nearby, has promised to bake a cake for the workers."
    parts = {
        "open": (
            "Drivers between {town} and {far} have [got used to|learned to live with] a long way "
            "round.",
            "{a}, a {shop} in {town}, has looked out at a fence since the spring of last year.",
            "{cars} cars a day used to pass where there is now a fence in {town}.",
            wait,
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
            "open bridge when why money", "open bridge why when money",
            "open bridge money why when", "open bridge when money why",
        ),
        extras=(
            "Until then, buses go by the ring road.",
            "The paint will be the same dark green as before.",
            "A small ferry takes walkers across for nothing.",
            extra,
        ),
        summary=summary,
        derived={"gap": f"month({later}) - month({earlier})"},
        claims=("cost > budget" if late else "cost < budget",),
    )  # fmt: skip
