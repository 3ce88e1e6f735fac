"""Measurements behind `detkit bench`: operators beside their peers, whole detectors, training."""
