"""`scalevit evaluate` from a checkout, whether or not scalevit is installed:

deepspeed launch/evaluate.py --config configs/grouped.json [key.sub=value ...]
torchrun --nproc-per-node 8 launch/evaluate.py --config configs/fsdp.json [key.sub=value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from scalevit.cli.main import main

    main(["evaluate", *sys.argv[1:]])
