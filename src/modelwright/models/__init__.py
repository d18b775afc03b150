"""Architectures, one file each, and their published weights."""

# Published model_type of a config.json -> the file's table from architecture names to classes.
FAMILIES = {
    "bamba": "modelwright.models.hybrid:ARCHITECTURES",
    "bert": "modelwright.models.bert:ARCHITECTURES",
    "big_bird": "modelwright.models.bigbird:ARCHITECTURES",
    "deberta-v2": "modelwright.models.deberta:ARCHITECTURES",
    "feedforward": "modelwright.models.feedforward:ARCHITECTURES",
    "deepseek_v2": "modelwright.models.deepseek:ARCHITECTURES",
    "deepseek_v3": "modelwright.models.deepseek:ARCHITECTURES",
    "gemma": "modelwright.models.gemma:ARCHITECTURES",
    "gemma2": "modelwright.models.gemma:ARCHITECTURES",
    "gemma3_text": "modelwright.models.gemma:ARCHITECTURES",
    "gpt2": "modelwright.models.gpt2:ARCHITECTURES",
    "llama": "modelwright.models.llama:ARCHITECTURES",
    "llava": "modelwright.models.llava:ARCHITECTURES",
    "longformer": "modelwright.models.longformer:ARCHITECTURES",
    "mamba": "modelwright.models.mamba:ARCHITECTURES",
    "mamba2": "modelwright.models.mamba2:ARCHITECTURES",
    "mistral": "modelwright.models.llama:ARCHITECTURES",
    "mixtral": "modelwright.models.mixtral:ARCHITECTURES",
    "phi3": "modelwright.models.phi3:ARCHITECTURES",
    "modernbert": "modelwright.models.modernbert:ARCHITECTURES",
    "qwen2": "modelwright.models.llama:ARCHITECTURES",
    "qwen2_moe": "modelwright.models.qwen_moe:ARCHITECTURES",
    "qwen3": "modelwright.models.llama:ARCHITECTURES",
    "qwen3_moe": "modelwright.models.qwen_moe:ARCHITECTURES",
    "recurrent": "modelwright.models.recurrent:ARCHITECTURES",
    "roberta": "modelwright.models.roberta:ARCHITECTURES",
    "rwkv": "modelwright.models.rwkv:ARCHITECTURES",
    "clip": "modelwright.models.clip:ARCHITECTURES",
    "clip_text_model": "modelwright.models.clip:TEXT_ARCHITECTURES",
    "clip_vision_model": "modelwright.models.clip:VISION_ARCHITECTURES",
    "siglip": "modelwright.models.siglip:ARCHITECTURES",
    "siglip_text_model": "modelwright.models.siglip:TEXT_ARCHITECTURES",
    "siglip_vision_model": "modelwright.models.siglip:VISION_ARCHITECTURES",
    "t5": "modelwright.models.t5:ARCHITECTURES",
    "vit": "modelwright.models.vit:ARCHITECTURES",
    "seq2seq": "modelwright.models.seq2seq:ARCHITECTURES",
    "series": "modelwright.models.series:ARCHITECTURES",
    "whisper": "modelwright.models.whisper:ARCHITECTURES",
    "xlm-roberta": "modelwright.models.roberta:ARCHITECTURES",
}

# How an n-gram model shares out probability between what was seen and what was not.
SMOOTHINGS = {
    "laplace": "modelwright.models.ngram_smoothing:laplace",
    "add_k": "modelwright.models.ngram_smoothing:add_k",
    "katz": "modelwright.models.ngram_smoothing:katz",
    "interpolated": "modelwright.models.ngram_smoothing:interpolated",
    "kneser_ney": "modelwright.models.ngram_smoothing:kneser_ney",
    "modified_kneser_ney": "modelwright.models.ngram_smoothing:modified_kneser_ney",
}

# Files that hold a whole model, by their ending -> the function that reads one: (path, *, dtype, device) -> model.
READERS = {
    ".bin": "modelwright.models.llama2c:read_llama2c",
    ".gguf": "modelwright.models.gguf:read_gguf",
}

# Update rules of the network in NumPy.
NUMPY_OPTIMIZERS = {
    "sgd": "modelwright.models.multilayer:SGD",
    "momentum": "modelwright.models.multilayer:Momentum",
    "rmsprop": "modelwright.models.multilayer:RMSProp",
    "adam": "modelwright.models.multilayer:Adam",
}
