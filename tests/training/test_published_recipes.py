"""The published recipes (`configs/recipes`): what each says about itself, and its digits command for three steps."""

import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from task_runs import one_thread
from torch import Tensor

from launching import metrics
from recipe_pages import ABOUT, IMAGES, RECIPES, about, page, page_of
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.models.build import build_model
from scalevit.models.dropout import RowDropPath
from scalevit.training.run import prepare

STEPS = 3
SHORT = [
    f"train.max_steps={STEPS}",
    "train.log_every_steps=1",
    "schedule.warmup_epochs=0",
    "data.workers=0",
    "train.checkpoint.every_epochs=50",
    "evaluation.batch=360",
]


# --- what they say ----------------------------------------------------------------------------------------


def test_the_page_says_what_the_configs_say() -> None:
    assert page_of(page.read_text()) == page.read_text(), "run: python tests/support/recipe_pages.py"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_its_source_cost_and_accuracy(name: str) -> None:
    notes, config = about(name), load_config(f"recipes/{name}")
    assert set(notes) == set(ABOUT)
    assert config.name == name
    assert re.search(r"arXiv:\d{4}\.\d{5}", notes["source"])
    assert notes["top1"].endswith("not run by us")
    assert f"--config recipes/{name}" in notes["command"]
    hours, epochs, rate = re.match(
        rf"estimate, not measured: ([\d.]+) hours for (\d+) epochs at ([\d,]+) images/s on 8 H100 "
        rf"\(`scalevit plan --config recipes/{name} --gpus 8 --device h100`",
        notes["time"],
    ).groups()  # type: ignore[union-attr]
    assert int(epochs) == config.train.epochs
    expected = config.train.epochs * IMAGES / int(rate.replace(",", "")) / 3600
    assert float(hours) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", RECIPES)
def test_the_documented_commands_are_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, settings = digits_command(name)
    main(["config", "check", recipe])
    main(["config", "check", recipe, *settings])
    assert not load_config(recipe, settings).model.pretrained  # nothing is downloaded
    capsys.readouterr()


def digits_command(name: str) -> tuple[str, list[str]]:
    """The config and the settings of the command that a recipe gives for the digits."""
    program, action, option, recipe, *settings = shlex.split(about(name)["digits"])
    assert (program, action, option) == ("scalevit", "train", "--config")
    assert settings[0] == "@recipes/digits"
    return recipe, settings


# --- three steps ------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Of a run: the state before each step and at the end, and the norm of the gradient that the optimizer got."""

    config: Config
    records: list[dict[str, Any]] = field(default_factory=list)
    optimizer: str = ""
    drop_path: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    from_file: bool = False
    evaluated: set[str] = field(default_factory=set)

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]

    def changed(self) -> set[str]:
        return {name for name, value in self.weights[0].items() if not torch.equal(value, self.weights[-1][name])}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Path]:
    """A folder with the digits, which is the current one."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run(name: str, *more: str) -> Seen:
    """Trains by a recipe's digits command, in the current folder."""
    recipe, settings = digits_command(name)
    with one_thread():
        prepared = prepare(load_config(recipe, [*settings, *SHORT, *more]))
        seen = Seen(prepared.config)
        with prepared.trainer() as trainer:
            optimizer, module = trainer.engine.optimizer, trainer.engine.module
            seen.optimizer = type(optimizer).__name__
            seen.drop_path = [each.drop_prob for each in module.modules() if isinstance(each, RowDropPath)]
            seen.from_file = trainer.initial_weights is not None

            def look(*_: Any) -> None:
                seen.weights.append(weights(module))
                seen.norms.append(gradient_norm(optimizer))

            optimizer.register_step_pre_hook(look)
            trainer.fit()
            seen.weights.append(weights(module))
    folder = Path(prepared.folder.path)
    assert folder.parts[:2] == ("runs", "digits")
    seen.records = metrics(folder)
    seen.evaluated = {key for record in metrics(folder, "evaluation") for key in record}
    return seen


def whole(tensor: Tensor) -> Tensor:
    """A copy of what a rank alone holds of a sharded tensor."""
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in module.named_parameters()}


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return math.sqrt(sum(float(whole(each.grad).square().sum()) for each in parameters if each.grad is not None))


OPTIMIZERS = {"adamw": "AdamW", "lamb": "Lamb", "momentum": "SGD"}
FIRST_LOSS = {"bce": math.log(2), "cross_entropy": math.log(10)}


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Seen]:
    """Of every recipe; deit3_base_192 comes before deit3_base_224, which starts from its weights."""
    return {name: run(name) for name in sorted(RECIPES)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, runs: dict[str, Seen]) -> None:
    seen, config = runs[name], load_config(f"recipes/{name}")
    assert len(seen.records) == STEPS
    assert all(map(math.isfinite, seen.losses))
    assert len(set(seen.losses)) == STEPS
    assert seen.optimizer == OPTIMIZERS[config.optimizer.name]
    # Initial logits are near zero, so that the first loss shows which one it is.
    labels = seen.records[0].get("loss_labels", seen.losses[0])
    assert labels == pytest.approx(FIRST_LOSS[config.loss.kind()], rel=0.05)
    assert ("ema_top1" in seen.evaluated) == config.ema.enabled
    # timm's first block has none, and there are two.
    branches = {"linear": 2, "constant": 4}[config.model.drop_path_mode]
    assert seen.drop_path == pytest.approx([config.model.drop_path] * (branches if config.model.drop_path else 0))
    # The recipe itself, but for what the digits need.
    for section in ("optimizer", "loss", "schedule", "ema", "reduction"):
        ours, theirs = getattr(seen.config, section), getattr(config, section)
        assert ours.model_dump(exclude={"warmup_epochs"}) == theirs.model_dump(exclude={"warmup_epochs"}), section
    assert seen.config.data.augmentation == config.data.augmentation


@pytest.mark.parametrize("name", [name for name in RECIPES if load_config(f"recipes/{name}").optimizer.frozen])
def test_a_probe_trains_the_classifier_only(name: str, runs: dict[str, Seen]) -> None:
    assert runs[name].changed() == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", [name for name in RECIPES if not load_config(f"recipes/{name}").optimizer.frozen])
def test_other_recipes_train_every_weight(name: str, runs: dict[str, Seen]) -> None:
    assert runs[name].changed() == set(runs[name].weights[0])


def test_augreg_clips_to_norm_one(runs: dict[str, Seen]) -> None:
    for name in ("augreg_base_224", "augreg_base_384"):
        raw = [record["grad_norm"] for record in runs[name].records]
        assert max(raw) > 1.0
        assert runs[name].norms == pytest.approx([min(norm, 1.0) for norm in raw], rel=1e-4)


def test_deit3_goes_on_at_a_larger_size_from_the_weights_of_its_first_step(runs: dict[str, Seen]) -> None:
    first, second = runs["deit3_base_192"], runs["deit3_base_224"]
    assert second.from_file
    assert second.weights[0]["pos_embed"].shape[1] > first.weights[-1]["pos_embed"].shape[1]
    for name in ("blocks.1.mlp.fc1.weight", "blocks.0.ls1.gamma", "head.weight"):
        assert torch.equal(second.weights[0][name], first.weights[-1][name]), name
    assert torch.all((first.weights[0]["blocks.0.ls1.gamma"] - 1e-4).abs() < 1e-9)


def test_the_distilled_recipe_has_a_teacher_and_shared_mlps(runs: dict[str, Seen]) -> None:
    seen = runs["deit_base_distilled_grouped"]
    for record in seen.records:
        assert record["loss_distillation"] > 0
        assert record["loss"] == pytest.approx(0.5 * (record["loss_labels"] + record["loss_distillation"]), rel=1e-5)
    assert "blocks.0.mlp.fc1.weight" in seen.weights[0]
    assert "blocks.1.mlp.fc1.weight" not in seen.weights[0]


def test_a_probe_keeps_the_pretrained_weights(place: Path) -> None:
    """Of a file here, which stands for a download: without a classifier, as DINO's."""
    recipe, settings = digits_command("dinov2_linear")
    of = load_config(recipe, settings)
    headless = of.model_copy(update={"model": of.model.model_copy(update={"num_classes": 1})})
    model = build_model(headless.model, of.reduction, seed=7)
    torch.save({key: value for key, value in model.state_dict().items() if "head" not in key}, place / "dino.pth")
    seen = run("dinov2_linear", "name=from_file", "model.initial_weights=dino.pth")
    assert seen.from_file
    assert torch.equal(seen.weights[-1]["blocks.1.attn.qkv.weight"], model.state_dict()["blocks.1.attn.qkv.weight"])
    assert 0.009 < float(seen.weights[0]["head.weight"].std()) < 0.011  # the upstream initial values


def test_a_recipe_is_combined_with_a_reduction(place: Path) -> None:
    seen = run("deit3_small", "name=grouped", "reduction.strategy=grouped")
    assert "blocks.1.mlp.fc1.weight" not in seen.weights[0]
    assert "blocks.0.mlp.fc1.weight" in seen.changed()
    assert all(map(math.isfinite, seen.losses))


def test_the_commands_on_the_page_are_those_of_the_configs() -> None:
    """In its prose; the table is generated."""
    commands = re.findall(r"^scalevit train --config (\S+) (.*)$", page.read_text(), re.MULTILINE)
    assert commands
    for recipe, settings in commands:
        if "NAME" not in recipe:
            load_config(recipe, shlex.split(settings))


def test_recipes_are_written_as_json_with_a_schema() -> None:
    for name in (*RECIPES, "digits"):
        path = Path(__file__).parents[2] / "configs" / "recipes" / f"{name}.json"
        content = json.loads(path.read_text())
        assert (path.parent / content["$schema"]).resolve() == path.parents[1] / "schema.json"
