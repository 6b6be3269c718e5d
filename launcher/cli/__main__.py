"""`python -m launcher.cli`: the `vernier` command."""

from launcher.cli import main

if __name__ == "__main__":
    main()
