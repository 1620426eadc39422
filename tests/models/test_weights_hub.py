"""Initial weights by name: folders and models of the Hugging Face form, and timm's pretrained models. No network."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import scalevit
from scalevit.config.loading import load_config
from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.meta_init import initial_values
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.weights.coverage import Coverage
from scalevit.models.weights.hub import find_weights
from scalevit.models.weights.read import read_classes
from scalevit.training.run import with_model_defaults

NAME = "vit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
MODEL = ModelConfig(name=NAME, image_size=32, num_classes=7, kwargs=ARGUMENTS)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=7, img_size=32, **ARGUMENTS)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub and of torch, on a machine without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "hub"


def cached(cache: Path, repository: str, folder: Path, revision: str = "main") -> None:
    """Puts a folder's files into the hub's cache as a download does."""
    own = cache / f"models--{repository.replace('/', '--')}"
    commit = f"{len(revision):040x}"
    (own / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    (own / "refs").mkdir(exist_ok=True)
    (own / "refs" / revision).write_text(commit)
    for path in folder.iterdir():
        (own / "snapshots" / commit / path.name).write_bytes(path.read_bytes())


def built(**changes: Any) -> tuple[dict[str, torch.Tensor], Coverage]:
    found: list[Coverage] = []
    model = MODEL.model_copy(update=changes)
    return build_model(model, NoReduction(), seed=9, on_weights=found.append).state_dict(), found[0]


def assert_of(network: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    expected = network.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


@pytest.fixture
def folder(network: torch.nn.Module, tmp_path: Path) -> Path:
    """As timm writes one for the hub."""
    names = {"label_names": list("abcdefg")}
    save_for_hf(network, str(tmp_path / "exported"), model_config=names, safe_serialization=True)
    return tmp_path / "exported"


def test_a_folder_of_the_hugging_face_form(network: torch.nn.Module, folder: Path) -> None:
    for source in (str(folder), f"local-dir:{folder}"):
        state, coverage = built(initial_weights=source)
        assert_of(network, state)
        assert str(coverage) == f"all {len(state)} tensors"
        assert read_classes(source) == tuple("abcdefg")
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    assert_of(network, built(initial_weights=str(folder))[0])


def test_a_model_of_the_hub_comes_from_its_cache(network: torch.nn.Module, folder: Path, cache: Path) -> None:
    cached(cache, "someone/model", folder)
    cached(cache, "someone/model", folder, revision="v1.0")
    for source in ("hf-hub:someone/model", "hf-hub:someone/model@v1.0"):
        state, _ = built(initial_weights=source)
        assert_of(network, state)
        assert read_classes(source) == tuple("abcdefg")
    with pytest.raises(UserError, match="not in the cache"):
        find_weights("hf-hub:someone/model@v2.0")


def test_pretrained_weights_come_from_the_cache(network: torch.nn.Module, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    save_file(network.state_dict(), tmp_path / "files" / "model.safetensors")
    tag = "augreg_in21k_ft_in1k"
    cached(cache, f"timm/{NAME}.{tag}", tmp_path / "files")
    # The default tag of the name, the name with the tag, and the address of it.
    for changes in (
        {"pretrained": True},
        {"pretrained": True, "name": f"{NAME}.{tag}"},
        {"initial_weights": f"timm:{NAME}.{tag}"},
    ):
        assert_of(network, built(**changes)[0])
    model = MODEL.model_copy(update={"pretrained": True})
    expected = dict(build_model(model, GroupedReduction(), seed=1).named_parameters())
    for name, tensor in initial_values(model, GroupedReduction(), seed=1):
        assert torch.equal(tensor, expected[name]), name
    created = scalevit.create_model(NAME, "none", pretrained=True, img_size=32, num_classes=7, **ARGUMENTS)
    assert_of(network, created.state_dict())


def test_pretrained_weights_of_the_web_come_from_torchs_cache(network: torch.nn.Module, cache: Path) -> None:
    """Of the few models that are not on the hub."""
    config = timm.get_pretrained_cfg("vit_huge_patch14_gap_224.in1k_ijepa")
    assert not config.hf_hub_id
    path = Path(torch.hub.get_dir()) / "checkpoints" / str(config.url).rpartition("/")[2]
    path.parent.mkdir(parents=True)
    renamed = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"encoder": renamed, "epoch": 300}, path)
    assert_of(network, built(initial_weights="timm:vit_huge_patch14_gap_224.in1k_ijepa")[0])


@pytest.mark.parametrize(
    ("source", "part"),
    [
        (f"timm:{NAME}", "not in the cache"),
        (f"timm:{NAME}.augreg_in21k", "cannot be downloaded (OfflineModeIsEnabled"),
        (f"timm:{NAME}.no_such_tag", f"timm has no such pretrained weights of {NAME}; it has {NAME}."),
        ("timm:vit_base_patch8_224.dino", "not in the cache"),
        ("timm:vit_tiny_patch16_22", "vit_tiny_patch16_22 is not a timm model; nearest: vit_tiny_patch16_224"),
        ("timm:vit_base_patch16_rope_224_nothing", "is not a timm model"),
        ("timm:vit_small_patch32_384.nothing", "timm has no such pretrained weights"),
        ("hf-hub:someone/no_such_model", "on a machine without network, name a file"),
        ("hf-hub:a/b/c/d", "a/b/c/d is not a name such as ORG/NAME"),
        ("timm:", "names nothing after the colon, e.g. timm:vit_base_patch16_224"),
        ("hf-hub:", "names nothing after the colon, e.g. hf-hub:ORG/NAME"),
        ("local-dir:", "names nothing after the colon, e.g. local-dir:FOLDER"),
        ("local-dir:nowhere", "no such folder"),
        ("hf_hub:someone/model", "no such file; nearest: hf-hub"),
        ("nowhere.pth", "no such file"),
    ],
)
def test_weights_that_are_not_there_are_one_line(source: str, part: str, cache: Path, capfd: Any) -> None:
    with pytest.raises(UserError) as error:
        find_weights(source)
    assert part in str(error.value)
    assert str(error.value).startswith(f"weights {source}: ")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_model_without_pretrained_weights_is_one_line(cache: Path) -> None:
    with pytest.raises(UserError, match=r"timm has no such pretrained weights of vit_giant_patch14_224$") as error:
        find_weights("timm:vit_giant_patch14_224")
    assert "\n" not in str(error.value)


def test_the_hub_is_asked_once_and_quietly(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the hub does not have is passed over; a file that it has is taken from the cache afterwards."""
    asked: list[tuple[str, str | None, bool]] = []
    missing = huggingface_hub.errors.RemoteEntryNotFoundError

    def download(repository: str, name: str, *, revision: str | None) -> str:
        asked.append((name, revision, huggingface_hub.utils.are_progress_bars_disabled()))
        if name == "model.safetensors":
            raise missing.__new__(missing)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_weights(f"timm:{NAME}").path == tmp_path / "pytorch_model.bin"
    assert asked == [("model.safetensors", None, True), ("pytorch_model.bin", None, True)]
    assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_folders_that_hold_no_model_of_timm_are_one_line(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": {"name": NAME}}))
    (run / "best.safetensors").touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    (folder / "model.safetensors").unlink()
    for path, part in (
        (
            run,
            f"a folder without a config.json of timm, which names the architecture: name a file, e.g. {run}/best.saf",
        ),
        (empty, "a folder without a config.json of timm"),
        (folder, "the folder has no file of weights, such as model.safetensors"),
    ):
        with pytest.raises(UserError) as error:
            find_weights(path)
        assert part in str(error.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        find_weights(folder)


def test_names_of_classes_that_do_not_fit_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "label_names": ["a", "b"]}))
    with pytest.raises(UserError) as error:
        read_classes(folder)
    assert str(error.value) == f"weights {folder}: config.json has 2 label_names, but num_classes = 7"


def test_weights_of_another_model_name_both(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"weights are of {NAME} .*depth=2.*, this model is vit_small_patch16_224$"):
        built(initial_weights=str(folder), name="vit_small_patch16_224", kwargs={**ARGUMENTS, "embed_dim": 96})


def test_pretrained_and_initial_weights_exclude_each_other() -> None:
    with pytest.raises(UserError) as error:
        load_config("quickstart", ["model.pretrained=true", "model.initial_weights=weights.pth"])
    assert "give one of the two" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError) as error:
        scalevit.create_model(NAME, "none", pretrained=True, weights="weights.pth")
    assert str(error.value) == 'weights = "weights.pth": pretrained=True names weights too: give one of the two'


def test_a_tag_of_the_name_chooses_how_images_are_normalised() -> None:
    means = []
    for name in ("vit_base_patch16_224.augreg_in1k", "vit_base_patch16_224.mae"):
        means.append(with_model_defaults(load_config(None, [f"model.name={name}"])).data.mean)
    assert means[0] == pytest.approx((0.5, 0.5, 0.5))
    assert means[1] == pytest.approx((0.485, 0.456, 0.406))
    with pytest.raises(UserError) as error:
        with_model_defaults(load_config(None, ["model.name=vit_base_patch16_224.mea"]))
    assert str(error.value) == (
        'config: model.name = "vit_base_patch16_224.mea": timm knows no weights of vit_base_patch16_224 with '
        "this tag; nearest: vit_base_patch16_224.mae"
    )
