"""The progress bar: counts, rate and remaining time."""

import pytest

from scalevit import terminal
from scalevit.terminal import ProgressBar


def test_the_rate_leaves_out_the_first_which_may_take_longer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with ProgressBar("x", 102, "steps") as bar:
        now = 50.0  # compiles
        bar.advance()
        now = 61.0
        bar.advance()
        for _ in range(10):
            now += 11.0
            bar.advance("loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "x: 1/102 steps, 0/s, 84 min 10 s left"
    assert lines[1] == "x: 2/102 steps, 0/s, 18 min 20 s left"
    assert lines[2] == "x: 3/102 steps, loss 1, 18 min 09 s left"
    assert lines[-1] == "x: 12 steps in 2 min 51 s, 0.1/s"
