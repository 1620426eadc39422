"""Trains one run: config, data, model, engine, loop. What a person or a cluster starts:

deepspeed launch/train.py --config configs/grouped.json [key.sub=value ...]
torchrun --nproc-per-node 8 launch/train.py --config configs/fsdp.json
python launch/train.py --config configs/quickstart.json
"""

from scalevit.cli.launching import launch
from scalevit.config.tree import Config


def train(config: Config) -> None:
    # Imported late: a mistake in the config is reported before torch and timm take their seconds.
    from scalevit.cli.summary_table import print_summary
    from scalevit.training.run import prepare

    run = prepare(config)
    summary = run.train()
    if run.world.is_first:
        print_summary(summary, run.folder.path)


if __name__ == "__main__":
    launch(train, __doc__)
