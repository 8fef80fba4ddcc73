"""How the compiled operators come to be: DeepSpeed's builder, compilers, caches."""
