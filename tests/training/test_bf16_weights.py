"""Weights in bf16: against a plain loop over timm's `model.to(bfloat16)`, and what keeps fp32."""

from pathlib import Path

import pytest
import timm.optim
import torch
from safetensors.torch import load_file
from task_runs import ALONE, config, evaluate, train
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy

from launching import losses, metrics
from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.engines.base import Engine
from scalevit.errors import UserError
from scalevit.planning.devices import load_device
from scalevit.planning.estimate import estimate_run
from scalevit.training.ema import Ema
from scalevit.training.engine_builder import EngineBuilder, check_engine

BF16 = "train.precision=bf16-weights"
STEPS, ROWS, LR = 20, 6, 3e-3


def small() -> Config:
    settings = [
        "model.drop_path=0",
        "optimizer.clip_grad=null",
        "ema.start=first_step",
        "ema.shared_parameters=per_use",
        "ema.decay=0.9",
        f"optimizer.lr={LR}",
    ]
    return config(BF16, *settings)


def engine_of(of: Config) -> Engine:
    return EngineBuilder(of, ALONE, check_engine(of, ALONE))(micro_batch=ROWS, accumulation=1)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(ROWS, 3, 16, 16, generator=generator), torch.randint(10, (ROWS,), generator=generator))
        for _ in range(STEPS)
    ]


def test_steps_are_those_of_a_plain_loop_over_timms_objects() -> None:
    """The loss is computed from fp32 logits; all else is as in timm's trainer."""
    of = small()
    with ALONE.process_group():
        model = EngineBuilder(of, ALONE, check_engine(of, ALONE))._build_model().to(torch.bfloat16)
        engine = engine_of(of)
        assert {tensor.dtype for tensor in engine.local_parameters().values()} == {torch.bfloat16}
        ema = Ema.from_config(of.ema, engine)
        assert ema is not None
        optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=LR, weight_decay=of.optimizer.weight_decay)
        average = ModelEmaV3(model, decay=0.9, dtype=torch.float32, foreach=False)
        engine.train()
        for step, (images, labels) in enumerate(batches()):
            loss = cross_entropy(model(images.bfloat16()).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model, step=step + 1)
            ours = cross_entropy(engine.forward(images), labels)
            engine.backward(ours, last=True)
            engine.step(LR)
            ema.update(engine.local_parameters(), step + 1)
            # The same operations on the same numbers: nothing but the order of a sum may differ.
            assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
        own = engine.local_parameters()
        states = {str(value.dtype) for state in engine.optimizer.state.values() for value in state.values()}
        assert states == {"torch.bfloat16", "torch.float32"}, "the moments, and the numbers of steps"
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(own[name], parameter.detach(), rtol=0, atol=0)
            expected = dict(average.module.named_parameters())[name]
            torch.testing.assert_close(ema.tensors[name], expected, rtol=1e-5, atol=1e-7)


def test_an_average_keeps_its_fp32_values_while_it_is_evaluated() -> None:
    with ALONE.process_group():
        engine = engine_of(small())
        own = {name: tensor.clone() for name, tensor in engine.local_parameters().items()}
        average = {name: tensor.float() + 1e-4 for name, tensor in own.items()}
        before = {name: tensor.clone() for name, tensor in average.items()}
        with engine.using(average):
            for name, tensor in engine.local_parameters().items():
                assert torch.equal(tensor, before[name].bfloat16())
        assert all(torch.equal(average[name], before[name]) for name in before)
        assert all(torch.equal(tensor, own[name]) for name, tensor in engine.local_parameters().items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_a_run_resumes_exactly_and_its_weights_files_are_what_it_evaluated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    whole = train("whole", BF16, steps=4)
    train("parts", BF16, "train.checkpoint.every_steps=2", steps=2)
    run = train("parts", BF16, steps=4)
    assert losses(run) == losses(whole)
    (evaluation,) = metrics(whole, "evaluation")
    for name, key, dtype in (("final", "loss", torch.bfloat16), ("final_ema", "ema_loss", torch.float32)):
        weights = run / f"{name}.safetensors"
        assert {tensor.dtype for tensor in load_file(weights).values()} == {dtype}
        evaluated = evaluate(config(BF16, f"model.initial_weights={weights}"))
        assert evaluated["loss"] == pytest.approx(evaluation[key], rel=1e-6)
    with pytest.raises(UserError, match=r"with weights of another type \(train\.precision: bf16-weights -> fp32\)"):
        train("parts", "train.precision=fp32", "train.resume_changes=allow", steps=6)


def test_the_planner_counts_two_bytes() -> None:
    memory = {}
    for precision in ("bf16", "bf16-weights"):
        of = config(f"train.precision={precision}", "train.micro_batch=4")
        (row,) = estimate_run(
            of, load_device("h100"), gpus=2, nodes=1, optimizer_tensors=2, optimizer_refusals={}, compare=False
        ).rows
        memory[precision] = row.cost.memory
    assert memory["bf16-weights"].weights * 2 == memory["bf16"].weights
    assert memory["bf16-weights"].optimizer * 2 == memory["bf16"].optimizer
    assert memory["bf16-weights"].ema == memory["bf16"].ema


def test_deepspeed_refuses_it_in_one_line() -> None:
    with pytest.raises(UserError, match=r"train\.precision = bf16-weights needs engine\.name = fsdp"):
        load_config("quickstart", ["engine.name=deepspeed", BF16])
