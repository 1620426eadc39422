"""The script with which Slurm runs a sweep: an array job with one task for each run."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from scalevit.reports.sweeps.plan import SweepPlan
from scalevit.runs.status import FAILURES

_SCRIPT = """\
#!/bin/bash
# sbatch {file}
# One task for each of the {count} runs of the sweep {folder}. Submitted again, finished runs end at once, and
# interrupted ones resume. Set the lines below to your cluster; `scalevit runs {quoted}` shows the state.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{together}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cores}
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output={folder}/{logs}/slurm-%A_%a.out
set -euo pipefail

cd {directory}
exec {command} --only "$SLURM_ARRAY_TASK_ID"
"""
_CORES_PER_GPU = 8


def array_script(
    plan: SweepPlan, file: Path, command: Sequence[str], *, ranks: int = 1, together: int | None = None
) -> str:
    """The script's text.

    Args:
        file: where it will be.
        command: that is run with `--only INDEX` added.
        ranks: GPUs of each run.
        together: how many runs may run at the same time; None leaves it to Slurm.
    """
    return _SCRIPT.format(
        file=shlex.quote(str(file)),
        count=len(plan.runs),
        folder=plan.folder.absolute(),
        quoted=shlex.quote(str(plan.folder)),
        name=plan.folder.name,
        last=len(plan.runs) - 1,
        together="" if together is None else f"%{together}",
        gpus=ranks,
        cores=_CORES_PER_GPU * ranks,
        logs=FAILURES,
        directory=shlex.quote(str(Path.cwd())),
        command=shlex.join(command),
    )
