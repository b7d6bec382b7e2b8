"""`python -m autofr` is the command line."""

from autofr.cli.app import main

main()
