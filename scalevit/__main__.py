"""`python -m scalevit`, for launchers: torchrun --nproc-per-node 8 -m scalevit checkpoint convert ..."""

from scalevit.cli.main import main

if __name__ == "__main__":
    main()
