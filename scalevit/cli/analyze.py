"""`scalevit analyze`: what the MLPs of trained weights have in common, and what sharing or narrowing them changes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalevit.cli.fit_arguments import add_method, method_of, trained_config, warn_of_faults
from scalevit.cli.parsing import add_overrides, integer
from scalevit.files import check_new
from scalevit.terminal import narrow_table, print_notes, print_table, progress_text

if TYPE_CHECKING:
    from scalevit.analysis.report import Analysis

EXAMPLES = """\
  scalevit analyze runs/baseline
  scalevit analyze runs/baseline --output analysis/ --validation-images 2000
  scalevit analyze runs/baseline/final.safetensors --shared first --no-refit data.validation=data/other

`scalevit reduce --choose-pairs N` takes the pairs that change the outputs least."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="RUN|FILE", help="a run folder, whose best weights are taken, or a weights file"
    )
    add_overrides(parser)
    parser.add_argument("--config", help="of the model; default: the config.json in the run folder or beside the file")
    parser.add_argument("--output", metavar="DIR", help="new folder for analysis.json, two CSV files and figures")
    parser.add_argument(
        "--figures", action=argparse.BooleanOptionalAction, default=True, help="draw figures into DIR (default: true)"
    )
    parser.add_argument(
        "--validation-images", type=integer(2), default=512, help="images that are measured (default: %(default)s)"
    )
    add_method(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints tables and writes files.

    Raises:
        UserError: a mistake in the arguments, the weights or the data, DIR has content, or matplotlib is missing.
    """
    config = trained_config(arguments.target, arguments.config, arguments.overrides)
    folder = None if arguments.output is None else Path(arguments.output)
    if folder is not None:
        check_new(folder, folder=True)
    from scalevit.analysis.figures import check_figures, draw

    draws = folder is not None and arguments.figures
    if draws:
        check_figures()
    # Imported late: a mistake in the arguments is reported before torch and timm are loaded, which takes seconds.
    from scalevit.analysis.reducing import calibration_samples, load_trained, validation_samples
    from scalevit.analysis.report import analyse, write_analysis

    with progress_text("loading the weights") as report:
        trained = load_trained(config)
        calibration = calibration_samples(trained, arguments.images)
        samples = validation_samples(trained, arguments.validation_images)
        analysis = analyse(trained, method_of(arguments), calibration, samples, report=report)
    warn_of_faults([*calibration.faults, *samples.faults])
    _print(analysis)
    if folder is not None:
        written = write_analysis(analysis, folder) + (draw(analysis, folder) if draws else [])
        print(f"wrote {', '.join(path.name for path in written)} in {folder}")


# By heading: the key of a row, and how its value is written.
_Columns = dict[str, tuple[str, Callable[[Any], str]]]
_CHANGES: _Columns = {
    "loss": ("loss_change", "{:+.4f}".format),
    "top-1": ("top1_change", "{:+.2f}".format),
    "KL": ("divergence", "{:.4f}".format),
}
_PAIRS: _Columns = {
    "blocks": ("blocks", lambda blocks: " and ".join(map(str, blocks))),
    "cosine": ("cosine_as_listed", "{:.3f}".format),
    "matched": ("cosine_matched", "{:.3f}".format),
    "CKA": ("output_cka", "{:.3f}".format),
    "error": ("output_relative_error", "{:.3f}".format),
    **_CHANGES,
}
_BLOCKS: _Columns = {
    "block": ("block", str),
    "hidden": ("hidden", str),
    "rank fc1": ("effective_rank_fc1", "{:.1f}".format),
    "rank fc2": ("effective_rank_fc2", "{:.1f}".format),
    "rank hidden": ("effective_rank_hidden", "{:.1f}".format),
    "90 % in": ("units_for_90_percent", "{:.0%}".format),
    **_CHANGES,
    "attention": ("attention_distance", "{:.1f} px".format),
}


def _print(analysis: "Analysis") -> None:
    first = f"{analysis.weights}: top-1 {analysis.outputs.top1:.2f} %, loss {analysis.outputs.loss:.4f} "
    print(first + f"on {analysis.images:,} validation images\n")
    for title, columns, rows in (
        ("A block and the next one; what changes if they share an MLP", _PAIRS, analysis.pair_rows()),
        ("Each block; what changes if its MLP keeps half of its hidden units", _BLOCKS, analysis.block_rows()),
    ):
        table = narrow_table(*columns, text=("blocks",), title=title)
        for row in rows:
            table.add_row(*("-" if row[key] is None else write(row[key]) for key, write in columns.values()))
        print_table(table, "")
    order = ", ".join(f"{row['blocks'][0]}-{row['blocks'][1]}" for row in analysis.sharing_order())
    print_notes([f"Pairs of blocks by what sharing changes in the outputs (KL), least first: {order or 'none'}."])
    print_notes(
        [
            "cosine, matched: between the weights of both MLPs, with hidden units as they are and in the best order. "
            "CKA, error: of the outputs of both MLPs on the inputs of the second. rank: effective rank, exp(entropy of "
            "the singular values). 90 % in: share of the hidden units that have 90 % of the importance.",
        ]
    )
