"""Changing weights: one loop, objectives that say what a step is, checkpoints, budgets."""
