"""Estimates of `scalevit plan` beside what real ranks hold and send.

`python tests/planning/accounting.py` writes docs/results/plan_check.json; tests/planning/test_accounting.py asserts.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import accounting_worker as worker
from launching import Ranks
from scalevit.config.loading import load_config
from scalevit.engines.cost import ParameterLayout, Workload
from scalevit.models.build import build_model
from scalevit.models.mlps import transformer_blocks
from scalevit.planning.activations import TracedModel
from scalevit.runs.environment import describe_environment

BUCKET = 2_000_000  # elements: above the model's, as DeepSpeed's 5e8 are above most models'
_ZERO = f"engine.native.zero_optimization.reduce_bucket_size={BUCKET}"
# ranks, engine, reduction, accumulation
CASES = [
    *((1, engine, "grouped", 2) for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp")),
    *((2, engine, "grouped", 2) for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp")),
    *((2, engine, "none", 1) for engine in ("zero1", "zero2", "zero3", "fsdp")),
    *((2, engine, "grouped", 1) for engine in ("zero1", "zero2", "zero3", "fsdp")),
    (2, "zero3 gathering twice", "grouped", 2),
    (2, "fsdp without resharding", "grouped", 2),
]
_SETTINGS = {
    **{f"zero{stage}": [f"engine.stage={stage}", _ZERO] for stage in range(4)},
    "fsdp": ["engine.name=fsdp"],
    "zero3 gathering twice": [
        "engine.stage=3",
        _ZERO,
        "engine.native.zero_optimization.stage3_max_live_parameters=0",
        "engine.native.zero_optimization.stage3_max_reuse_distance=0",
    ],
    "fsdp without resharding": ["engine.name=fsdp", "engine.reshard_after_forward=false"],
}


def measure(folder: Path) -> list[dict[str, Any]]:
    """Runs every case on real ranks; bytes of rank 0, estimated and measured."""
    rows = []
    for ranks in (1, 2):
        cases = [
            {"id": f"{engine}-{reduction}-{accumulation}", "engine": engine, "reduction": reduction,
             "accumulation": accumulation, "settings": _SETTINGS[engine]}
            for n, engine, reduction, accumulation in CASES if n == ranks
        ]  # fmt: skip
        (folder / "cases.json").write_text(json.dumps(cases))
        result = folder / f"results{ranks}.json"
        Ranks(ranks, worker.__file__, folder / "cases.json", result, log=folder / f"{ranks}.log").wait()
        measured = json.loads(result.read_text())
        rows += [_row(ranks, case, measured[case["id"]]) for case in cases]
    return rows


def _row(ranks: int, case: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    reduction = worker.REDUCTIONS[case["reduction"]]
    engine = load_config(None, case["settings"]).engine
    model = build_model(worker.MODEL, reduction, seed=0, device="meta")
    layout = ParameterLayout.of(model, transformer_blocks(model))
    cost = engine.cost(layout, Workload(ranks, case["accumulation"], optimizer_tensors=2, ema=True))
    held, sent = cost.memory, cost.traffic
    traced = TracedModel(worker.MODEL, reduction, mode="eager", precision="fp32", activation_checkpointing=False)
    batch = traced.trace(worker.MICRO_BATCH)
    # ZeRO-3 allocates its bucket and its part of the gradients at the start, so a step's peak does not contain them.
    throughout = held.gradients + 4 * BUCKET if case["engine"].startswith("zero3") else 0
    step_peak = held.peak(batch.peak_bytes) - held.weights - held.optimizer - held.ema - throughout
    state = {"weights": held.weights, "optimizer": held.optimizer, "gradients": held.gradients, "ema": held.ema}
    bucket = 4 * BUCKET if case["engine"].startswith("zero3") else 0
    return {
        "ranks": ranks,
        **{key: case[key] for key in ("engine", "reduction", "accumulation")},
        "parameters": sum(p.numel() for p in layout.parameters),
        "estimated": {
            "held": {**state, "all": sum(state.values()) + bucket},
            "sent": asdict(sent),
            "step_peak": round(step_peak),
        },
        "measured": {"held": measured["held"], "sent": measured["sent"], "step_peak": measured["peak"]},
    }  # fmt: skip


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    about = describe_environment(2, "cpu")
    kept = {key: about[key] for key in ("python", "packages", "git_commit", "cpus", "device")}
    result = {"date": date.today().isoformat(), "command": "python tests/planning/accounting.py", **kept, "rows": rows}
    path = Path(__file__).parents[2] / "docs" / "results" / "plan_check.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
