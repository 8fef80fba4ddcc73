"""The processes of a run: how they start, find, check and watch each other, and how they stop."""
