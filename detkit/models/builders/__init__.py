"""Named detectors put together from parts, one family per file."""
