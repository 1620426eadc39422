"""`launch/train.py` as on GPUs with little memory: arguments are the free bytes of a rank, how many images of a
micro-batch really fit, and the config.

Every rank says that it has so many bytes. Rank 0 has less than that, and finds out in the evaluation of a trial step.
"""

import os
import sys

import torch

from scalevit.cli.main import main
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.training.engine_builder import EngineBuilder


def limit_memory(free_bytes: int, fitting: int) -> None:
    build = EngineBuilder.__call__

    def run_out() -> None:
        raise torch.OutOfMemoryError("as a GPU would say")

    def build_limited(self: EngineBuilder, *, micro_batch: int, accumulation: int) -> Engine:
        engine = build(self, micro_batch=micro_batch, accumulation=accumulation)
        if micro_batch > fitting and os.environ["RANK"] == "0":
            vars(engine)["eval"] = run_out
        return engine

    World.free_memory_bytes = lambda self: free_bytes  # type: ignore[method-assign]
    EngineBuilder.__call__ = build_limited  # type: ignore[method-assign]


if __name__ == "__main__":
    limit_memory(int(sys.argv[1]), int(sys.argv[2]))
    main(["train", *sys.argv[3:]])
