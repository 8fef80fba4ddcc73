"""Benchmarks of the operators: `python -m irpe_ds.ops.bench`."""
