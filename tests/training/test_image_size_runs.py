"""Runs at several image sizes: the same for any micro-batch, worker and resume; and what they refuse."""

import json

import numpy as np
import pytest
from task_runs import ALONE, config, evaluate, train

from launching import metrics
from scalevit.config.loading import load_config
from scalevit.errors import UserError
from scalevit.planning.estimate import largest_micro_batch
from scalevit.training.open_data import open_data
from scalevit.training.run import prepare

SIZES = ["data.augmentation.image_sizes=[8,12,24]", "seed=17"]  # of which the first steps have all three
PROGRESSIVE = [
    *("data.augmentation.image_size_probs=[1,2,2]", "data.augmentation.image_size_schedule=progressive"),
    *("data.augmentation.image_size_spread=2", "train.epochs=2", "data.augmentation.random_erasing=0.5"),
    *("data.transforms=fast", "model.drop_path=0.3", "data.augmentation.cutmix=1"),
]

TEACHER = [
    *("task.name=distillation", "task.teacher.name=vit_tiny_patch16_224", "task.teacher.pretrained=false"),
    'task.teacher.kwargs={"depth":1,"patch_size":8,"num_classes":10}',
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are, and the digits."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(("name", "settings", "workers"), [("constant", [], 0), ("progressive", PROGRESSIVE, 2)])
def test_neither_micro_batches_nor_workers_nor_a_resume_change_a_run(name, settings, workers):
    settings = [*SIZES, *settings]
    whole = metrics(train(f"{name}-whole", *settings, "train.micro_batch=12", steps=6), "train")
    train(f"{name}-parts", *settings, "train.micro_batch=1", "train.checkpoint.every_steps=3", steps=3)
    parts = train(f"{name}-parts", *settings, "train.micro_batch=6", f"data.workers={workers}", steps=6)
    sizes = [record["image_size"] for record in whole]
    assert set(sizes) == {8, 12, 24}
    assert [record["image_size"] for record in metrics(parts, "train")] == sizes
    losses = [[record["loss"] for record in each] for each in (whole, metrics(parts, "train"))]
    # Sums of rounded terms in other orders, of a learning rate that magnifies them; a changed row changes 1e-2.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_a_trained_model_is_one_of_the_usual_size():
    """It is evaluated at `model.image_size`, in the run and from its weights, which name no further argument."""
    run = train("usual", *SIZES, steps=3)
    (evaluation,) = metrics(run, "evaluation")
    found = evaluate(config(*SIZES, f"model.initial_weights={run}/final.safetensors"))
    assert found["top1"] == pytest.approx(evaluation["top1"])
    assert found["loss"] == pytest.approx(evaluation["loss"], rel=1e-5)
    assert "dynamic_img_size" not in json.loads((run / "config.json").read_text())["model"]["kwargs"]


def test_the_whole_step_has_one_size_on_all_ranks():
    """Whatever the place among ranks; and a rank's rows that only fill up have it too."""
    sizes = []
    for rank in range(5):
        world = type(ALONE)(rank=rank, size=5, local_rank=rank, ranks_per_node=5, device=ALONE.device)
        loader = open_data(config(*SIZES, "train.micro_batch=2"), world).train
        batches = loader.batches(7)
        sizes.append([next(batches).images.shape[-1] for _ in range(4 * loader.split.loads)][:: loader.split.loads])
    assert sizes == [[loader.image_size(step) for step in range(7, 11)]] * 5


def test_the_planner_counts_the_largest_size():
    fitting = {
        side: largest_micro_batch(
            config(f"data.augmentation.image_sizes=[8,{side}]", "train.micro_batch=auto", "train.global_batch=4096"),
            ranks=1,
            memory_bytes=1e8,
            optimizer_tensors=2,
        )
        for side in (8, 32)
    }
    assert 1 < fitting[32] < fitting[8] / 8, "16 times the tokens"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.augmentation.image_size_probs=[1]", *SIZES], "image_size_probs: 1 weights for 3 image_sizes; must be"),
        (["data.augmentation.image_size_probs=[0,0,0]", *SIZES], r"image_size_probs = \[0\.0, 0\.0, 0\.0\]: one must"),
        (["data.augmentation.image_size_schedule=progressive"], r"progressive: needs at least two image_sizes, not \["),
        (
            ["data.augmentation.image_sizes=[16,18]"],
            r"config: data\.augmentation\.image_sizes = \[16, 18\]: with 18, the model cannot .* divisible by patch",
        ),
        (
            [*SIZES, "model.name=beit_base_patch16_224"],
            r"config: data\.augmentation\.image_sizes = \[8, 12, 24\]: with 8, .* doesn't match model \(16\)",
        ),
        (
            [*SIZES, "data.stream_samples_per_epoch=64", "data.builtin=null", "data.train=pipe:cat a.tar"],
            r"data\.augmentation\.image_sizes = \[8, 12, 24\]: a stream has images of one size",
        ),
        ([*SIZES, "data.augmentation.gaussian_blur_prob=0.5"], r"gaussian_blur_prob = 0\.5: needs .* not 8"),
        (
            [*SIZES, "data.augmentation.cutmix_minmax=[0.3,0.35]", "data.augmentation.mixup=0.8"],
            r"cutmix_minmax = \[0\.3, 0\.35\]: is less than one of 8 pixels",
        ),
        (
            [*SIZES, *TEACHER],
            r"task\.teacher\.name = \"vit_tiny_patch16_224\": cannot take images of 3 x 8 x 8",
        ),
    ],
    ids=["weights", "no weight", "one size", "patches", "model", "stream", "blur", "minmax", "teacher"],
)
def test_what_does_not_fit_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        prepare(load_config("quickstart", ["data.workers=0", *settings]))
