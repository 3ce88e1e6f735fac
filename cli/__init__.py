"""The command line: one file per command, thin over :mod:`detkit.api`."""
