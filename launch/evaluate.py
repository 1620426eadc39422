"""Evaluates weights on the validation shards of a config, every image once:

    torchrun --nproc-per-node 8 launch/evaluate.py --config configs/grouped.json \
        model.initial_weights=runs/vit_base_grouped/best_ema.safetensors
"""

import json

from scalevit.cli.launching import launch
from scalevit.config.tree import Config
from scalevit.errors import UserError


def evaluate_weights(config: Config) -> None:
    if config.model.initial_weights is None:
        raise UserError("model.initial_weights = null: name the weights to evaluate")
    from scalevit.distributed import World
    from scalevit.training.evaluation import evaluate
    from scalevit.training.run import check_engine, open_evaluation, prepare_engine, resolve_normalisation

    world = World.from_environment()
    config = resolve_normalisation(config)
    check_engine(config, world)
    loader = open_evaluation(config, world)
    shard = prepare_engine(config, world)
    with world.process_group(loaders=config.data.workers, offloads=config.engine.offloads):
        accuracy = evaluate(shard(), loader, channels_last=config.train.channels_last)
    if world.is_first:
        print(json.dumps({"weights": config.model.initial_weights, **vars(accuracy)}))


if __name__ == "__main__":
    launch(evaluate_weights, __doc__)
