"""The table of `scalevit describe`: a model beside its baseline."""

from rich.console import Console
from rich.table import Table

from scalevit.config import ModelConfig, NoReduction
from scalevit.models.reduction import ReductionConfig
from scalevit.models.statistics import Statistics, statistics_of


def print_description(model: ModelConfig, reduction: ReductionConfig) -> None:
    """Prints one row for the unreduced model and, where it differs, one for the reduced.

    Raises:
        UserError: as `build_model`.
    """
    baseline = statistics_of(model, NoReduction())
    rows = {"baseline": baseline}
    if reduction.strategy != "none":
        rows[reduction.strategy] = statistics_of(model, reduction)
    table = Table(title=f"{model.name}, {model.image_size} px, {model.num_classes} classes")
    table.add_column("")
    for heading in (
        "parameters",
        "share of\nbaseline",
        "MLP\nparameters",
        "unique\nMLPs",
        "GMACs as in\nthe paper",
        "GMACs with\nattention",
        "GFLOPs with\nattention",
    ):
        table.add_column(heading, justify="right")
    for name, statistics in rows.items():
        table.add_row(name, *_cells(statistics, baseline))
    console = Console()
    console.print(table)
    console.print(
        'Per image, forward. The paper\'s "GFLOPs" are multiply-accumulates (MACs) without the attention products '
        "QK^T and AV; one MAC is two FLOPs.",
        highlight=False,
    )


def _cells(statistics: Statistics, baseline: Statistics) -> list[str]:
    return [
        f"{statistics.parameters:,}",
        f"{100 * statistics.parameters / baseline.parameters:.3f} %",
        f"{statistics.mlp_parameters:,}",
        str(statistics.unique_mlps),
        f"{statistics.paper_macs / 1e9:.3f}",
        f"{statistics.macs / 1e9:.3f}",
        f"{2 * statistics.macs / 1e9:.3f}",
    ]
