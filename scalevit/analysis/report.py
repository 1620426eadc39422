"""What `scalevit analyze` finds out about a trained model: every measurement together, as rows and as files.

Knows the measurements of this room. Must not know how they are printed or drawn.
"""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalevit.analysis.attention import AttentionOfBlock, measure_attention
from scalevit.analysis.hidden_units import HiddenUnits, measure_hidden_units, rank_of_weight
from scalevit.analysis.reducing import TrainedModel
from scalevit.analysis.samples import Samples
from scalevit.analysis.sensitivity import Change, Outputs, half_changes, outputs_of, pair_changes
from scalevit.analysis.similarity import (
    OutputSimilarity,
    WeightSimilarity,
    output_similarities,
    weight_similarities,
)
from scalevit.errors import UserError
from scalevit.files import write_whole
from scalevit.models.mlps import mlp_views
from scalevit.models.reductions.method import FitMethod


@dataclass(frozen=True)
class Analysis:
    """Of one model. Lists over pairs have an entry for each block but the last, of it and the next block."""

    weights: str
    images: int
    method: FitMethod
    """Of the reductions whose changes were measured."""
    outputs: Outputs
    weight_similarities: list[WeightSimilarity | None]
    output_similarities: list[OutputSimilarity | None]
    hidden_units: list[list[HiddenUnits]]
    weight_ranks: list[list[tuple[float, float]]]
    """By block and MLP: effective ranks of the first layers and of fc2."""
    pairs: list[Change | None]
    """If the block shares an MLP with the next one."""
    halves: list[Change | None]
    """If the block's MLP is narrowed to half."""
    attention: list[AttentionOfBlock] | None

    def pair_rows(self) -> list[dict[str, Any]]:
        """One for each pair of neighbouring blocks; None for what does not exist."""
        return [
            {
                "blocks": [block, block + 1],
                "cosine_as_listed": None if weights is None else weights.as_listed,
                "cosine_matched": None if weights is None else weights.matched,
                "output_cka": None if outputs is None else outputs.cka,
                "output_relative_error": None if outputs is None else outputs.relative_error,
                **_change(change),
            }
            for block, (weights, outputs, change) in enumerate(
                zip(self.weight_similarities, self.output_similarities, self.pairs, strict=True)
            )
        ]

    def block_rows(self) -> list[dict[str, Any]]:
        """One for each MLP of each block."""
        distances = {attention.block: attention.distances for attention in self.attention or ()}
        return [
            {
                "block": units.block,
                "hidden": units.hidden,
                "effective_rank_fc1": ranks[0],
                "effective_rank_fc2": ranks[1],
                "effective_rank_hidden": units.effective_rank,
                "units_for_90_percent": units.share_for(0.9),
                **_change(change),
                "attention_distance": float(distances[units.block].mean()) if units.block in distances else None,
            }
            for own, own_ranks, change in zip(self.hidden_units, self.weight_ranks, self.halves, strict=True)
            for units, ranks in zip(own, own_ranks, strict=True)
        ]

    def sharing_order(self) -> list[dict[str, Any]]:
        """The pairs that can share, the one that changes the outputs least first."""
        return sorted(
            (row for row in self.pair_rows() if row["divergence"] is not None), key=lambda row: row["divergence"]
        )

    def as_json(self) -> dict[str, Any]:
        """Everything but the maps."""
        return {
            "weights": self.weights,
            "images": self.images,
            "method": vars(self.method),
            "loss": self.outputs.loss,
            "top1": self.outputs.top1,
            "pairs": self.pair_rows(),
            "blocks": self.block_rows(),
            "importance": [[units.importance.tolist() for units in own] for own in self.hidden_units],
            "attention_distances": None
            if self.attention is None
            else [attention.distances.tolist() for attention in self.attention],
        }


def _change(change: Change | None) -> dict[str, Any]:
    values = (None, None, None) if change is None else change
    return dict(zip(("loss_change", "top1_change", "divergence"), values, strict=True))


def analyse(
    trained: TrainedModel,
    method: FitMethod,
    calibration: Samples,
    samples: Samples,
    *,
    report: Callable[[str], None] = lambda text: None,
) -> Analysis:
    """Measures a trained model.

    Args:
        method: of the reductions whose changes are measured.
        calibration: training images, for these reductions.
        samples: validation images, for everything that is measured.
        report: called with what is done at present.
    """
    network, images = trained.network, samples.image_batches
    views = mlp_views(network)
    report("comparing weights")
    cosines = weight_similarities(network)
    ranks = [
        [
            (rank_of_weight(view.unit_vectors()[:, : -view.output.out_features]), rank_of_weight(view.output.weight))
            for view in own
        ]
        for own in views
    ]
    report("comparing outputs")
    alike = output_similarities(network, images)
    report("hidden units")
    units = measure_hidden_units(network, images)
    report("attention")
    attention = measure_attention(network, images)
    changes = [
        measure(
            network,
            method,
            calibration.image_batches,
            samples,
            on_block=lambda block, what=what: report(f"block {block}, {what}"),  # type: ignore[misc]
        )
        for measure, what in ((pair_changes, "shared with the next"), (half_changes, "narrowed to half"))
    ]
    outputs = outputs_of(network, samples)
    return Analysis(
        str(trained.path),
        len(samples),
        method,
        outputs,
        cosines,
        alike,
        units,
        ranks,
        changes[0],
        changes[1],
        attention,
    )


def write_analysis(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes analysis.json, pairs.csv and blocks.csv.

    Raises:
        UserError: the folder cannot be written.
    """
    files = {"analysis.json": json.dumps(analysis.as_json(), indent=1) + "\n"}
    files |= {"pairs.csv": _csv(analysis.pair_rows()), "blocks.csv": _csv(analysis.block_rows())}
    try:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            write_whole(folder / name, text.encode())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return [folder / name for name in files]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
