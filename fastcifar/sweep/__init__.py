"""Sweeps, which run many trials: sweep files, executors, Optuna studies and the trial log."""
