"""Measured comparisons; run from the top of the source tree, `python -m benchmarks.cpu_decode`."""
