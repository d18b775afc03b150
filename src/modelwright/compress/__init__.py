"""Smaller weights that say what they cost."""

# How the key/value heads of a group become one.
HEAD_POOLS = {
    "mean": "modelwright.compress.gqa:mean_of_heads",
    "first": "modelwright.compress.gqa:first_of_heads",
}

# How a model gets more layers: new ones that add nothing yet, or two overlapping copies.
DEPTH_WAYS = {
    "silent": "modelwright.compress.depth:add_silent_layers",
    "stack": "modelwright.compress.depth:scale_depth",
}
