import shutil
from pathlib import Path

import pytest

from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.data.loading.train_loader import TrainLoader
from scalevit.data.order.shuffle import Order
from scalevit.data.shards.index import load_index
from scalevit.errors import UserError


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_is_one_line_from_either_loader(damaged, tmp_path, workers):
    shutil.copytree(Path(damaged[0].index.shards[0].path).parent, tmp_path / "set")
    index = load_index(tmp_path / "set")
    (tmp_path / "set" / "shard-000001.tar").unlink()
    train, evaluation = (ShardDataset(index, dataset.transform) for dataset in damaged)
    batches = TrainLoader(train, Order(20, 0), global_batch=2, micro_batch=2, workers=workers).batches(0)
    for loader in (batches, EvaluationLoader(evaluation, batch=2, workers=workers)):
        with pytest.raises(UserError, match=r"shard .*shard-000001.tar: cannot be read") as caught:
            list(loader)
        assert "\n" not in str(caught.value)
        # No cycle of the error and the frame that holds the workers: see `base.iterate_batches`.
        assert caught.value not in caught.traceback[-1].frame.f_locals.values()
