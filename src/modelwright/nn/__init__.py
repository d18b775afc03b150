"""Layers: attention, rotary positions, norms, feed-forward blocks, low-rank adapters, low-bit weights."""
