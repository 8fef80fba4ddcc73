"""Planning runs on many GPUs: memory, communication and time, from counts and stated shares."""
