"""Evaluates weights on the validation shards of a config, every image once:

    torchrun --nproc-per-node 8 launch/evaluate.py --config configs/grouped.json \
        model.initial_weights=runs/vit_base_grouped/best_ema.safetensors
"""

import json

from scalevit.cli.launching import launch
from scalevit.config.tree import Config


def evaluate_weights(config: Config) -> None:
    from scalevit.training.run import prepare_evaluation

    evaluation = prepare_evaluation(config)
    metrics = evaluation.evaluate()
    if evaluation.world.is_first:
        print(json.dumps({"weights": config.model.initial_weights, **metrics}))


if __name__ == "__main__":
    launch(evaluate_weights, __doc__)
