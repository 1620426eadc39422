"""`scalevit evaluate`: evaluates weights on the validation shards of a config, every image once."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scalevit.cli.local_ranks import add_ranks, start_ranks
from scalevit.cli.parsing import add_config, add_weight_set
from scalevit.config.loading import LAYER, load_config
from scalevit.errors import UserError
from scalevit.export.source import Source, WeightSet, find_source

if TYPE_CHECKING:
    from scalevit.training.evaluation import CheckedMetrics

_PRINTED_FAULTS = 5
EXAMPLES = """\
  scalevit evaluate runs/quickstart    # the best weights of a run, with its config
  scalevit evaluate runs/quickstart/final.safetensors evaluation.batch=64
  scalevit evaluate runs/quickstart/checkpoints/step-00000100 --weights weights
  scalevit evaluate photos.onnx data.validation=data/photos/validation    # an export, in one process
  scalevit evaluate --config grouped model.initial_weights=best_ema.safetensors --ranks all

under a launcher:
  torchrun --nproc-per-node 8 -m scalevit evaluate runs/vit_base_grouped"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, required=False)
    add_weight_set(parser)
    add_ranks(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, and prints one line of JSON on rank 0; bad samples are named on standard error too. Returns the
    exit status.

    Raises:
        UserError: a mistake in the config, the data or the weights.
    """
    given = arguments.overrides
    # The path of a run may contain "=" too.
    is_setting = bool(given) and ("=" in given[0] or given[0].startswith(LAYER))
    has_target = bool(given) and (not is_setting or Path(given[0]).exists())
    target, overrides = (given[0], given[1:]) if has_target else (None, given)
    source = _source(arguments.config, target, overrides, arguments.weights)
    if arguments.ranks is not None and source.exporter is None:
        options = [] if arguments.config is None else ["--config", arguments.config]
        options += [] if arguments.weights is None else ["--weights", arguments.weights]
        return start_ranks(arguments.ranks, "evaluate", [*options, *given])
    if arguments.ranks is not None:
        raise UserError(f"--ranks: an export is evaluated in one process, and {source.path} is one")
    is_first, result = _evaluate(source)
    if is_first:
        for fault in result.faults[:_PRINTED_FAULTS]:
            print(f"warning: bad sample: {fault}", file=sys.stderr)
        if more := len(result.faults[_PRINTED_FAULTS:]):
            print(f"warning: ... and {more} more; `scalevit shards verify` lists all", file=sys.stderr)
        print(json.dumps({"weights": str(source), **result.metrics, "data_faults": len(result.faults)}))
    return 0


def _evaluate(source: Source) -> tuple[bool, "CheckedMetrics"]:
    """Whether this is rank 0, and what was measured."""
    # Imported late: a mistake in the config is reported before torch and timm are loaded, which takes seconds.
    if source.exporter is not None:
        from scalevit.export.classifier import open_classifier
        from scalevit.export.measure import measure_classifier

        return True, measure_classifier(open_classifier(source), source.config)
    from scalevit.training.run import prepare_evaluation

    if source.part is not None:
        from scalevit.export.trained_model import read_model

        model, description = read_model(source)
        prepared = prepare_evaluation(source.config, model, classes=description.classes)
    else:
        prepared = prepare_evaluation(source.config)
    return prepared.world.is_first, prepared.evaluate()


def _source(config: str | None, target: str | None, overrides: list[str], weights: WeightSet | None) -> Source:
    """The weights to evaluate.

    Args:
        config: as given by `--config`.
        target: a run folder, a checkpoint, a weights file or an export.
        weights: as given by `--weights`.

    Raises:
        UserError: nothing says what to evaluate, or with which config.
    """
    if target is not None:
        return find_source(target, config=config, overrides=overrides, weights=weights)
    if config is None:
        raise UserError("name a run folder or a weights file, or give --config and model.initial_weights=FILE")
    found = load_config(config, overrides)
    if found.model.weights_source is None:
        raise UserError("config: model.initial_weights = null: name the weights to evaluate")
    if weights is not None:
        raise UserError("--weights applies to runs and checkpoints, and model.initial_weights is a file")
    return Source(Path(found.model.weights_source), found)
