"""Images in FFCV's .beton files: conversion, verification and loading.

Nothing is imported here: `ffcv` is needed by `convert`, `verify`, `dataset` and `loaders` alone.
"""
