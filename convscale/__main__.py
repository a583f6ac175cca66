"""``python -m convscale``: the command line."""

from convscale.cli.app import main

if __name__ == "__main__":
    main()
