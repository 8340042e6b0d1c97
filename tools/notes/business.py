"""Notes about firms and jobs: two scenarios. See `telling.Story` for the parts.

Written for this project.
"""

from tools.notes.names import MONTHS
from tools.notes.telling import Draw, Story

# Goods: the trade, then why sales rose and why they fell, each with the same in short.
TRADES = {
    "bicycles": (
        "bicycle maker",
        ("fuel had become so dear that people left their cars at home", "expensive fuel"),
        ("it had rained on almost every weekend of the spring", "a wet spring"),
    ),
    "boots": (
        "shoe factory",
        ("a film star had been seen in a pair of them", "a [famous|well-known] customer"),
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
    """A firm's sales in two years, why they changed, and the consequences for its staff."""
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
        mood = "It has been a good year for {a_firm} in {town}."
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
        mood = "It has been a hard year for {a_firm} in {town}."
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
            f"{mood[:-1]} and its {{staff}} workers.",
            "{name} began in a kitchen in {year:d}.",
        ),
        "firm": (
            "The [family firm|company], based in {town}, makes {goods}.",
            "{name} of {town} [makes|is known for its] {goods}.",
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


# A firm: its trade, a description, its buildings, two groups of its staff.
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
                "There will be [more work|new jobs] in {town} [soon|before long].",
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
            "{why} will bring {total} jobs to {town}, where {firm} is [opening|"
            "setting up] a {place}.",
            "{firm} has chosen {town} over {rival} for a {place} with {total} jobs.",
            "{total} people will find work in {town} at the new {place} of {firm}.",
        )
    else:
        parts |= {
            "open": (
                "There is bad news for [workers|people with jobs] in {town}.",
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
        extras=(
            *extras,
            "The site measures {acres} acres.",
            "{a}, the caretaker, has the keys to the gate.",
        ),
        summary=summary,
        derived={"total": "part + rest"},
    )
