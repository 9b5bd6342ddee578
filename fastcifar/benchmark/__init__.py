"""Timing: throughput of the loader, the step and training, and time to an accuracy."""
