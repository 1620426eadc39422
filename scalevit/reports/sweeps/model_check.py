"""Finds what needs torch and timm to be found wrong with a sweep's models, in a process of its own.

    python -m scalevit.reports.sweeps.model_check < configs    # JSON: {combination: config}

Prints one JSON object: {"error": line} or {"parameters": {combination: count}}.
"""

import json
import os
import subprocess
import sys

from scalevit.config.loading import validate
from scalevit.errors import UserError
from scalevit.reports.sweeps.plan import SweepPlan


def check_models(plan: SweepPlan, *, ranks: int = 1) -> dict[str, int]:
    """Checks one run of each combination as `scalevit train` does, up to its data.

    Args:
        ranks: that each run will have.

    Returns:
        The number of parameters of each combination.

    Raises:
        UserError: a wrong setting, in one line that names the combination.
    """
    configs = {run.combination: run.config.model_dump(mode="json") for run in reversed(plan.runs)}
    configs = {combination: configs[combination] for combination in plan.combinations}
    world = {} if ranks == 1 else {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    done = subprocess.run(
        [sys.executable, "-m", "scalevit.reports.sweeps.model_check"],
        input=json.dumps(configs),
        env={**os.environ, **world},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the check of the sweep's models failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        raise UserError(result["error"])
    return dict(result["parameters"])


def main() -> None:
    from scalevit.training.run import check_settings

    parameters = {}
    for combination, settings in json.load(sys.stdin).items():
        try:
            parameters[combination] = check_settings(validate(settings)).parameters
        except UserError as error:
            where = "sweep" if combination == "all" else f"sweep with {combination}"
            print(json.dumps({"error": f"{where}: {error}"}))
            return
    print(json.dumps({"parameters": parameters}))


if __name__ == "__main__":
    main()
