"""The table of `scalevit describe`: a model beside its baseline."""

from collections.abc import Callable

from rich.table import Table

from scalevit.config.model import ModelConfig
from scalevit.models.costs import Statistics, statistics_of
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.none import NoReduction
from scalevit.terminal import print_table


def print_description(model: ModelConfig, reduction: Reduction) -> None:
    """Prints one column for the unreduced model and, where it differs, one for the reduced.

    Raises:
        UserError: as `build_model`.
    """
    baseline = statistics_of(model, NoReduction())
    rows = {"baseline": baseline}
    if reduction.strategy != "none":
        rows[reduction.strategy] = statistics_of(model, reduction)
    table = Table(title=f"{model.name}, {model.image_size} px, {model.num_classes} classes")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for quantity, cell in _QUANTITIES.items():
        table.add_row(quantity, *(cell(statistics, baseline) for statistics in rows.values()))
    print_table(
        table,
        'Per image, forward. The paper\'s "GFLOPs" are multiply-accumulates (MACs) without the attention products '
        "QK^T and AV; one MAC is two FLOPs.",
    )


# Row by row: what stands in a column, given its model and the baseline.
_QUANTITIES: dict[str, Callable[[Statistics, Statistics], str]] = {
    "parameters": lambda model, baseline: f"{model.parameters:,}",
    "share of baseline": lambda model, baseline: f"{100 * model.parameters / baseline.parameters:.3f} %",
    "MLP parameters": lambda model, baseline: f"{model.mlp_parameters:,}",
    "unique MLPs": lambda model, baseline: str(model.unique_mlps),
    "GMACs as in the paper": lambda model, baseline: f"{model.paper_macs / 1e9:.3f}",
    "GMACs with attention": lambda model, baseline: f"{model.macs / 1e9:.3f}",
    "GFLOPs with attention": lambda model, baseline: f"{2 * model.macs / 1e9:.3f}",
}
