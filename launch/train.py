"""Trains one run: config, data, model, engine, loop. What a person or a cluster starts:

deepspeed launch/train.py --config configs/grouped.json [key.sub=value ...]
torchrun --nproc-per-node 8 launch/train.py --config configs/fsdp.json
python launch/train.py --config configs/quickstart.json
"""

import argparse
import os

from scalevit.config import Config
from scalevit.config_file import load_config
from scalevit.errors import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a JSON file, see configs/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file's")
    arguments = parser.parse_intermixed_args()
    with one_line_errors(rank=int(os.environ.get("RANK", "0"))):
        train(load_config(arguments.config, arguments.overrides))


def train(config: Config) -> None:
    # Imported late: a mistake in the config is told at once, before torch and timm take their seconds.
    from scalevit.assemble import engine_setup, open_data, resolve_normalisation
    from scalevit.engines import World, build_engine
    from scalevit.models import build_model, fuse_mlps
    from scalevit.models.statistics import statistics_of
    from scalevit.results import print_summary
    from scalevit.tracking import RunFolder
    from scalevit.train import Trainer, find_resumable

    world = World.from_environment()
    config = resolve_normalisation(config)
    run = RunFolder(config, writes=world.is_first)
    # Mistakes first, the cheapest to find before the others: the model's shapes, the run folder, the data.
    costs = statistics_of(config.model, config.reduction)
    checkpoint = find_resumable(config, run)
    data = open_data(config, world)
    model = build_model(config.model, config.reduction, seed=config.seed)
    setup = engine_setup(config, world, model)
    fuse_mlps(model, config.kernels, world.device)
    with world.process_group(loaders=config.data.workers):
        engine = build_engine(model, setup, config.engine)
        summary = Trainer(config, world, engine, data, run, costs).fit(resume_from=checkpoint)
    if world.is_first:
        print_summary(summary, run.path)


if __name__ == "__main__":
    main()
