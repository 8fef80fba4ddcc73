"""Scaling experiments: a matrix of short runs, measured and reported."""
