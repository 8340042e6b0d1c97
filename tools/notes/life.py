"""Notes about culture and schools: three scenarios. See `telling.Story` for the parts.

Written for this project.
"""

from tools.notes.names import DAYS, MONTHS, SHE
from tools.notes.telling import Draw, Story

FESTIVALS = {  # what kind: something seen there
    "music festival": "{a}'s band was the smallest of all, with two flutes and a drum.",
    "book fair": "{a} read from a novel and signed copies until [dark|midnight].",
    "puppet festival": "{a} had carved a dragon that was {metres} metres long.",
    "food fair": "{a} baked a loaf that was {metres} metres long.",
    "film festival": "{a} showed a film that had been made with a telephone.",
    "dance festival": "{a} danced on the roof of a bus.",
}
MORE_CAME = {  # why more came: the same in short
    "the sun had shone from morning to night": "fine weather",
    "for the first time, children had not had to pay": "free entry for children",
    "a special train had run from the city every hour": "an hourly train",
    "a famous singer had said that she would come": "the promise of a famous guest",
}
FEWER_CAME = {
    "it had poured from morning to night": "heavy rain",
    "tickets had cost twice as much as before": "high ticket prices",
    "the trains had stood still because of a strike": "a rail strike",
    "a big football match had been on television": "a big football match",
}


def festival(d: Draw) -> Story:
    """Visitors of three days add up to a total, which is compared with the year before."""
    kind, grew = d.pick(list(FESTIVALS)), d.chance()
    days = [d.number(1500, 3900, 100) for _ in range(3)]
    change = d.number(300, 1400, 100)
    reason = d.pick(list(MORE_CAME if grew else FEWER_CAME))
    facts = {
        "town": d.town(), "kind": kind, "one": days[0], "two": days[1], "three": days[2],
        "before": sum(days) - change if grew else sum(days) + change, "reason": reason,
        "cause": (MORE_CAME if grew else FEWER_CAME)[reason], "a": d.person(), "head": d.person(),
        "metres": d.number(4, 19), "times": d.number(6, 40), "month": d.pick(MONTHS[3:9]),
        "tents": d.number(12, 60), "helpers": d.number(40, 190, 10),
    }  # fmt: skip
    if grew:
        summary = (
            "Thanks to {cause}, {total} people came to the {kind} in {town}.",
            "{cause} [helped to draw|brought] {total} people to the {kind} in {town}, more than "
            "the year before.",
            "The {kind} in {town} has grown: {total} people visited it, thanks to {cause}.",
        )
    else:
        summary = (
            "{cause} hurt the {kind} in {town}: only {total} people came.",
            "{cause} kept many away from the {kind} in {town}, where attendance fell to {total}.",
            "Only {total} people visited the {kind} in {town}, fewer than the year before, because "
            "of {cause}.",
        )
    parts = {
        "open": (
            "The last of {tents} tents of the {kind} in {town} was taken down on Monday.",
            "{head} has now run the {kind} in {town} {times} times.",
            "On Sunday night, the {kind} in {town} [ended with fireworks|came to an end].",
            "The {kind} in {town} is over, and the numbers are known.",
            "{head} looked back at the {kind} in {town} [this week|on Monday].",
        ),
        "days": (
            "{one} [visitors|people] came on Friday, {two} on Saturday and {three} on Sunday.",
            "The gates counted {one} people on Friday, {two} on Saturday and {three} on the last "
            "day.",
        ),
        "before": (
            "[Last year|A year ago], the three days together had brought {before}.",
            "The year before, {before} had come [in all|altogether].",
        ),
        "why": (
            "{head}, the director, had a simple explanation: {reason}.",
            "What made the difference, according to {head}, the director, was that {reason}.",
        ),
        "seen": FESTIVALS[kind],
    }
    return Story(
        "news/culture",
        facts,
        parts,
        orders=("open days before why", "open seen days before why", "open seen why days before",
                "open days why before seen", "open days before seen why"),
        extras=(
            "The next one is planned for {month}.",
            "{helpers} volunteers had put up signs and sold drinks.",
            "A lost parrot was returned to its owner.",
            "Some guests slept in their cars.",
        ),
        summary=summary,
        derived={"total": "one + two + three"},
        claims=("total > before" if grew else "total < before",),
    )  # fmt: skip


WORK = {  # what a writer does for a living: the same as a noun
    "drives a bus": "bus driver",
    "looks after patients at night": "night nurse",
    "taught chemistry until last year": "former chemistry teacher",
    "keeps bees": "beekeeper",
    "sells fish at the market": "fish seller",
    "repairs lifts": "lift mechanic",
    "cuts hair": "hairdresser",
    "delivers letters": "postal worker",
    "plays the organ in church": "church musician",
    "flies a rescue helicopter": "pilot",
}
THEMES = {  # what a book is about: the same in short
    "two sisters who keep a lighthouse": "life in a lighthouse",
    "a village that disappears under a lake": "a drowned village",
    "a cook on a pirate ship": "life among pirates",
    "the last winter of an old clockmaker": "a dying craftsman",
    "a train that never arrives": "an endless journey",
    "three thieves who steal a bell": "a stolen bell",
    "a boy who can hear trees speak": "talking trees",
    "a family of circus riders": "the circus",
    "a queen who runs away from her palace": "a runaway queen",
}
BOOKS = {"novel": "novels", "children's book": "children's books", "comic book": "comics"}


def prize(d: Draw) -> Story:
    """One of three writers wins; the winner and the subject of the book are in different places."""
    writers = [d.person(), d.person(), d.person()]
    jobs, themes, winner = d.some(list(WORK), 3), d.some(list(THEMES), 3), d.number(0, 2)
    wrote = ("wrote one about", "[sent in|submitted] one about", "had chosen to write about")
    facts = {f"w{i}": writer for i, writer in enumerate(writers)} | {
        "town": d.town(), "kind": d.pick(list(BOOKS)), "winner": writers[winner],
        "loser": writers[(winner + d.number(1, 2)) % 3], "job": WORK[jobs[winner]],
        "theme": THEMES[themes[winner]], "sum": d.number(2, 25) * 500, "books": d.number(28, 260),
        "judge": d.person(), "day": d.pick(DAYS), "hours": d.number(2, 7), "works": str(themes),
    }  # fmt: skip
    facts["books_left"] = BOOKS[facts["kind"]]
    entries = [
        f"{{w{i}}}, who {jobs[i]}, {way} {themes[i]}." for i, way in enumerate(d.some(wrote, 3))
    ]
    parts = {
        "open": (
            "The reading room in {town} was full on {day} when {judge} opened the envelope "
            "of the {town} Prize.",
            "{books} {books_left} had been handed in for the {town} Prize.",
            "The jury of the {town} Prize [talked|argued] for {hours} hours behind closed doors.",
            "The {town} Prize was [awarded|handed over] on {day}.",
            "A {kind} has [brought its author|earned somebody] the {town} Prize.",
        ),
        "list": " ".join(["Three {books_left} had reached the last round.", *entries]),
        "winner": (
            "The envelope held a card with the name of {winner.last}.",
            "In the end, it was {winner.last} who was called to the stage.",
            "The flowers [went|were handed] to {winner.last}.",
        ),
        "sum": (
            "The [cheque|prize money] is {sum} pounds.",
            "With the honour comes a cheque for {sum} pounds.",
        ),
        "loser": (
            "Booksellers had expected {loser.last} to win.",
            "{loser.last} [clapped longest|was the first to clap].",
            "Many [guests|readers] would have chosen {loser.last}.",
        ),
    }
    return Story(
        "news/culture",
        facts,
        parts,
        orders=("open list winner loser sum", "open list loser winner sum",
                "open sum list loser winner", "open sum list winner loser"),
        extras=(
            "There was soup for everybody afterwards.",
            "{judge}, who chaired the jury, read every page [twice|aloud].",
            "The lights went out for a moment, and somebody lit a candle.",
        ),
        summary=(
            "A {job} has won {sum} pounds [and the {town} Prize|in {town}] for a {kind} about "
            "{theme}.",
            "The {town} Prize, worth {sum} pounds, has gone to a {job} who wrote about {theme}.",
            "A {kind} about {theme} has earned a {job} {sum} pounds [in {town}|and the {town} "
            "Prize].",
        ),
    )  # fmt: skip


WISHES = {  # what pupils want: the same in other words
    "a telescope": "an instrument to watch the stars",
    "a set of drums": "percussion instruments",
    "a minibus": "a vehicle for school trips",
    "a glasshouse": "a place to grow plants",
    "twenty bicycles": "bikes",
    "a climbing wall": "somewhere to climb",
    "a week at the sea": "a trip to the coast",
}
EVENTS = (  # how money is raised
    "washing cars", "a concert", "selling [cakes|waffles]", "a run round the lake",
    "a flea market", "singing in the streets", "walking dogs", "a play about pirates",
)  # fmt: skip


def school(d: Draw) -> Story:
    """Three events raise money; the sum is more or less than the goal."""
    first, second, third = d.some(EVENTS, 3)
    sums = [d.number(150, 980, 10) for _ in range(3)]
    gap, enough = d.number(40, 300, 10), d.chance()
    wish = d.pick(list(WISHES))
    facts = {
        "town": d.town(), "first": first, "second": second, "third": third, "one": sums[0],
        "two": sums[1], "three": sums[2], "need": sum(sums) - gap if enough else sum(sums) + gap,
        "wish": wish, "aim": WISHES[wish], "head": d.person(), "a": d.person(), "b": d.person(SHE),
        "age": d.number(7, 15), "month": d.pick(MONTHS), "pupils": d.number(110, 780, 10),
    }  # fmt: skip
    if enough:
        summary = (
            "Pupils in {town} have [collected|earned] {gap} pounds more than they need to pay for "
            "{aim}.",
            "With {total} pounds, children at a school in {town} have [earned|collected] enough to "
            "pay for {aim}.",
        )
    else:
        summary = (
            "Pupils in {town} are still {gap} pounds short of what they need to pay for {aim}.",
            "Although they have [earned|collected] {total} pounds, children at a school in {town} "
            "cannot yet [pay for|afford] {aim}.",
        )
    parts = {
        "open": (
            "{a}, who is {age}, has drawn a thermometer on a door of {town} School to show how "
            "much there is in the box.",
            "The {pupils} pupils of {town} School have been busy [since {month}|all term].",
            "{head}, the head of {town} School, had to borrow a bag for all the coins.",
            "Pupils in {town} have been earning money [since {month}|all term].",
            "Children at a school in {town} have been [busy|hard at work] [since {month}|].",
            "It was {a}'s idea, and all of {town} School took part.",
        ),
        "wish": (
            "The price of {wish} is {need} pounds.",
            "The school would like to have {wish}, at a price of {need} pounds.",
        ),
        "first": (
            "[First|To begin with], {first} brought {one} pounds.",
            "{first} brought {one} pounds.",
        ),
        "second": ("{two} pounds came from {second}.", "Then {second} brought {two} pounds."),
        "third": (
            "Another {three} pounds came from {third}.",
            "Finally, {third} brought {three} pounds.",
        ),
    }
    return Story(
        "news/school",
        facts,
        parts,
        orders=("open wish first second third", "open first second third wish"),
        extras=(
            "{b}, a grandmother of five, gave a jar of old coins for the museum.",
            "The school cook made soup for all the helpers.",
            "A list of all those who helped hangs in the entrance.",
            "{a}, who counted the coins, now wants to become a banker.",
        ),
        summary=summary,
        derived={
            "total": "one + two + three",
            "gap": "one + two + three - need" if enough else "need - one - two - three",
        },
        claims=("total > need" if enough else "total < need",),
    )
