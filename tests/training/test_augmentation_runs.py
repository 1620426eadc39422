"""Runs with timm's ways of mixing, erasing and repeating: the same for any micro-batch and after a resume."""

import json
from pathlib import Path

import numpy as np
import pytest
from task_runs import ALONE, config, evaluate, train

from launching import losses
from scalevit.config.loading import load_config
from scalevit.errors import UserError
from scalevit.training.open_data import open_data
from scalevit.training.run import prepare

ORDER = ["train.global_batch=16", "data.augmentation.repeat_order=timm", "data.augmentation.repeat_processes=2"]
ORDER += ["data.augmentation.aug_repeats=3", "data.augmentation.mixing_group=4"]
TIMMS = [
    *ORDER,
    *("data.augmentation.mixup=0.8", "data.augmentation.cutmix_minmax=[0.2,0.8]", "data.augmentation.mixup_mode=elem"),
    *("data.augmentation.erase=after_mixing", "data.augmentation.random_erasing=0.5"),
    *("data.augmentation.random_erasing_count=3", "data.augmentation.crop_mode=rkrr"),
    *("data.augmentation.vflip=0.5", "data.augmentation.gaussian_blur_prob=0.2", "data.crop_mode=squash"),
]
VIEWS = [
    *("data.augmentation.splits=3", "data.augmentation.auto_augment=rand-m9", "data.augmentation.random_erasing=0.5"),
    *("data.augmentation.random_erasing_clean_split=true", "data.augmentation.mixup=0", "data.transforms=fast"),
    "model.drop_path=0.3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are, and the digits."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("timm", TIMMS), ("views", VIEWS), ("jsd", [*VIEWS, "loss.name=jsd"])],
    ids=["timm", "views", "jsd"],
)
def test_neither_micro_batches_nor_a_resume_change_a_run(name, settings):
    whole = losses(train(f"{name}-whole", *settings, "train.micro_batch=16", steps=4))
    train(f"{name}-parts", *settings, "train.micro_batch=1", "train.checkpoint.every_steps=2", steps=2)
    parts = losses(train(f"{name}-parts", *settings, "train.micro_batch=6", steps=4))
    assert len(set(whole)) == 4
    # Sums of rounded terms in other orders, of a learning rate that magnifies them; a changed row changes 1e-2.
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


def test_settings_reach_what_they_are_for():
    """1,437 digits; timm's order shows 1,280 of them in an epoch, in 80 steps."""
    data = open_data(
        config(*TIMMS, "data.augmentation.mixup_off_epoch=2", "data.augmentation.mixup_switch_prob=0.3"), ALONE
    )
    mixing = data.mixing
    assert (mixing.mode, mixing.switch, mixing.cutmix_minmax) == ("elem", 0.3, (0.2, 0.8))
    assert (mixing.until_step, mixing.unnormalised) == (160, True)
    batch = next(data.train.batches(0))
    assert len(batch.images) == 4
    views = open_data(config(*VIEWS), ALONE)
    assert len(next(views.train.batches(0)).images) == 3 * 4
    assert open_data(config(), ALONE).mixing.until_step is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.name=jsd"], r"loss\.name = jsd compares views: data\.augmentation\.splits = 0 must be at least 2"),
        (["data.augmentation.splits=1"], r"splits = 1: must be 0 \(no views\) or at least 2"),
        (["data.augmentation.splits=2"], r"splits = 2: views are not mixed; set mixup=0, cutmix=0"),
        (["data.augmentation.cutmix_minmax=[0.5,0.5]"], r"cutmix_minmax = \[0\.5, 0\.5\]: the first must be less"),
        (
            ["data.augmentation.cutmix_minmax=[0.5,0.51]"],
            r"augmentation\.cutmix_minmax = \[0\.5, 0\.51\]: is less",
        ),
        (["data.interpolation=box", "data.transforms=fast"], r'data\.interpolation = "box": fast transforms resize by'),
        ([*ORDER, "train.global_batch=12"], r"repeat_processes = 2: the global batch of 12 must be a multiple of 8"),
        (["evaluation.real_labels=none.json"], r'evaluation\.real_labels = "none\.json": cannot be read'),
        (["data.class_map=none.json"], r'config: data\.class_map = "none\.json": cannot be read'),
        (["data.class_names=none.txt"], r'config: data\.class_names = "none\.txt": cannot be read'),
    ],
    ids=[
        "jsd",
        "one view",
        "mixed views",
        "minmax",
        "minmax of pixels",
        "filter",
        "processes",
        "real labels",
        "class map",
        "class names",
    ],
)
def test_what_does_not_fit_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        prepare(load_config("quickstart", ["data.augmentation.mixup=0.8", *settings]))


def test_digits_by_another_number_and_with_several_right_labels():
    """A class map of both sets, and reassessed labels by key; classes that are one are learned as one."""
    Path("map.json").write_text(json.dumps({str(digit): digit % 2 for digit in range(10)}))
    mapped = ["data.class_map=map.json", "model.num_classes=2"]
    run = train("mapped", *mapped, steps=1)
    index = open_data(config(*mapped), ALONE).evaluation.dataset.index
    assert set(index.label.tolist()) == {0, 1}
    keys = {index.key(sample): [0, 1] for sample in range(0, 100)}
    Path("real.json").write_text(json.dumps(keys))
    weights = f"model.initial_weights={run}/final.safetensors"
    metrics = evaluate(config(*mapped, weights, "evaluation.real_labels=real.json"))
    assert metrics["real_top1"] == 100, "both classes are right"
    assert metrics["top1"] < 100
