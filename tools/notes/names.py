"""Invented names and everyday words for the notes; names listed for a split occur in no other.

Written for this project. `telling.py` draws from these lists; this file has no code.
"""

# Towns, surnames: those of dev and test do not occur in train, so a model must copy them.
TOWNS = {
    "train": """Aldermere Bramhollow Brockmere Calderwick Colnebridge Crandale Dunhallow Eastermouth
Fernmouth Greywater Hallowmere Hartlow Hazelmouth Kestreldale Larchfield Lindenbury Marlhaven
Merrowby Millhaven Northmarsh Oakmouth Pearmain Penmarrow Quillford Ravensmoor Rookhaven Saltwick
Sandlow Stonemarsh Thornmouth Tidebury Tollhaven Wadewater Westmarrow Whitmarsh Wrenhollow
Yarrowby Foxhaven Barleywick Harrowmere""".split(),
    "dev": """Appleworth Birchhaven Copperwick Dovemouth Elderlow Gullhaven Hollinmere Lowmarsh
Mosswater Pinehollow Silverwick Swanmouth""".split(),
    "test": """Ambermouth Brackenlow Cloverbury Cranewater Driftwick Emberley Frostdale Goosemere
Heatherlow Juniperwick Kingmarsh Larkhaven Mistlebury Otterdale Plumbridge Sparrowby""".split(),
}
SURNAMES = {
    "train": """Abbot Barlow Bartlett Bell Bramwell Brook Carver Chandler Cooper Croft Dale Draper
Fenwick Finch Fletcher Frost Garner Glover Hadley Harding Hart Hollis Hooper Horne Jarvis Keane
Lambert Larkin Marlow Mercer Merrick Moss Nash Norris Osborne Palmer Parr Pascoe Penrose Porter
Quince Ramsey Redfern Rook Rowe Sadler Sharpe Sorrel Spencer Thorne Tolliver Turner Tyler Vance
Wade Waller Warner Webb Whitlock Winter Woods Yates""".split(),
    "dev": """Archer Blythe Corbett Dawes Ellery Foster Gale Hobbs Ingram Kerr Lowell Mason Oakes
Pike Selby Tanner""".split(),
    "test": """Ashby Baxter Cole Denton Everett Flint Greer Holt Irvine Joyce Kemp Linden Mayhew
Nolan Oliver Pratt Quill Rudd Stokes Trent Usher Vale Weaver York""".split(),
}

HE = """Adam Ben Carl Daniel David Edward Frank George Harry Henry Hugh Jack James John Leo Mark
Martin Oscar Paul Peter Philip Robert Samuel Simon Stephen Thomas Victor William""".split()
SHE = """Alice Anna Beth Carol Clara Diana Ellen Emma Eva Grace Helen Jane Joan Judith Julia Karen
Kate Laura Linda Lucy Maria Martha Mary Nancy Rachel Rose Ruth Sarah Sophie Susan""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November
December""".split()
