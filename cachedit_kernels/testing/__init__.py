"""Shared by tests and benchmarks: an exact interpreter, compiling for GPUs that are not here, timers."""
