"""Starts scripts by fork from a process that has imported everything: a start costs a second instead of fifteen.

`launching.py` starts one for each process of tests. It reads a request on each line of standard input and answers in
one line: {"ranks", "port", "script", "arguments", "folder", "environment", "log", "errors"} with the process ids,
{"ended": process ids} with their exit statuses, or null for those that still run.
"""

import gc
import json
import os
import runpy
import sys
import threading
from importlib import import_module
from pathlib import Path

import torch

# Everything that a run imports, so that its forks find it there. DeepSpeed imports the last two when it starts.
IMPORTED = (
    "scalevit.training.run",
    "scalevit.training.trainer",
    "scalevit.engines.fsdp.engine",
    "scalevit.engines.deepspeed.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.cpp_extension",
)


def run_rank(rank: int, request: dict) -> None:
    os.environ.clear()
    os.environ |= request["environment"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": request["port"]}
    os.environ |= {key: str(request["ranks"]) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, path in ((1, request["log"]), (2, request["errors"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = [request["script"], *request["arguments"]]
    sys.path.insert(0, str(Path(request["script"]).parent))
    runpy.run_path(request["script"], run_name="__main__")


def fork_rank(rank: int, request: dict) -> int:
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
    return child


def main() -> None:
    for name in IMPORTED:
        import_module(name)
    assert threading.active_count() == 1, "a fork would lose the other threads"
    torch.set_num_threads(1)
    gc.freeze()  # the forks need not look through what is imported
    running: set[int] = set()
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            for child in running.intersection(request["ended"]):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    running.remove(child)
                    ended[child] = os.waitstatus_to_exitcode(status)
            answer = [ended.get(child) for child in request["ended"]]
        else:
            answer = [fork_rank(rank, request) for rank in range(request["ranks"])]
            running.update(answer)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
