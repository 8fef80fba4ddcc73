"""Training under DeepSpeed: engine, optimiser, loop, evaluation, checkpoints."""
