"""Models made ready to be used and no longer trained."""
