"""`scalevit average`: what it computes, evaluates, and refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import refused
from launching import QUICKSTART
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.models.build import build_model
from scalevit.models.weights.write import write_weights
from scalevit.tying import tied_names

LONG = f"{'x' * 240}.safetensors"
NAMES = [str(number) for number in range(10)]


@pytest.fixture(scope="module")
def soups(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Three runs on the digits, `a`, `b` and `c`; the classifier of c is that of a with another sign."""
    folder = tmp_path_factory.mktemp("soups")
    settings = {
        "extends": QUICKSTART,
        "model": {"kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 2}},
        "data": {"builtin": None, "workers": 0, "validation": str(digits / "validation")},
    }
    for seed, name in enumerate("abc"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(settings))
        config = load_config(folder / name / "config.json")
        model = build_model(config.model, config.reduction, seed=0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            if name == "c":
                other = load_file(folder / "a" / "best.safetensors")
                for key, parameter in model.named_parameters():
                    parameter.copy_(-3 * other[key] if key.startswith("head.") else other[key])
        about = {"model": config.model, "reduction": config.reduction, "tied": tied_names(model), "classes": NAMES}
        write_weights(folder / name / "best.safetensors", dict(model.named_parameters()), **about)
    return folder


def rows(printed: str) -> dict[str, tuple[float, float, str]]:
    """Top-1, top-5 and whether it is used, by the name of each row of the table."""
    found = re.findall(r"^(\S+) +(\d+\.\d\d) +(\d+\.\d\d) *(\w*) *$", printed, re.MULTILINE)
    return {Path(name).parent.name or name: (float(top1), float(top5), used) for name, top1, top5, used in found}


def evaluated(capsys: pytest.CaptureFixture[str], target: Path, images: Path) -> float:
    """Top-1 by an export's evaluation, which needs no process group."""
    exported = target.with_name(f"{target.stem}_{len(list(target.parent.iterdir()))}.safetensors")
    main(["export", str(target), str(exported), "--to", "timm"])
    capsys.readouterr()
    main(["evaluate", str(exported), f"data.validation={images}", "data.workers=0"])
    return json.loads(capsys.readouterr().out)["top1"]


def test_the_average_is_evaluated_before_and_after(
    soups: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "soup.safetensors"
    main(["average", str(soups / "a"), str(soups / "b"), "--output", str(output)])
    printed = capsys.readouterr().out
    assert f"wrote {output}: the average of 2 of 2 sets of weights" in printed
    soup = load_file(output)
    sources = [load_file(soups / name / "best.safetensors") for name in "ab"]
    assert soup.keys() == sources[0].keys()
    for name, tensor in soup.items():
        exact = (sources[0][name].double() + sources[1][name].double()) / 2
        assert torch.equal(tensor, exact.float()), name
    table = rows(printed)
    assert set(table) == {"a", "b", "average"}
    top1 = {name: evaluated(capsys, soups / name / "best.safetensors", digits / "validation") for name in "ab"}
    top1["average"] = evaluated(capsys, output, digits / "validation")
    # A precision of bf16 in the run, fp32 in the export: some of 360 images may change their class.
    assert {name: row[0] for name, row in table.items()} == pytest.approx(top1, abs=1.0)


def test_a_greedy_average_leaves_out_what_harms(
    soups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "soup.safetensors"
    main(["average", *(str(soups / name) for name in "ca"), "--output", str(output), "--greedy"])
    table = rows(capsys.readouterr().out)
    best, worst = sorted("ac", key=lambda name: -table[name][0])
    assert table[best][0] > table[worst][0]
    assert (table[best][2], table[worst][2]) == ("yes", "no")
    assert table["average"][0] == table[best][0]
    for name, tensor in load_file(output).items():
        assert torch.equal(tensor, load_file(soups / best / "best.safetensors")[name])


def test_sums_are_in_double_precision(soups: Path, tmp_path: Path) -> None:
    """In fp32, 1 + 2^-24 + 2^-24 is 1 if it is summed from the left."""
    for number, value in enumerate((1.0, 2.0**-24, 2.0**-24, 0.0)):
        tensors = {name: torch.full_like(t, value) for name, t in load_file(soups / "a" / "best.safetensors").items()}
        config = load_config(soups / "a" / "config.json")
        about = {"model": config.model, "reduction": config.reduction, "tied": {}, "classes": NAMES}
        write_weights(tmp_path / f"{number}.safetensors", tensors, **about)
    files = [str(tmp_path / f"{number}.safetensors") for number in range(4)]
    main(["average", *files, "--output", str(tmp_path / "soup.safetensors"), "--no-evaluation"])
    expected = np.float32(0.25 + 2.0**-25)
    assert expected != 0.25
    assert all((tensor == expected).all() for tensor in load_file(tmp_path / "soup.safetensors").values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/best.safetensors"], "an average needs two or more sources"),
        (["a", "nowhere"], "weights nowhere: no such file"),
        (["a", "deep"], "is not of the structure of a/best.safetensors: kwargs is"),
        (["a", "named"], "the list of class names is ['a', 'b'"),
        (["a", "ungrouped"], 'the reduction is {"strategy": "none"}, not {"strategy": "grouped", "groups": [[0, 1]]}'),
        (["a", "b", "--output", "a/best.safetensors"], "a/best.safetensors: already exists"),
        (["a", "b", "--output", "x.pth"], "--output x.pth: must end with .safetensors"),
        # The temporary name of a file is longer than its own. The sources are not read before that is found.
        (["a", "broken", "--output", LONG], f"error: {LONG}: cannot be written (File name too long)\n"),
        (["a", "b", "--greedy", "--no-evaluation"], "--greedy evaluates every average"),
        (["alone/1.safetensors", "alone/2.safetensors"], "name validation shards with --data, or give --no-evaluation"),
        (["a", "b", "--weights", "ema"], "run folder a: has none of best_ema.safetensors, final_ema.safetensors"),
        (["a", "broken"], "weights broken/best.safetensors: lacks"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    soups: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(soups)
    variants(soups)
    output = [] if "--output" in arguments else ["--output", "x.safetensors"]
    assert message in refused(capsys, "average", *arguments, *output)
    assert not (soups / "x.safetensors").exists()


def variants(soups: Path) -> None:
    """Runs that differ from `a` in one thing, and files without a config."""
    if (soups / "deep").exists():
        return
    text = (soups / "a" / "config.json").read_text()
    settings = json.loads(text)
    changed = {
        "deep": {**settings, "model": {"kwargs": {**settings["model"]["kwargs"], "depth": 4}}},
        "named": settings,
        "ungrouped": {**settings, "reduction": {"strategy": "none"}},
    }
    for name, content in changed.items():
        (soups / name).mkdir()
        (soups / name / "config.json").write_text(json.dumps(content))
        config = load_config(soups / name / "config.json")
        model = build_model(config.model, config.reduction, seed=0)
        about = {"model": config.model, "reduction": config.reduction, "tied": tied_names(model)}
        classes = list("abcdefghij") if name == "named" else NAMES
        write_weights(soups / name / "best.safetensors", dict(model.named_parameters()), **about, classes=classes)
    (soups / "alone").mkdir()
    for name in ("1", "2"):
        (soups / "alone" / f"{name}.safetensors").write_bytes((soups / "a" / "best.safetensors").read_bytes())
    (soups / "broken").mkdir()
    (soups / "broken" / "config.json").write_text(text)
    tensors = load_file(soups / "a" / "best.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith("patch_embed.")},
        soups / "broken" / "best.safetensors",
    )
