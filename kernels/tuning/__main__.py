"""`python -m scalevit.kernels.tuning`."""

import sys

from scalevit.kernels.tuning.tuner import main

if __name__ == "__main__":
    sys.exit(main())
