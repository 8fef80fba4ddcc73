"""Building and loading the compiled operators: DeepSpeed's builder, compilers, caches."""
