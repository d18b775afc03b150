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

# How a token that the old tokenizer does not have begins, when a model gets another tokenizer.
TRANSPLANT_WAYS = {
    "adapt": "modelwright.compress.transplant:by_adaptation",
    "pieces": "modelwright.compress.transplant:by_pieces",
    "mean": "modelwright.compress.transplant:by_mean",
    "random": "modelwright.compress.transplant:at_random",
}
