"""Sampling on the device, inside the step."""
