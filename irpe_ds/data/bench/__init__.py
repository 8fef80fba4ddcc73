"""Benchmarks of conversion and loading: `python -m irpe_ds.data.bench`."""
