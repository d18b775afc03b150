"""Layers: attention, norms, positions, feed-forward, low-rank and low-bit linear layers."""

# Ways of computing attention; `modelwright.nn.attention.use_backend` chooses one by name.
ATTENTION_BACKENDS = {
    "plain": "modelwright.nn.attention:attend_plain",
    "sdpa": "modelwright.nn.attention:attend_sdpa",
    "products": "modelwright.nn.attention:attend_products",
}
