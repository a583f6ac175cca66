"""``python -m convscale.cli``: the command line."""

from convscale.cli.app import main

main()
