"""The processes of a run: how they start, find, check and watch one another, and stop."""
