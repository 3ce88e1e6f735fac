"""Models made ready to be used and no longer trained."""

from detkit.deploy.fast import fast
from detkit.deploy.fold import fold

__all__ = ["fast", "fold"]
