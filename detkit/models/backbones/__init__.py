"""Backbones: images to one feature map per stage."""
