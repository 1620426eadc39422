"""Evaluates weights on the validation shards of a config, every image once:

    torchrun --nproc-per-node 8 launch/evaluate.py --config configs/grouped.json \
        model.initial_weights=runs/vit_base_grouped/best_ema.safetensors
"""

import json

from scalevit.config import Config
from scalevit.errors import UserError
from scalevit.launching import launch


def evaluate_weights(config: Config) -> None:
    if config.model.initial_weights is None:
        raise UserError("model.initial_weights = null: name the weights to evaluate")
    from scalevit.assemble import engine_setup, open_evaluation, resolve_normalisation
    from scalevit.engines import World, build_engine, check_engine
    from scalevit.evaluate import evaluate
    from scalevit.models import build_model, fuse_mlps

    world = World.from_environment()
    config = resolve_normalisation(config)
    check_engine(config.engine, world)
    loader = open_evaluation(config, world)
    device = "meta" if config.train.meta_init else "cpu"
    model = build_model(config.model, config.reduction, seed=config.seed, device=device)
    setup = engine_setup(config, world, model)
    fuse_mlps(model, config.kernels, world.device)
    with world.process_group(loaders=config.data.workers, offloads=config.engine.offloads):
        engine = build_engine(model, setup, config.engine)
        accuracy = evaluate(engine, loader, channels_last=config.train.channels_last)
    if world.is_first:
        print(json.dumps({"weights": config.model.initial_weights, **vars(accuracy)}))


if __name__ == "__main__":
    launch(evaluate_weights, __doc__)
