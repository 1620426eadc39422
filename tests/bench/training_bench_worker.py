"""One rank of the training benchmark's test: `main` with the arguments of the command line."""

import sys

from scalevit.bench.training import main

if __name__ == "__main__":
    main(sys.argv[1:])
