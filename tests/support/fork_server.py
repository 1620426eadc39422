"""Starts training runs by fork from a process that has imported everything: a start costs a second instead of fifteen.

Reads lines of JSON {"ranks", "port", "script", "arguments", "output"} on standard input, answers each with the process
ids and, when they have ended, with their exit statuses.
"""

import json
import os
import runpy
import sys
import threading
from pathlib import Path

import torch

import scalevit.engines.deepspeed.engine
import scalevit.engines.fsdp.engine

# Everything that a run imports, so that its forks find it there.
import scalevit.training.run
import scalevit.training.trainer  # noqa: F401


def run_rank(rank: int, request: dict) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": request["port"]}
    os.environ |= {key: str(request["ranks"]) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    output = os.open(Path(request["output"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")


def main() -> None:
    assert threading.active_count() == 1, "a fork would lose the other threads"
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for rank in range(request["ranks"]):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    run_rank(rank, request)
                    status = 0
                except SystemExit as leaving:
                    status = leaving.code if isinstance(leaving.code, int) else 1
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            children.append(child)
        print(json.dumps(children), flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    main()
