"""Models made ready to be used and no longer trained."""

from detkit.deploy.fold import fold

__all__ = ["fold"]
