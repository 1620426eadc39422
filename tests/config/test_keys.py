"""The key that was meant: moved, flattened, misspelt, or another trainer's name."""

import pytest

from launching import QUICKSTART
from scalevit.config import keys
from scalevit.config.keys import all_keys, find_key, is_free_form
from scalevit.config.loading import load_config
from scalevit.errors import UserError


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr=0.1", "unknown key lr = 0.1; nearest: optimizer.lr"),
        ("optimizer.learning_rate=0.1", "unknown key optimizer.learning_rate = 0.1; nearest: optimizer.lr"),
        ("train.lr=1", "nearest: optimizer.lr"),
        ("epochs=3", "nearest: train.epochs"),
        ("batch_size=64", "nearest: train.global_batch"),
        ("mixup=0.2", "nearest: data.augmentation.mixup"),
        ("data.mixup=0.2", "nearest: data.augmentation.mixup"),
        ("augmentation.mixup=0.2", "nearest: data.augmentation"),
        ("img_size=32", "nearest: model.image_size"),
        ("wandb=true", "nearest: tracking.wandb"),
        ("engine.zero_stage=3", "nearest: engine.stage (allowed: "),
        ("optim.lr=1", "nearest: optimizer (allowed: "),
        ("train.epoch=1", "nearest: train.epochs (allowed: "),
        ("engine=fsdp", 'engine = "fsdp": must be a section; set engine.name = "fsdp"'),
        ("reduction=none", 'set reduction.strategy = "none"'),
        ("model=vit_small_patch16_224", 'set model.name = "vit_small_patch16_224"'),
        ("tracking.wandb=true", "set tracking.wandb.enabled = true"),
    ],
)
def test_a_wrong_key_names_the_right_one(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_like_nothing_has_no_hint() -> None:
    assert find_key("zzzz") is None
    with pytest.raises(UserError, match=r"unknown key zzzz = 1; allowed: name, "):
        load_config(QUICKSTART, ["zzzz=1"])


def test_other_trainers_names_lead_to_keys_that_exist() -> None:
    names = {key.name for key in all_keys()}
    assert [name for name in keys._SYNONYMS.values() if name not in names] == []
    leaves = {name.rpartition(".")[2] for name in names}
    # scale: of a crop, not of a reduction; warmup: of the schedule, not of the EMA.
    assert keys._SYNONYMS.keys() & leaves == {"scale", "warmup"}, "a key of ours comes first"


def test_objects_of_the_users_own_keys_are_replaced_whole() -> None:
    assert is_free_form("model.kwargs")
    assert not is_free_form("model")
    assert not is_free_form("seed")
    kwargs = load_config(QUICKSTART).model.kwargs
    assert load_config(QUICKSTART, ["model.kwargs={}"]).model.kwargs == {}
    assert load_config(QUICKSTART, ['model.kwargs={"depth":2}', "model.kwargs.num_heads=1"]).model.kwargs == {
        "depth": 2,
        "num_heads": 1,
    }
    assert load_config(QUICKSTART, ["model.kwargs.depth=2"]).model.kwargs == {**kwargs, "depth": 2}
    optimizer = load_config(QUICKSTART, ['optimizer={"lr":0.5}']).optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (0.5, load_config(QUICKSTART).optimizer.weight_decay)
