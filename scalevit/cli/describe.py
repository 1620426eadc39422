"""`scalevit describe`: reads its arguments, prints a model's costs beside its baseline's."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table

from scalevit.cli.parsing import add_config
from scalevit.config.loading import load_config
from scalevit.config.tree import SECTIONS
from scalevit.errors import naming_settings
from scalevit.models.reductions import NO_REDUCTION
from scalevit.terminal import print_table

if TYPE_CHECKING:
    from scalevit.models.costs import ModelCosts


EXAMPLES = """\
  scalevit describe --config grouped
  scalevit describe --config baseline reduction.strategy=shallow model.image_size=384"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints one column for the unreduced model and one for the reduced model.

    Raises:
        UserError: as `load_config` and `build_model`.
    """
    config = load_config(arguments.config, arguments.overrides)
    from scalevit.models.costs import model_costs

    model, reduction = config.model, config.reduction
    with naming_settings(SECTIONS):
        baseline = model_costs(model, NO_REDUCTION)
        columns = {"baseline": baseline}
        if reduction.changes_model:
            columns[reduction.strategy] = model_costs(model, reduction)
    table = Table(title=f"{model.name}, {model.image_size} px, {model.num_classes} classes")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for quantity, cell in _QUANTITIES.items():
        table.add_row(quantity, *(cell(costs, baseline) for costs in columns.values()))
    print_table(
        table,
        'Per image, forward. The paper\'s "GFLOPs" are multiply-accumulates (MACs) without the attention products '
        "QK^T and AV; one MAC is two FLOPs.",
    )


# By row: the text of a cell, given its model's costs and the baseline's.
_QUANTITIES: dict[str, Callable[["ModelCosts", "ModelCosts"], str]] = {
    "parameters": lambda model, baseline: f"{model.parameters:,}",
    "share of baseline": lambda model, baseline: f"{100 * model.parameters / baseline.parameters:.3f} %",
    "MLP parameters": lambda model, baseline: f"{model.mlp_parameters:,}",
    "unique MLPs": lambda model, baseline: str(model.unique_mlps),
    "GMACs as in the paper": lambda model, baseline: f"{model.paper_macs / 1e9:.3f}",
    "GMACs with attention": lambda model, baseline: f"{model.macs / 1e9:.3f}",
    "GFLOPs with attention": lambda model, baseline: f"{2 * model.macs / 1e9:.3f}",
}
