"""The table at the end of a run."""

from pathlib import Path

import pytest

from scalevit.cli.summary_table import print_summary
from scalevit.runs.summary import AccuracySummary, Summary


@pytest.mark.parametrize(
    ("rate", "mfu", "shown"),
    [(1234.5, 0.401, "1,234 images/s, 40.1 % MFU on 2 ranks"), (None, None, "- images/s on 2")],
)
def test_a_rate_that_was_not_measured_is_not_shown_as_zero(
    rate: float | None, mfu: float | None, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = Summary(
        name="a",
        weights=AccuracySummary(70.0, 91.0, 2, 70.0, 95.0, 0.0),
        ema=None,
        images_per_second=rate,
        mfu=mfu,
        steps=1,
        data_faults=0,
        epochs=1,
        parameters=100,
        mlp_parameters=50,
        unique_mlps=3,
        gmacs=0.5,
        reduction="none",
        engine={"name": "fsdp"},
        precision="fp32",
        world_size=2,
        seed=42,
    )
    print_summary(summary, Path("runs/a"))
    assert shown in capsys.readouterr().out
    assert summary.to_json()["images_per_second"] == rate
