"""The command `info`: counts parameters; with --gpu, shows how attention is computed."""

from pathlib import Path

from kernels.assembler import report
from minprefix.cli.commands import InfoOptions
from minprefix.cli.report import format_rows, parameter_rows
from minprefix.cli.trained import load_model, load_trained
from minprefix.methods.counts import method_rows
from minprefix.models import weights
from minprefix.models.config import OFFICIAL


def run(options: InfoOptions) -> dict | None:
    if options.gpu:
        rows = report()
        if options.json:
            return rows
        print("\n".join(f"{name + ':':10} {text}" for name, text in rows.items()))
        return None
    if options.model in OFFICIAL and not (
        options.prefix or options.adapter or Path(options.model).is_dir()
    ):
        model = weights.shapes_of(OFFICIAL[options.model][0])  # no need to download the weights
    else:
        model, _ = load_model(options)
    rows = parameter_rows(model, load_trained(options, model))
    methods = method_rows(model.config)
    if options.json:
        return {"parameters": rows, "methods": methods}
    print(format_rows(rows), format_rows(methods), sep="\n\n")
    return None
