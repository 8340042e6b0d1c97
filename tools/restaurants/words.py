"""The material of the embedded restaurant data: values, name parts, phrases and sentence frames.

Written for this project. `make.py` combines them; this file has no code.
"""

# Values. A price or a rating has a mood: +1 praises, -1 deters; "but" joins opposites.
TYPES = "restaurant|pub|coffee shop|bistro|wine bar|tea room|café|diner".split("|")
CUISINES = "Italian|Greek|Indian|Japanese|Mexican|Turkish|Thai|Lebanese|vegan".split("|")
DISHES = "seafood|pizza|pancakes|tapas".split("|")
PRICES = {
    "affordable": 1, "moderate": 0, "mid-range": 0, "high": -1,
    "less than 10 pounds": 1, "15-25 pounds": 0, "around 20 pounds": 0, "more than 30 pounds": -1,
}  # fmt: skip
RATINGS = {
    "poor": -1, "average": 0, "good": 1, "excellent": 1,
    "2 out of 5": -1, "3 out of 5": 0, "4 out of 5": 1, "5 out of 5": 1,
}  # fmt: skip
AREAS = {
    "riverside": ("on the riverside", "by the riverside", "in the riverside area"),
    "city centre": ("in the city centre",),
    "old town": ("in the old town",),
    "harbour": ("at the harbour", "by the harbour", "in the harbour area"),
    "seafront": ("on the seafront",),
    "market quarter": ("in the market quarter",),
    "university district": ("in the university district",),
    "northern suburbs": ("in the northern suburbs",),
}
NEAR = ("near", "close to", "not far from", "a short walk from", "round the corner from")
# Words before the noun, for values that have them.
PRE = {
    "affordable": ("affordable",),
    "moderate": ("moderately priced",),
    "mid-range": ("mid-range",),
    "high": ("high-priced",),
    "riverside": ("riverside",),
    "city centre": ("city centre",),
    "seafront": ("seafront",),
    "yes": ("family-friendly", "child-friendly"),
    "no": ("adults-only",),
}

# Names: (template, weight, first words, second words).
ADJECTIVES = """Copper Crooked Velvet Wandering Quiet Painted Amber Hidden Silver Merry Gilded Rusty
Scarlet Sleepy Midnight Winter Ivory Paper Wooden Brass Idle Lucky Restless Mossy Speckled
Twisted""".split()
NOUNS = """Kettle Lantern Heron Anchor Thistle Compass Spoon Otter Magpie Barrel Pear Fiddle Fox
Sparrow Chimney Teapot Ladle Piper Badger Orchard Swan Cartwheel Nightingale Acorn Goblet Rooster
Hare Weaver""".split()
SURNAMES = """Marlow Finch Hadley Bramwell Croft Penrose Tolliver Ashby Whitlock Sorrel Larkin
Draper Hollis Fenwick Rook Pascoe Merrick Thorne Wilder Quince""".split()
SPICES = """Saffron Juniper Tamarind Clove Basil Nutmeg Fennel Sesame Cardamom Ginger Thyme Sage
Rosemary Mint Paprika Anise Sumac""".split()
ROOMS = "Yard House Lane Row Corner Table Cellar Loft Terrace Garden Gate".split()
FIRST_NAMES = """Odette Bruno Matilda Rosa Gwen Hugo Dorian Clara Silas Ingrid Leopold Nadia Tobias
Wilma Felix Greta""".split()
FRENCH_NAMES = "Amélie Noémie René Théo Désirée Zoé Honoré André Léonie Cléo Aimée Timothé".split()
SPANISH_NAMES = "Alma Marisol Lucero Perla Ramona Salinas Violeta Morena Azul Ventura".split()
NAME_PATTERNS = (
    ("The {} {}", 45, ADJECTIVES, NOUNS),
    ("{} & {}", 22, SURNAMES, SURNAMES + NOUNS[:12]),
    ("{} {}", 20, SPICES, ROOMS),
    ("{}'s {}", 9, FIRST_NAMES, ("Kitchen", "Table", "Pantry", "Larder")),
    ("Chez {}", 3, FRENCH_NAMES, ("",)),
    ("Casa {}", 2, SPANISH_NAMES, ("",)),
)
LANDMARK_PATTERNS = (
    (
        "{} {}",
        1,
        """Ravensholt Tilbrook Brindlemere Wexcombe Pembering Dunmarrow Elmsworth Fairholt Larkspur
        Norwick Caxley Selwick Thornmere Merriton Oakenby Yarrowby Aldercott Quillham""".split(),
        """Park Station Bridge Square Abbey Cathedral Library Museum Theatre Castle Lock Mill Tower
        Hall Gardens Green Observatory""".split(),
    ),
)

# The phrases for each kind of fact, by grammatical role. `post` follows a noun; `with` follows
# "with"; `vps` have the place as their subject; `clauses` are complete ({there} is empty after
# "At <name>, ..."); `want` is the object of a guest's wish; `front` opens a sentence; `where` is a
# bare adverbial; `lead` surrounds the name, whose place is the "|".
PHRASES = {
    "food": {
        "post": ("serving {food}", "offering {food}", "with {food} on the menu",
                 "that serves {food}", "where you can eat {food}"),
        "vps": ("serves {food}", "offers {food}", "has {food} on the menu", "provides {food}"),
        "clauses": ("you can eat {food}{there}", "guests can order {food}{there}",
                    "the menu offers {food}", "the kitchen serves {food}"),
        "want": ("{food}",),
        "lead": ("you can eat {food} at|", "guests can order {food} at|"),
    },
    "price word": {
        "with": ("{price} prices",),
        "post": ("where prices are {price}",),
        "vps": ("has {price} prices", "charges {price} prices", "is {priced}"),
        "clauses": ("the prices{there} are {price}", "prices are {price}",
                    "you can expect {price} prices{there}"),
        "lead": ("prices at|are {price}", "prices are {price} at|"),
    },
    "price amount": {
        "with": ("prices of {price}", "meals for {price}"),
        "post": ("where a meal costs {price}", "charging {price} for a meal"),
        "vps": ("charges {price} for a meal", "has meals for {price}", "is priced at {price}"),
        "clauses": ("a meal{there} costs {price}", "you can expect to pay {price}{there}",
                    "you pay {price} for a meal{there}", "meals{there} cost {price}"),
        "lead": ("a meal at|costs {price}", "meals at|cost {price}",
                 "you can expect to pay {price} at|"),
    },
    "meal word": {
        "post": ("serving {food} at {price} prices", "offering {priced} {food}"),
        "vps": ("serves {food} at {price} prices", "serves {priced} {food}",
                "offers {priced} {food}"),
        "clauses": ("the menu offers {priced} {food}", "you can eat {priced} {food}{there}"),
        "want": ("{food} at {price} prices", "{priced} {food}"),
        "lead": ("you can eat {priced} {food} at|",),
    },
    "meal amount": {
        "post": ("serving {food} for {price}", "offering {food} for {price}"),
        "vps": ("serves {food} for {price}", "offers {food} for {price}"),
        "clauses": ("you can eat {food}{there} for {price}",),
        "want": ("{food} for {price}",),
        "lead": ("you can eat {food} for {price} at|",),
    },
    "rating word": {
        "with": ("a {rating} customer rating", "{rating} customer reviews"),
        "post": ("rated as {rating} by customers", "that customers rate as {rating}"),
        "vps": ("has a {rating} customer rating", "is rated {rating} by customers",
                "gets {rating} customer reviews", "receives {rating} ratings from customers"),
        "clauses": ("customers rate it as {rating}", "customers consider it {rating}",
                    "customer reviews are {rating}", "the customer rating is {rating}"),
        "front": ("rated {rating} by customers", "with a {rating} customer rating"),
        "lead": ("customers rate|as {rating}", "customers give|a {rating} rating"),
    },
    "rating score": {
        "with": ("a customer rating of {rating}", "a {rating} customer rating"),
        "post": ("rated {rating} by customers", "that customers rate {rating}"),
        "vps": ("has a customer rating of {rating}", "is rated {rating} by customers",
                "scores {rating} with customers", "gets {rating} from its customers"),
        "clauses": ("customers give it {rating}", "customers rate it {rating}",
                    "the customer rating is {rating}", "its customers have rated it {rating}"),
        "front": ("rated {rating} by customers", "with a customer rating of {rating}"),
        "lead": ("customers give|{rating}", "customers rate|{rating}"),
    },
    "yes": {
        "post": ("where children are welcome", "where families are welcome",
                 "that is suitable for families", "that welcomes families",
                 "that welcomes children"),
        "vps": ("is family-friendly", "is child-friendly", "is suitable for families",
                "welcomes families", "welcomes children"),
        "clauses": ("children are welcome{there}", "families are welcome{there}",
                    "you can bring the children{there}"),
        "front": ("suitable for families",),
        "lead": ("children are welcome at|", "families are welcome at|"),
    },
    "no": {
        "post": ("that caters for adults only", "where children are not welcome",
                 "that is not family-friendly", "that is not suitable for families"),
        "vps": ("is not family-friendly", "is not suitable for families", "is for adults only",
                "caters for adults only", "does not welcome children"),
        "clauses": ("children are not welcome{there}", "only adults are welcome{there}"),
        "front": ("not suitable for families",),
        "lead": ("children are not welcome at|", "only adults are welcome at|"),
    },
    "place": {
        "post": ("{place}",),
        "vps": ("is {place}", "is located {place}", "stands {place}", "can be found {place}"),
        "clauses": ("it is {place}", "you will find it {place}", "you can find it {place}"),
        "front": ("located {place}", "situated {place}"),
        "where": ("{place}",),
        "lead": ("you will find|{place}", "you can find|{place}"),
    },
}  # fmt: skip

# Sentences. {np} is a noun with modifiers, {called} the same around "<type> called <name>",
# {scene} clauses that need no pronoun, {before} and {after} the two halves of a `lead`.
OPENERS = (
    "{name} is a {np}.",
    "{name} is a {np}, and it {vps}.",
    "{name}, a {np}, {vps}.",
    "{name}, which {vps}, is a {np}.",
    "{name} {vps}.",
    "{name} {vps}, and {clauses}.",
    "The {noun} {name} {vps}.",
    "A {np}, {name} {vps}.",
    "A {called} {vps}.",
    "There is a {called}.",
    "{where} there is a {called}.",
    "You will find a {called} {where}.",
    "{where}, {name} {vps}.",
    "{front}, {name} is a {np}.",
    "{front}, {name} {vps}.",
    "{before} {name} {after}.",
    "{before} {name}, a {np}, {after}.",
    "At {name}, a {np}, {scene}.",
    "At {name}, {scene}.",
)
INVITATIONS = (  # openers that recommend: not for a table with a poor rating or high prices
    "If you are looking for a {np}, try {name}.",
    "If you want {want}, try {name}, a {np}.",
    "Looking for a {np}? Try {name}.",
    "Try {name} if you are looking for a {np}.",
    "Why not try {name}, a {np}?",
    "Fancy {want}? Try {name}, a {np}.",
    "Anyone who wants {want} can go to {name}, a {np}.",
    "For {want} {where}, try {name}, a {np}.",
    "One option for {want} is {name}, a {np}.",
    "An option for {want} {where} is {name}, a {np}.",
)
FOLLOW_UPS = (
    "It {vps}.",
    "The {noun} {vps}.",
    "This {noun} {vps}.",
    "{clauses}.",
    "{clauses}.",
    "It {vps}, and {clauses}.",
    "{front}, it {vps}.",
    "{front}, the {noun} {vps}.",
)
LATE_TYPE = "It is a {np}."  # a follow-up, where the opener has not named the type
OTHER_NOUNS = ("place", "venue", "spot", "eatery")  # for a table without a type
