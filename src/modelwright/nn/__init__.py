"""Layers: attention, norms, positions, feed-forward, low-rank and low-bit linear layers."""

# Ways of computing attention; `modelwright.nn.attention.use_backend` chooses one by name.
ATTENTION_BACKENDS = {
    "plain": "modelwright.nn.attention:attend_plain",
    "sdpa": "modelwright.nn.attention:attend_sdpa",
    "flex": "modelwright.nn.flex:attend_flex",
    "products": "modelwright.nn.attention:attend_products",
    "flash": "modelwright.nn.flash:flash_attend",
    "triton": "modelwright.nn.flash:attend_triton",
    "ring": "modelwright.nn.ring:attend_ring",
    "tiles": "modelwright.nn.tiles:attend_tiles",
}

# Cells of a recurrent network.
RECURRENT_CELLS = {
    "rnn": "modelwright.nn.recurrent:RNN",
    "lstm": "modelwright.nn.recurrent:LSTM",
    "gru": "modelwright.nn.recurrent:GRU",
}

# Parameter-efficient fine-tuning: the settings of each method; `modelwright.nn.adapters.attach_adapter` applies them.
ADAPTERS = {
    "lora": "modelwright.nn.lora:LoraConfig",
    "adalora": "modelwright.nn.adalora:AdaLoraConfig",
    "ia3": "modelwright.nn.ia3:IA3Config",
    "bottleneck": "modelwright.nn.bottleneck:BottleneckConfig",
    "prefix": "modelwright.nn.virtual_tokens:PrefixConfig",
    "prompt": "modelwright.nn.virtual_tokens:PromptConfig",
}
