"""Notes from the town hall: two scenarios. See `telling.Story` for the parts.

Written for this project.
"""

from tools.notes.names import DAYS, MONTHS
from tools.notes.telling import Draw, Story, spell

# A plan, the same in short, an objection and its short form, an advantage and its short form.
PLANS = (
    {
        "plan": "build {n} flats on the site of the old brewery",
        "brief": "[new homes|housing] at a former brewery",
        "con": "the lanes around it were full of cars every morning",
        "worry": "traffic",
        "pro": "many young families had to leave the town to find a place of their own",
        "hope": "house more young people",
    },
    {
        "plan": "turn the car park behind the station into a garden with {n} trees",
        "brief": "a [park|green space] beside the railway",
        "con": "shops nearby would lose the customers who came by car",
        "worry": "trade",
        "pro": "children in that quarter had nowhere safe to play",
        "hope": "give children a [playground|place to play]",
    },
    {
        "plan": "put up {n} lamps along the path by the river",
        "brief": "[lights|lighting] on a riverside walk",
        "con": "a bright path would drive away the bats and owls that hunted there",
        "worry": "wildlife",
        "pro": "several people had slipped and fallen there in the dark",
        "hope": "prevent accidents",
    },
    {
        "plan": "let the cafés on the market square serve {n} tables outside until midnight",
        "brief": "late opening for [outdoor cafés|cafés in the open air]",
        "con": "nobody who lived on the square would be able to sleep",
        "worry": "noise",
        "pro": "the old streets were empty as soon as the shops had closed",
        "hope": "bring life to the town centre",
    },
    {
        "plan": "move the library from Mill Street into {n} rooms of the sports hall",
        "brief": "a new home for the library",
        "con": "the hall was two bus rides away for most pensioners",
        "worry": "older readers",
        "pro": "rain came through the roof of the old building",
        "hope": "keep the books dry",
    },
    {
        "plan": "charge drivers {n} pounds a day to leave their cars at the beach",
        "brief": "a parking fee at the seaside",
        "con": "day trippers would simply choose another resort",
        "worry": "tourism",
        "pro": "somebody had to pay for clearing up the sand every summer",
        "hope": "pay for a cleaner beach",
    },
    {
        "plan": "close Castle Street to cars on {n} Sundays a year",
        "brief": "car-free Sundays",
        "con": "elderly people could no longer be driven to church",
        "worry": "the elderly",
        "pro": "the air in the street was the worst in the county",
        "hope": "fight pollution",
    },
    {
        "plan": "allow a farmer to put up {n} wind turbines on the hill",
        "brief": "a wind farm",
        "con": "they would be seen from every window in the valley",
        "worry": "the view",
        "pro": "the money would pay for a doctor in the village",
        "hope": "fund a doctor",
    },
)


def vote(d: Draw) -> Story:
    """A vote on a plan; the winner and the reason must be found among both sides' arguments."""
    plan, passed = d.pick(PLANS), d.chance()
    few, many = d.number(3, 14), d.number(15, 32)
    n = d.number(13, 60) if "flats" in plan["plan"] or "trees" in plan["plan"] else d.number(3, 12)
    facts = {key: text.format(n=spell(n)) for key, text in plan.items()} | {
        "town": d.town(), "day": d.pick(DAYS), "months": d.number(3, 9), "n": n,
        "yes": many if passed else few, "no": few if passed else many,
        "petition": d.number(210, 2900, 10), "chair": d.person(), "a": d.person(), "b": d.person(),
        "hours": d.number(2, 5), "years": d.number(3, 12), "month": d.pick(MONTHS),
    }  # fmt: skip
    if passed:
        summary = (
            "Councillors in {town} have [agreed to|backed|approved] {brief} to {hope}, despite "
            "[protests by|a petition from] {petition} people.",
            "{town} council has [agreed to|approved] {brief}, hoping to {hope}.",
            "{brief} [has been agreed|will get the go-ahead] in {town} in order to {hope}, "
            "although {petition} people had [protested|objected].",
        )
    else:
        summary = (
            "Councillors in {town} have [rejected|turned down|thrown out] {brief} because of "
            "[worries|concern] about {worry}.",
            "{town} council has [rejected|turned down] {brief}, fearing for {worry}."
            if plan["worry"] in ("trade", "wildlife", "older readers", "tourism", "the view")
            else "{town} council has [rejected|turned down] {brief}, fearing {worry}.",
            "Concern about {worry} has led {town} council to [say no to|decide against] {brief}.",
            "Plans for {brief} in {town} have been [defeated|blocked] by members who were "
            "[worried|concerned] about {worry}.",
        )
    parts = {
        "open": (
            "People in {town} have argued about {brief} for {months} months.",
            "{town} council had to [decide about|deal with] {brief} on {day}.",
            "Councillors in {town} talked for {hours} hours on {day} before they could agree.",
            "{day}'s meeting of {town} council was [a long|a noisy|not a quiet] one.",
            "{chair} had to ring the bell [twice|several times] when {town} council met on {day}.",
        ),
        "plan": (
            "[On the table was|Before the members was] a plan to {plan}.",
            "The question was whether to {plan}.",
            "The proposal was to {plan}.",
        ),
        "con": (
            "[One speaker|A resident|One of the critics], {a}, said that {con}.",
            "[Those against it|Opponents] pointed out that {con}.",
            "{a}, who lives nearby, complained that {con}.",
        ),
        "pro": (
            "[The supporters|Those in favour] argued that {pro}.",
            "{b}, who had drawn up the plan, [reminded the meeting|said] that {pro}.",
        ),
        "petition": (
            "[A petition against it|A letter of protest] had been signed by {petition} people.",
            "Protesters handed over {petition} signatures against it.",
        ),
        "show": (
            "[In the end|When it came to a show of hands], {yes} councillors voted for it and {no} "
            "against.",
            "{no} councillors raised their hands against it, {yes} for it.",
            "The count was {yes} for and {no} against.",
        ),
    }
    return Story(
        "news/council",
        facts,
        parts,
        orders=(
            "open plan con petition pro show", "open plan pro con petition show",
            "open plan petition pro con show", "open plan show con pro petition",
            "open plan show pro con petition",
        ),
        extras=(
            "The [next meeting|council's next meeting] is in {month}.",
            "Another item, about benches in the churchyard, was put off until {month}.",
            "The meeting was shown on a screen in the hall below for those without a seat.",
            "{chair}, who has led the council for {years} years, did not vote.",
        ),
        summary=summary,
        claims=("yes > no",) if passed else ("no > yes",),
    )  # fmt: skip


OPTIONS = {  # what money may be spent on: the same in other words
    "new swings for the playground": "a better [playground|play area]",
    "a bus to the hospital every hour": "a regular hospital bus",
    "a roof over the market": "a covered market",
    "flowers along the high street": "planting in the centre",
    "fast internet for the village hall": "a quicker web connection",
    "heating for the swimming pool": "warmer water for swimmers",
    "new boats for the sailing school": "a fleet for young sailors",
    "repairs to the clock tower": "mending the old clock",
}


def survey(d: Draw) -> Story:
    """Residents choose one of three ways to spend money: the largest of three counts."""
    counts = sorted(d.some(range(180, 1900), 3), reverse=True)
    first, second, third = d.some(list(OPTIONS), 3)
    facts = {
        "town": d.town(), "sum": d.number(20, 90) * 1000, "most": counts[0],
        "fewer": counts[1], "fewest": counts[2], "first": first, "second": second, "third": third,
        "prize": OPTIONS[first], "loser": OPTIONS[second], "last": OPTIONS[third],
        "mayor": d.person(), "a": d.person(), "weeks": d.number(2, 8), "age": d.number(8, 16),
        "month": d.pick(MONTHS[:6]), "later": d.pick(MONTHS[8:]), "saved": d.number(2, 9),
    }  # fmt: skip
    parts = {
        "open": (
            "What people in {town} want most has become clear [this week|at last].",
            "People in {town} have voted on [how to spend|a use for] a sum of money.",
            "Every household in {town} was sent a [short letter|form with three boxes] in {month}.",
            "For {weeks} weeks a [wooden|large] box stood in the post office of {town}.",
            "{town} council has been asking [its residents|people] a question since {month}.",
        ),
        "ask": (
            "[The council wanted to know|People were asked] how to spend {sum} pounds that [had "
            "been left over from last year|a local woman had left to the town].",
            "The town had {sum} pounds, [saved|put aside] over {saved} years, and three ideas of "
            "how to spend them.",
        ),
        "first": (
            "{most} [people|residents] [voted|opted] for {first}.",
            "{first} got {most} votes.",
            "{most} of those who answered would like to have {first}.",
        ),
        "second": (
            "{second} got {fewer} votes.",
            "{fewer} [people|residents] asked for {second}.",
            "For {second} there were {fewer} votes.",
        ),
        "third": (
            "{third} got {fewest} votes.",
            "{fewest} people [wanted|preferred] {third}.",
            "{fewest} forms had a cross beside {third}.",
        ),
    }
    return Story(
        "news/council",
        facts,
        parts,
        orders=(
            "open ask first second third", "open ask second first third",
            "open ask third first second", "open ask second third first",
            "open ask third second first",
        ),
        extras=(
            "{a}, the youngest to take part, is {age} years old.",
            "{mayor}, the mayor, [promised|said] that work would begin in {later}.",
            "A few people sent [poems|drawings] instead of a vote.",
            "Counting the answers took two days.",
        ),
        summary=(
            "[People|Residents] in {town} have [chosen|picked] {prize} as the [best|right] way to "
            "spend {sum} pounds.",
            "{prize}, ahead of {loser}, is the first choice of people in {town} for {sum} pounds.",
            "A sum of {sum} pounds will go into {prize} after a vote in {town}, in which {last} "
            "came last.",
        ),
        claims=("most > fewer", "fewer > fewest"),
    )  # fmt: skip
