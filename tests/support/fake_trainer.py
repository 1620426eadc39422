"""Replaces `scalevit train` in tests: makes a run folder in milliseconds, or does what ACT says.

python -I -S fake_trainer.py --config FILE    # ACT in the environment: JSON, {run name: "fail", "kill", "wait", ...}
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
folder = Path(config["output_dir"]) / config["name"]
act = json.loads(os.environ.get("ACT", "{}")).get(config["name"], "finish")


def write(name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def save_and_end(number: int, frame: object) -> None:
    write("saved.json", number)
    print("stopped after step 1; run the same command to resume", file=sys.stderr)
    sys.exit(128 + number)


print("starting", config["name"], *sys.argv[3:], flush=True)
if act == "silent":
    sys.exit(3)
if act == "mistake":
    print("error: train.micro_batch = 7: does not fit\nsome warning afterwards", file=sys.stderr)
    sys.exit(2)
folder.mkdir(exist_ok=True)
resumed = (folder / "saved.json").exists()
write("config.json", config)
write("environment.json", {"cores": sorted(os.sched_getaffinity(0)), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")})
first = {"kind": "resume" if resumed else "start", "step": 0, "steps": 2, "time": time.time()}
with (folder / "metrics.jsonl").open("a") as metrics:
    metrics.write(json.dumps(first) + "\n")
if act == "fail":
    raise ValueError("the numbers are wrong")
if act == "preempted":
    save_and_end(signal.SIGTERM, None)
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if act in ("wait", "hang") and not resumed:
    signal.signal(signal.SIGTERM, save_and_end if act == "wait" else signal.SIG_IGN)
    write("ready.json", True)
    while True:
        time.sleep(60)
if act.startswith("meet "):  # ends only if the other one runs at the same time
    write("here.json", True)
    while not (folder.parent / act.removeprefix("meet ") / "here.json").exists():
        time.sleep(0.01)
top1 = 90.0 + config["seed"] + (0.5 if config["reduction"]["strategy"] == "thin" else 0.0)
result = {"top1": top1, "best_epoch": 1, "peak_to_final_gap": config["seed"] / 4}
write("summary.json", {**result, "ema": {**result, "top1": top1 + 1}, "steps": 2})
