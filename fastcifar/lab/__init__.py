"""Many runs, measured: the clock of the loader, the step and both together."""
