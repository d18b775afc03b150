"""Smaller weights that say what they cost."""

# How the key/value heads of a group become one.
HEAD_POOLS = {
    "mean": "modelwright.compress.gqa:mean_of_heads",
    "first": "modelwright.compress.gqa:first_of_heads",
}
