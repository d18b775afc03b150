"""Smaller weights that say what they cost."""
