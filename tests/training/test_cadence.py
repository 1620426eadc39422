"""When a run logs, evaluates and saves, without a run."""

from scalevit.training.cadence import Actions, Cadence


def test_intervals_of_epochs_and_steps() -> None:
    """Epochs of 10 steps."""
    cadence = Cadence(40, log_every_steps=4, evaluate_every_epochs=2, save_every_epochs=3, save_every_steps=15)
    done = {step: cadence.after(step, epochs_done=step // 10 if step % 10 == 0 else None) for step in range(1, 41)}
    assert [step for step in done if done[step].log] == [4, 8, 10, 12, 16, 20, 24, 28, 30, 32, 36, 40]
    assert [step for step in done if done[step].evaluate] == [20, 40]
    assert [step for step in done if done[step].save] == [15, 30, 40]


def test_the_last_step_does_everything_whatever_the_intervals_are() -> None:
    cadence = Cadence(7, log_every_steps=100, evaluate_every_epochs=100)
    assert cadence.after(6, epochs_done=None) == Actions(log=False, evaluate=False, save=False)
    assert cadence.after(7, epochs_done=None) == Actions(log=True, evaluate=True, save=True)
