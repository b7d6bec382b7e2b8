"""`python -m autofr` is the command line."""

from autofr.cli import main

main()
