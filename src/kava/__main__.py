"""`python -m kava` is the `kava` command."""

from .pipeline.cli import main

if __name__ == "__main__":
    main()
