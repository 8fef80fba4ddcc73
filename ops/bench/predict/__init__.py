"""Predicts from machine code how long a kernel takes on a GPU that is not there."""
