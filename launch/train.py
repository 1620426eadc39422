"""Trains one run: config, data, model, engine, loop. What a person or a cluster starts:

deepspeed launch/train.py --config configs/grouped.json [key.sub=value ...]
torchrun --nproc-per-node 8 launch/train.py --config configs/fsdp.json
python launch/train.py --config configs/quickstart.json
"""

from scalevit.cli.launching import launch
from scalevit.config.tree import Config


def train(config: Config) -> None:
    # Imported late: a mistake in the config is told at once, before torch and timm take their seconds.
    from scalevit.distributed import World
    from scalevit.models.costs import statistics_of
    from scalevit.runs.folder import RunFolder
    from scalevit.runs.summary import print_summary
    from scalevit.training.run import check_engine, open_data, prepare_engine, resolve_normalisation
    from scalevit.training.trainer import Trainer, find_resumable

    world = World.from_environment()
    config = resolve_normalisation(config)
    run = RunFolder(config, writes=world.is_first)
    # Mistakes first, the cheapest to find before the others: the model's shapes, the run folder, the data.
    check_engine(config, world)
    costs = statistics_of(config.model, config.reduction)
    checkpoints = find_resumable(config, run)
    data = open_data(config, world)
    shard = prepare_engine(config, world)
    with world.process_group(loaders=config.data.workers, offloads=config.engine.offloads):
        summary = Trainer(config, world, shard(), data, run, costs).fit(resume_from=checkpoints)
    if world.is_first:
        print_summary(summary, run.path)


if __name__ == "__main__":
    launch(train, __doc__)
