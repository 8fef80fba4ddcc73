"""Images in FFCV's .beton files: conversion, verification, loading and augmentation.

Nothing is imported here: only modules that read or write .beton files need `ffcv`.
"""
