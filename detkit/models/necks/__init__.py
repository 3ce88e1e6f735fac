"""Necks: maps of a backbone to maps of equal channels."""
