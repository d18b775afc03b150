"""Figures that can be compared: perplexity, bits per byte, reports."""
