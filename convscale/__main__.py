"""``python -m convscale``: the command line."""

from convscale.cli.app import main

main()
