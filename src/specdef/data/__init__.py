"""Texts the demo and the calibration use."""
