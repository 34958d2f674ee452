"""`python -m audiosep` is the `audiosep` command."""

from audiosep.cli import main

if __name__ == "__main__":
    main()
