"""`python -m detkit.cli`: the same as the `detkit` command."""

from detkit.cli.main import main

main()
