"""Heads: proposals, boxes and classes from feature maps."""
