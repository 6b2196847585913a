"""`python -m asyncopd.cli`: the command without its script."""

from asyncopd.cli import main

if __name__ == "__main__":
    main()
