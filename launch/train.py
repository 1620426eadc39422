"""`scalevit train` from a checkout, whether or not scalevit is installed:

deepspeed launch/train.py --config configs/grouped.json [key.sub=value ...]
torchrun --nproc-per-node 8 launch/train.py --config configs/fsdp.json [key.sub=value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from scalevit.cli.main import main

    main(["train", *sys.argv[1:]])
