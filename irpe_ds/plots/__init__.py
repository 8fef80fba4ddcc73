"""Figures of runs, tables, plans and scaling experiments."""
