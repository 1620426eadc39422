"""Figures of an analysis, as PNG files. Needs matplotlib, which is imported when they are drawn."""

from pathlib import Path
from typing import TYPE_CHECKING

from scalevit.analysis.report import Analysis
from scalevit.errors import UserError, require
from scalevit.files import writing_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_figures() -> None:
    """To be called before minutes of measuring.

    Raises:
        UserError: matplotlib is missing.
    """
    require("matplotlib", extra="plots")


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes sharing.png, hidden_units.png and, where attention was measured, attention_distance.png and
    attention_maps.png.

    Raises:
        UserError: matplotlib is missing, or the folder cannot be written.
    """
    check_figures()
    figures = {"sharing": _sharing(analysis), "hidden_units": _hidden_units(analysis)}
    if analysis.attention is not None:
        figures |= {"attention_distance": _distances(analysis), "attention_maps": _maps(analysis)}
    paths = []
    try:
        for name, figure in figures.items():
            paths.append(folder / f"{name}.png")
            with writing_whole(paths[-1]) as temporary:
                figure.savefig(temporary, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return paths


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _sharing(analysis: Analysis) -> "Figure":
    figure = _figure(8, 6)
    above, below = figure.subplots(2, 1)
    rows = analysis.pair_rows()
    shared = {row["blocks"][0] + 0.5: row["divergence"] for row in rows if row["divergence"] is not None}
    halved = {row["block"]: row["divergence"] for row in analysis.block_rows() if row["divergence"] is not None}
    above.bar(list(shared), list(shared.values()), width=0.4, label="shared with the next block")
    above.bar(list(halved), list(halved.values()), width=0.4, label="narrowed to half")
    above.set_ylabel("KL divergence of the\noutputs (nats)")
    above.legend()
    for key, label in (
        ("cosine_matched", "weights: cosine, units matched"),
        ("output_cka", "outputs: linear CKA"),
        ("output_relative_error", "outputs: relative error"),
    ):
        found = {row["blocks"][0] + 0.5: row[key] for row in rows if row[key] is not None}
        below.plot(list(found), list(found.values()), marker="o", label=label)
    below.set_ylabel("a block and the next one")
    below.set_ylim(bottom=0)
    below.legend()
    for axes in (above, below):
        axes.set_xlabel("block")
        axes.set_xticks(range(len(analysis.hidden_units)))
    return figure


def _hidden_units(analysis: Analysis) -> "Figure":
    figure = _figure(8, 3.5)
    left, right = figure.subplots(1, 2)
    rows = analysis.block_rows()
    left.bar([row["block"] for row in rows], [row["effective_rank_hidden"] for row in rows])
    left.set_xlabel("block")
    left.set_ylabel("effective rank of the hidden units")
    for units in (units for own in analysis.hidden_units for units in own):
        total = units.importance.sum().clamp_min(1e-30)
        shares = [(number + 1) / units.hidden for number in range(units.hidden)]
        right.plot(shares, (units.importance.cumsum(0) / total).tolist(), label=f"block {units.block}")
    right.set_xlabel("share of the hidden units")
    right.set_ylabel("share of their importance")
    right.legend(fontsize="small", ncols=2)
    return figure


def _distances(analysis: Analysis) -> "Figure":
    figure = _figure(6, 3.5)
    axes = figure.subplots()
    for attention in analysis.attention or ():
        axes.scatter([attention.block] * len(attention.distances), attention.distances.tolist(), color="tab:blue")
    axes.margins(y=0.1)
    axes.set_xlabel("block")
    axes.set_ylabel("mean attention distance of a head (pixels)")
    axes.set_ylim(bottom=0)
    return figure


def _maps(analysis: Analysis) -> "Figure":
    """A row of maps for each image."""
    blocks = analysis.attention or []
    images = len(blocks[0].maps)
    figure = _figure(1.2 * len(blocks) + 0.5, 1.3 * images + 0.5)
    for column, attention in enumerate(blocks):
        for row, values in enumerate(attention.maps):
            axes = figure.add_subplot(images, len(blocks), row * len(blocks) + column + 1)
            axes.imshow(values.tolist())
            axes.set_axis_off()
            if row == 0:
                axes.set_title(f"block {attention.block}", fontsize="small")
    return figure
