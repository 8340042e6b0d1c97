"""Notes from the town hall and about business: four scenarios. See `telling.Story` for the parts.

Written for this project.
"""

from minprefix.assets.notes.names import DAYS, MONTHS
from minprefix.assets.notes.telling import Draw, Story, spell

# What is planned, the same in short, an objection and what it comes to, an advantage likewise.
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
    """A plan is put to the vote; who won and why is to be found among both sides' arguments."""
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
            "{brief} [has been agreed|will get the go-ahead] in {town} in order to {hope}, "
            "although {petition} people had [protested|objected].",
        )
    else:
        summary = (
            "Councillors in {town} have [rejected|turned down|thrown out] {brief} because of "
            "[worries|concern] about {worry}.",
            "Concern about {worry} has led {town} council to [say no to|decide against] {brief}.",
            "Plans for {brief} in {town} have been [defeated|blocked] by members who were "
            "[worried|concerned] about {worry}.",
        )
    parts = {
        "open": (
            "The public seats in {town} town hall were all taken on {day} [evening|night].",
            "Councillors in {town} talked for {hours} hours on {day} before they could agree.",
            "{day}'s meeting of {town} council was [a long|a noisy|not a quiet] one.",
            "{chair} had to ring the bell [twice|several times] when {town} council met on {day}.",
        ),
        "plan": (
            "[On the table was|Before the members was] a plan to {plan}.",
            "The question was whether to {plan}.",
            "A proposal to {plan} had been waiting for a decision for {months} months.",
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


# Goods: the trade, then why sales rose and why they fell, each with the same in short.
TRADES = {
    "bicycles": (
        "bicycle maker",
        ("fuel had become so dear that people left their cars at home", "expensive fuel"),
        ("it had rained on almost every weekend of the spring", "a wet spring"),
    ),
    "boots": (
        "shoe factory",
        ("a film star had been seen in a pair of them", "a [famous customer|star's taste]"),
        ("a shop chain had stopped ordering from them", "the loss of a [big|major] customer"),
    ),
    "lemonade": (
        "drinks maker",
        ("the summer had been the hottest for many years", "the heat"),
        ("it had been too cold for the beach even in July", "a cool summer"),
    ),
    "garden tools": (
        "tool maker",
        ("so many people had begun to grow their own vegetables", "a new love of gardening"),
        ("nobody had been allowed to water a lawn", "a ban on watering"),
    ),
    "pianos": (
        "piano builder",
        ("several schools had opened music classes", "new music lessons at schools"),
        ("wood from abroad had doubled in price", "the cost of timber"),
    ),
    "candles": (
        "candle factory",
        ("the lights had gone out so often in the winter", "winter power cuts"),
        ("flames had destroyed the largest machine", "a fire"),
    ),
}


def results(d: Draw) -> Story:
    """A firm's sales in two years, why they changed, and what becomes of its staff."""
    goods, rise = d.pick(list(TRADES)), d.chance()
    firm, up, down = TRADES[goods]
    reason, cause = up if rise else down
    low, high = sorted(d.some(range(210, 980, 10), 2))
    facts = {
        "town": d.town(), "firm": firm, "name": f"{d.surname()} & {d.pick(('Sons', 'Daughters'))}",
        "goods": goods, "this": (high if rise else low) * 1000, "reason": reason, "cause": cause,
        "last": (low if rise else high) * 1000, "jobs": d.number(13, 60), "boss": d.person(),
        "staff": d.number(130, 460, 10), "year": d.number(1871, 1990), "month": d.pick(MONTHS),
        "a": d.person(), "price": d.number(3, 12),
    }  # fmt: skip
    if rise:
        mood = "There were smiles and sandwiches at {name} [this week|yesterday]."
        staff = (
            "{jobs} [people|workers] will be taken on [in|before] {month}.",
            "It is looking for {jobs} [new workers|more people], who can start in {month}.",
        )
        summary = (
            "{a_firm} in {town} is [hiring|to hire] {jobs} people after {cause} pushed up its "
            "sales.",
            "[Thanks to|Helped by] {cause}, {a_firm} in {town} has earned more than the year "
            "before and will create {jobs} jobs.",
        )
    else:
        mood = "There were long faces at {name} [this week|yesterday]."
        staff = (
            "{jobs} [people|workers] will have to go in {month}.",
            "It will have to do without {jobs} of its workers from {month}.",
        )
        summary = (
            "{a_firm} in {town} is [cutting|to cut] {jobs} jobs after {cause} [hurt|hit] its "
            "sales.",
            "{jobs} jobs are to be lost at {a_firm} in {town} that has earned less than the year "
            "before because of {cause}.",
        )
    parts = {
        "open": (
            "{boss} called the whole staff [together|into the yard] on the last day of the year.",
            mood,
            "{staff} people earn their living at {name}.",
            "{name} began in a kitchen in {year:d}.",
        ),
        "firm": (
            "The [family firm|company], based in {town}, makes {goods}.",
            "{name} is a [family business|company] in {town} that makes {goods}.",
        ),
        "this": (
            "[Over the last twelve months|In the past year] its sales [reached|were] {this} "
            "pounds.",
            "This year's sales came to {this} pounds.",
        ),
        "last": (
            "A year earlier [sales|the figure] had been {last} pounds.",
            "The year before, customers had spent {last} pounds.",
        ),
        "why": (
            "{boss}, who runs it, [said|explained] that {reason}.",
            "The [reason|explanation], according to {boss}, its head, was that {reason}.",
        ),
        "staff": staff,
    }
    return Story(
        "news/business",
        facts | {"a_firm": f"a {firm}"},
        parts,
        orders=(
            "open firm this last why staff", "open firm staff this last why",
            "open firm why this last staff", "open firm why staff this last",
        ),
        extras=(
            "{a} has worked there for longer than anybody else.",
            "A new [sign|gate] was put up at the entrance in the spring.",
            "School classes are allowed to look around on Fridays.",
            "It also has a small museum, where tickets cost {price} pounds.",
        ),
        summary=summary,
        claims=("this > last",) if rise else ("this < last",),
    )  # fmt: skip


# A firm: its trade, what it is, where it works, two groups of its staff.
SITES = (
    ("parcel", "a parcel [firm|company]", "depot", "as drivers", "at the sorting belts"),
    ("furniture", "a furniture [maker|firm]", "workshop", "at the saws", "in the paint shop"),
    ("laundry", "a laundry [business|firm]", "laundry", "at the machines", "in the vans"),
    ("biscuit", "a biscuit [maker|company]", "bakery", "at the ovens", "in the packing hall"),
    ("toy", "a toy [maker|firm]", "factory", "in the workshops", "in the office"),
)
WHY_HERE = {  # why a firm comes, the same in short
    "the railway was so close": "good [train links|rail connections]",
    "land cost only half as much as in the city": "cheap land",
    "the college nearby trained so many young people": "skilled young workers",
    "the council had promised to build a new road": "the promise of a new road",
}
WHY_CLOSED = {
    "the rent had been raised for the third time in two years": "rising rents",
    "the machines were too old to be mended": "worn-out machines",
    "there were hardly any orders left": "a lack of orders",
    "the walls were no longer safe": "an unsafe building",
}


def site(d: Draw) -> Story:
    """A firm comes or goes: two groups of staff make up the number of jobs."""
    trade, firm, place, some, others = d.pick(SITES)
    opens = d.chance()
    because, why = d.pick(list((WHY_HERE if opens else WHY_CLOSED).items()))
    facts = {
        "town": d.town(), "rival": d.town(), "name": d.surname(), "trade": trade, "firm": firm,
        "place": place, "some": some, "others": others, "because": because, "why": why,
        "part": d.number(12, 90), "rest": d.number(12, 90), "boss": d.person(), "mayor": d.person(),
        "years": d.number(13, 80), "month": d.pick(MONTHS), "cost": d.number(2, 30),
        "acres": d.number(3, 20), "a": d.person(),
    }  # fmt: skip
    parts = {
        "why": (
            "{boss}, the head of the [firm|company], said that {because}.",
            "The [firm|company] gave its reason in one sentence: {because}.",
        )
    }
    if opens:
        parts |= {
            "open": (
                "A sign with the name {name} [has been put up|has appeared] in an empty field near "
                "{town}.",
                "{mayor}, the mayor of {town}, had kept a secret [for weeks|since {month}].",
                "After months of talks, {boss} signed a paper in {town} this week.",
            ),
            "plan": "The {trade} [firm|company] {name} [is going to|will] build a {place} there.",
            "jobs": (
                "{part} people will work {some} and [another|] {rest} {others}.",
                "There will be jobs for {part} people {some} and for {rest} {others}.",
            ),
            "rival": (
                "{rival} had [also|] hoped to get the {place}.",
                "The {place} might also have gone to {rival}.",
            ),
        }
        extras = ["The building will cost {cost} million pounds.", "Work begins in {month}."]
        summary = (
            "{why} [will bring|is bringing] {total} jobs to {town}, where {firm} is [opening|"
            "setting up] a {place}.",
            "{firm} has chosen {town} over {rival} for a {place} with {total} jobs.",
            "{total} people will find work in {town} at the new {place} of {firm}.",
        )
    else:
        parts |= {
            "open": (
                "The lights at {name} in {town} will go out for [good|the last time] in {month}.",
                "{boss} read out a letter to a silent hall in {town} [yesterday|this morning].",
                "For {years} years, people in {town} have set their clocks by the bell at {name}.",
            ),
            "plan": "The {trade} [firm|company] {name} is going to shut its {place} in the town.",
            "jobs": (
                "{part} people work there {some} and [another|] {rest} {others}.",
                "It has {part} workers {some} and [another|] {rest} {others}.",
            ),
            "rival": "Its {place} in {rival} is not [affected|touched].",
        }
        extras = [
            "A buyer has been found for the building, at {cost} million pounds.",
            "{mayor}, the mayor, was told only the evening before.",
        ]
        summary = (
            "{firm} is closing its {place} in {town} because of {why}, with the loss of {total} "
            "jobs.",
            "{total} people in {town} are to lose their jobs because of {why} at {firm}.",
            "{firm} has blamed {why} for the end of its {place} and {total} jobs in {town}.",
        )
    return Story(
        "news/business",
        facts,
        parts,
        orders=("open plan jobs why rival", "open plan why jobs rival", "open plan why rival jobs"),
        extras=(*extras, "The site measures {acres} acres.", "{a} has the keys to the gate."),
        summary=summary,
        derived={"total": "part + rest"},
    )
