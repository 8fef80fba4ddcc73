"""Building and loading the compiled operators: builders, compilers, caches."""
