"""Models made ready to be used and no longer trained."""

from detkit.deploy.fast import fast
from detkit.deploy.fold import fold
from detkit.deploy.form import Form

__all__ = ["Form", "fast", "fold"]
