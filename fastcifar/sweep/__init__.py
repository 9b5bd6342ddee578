"""Many trials: sweep files, executors, Optuna studies, the trial log."""
