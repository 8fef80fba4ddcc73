"""Training with DeepSpeed: engine, optimizer, loop, evaluation, checkpoints."""
