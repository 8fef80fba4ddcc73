"""Scaling experiments: runs of a matrix of settings, measured and reported."""
