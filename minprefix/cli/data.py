"""The command `data`: downloads and checks official data sets (`data/download.py`).

python -m minprefix data e2e                      fill the cache; then `train --data e2e` works
python -m minprefix data webnlg --data-dir DIR    check the copies in DIR, fetch what is missing
"""

import sys

from minprefix.cli.commands import DataOptions
from minprefix.cli.report import format_rows
from minprefix.data.download import SOURCES, fetch
from minprefix.data.load import data_folder


def run(options: DataOptions) -> dict | None:
    """Print a short list, or return the full list for --json."""
    source, folder = SOURCES[options.name], options.data_dir or data_folder(options.name)
    print(f"{options.name}: {source.home}\nlicence: {source.licence}", file=sys.stderr)
    rows = fetch(options.name, folder)
    about = {"name": options.name, "folder": str(folder), "source": source.home}
    about["licence"] = source.licence
    if options.json:
        return about | {"files": rows}
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    if len({row["state"] for row in rows}) == 1 and len(rows) > 9:
        print(f"{len(rows)} files, all {rows[0]['state']}")
    else:
        print(format_rows(rows))
    return None
