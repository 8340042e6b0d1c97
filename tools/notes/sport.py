"""Notes about sport: four scenarios. See `telling.Story` for the parts.

Written for this project.
"""

from tools.notes.names import DAYS, HE, SHE
from tools.notes.telling import Draw, Story

CLUBS = ("Rovers", "Town", "United", "Wanderers", "City", "Athletic")
SHOTS = {  # how the last goal falls: the same in short
    "headed in a corner": "header",
    "scored from the penalty spot": "penalty",
    "curled a free kick round the wall": "free kick",
    "hit the ball in from thirty yards": "long shot",
    "turned a cross into the net": "finish",
}


def football(d: Draw) -> Story:
    """Goals are listed one by one; who won, or saved a point, and how must be inferred."""
    course = d.pick(("behind", "level", "only", "draw"))
    shot, names = d.pick(list(SHOTS)), d.pick((HE, SHE))
    facts = {
        "us": f"{d.town()} {d.pick(CLUBS)}", "them": f"{d.town()} {d.pick(CLUBS)}",
        "hero": d.person(names), "b": d.person(names), "c": d.person(names),
        "keeper": d.person(names), "coach": d.person(), "early": d.number(11, 38),
        "middle": d.number(49, 74), "left": d.number(2, 9), "shot": shot, "short": SHOTS[shot],
        "crowd": d.number(21, 98) * 100, "day": d.pick(DAYS), "pies": d.number(11, 60) * 10,
    }  # fmt: skip
    goals, score, summary = {
        "behind": (
            [
                "{b} had put {them} in front after {early} minutes.",
                "{c} [equalised|made it level] for {us} after {middle} minutes.",
            ],
            "2-1",
            (
                "{us} came back to beat {them} with a late {short}.",
                "{us} came from behind to beat {them} {score} [thanks to|with] a late {short} by "
                "{hero}.",
                "{hero}'s {short} near the end completed a [comeback|recovery] by {us} against "
                "{them}.",
            ),
        ),
        "level": (
            [
                "{b} had put {us} in front after {early} minutes.",
                "{c} [equalised|made it level] for {them} after {middle} minutes.",
            ],
            "2-1",
            (
                "A late {short} by {hero} gave {us} a {score} [win|victory] over {them}.",
                "{them} fought back but lost {score} to {us}, [beaten by|undone by] {hero}'s late "
                "{short}.",
            ),
        ),
        "only": (
            [
                "{b} of {them} had hit the post after {early} minutes.",
                "{c} of {them} had missed a penalty after {middle} minutes.",
            ],
            "1-0",
            (
                "A late {short} by {hero} was enough for {us} to beat {them} {score}.",
                "{them} wasted a penalty and lost {score} to {us} in the last minutes.",
            ),
        ),
        "draw": (
            [
                "{b} had put {them} in front after {early} minutes.",
                "{c} of {them} had hit the post after {middle} minutes.",
            ],
            "1-1",
            (
                "{hero}'s late {short} saved a point for {us} in a {score} draw with {them}.",
                "{them} were [close to victory|on course to win] until a late {short} by {hero} "
                "earned {us} a {score} draw.",
            ),
        ),
    }[course]
    parts = {
        "open": (
            "{crowd} people had come to see {us} [play|meet] {them} on {day}.",
            "The rain never stopped while {us} and {them} played on {day}.",
            "{us} and {them} gave {crowd} people a good match on {day}.",
            "{coach}, the coach of {us}, could not sit still [on {day}|during the game on {day}].",
            "It was the last match of the season for {us} and {them}.",
        ),
        "early": goals[0],
        "middle": goals[1],
        "late": (
            "With {left} minutes to go, {hero} {shot} for {us}.",
            "{hero} {shot} for {us} when only {left} minutes were left.",
        ),
        "score": ("[It ended|The game ended|It finished] {score}."),
        "talk": (
            "{coach} [praised|thanked] the referee.",
            "{keeper}, who kept goal for {us}, spoke of a strange evening.",
            "Both teams will meet again in the cup.",
        ),
    }
    return Story(
        "sport/football",
        facts | {"score": score},
        parts,
        orders=(
            "open early middle late score", "open early middle late talk score",
            "open early middle score late talk", "open score early middle late",
        ),
        extras=(
            "{pies} pies were sold at half-time.",
            "A dog ran onto the pitch and had to be caught.",
            "The grass was so long that it slowed the ball.",
        ),
        summary=summary,
    )  # fmt: skip


RACES = {  # topic: what it is called, who takes part, a possible mishap and the same in short
    "athletics": ("hill race", "runner", {
        "lost a shoe in a puddle": "lost a shoe", "took the wrong path at the mill": "went astray",
        "had to stop with a cramp": "suffered a cramp"}),
    "cycling": ("cycle race", "rider", {
        "ran into a flock of sheep": "met some sheep", "fell in the last bend": "crashed",
        "had to change a wheel": "had a flat tyre"}),
    "rowing": ("rowing race", "rower", {
        "broke an oar": "damaged an oar", "got caught in the reeds": "became stuck",
        "was hit by the wave of a ferry": "was slowed by a ferry"}),
    "skiing": ("ski race", "skier", {
        "broke a pole": "damaged a pole", "fell into deep snow": "had a fall",
        "waxed the skis badly": "chose the wrong wax"}),
}  # fmt: skip


def race(d: Draw) -> Story:
    """Times of three athletes and the record: the smallest wins, the differences are derived."""
    sport = d.pick(list(RACES))
    name, athlete, mishaps = RACES[sport]
    mishap, names = d.pick(list(mishaps)), d.pick((HE, SHE))
    times = [3 * n + d.number(0, 1) for n in sorted(d.some(range(2, 20), 4))]  # well separated
    is_record = d.chance()
    best = times.pop(1 if is_record else 0)
    facts = {
        "town": d.town(), "race": name, "athlete": athlete, "first": d.person(names),
        "second": d.person(names), "third": d.person(names), "minutes": d.number(21, 58),
        "one": times[0], "two": times[1], "three": times[2], "best": best, "year": d.number(1961,
        2009), "mishap": mishap, "short": mishaps[mishap], "day": d.pick(DAYS),
        "field": d.number(31, 290), "cups": d.number(300, 2000, 100), "a": d.person(),
        "b": d.person(), "age": d.number(70, 85),
    }  # fmt: skip
    if is_record:
        summary = (
            "{first} has won the {race} in {town} in a record time, {gap} seconds ahead of {second}"
            ", who {short}.",
            "The record for {town}'s {race} has been broken by {first}, who beat {second} by {gap} "
            "seconds.",
        )
    else:
        summary = (
            "{first} won the {race} in {town} by {gap} seconds.",
            "{first} has won {town}'s {race} but missed the record by {miss} seconds.",
            "{first} was the fastest {athlete} in {town}, {gap} seconds ahead of {second}, who "
            "{short}.",
        )
    past = (
        "The record had stood at {minutes} minutes and {best} seconds since {year:d}.",
        "Nobody had ever been faster than {minutes} minutes and {best} seconds.",
    )
    if not is_record:
        past = (
            "The record is {minutes} minutes and {best} seconds, set in {year:d}.",
            "In {year:d}, the record was set at {minutes} minutes and {best} seconds.",
        )
    parts = {
        "open": (
            "{field} people stood at the start of the {race} in {town} on {day}.",
            "The {race} in {town} had a surprising end on {day}.",
            "{first} and {second} were both at the {race} in {town} on {day}.",
            "{second} had been the favourite for the {race} in {town} on {day}.",
            "{a} rang the bell for the start of the {race} in {town}.",
        ),
        "mishap": "{second}, who had been leading [for a long time|until then], {mishap}.",
        "first": (
            "{first} [needed|took] {minutes} minutes and {one} seconds.",
            "The clock [showed|stopped at] {minutes} minutes and {one} seconds for {first}.",
        ),
        "second": (
            "{second} needed {minutes} minutes and {two} seconds.",
            "For {second} it was {minutes} minutes and {two} seconds.",
        ),
        "third": "{third} [finished|came in] after {minutes} minutes and {three} seconds.",
        "past": past,
    }
    return Story(
        f"sport/{sport}",
        facts,
        parts,
        orders=(
            "open mishap first second third past", "open mishap second first third past",
            "open past mishap third second first", "open past mishap first second third",
            "open mishap third first second past",
        ),
        extras=(
            "{cups} cups of tea were handed out on the way.",
            "{b}, the oldest at the start, is {age}.",
            "Next year, there will be a race for children as well.",
            "A brass band played at the finish.",
        ),
        summary=summary,
        derived={"gap": "two - one", "miss": "one - best"},
        claims=("one < two", "two < three", "one < best" if is_record else "one > best"),
    )  # fmt: skip


HURT = {  # how it happened: the same in short
    "slipped on the wet stairs of the team hotel": "a fall at a hotel",
    "was bitten by a dog in the park": "a dog bite",
    "ran into a team mate in training": "a collision in training",
    "dropped a suitcase on {his} own foot": "an accident with luggage",
    "fell off a horse on {his} day off": "a riding accident",
    "twisted a knee while dancing at a wedding": "an injury on the dance floor",
}
TEAMS = {"hockey": "Hawks", "handball": "Bears", "basketball": "Giants", "rugby": "Lions"}


def injury(d: Draw) -> Story:
    """A player is injured; the number of missed games is the sum over two competitions."""
    sport, how = d.pick(list(TEAMS)), d.pick(list(HURT))
    names = d.pick((HE, SHE))
    player = d.person(names)
    facts = {
        "team": f"{d.town()} {TEAMS[sport]}", "sport": sport, "player": player,
        "how": how.format(his=player.his), "short": HURT[how], "league": d.number(3, 9),
        "cup": d.number(2, 4), "doctor": d.person(), "coach": d.person(), "other": d.person(names),
        "age": d.number(17, 34), "weeks": d.number(4, 9), "points": d.number(110, 390),
        "day": d.pick(DAYS), "rank": d.pick(("second", "third", "fourth", "fifth")),
    }  # fmt: skip
    parts = {
        "open": (
            "It has been a bad week for {team} and {player}.",
            "Fans of {team} will not see {player} for [some time|a while].",
            "{player} sat on the bench on {day} with one foot in ice.",
            "The {sport} team {team} are {rank} in the table.",
            "Nobody has scored more for {team} this season than {player}, with {points} points.",
        ),
        "how": (
            "The captain of {team}, {player}, {how}.",
            "{player}, the captain of {team}, {how}.",
        ),
        "league": (
            "In the league, {league} games will be played without {player.him}.",
            "{coach}, the coach, expects {league} league games without {player.him}.",
        ),
        "cup": (
            "There are also {cup} games in the cup that {player.he} will miss.",
            "In the cup, {player.he} cannot play in the next {cup} games.",
        ),
        "other": (
            "{other}, who is {age}, will [stand in|take over].",
            "The armband goes to {other} for the time being.",
        ),
    }
    return Story(
        f"sport/{sport}",
        facts,
        parts,
        orders=("open how league cup other", "open how cup league other",
                "open how other league cup"),
        extras=(
            "{doctor}, the doctor, [ordered rest|forbade all training] for {weeks} weeks.",
            "Fans have sent flowers and a huge card.",
            "Tickets for the next game are sold out.",
            "{player} wants to use the time to learn the piano.",
        ),
        summary=(
            "{team} will be without {player} for {total} games after {short}.",
            "{short} will keep {team}'s captain {player} out of {total} games.",
            "{team} have lost their captain for {total} games because of {short}, and {other} "
            "will [lead the team|replace {player.him}].",
        ),
        derived={"total": "league + cup"},
    )  # fmt: skip


def coach(d: Draw) -> Story:
    """A coach goes after games without a win, or stays after games without a defeat."""
    stays = d.chance()
    facts = {
        "club": f"{d.town()} {d.pick(CLUBS)}", "coach": d.person(), "chair": d.person(),
        "next": d.person(), "draws": d.number(2, 5), "others": d.number(2, 8),
        "age": d.number(38, 63), "a": d.person(), "day": d.pick(DAYS),
        "until": d.number(2031, 2036), "since": d.pick(("Since the winter", "Since the summer",
        "In the last weeks", "In this half of the season")), "crowd": d.number(11, 49) * 100,
    }  # fmt: skip
    if stays:
        games = "{since}, the team has won {others} games and drawn {draws}."
        decision = (
            "{chair}, who chairs the club, offered {coach} a new contract, which runs until "
            "{until:d}.",
            "The new contract of {coach}, signed [at noon|in front of the fans], runs until "
            "{until:d}.",
        )
        summary = (
            "After {total} games without a defeat, {club} have [kept|secured] their coach {coach} "
            "until {until:d}.",
            "{coach} will stay with {club} until {until:d} after a run of {total} games without "
            "defeat.",
        )
        future = "{a}, who plays in goal, called it the best news of the year."
    else:
        games = "{since}, the team has lost {others} games and drawn {draws}."
        decision = (
            "{chair}, who chairs the club, handed {coach} a letter and took back the keys.",
            "{chair}, who chairs the club, spoke of a hard decision and shook hands with {coach}.",
        )
        summary = (
            "{club} have [parted with|dismissed] their coach {coach} after {total} games without "
            "a win.",
            "{next} will take over from {coach} at {club}, who have not won for {total} games.",
        )
        future = "{next} will lead the training from {day}."
    parts = {
        "open": (
            "There was a long meeting [at|of] {club} about {coach} on {day}.",
            "{club} have [made up their minds about|decided what to do with] {coach}.",
            "The lights in the office of {club} burned [late|all night].",
            "{crowd} fans sang the name of {coach} at the last home game of {club}.",
            "It is not long since {coach} came to {club}.",
        ),
        "games": games,
        "decision": decision,
        "future": future,
    }
    return Story(
        "sport/football",
        facts,
        parts,
        orders=("open games decision future", "open decision games future",
                "open decision future games"),
        extras=(
            "{coach}, who is {age}, used to play for the club.",
            "The club was founded by the workers of a mill.",
            "A new stand will be opened in the summer.",
            "The players trained as usual in the afternoon.",
        ),
        summary=summary,
        derived={"total": "draws + others"},
    )  # fmt: skip
