"""A new reduction is one file and one line: added to a copy of the package, it works everywhere (docs/extending.md)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from launching import SECONDS

REPOSITORY = Path(__file__).parents[2]

FILE = '''"""AlternateMLP: every second block has no MLP."""

from typing import Literal

from scalevit.models.reductions.base import Reduction


class AlternateReduction(Reduction):
    """AlternateMLP: the MLPs of blocks 1, 3, 5, ... are removed, with the norm and the layer scale before and after."""

    strategy: Literal["alternate"] = "alternate"

    def source(self, block: int, depth: int) -> int | None:
        return block if block % 2 == 0 else None
'''

SCRIPT = """
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F

import scalevit.models.timm_names
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.config.model import KernelsConfig
from scalevit.distributed import World
from scalevit.models.build import build_model
from scalevit.models.costs import model_costs
from scalevit.models.fused_mlp import FusedMlp
from scalevit.models.meta_init import initial_values
from scalevit.models.reductions.none import NoReduction
from scalevit.models.weights.write import write_weights
from scalevit.models.dropout import RowKeys
from scalevit.training.engine_builder import EngineBuilder, check_engine
from scalevit.tying import canonical_state, tied_names

TINY = [
    "reduction.strategy=alternate", "model.name=vit_tiny_patch16_224", "model.image_size=32", "model.num_classes=7",
    'model.kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3, "init_values": 0.1}', "train.precision=fp32",
    "train.micro_batch=2", "train.global_batch=2", *sys.argv[1:],
]
config = load_config(None, TINY)
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

# The model: blocks 1 and 3 add their attention only, everything else is the baseline's.
baseline = build_model(config.model, NoReduction(), seed=1).eval()
model = build_model(config.model, config.reduction, seed=1).eval()
removed = [n for n, _ in baseline.named_parameters() for b in "13" for m in ("norm2", "mlp", "ls2")
           if n.startswith(f"blocks.{b}.{m}")]
state = model.state_dict()
assert state.keys() == baseline.state_dict().keys() - set(removed) and len(removed) == 2 * 7
assert all(torch.equal(tensor, baseline.state_dict()[name]) for name, tensor in state.items())
with torch.no_grad():
    for block in baseline.blocks[1::2]:
        block.ls2.gamma.zero_()
    assert torch.equal(model(images), baseline(images))
assert tied_names(model) == {}

# Costs, kernels, leaf by leaf initialisation, timm's registry.
costs = model_costs(config.model, config.reduction)
assert costs.unique_mlps == 2 and costs.parameters == sum(p.numel() for p in model.parameters())
assert costs.mlp_parameters * 2 == model_costs(config.model, NoReduction()).mlp_parameters
fused = build_model(config.model, config.reduction, seed=1, kernels=KernelsConfig(mlp="auto")).eval()
assert [isinstance(block.mlp, FusedMlp) for block in fused.blocks] == [True, False, True, False]
torch.testing.assert_close(fused(images), model(images))
values = {name: tensor.shape for name, tensor in initial_values(config.model, config.reduction, seed=1)}
assert values == {name: parameter.shape for name, parameter in model.named_parameters()}
registered = timm.create_model("vit_tiny_patch16_224_alternate")
assert sum(block.mlp.__class__.__name__ == "NoMlp" for block in registered.blocks) == 6

# Weights files: a round trip, plain weights, and another structure.
for reduction, source in ((config.reduction, model), (NoReduction(), build_model(config.model, NoReduction(), seed=1))):
    path = Path(f"{reduction.strategy}.safetensors").absolute()
    write_weights(path, canonical_state(source), model=config.model, reduction=reduction, tied=tied_names(source))
    from_file = config.model.model_copy(update={"initial_weights": str(path)})
    loaded = build_model(from_file, config.reduction, seed=2).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    for name, tensor in initial_values(from_file, config.reduction, seed=2):
        assert torch.equal(tensor, state[name]), name

# A training step on an engine, then the command line.
world = World.from_environment()
build = EngineBuilder(config, world, check_engine(config, world))
with world.process_group():
    engine = build(micro_batch=2, accumulation=1)
    engine.train()
    for step in range(2):
        RowKeys(engine.module).set(0, step, np.arange(2), world.device)
        loss = F.cross_entropy(engine.forward(images), torch.tensor([1, 2]))
        engine.backward(loss, last=True)
        engine.step(1e-3)
    assert loss.isfinite()
    engine.close()
Path("tiny.json").write_text(config.model_dump_json())
main(["describe", "--config", "tiny.json"])
main(["plan", "--config", "tiny.json", "--gpus", "2", "train.global_batch=4"])
print("everything works")
"""


def add_reduction(folder: Path) -> None:
    """Copies the package into a folder and adds the reduction there as a commit would."""
    shutil.copytree(REPOSITORY / "scalevit", folder / "scalevit", ignore=shutil.ignore_patterns("__pycache__"))
    seam = folder / "scalevit" / "models" / "reductions"
    (seam / "alternate.py").write_text(FILE)
    listed = (seam / "__init__.py").read_text()
    before, tuple_of_parts = listed.split("REDUCTIONS = (")
    imported = "from scalevit.models.reductions.alternate import AlternateReduction\n\n"
    parts = tuple_of_parts.rstrip().removesuffix(")").rstrip(" ,\n")
    (seam / "__init__.py").write_text(f"{before}{imported}REDUCTIONS = ({parts}, AlternateReduction)\n")


def test_every_second_block_without_mlp(tmp_path: Path) -> None:
    add_reduction(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TERM": "dumb", "COLUMNS": "200"}
    command = [sys.executable, "-c", SCRIPT, "engine.name=fsdp"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("everything works\n")
    assert done.stdout.count("alternate") >= 6  # a column of describe, five engines of plan
