"""One rank of the training benchmark's test: `scalevit` with the arguments of the command line."""

from scalevit.cli.main import main

if __name__ == "__main__":
    main()
