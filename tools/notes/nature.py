"""Notes about animals: two scenarios. See `telling.Story` for the parts.

Written for this project.
"""

from tools.notes.names import DAYS, MONTHS
from tools.notes.telling import Draw, Story

ANIMALS = {  # what is counted: the family that the summary names
    "barn owls": "owls", "kingfishers": "river birds", "hedgehogs": "[small|spiny] animals",
    "common toads": "toads", "swallows": "[small|migrating] birds", "brown hares": "hares",
    "water voles": "river animals", "white storks": "large birds", "badgers": "wild animals",
}  # fmt: skip
BETTER = {  # why there are more: the same in short
    "farmers had left strips of long grass at the edge of their fields": "strips of long grass",
    "there had been plenty to eat after the mild winter": "a mild winter",
    "foxes had been kept out by a new fence": "a new fence",
    "walkers had learned to stay on the paths": "[careful|considerate] walkers",
}
WORSE = {
    "the ponds had dried up in the spring": "a dry spring",
    "the hedges in which they hid had been cut down": "the loss of hedges",
    "cats and dogs had run free there": "pets",
    "oil from a lorry had run into the streams": "an oil spill",
}


def count(d: Draw) -> Story:
    """Animals are counted in two years; the summary says by how much the number changed."""
    few, step, grew = d.number(20, 150), d.chance(), d.chance()
    many = d.number(2 * few + 3, 3 * few) if step else d.number(few + 8, 2 * few - 4)
    kind, other = d.some(list(ANIMALS), 2)
    reason = d.pick(list(BETTER if grew else WORSE))
    facts = {
        "town": d.town(), "kind": kind, "family": ANIMALS[kind], "other": other,
        "this": many if grew else few, "last": few if grew else many, "reason": reason,
        "cause": (BETTER if grew else WORSE)[reason], "a": d.person(), "b": d.person(),
        "same": d.number(15, 90), "helpers": d.number(11, 70), "hour": d.number(3, 6),
        "age": d.number(9, 14), "month": d.pick(MONTHS[2:10]),
    }  # fmt: skip
    if grew:
        change, claim = (
            ("more than doubled", "this > 2 * last") if step else ("[risen|grown]", "this > last")
        )
        because, many_or_few = "thanks to", "more"
    else:
        change, claim = (
            ("fallen by more than half", "2 * this < last")
            if step
            else ("[fallen|dropped|gone down]", "this < last")
        )
        because, many_or_few = "because of", "fewer"
    parts = {
        "open": (
            "{helpers} volunteers got up at {hour} in the morning to walk through the countryside "
            "around {town}.",
            "With a torch and a notebook, {a} waited in the dark near {town}.",
            "Once a year, the nature club of {town} goes out to count animals.",
            "How many {family} are there around {town}? {helpers} volunteers went to find out.",
            "The number of {family} around {town} is known again.",
            "{a} is only {age}, but knows every animal in the fields of {town}.",
        ),
        "numbers": (
            "[This time|This {month}], {this} {kind} were [seen|found|counted]. [Last year|Twelve "
            "months ago], there had been {last}.",
            "A year [ago|before], the helpers had found {last} {kind}. This time, there "
            "were {this}.",
            "The list for last year has {last} {kind}; the new one has {this}.",
        ),
        "why": (
            "{b}, who leads the club, believes that the reason is simple: {reason}.",
            "{b}, an expert at the college, explained that {reason}.",
        ),
        "other": "The number of {other} was {same}, [the same as|as] before.",
    }
    return Story(
        "news/nature",
        facts,
        parts,
        orders=("open numbers why other", "open numbers other why", "open other numbers why"),
        extras=(
            "Everyone got tea and a slice of cake.",
            "The figures are sent to a museum, which keeps a map.",
            "Next year, the count will be in {month}.",
            "Rubber boots are a must.",
        ),
        summary=(
            f"The number of {{family}} around {{town}} has {change} within a year {because} "
            "{cause}.",
            f"There are {many_or_few} {{family}} near {{town}} than last year {because} {{cause}}.",
        ),
        claims=(claim,),
    )


TRAPS = {  # an animal and its trap: the same in short, how it is freed
    ("pony", "up to its belly in the mud of the river"): ("deep mud", (
        "laid ladders on the ground and pulled with ropes", "dug a ditch to let the water out")),
    ("dog", "at the bottom of a dry well"): ("a well", (
        "let down the smallest of the team in a basket", "sent down a bucket full of sausages")),
    ("goat", "on a narrow ledge above the sea"): ("a cliff", (
        "climbed down with a net", "came from below in a boat with a long ladder")),
    ("cat", "inside the wall of the post office"): ("a wall", (
        "took out eleven bricks", "cut a hole beside the letter box")),
    ("cow", "in the deep end of a swimming pool"): ("a pool", (
        "built a ramp from bales of straw", "put straps around it and used a crane")),
    ("lamb", "on an island in the flooded meadow"): ("the floods", (
        "rowed over in a bath tub", "waded through the water in rubber suits")),
}  # fmt: skip
PETS = "Biscuit Button Captain Clover Daisy Dusty Nelly Pepper Pickle Pudding".split()
RESCUERS = {  # who helps: the same in other words
    "firefighters": "the fire service", "students of the farm college": "students",
    "neighbours": "people from next door", "soldiers on an exercise": "the army",
}  # fmt: skip


def rescue(d: Draw) -> Story:
    """An animal is stuck from one hour to another, which gives the time; who helped, and how."""
    animal, place = d.pick(list(TRAPS))
    trap, methods = TRAPS[animal, place]
    rescuers = d.pick(list(RESCUERS))
    start = d.number(2, 6)
    facts = {
        "town": d.town(), "animal": animal, "place": place, "trap": trap,
        "where": "on" if trap == "a cliff" else "in",
        "method": d.pick(methods), "rescuers": rescuers, "helpers": RESCUERS[rescuers],
        "start": start, "end": start + d.number(2, 6), "day": d.pick(DAYS), "a": d.person(),
        "owner": d.person(), "vet": d.person(), "name": d.pick(PETS),
    }  # fmt: skip
    parts = {
        "open": (
            "{owner} of {town} called for {name} again and again on {day}.",
            "A {animal} in {town} has had a [difficult|long] {day}.",
            "A {animal} kept [half of|] {town} [busy|awake] on {day}.",
            "At first, {a} thought that the [strange|sad] noise near {town} was the wind.",
            "Everybody in {town} knows {name}, and not for good manners.",
            "On {day}, a walker in {town} heard a noise and [stopped|turned round].",
        ),
        "stuck": (
            "{owner}'s {animal} {name} had been stuck {place} since {start} o'clock.",
            "Since {start} o'clock {name}, the {animal} of {owner}, had been {place}.",
        ),
        "how": ("{rescuers} {method}.", "It was {rescuers} who came; they {method}."),
        "end": (
            "It was {end} when the animal stood on firm ground again.",
            "The church clock struck {end} when the animal was [free|out] at last.",
        ),
        "vet": (
            "{vet}, the vet, found [nothing wrong|only a scratch].",
            "The animal had a long drink, and {vet}, the vet, was content.",
        ),
    }
    return Story(
        "news/nature",
        facts,
        parts,
        orders=("open stuck how end vet", "open stuck end how vet", "open stuck how vet end"),
        extras=(
            "{owner} [cried and laughed|hugged everybody].",
            "A fence will now be put up.",
            "A neighbour, {a}, took a photograph that was printed on cups.",
            "It is not the first time that {name} has run away.",
        ),
        summary=(
            "A {animal} in {town} is [safe|well] after {helpers} freed it from {trap} where it had "
            "spent {time} hours.",
            "{helpers} [rescued|saved] a {animal} that was trapped {where} {trap} in {town} for "
            "{time} hours.",
        ),
        derived={"time": "end - start"},
    )
