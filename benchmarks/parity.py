"""Every family against its reference in transformers: same random weights, same inputs, both directions.

    python benchmarks/parity.py [--only NAME] [--json FILE]

For each case a tiny reference model is made, its weights moved away from their first values, saved, and read by
`load_model`. Then are compared, in float32 on the CPU: the outputs (positions beyond 64), the outputs at tokens when
rows are padded left and right, packed documents with separate ones, cached steps with the whole sequence, the gradient
of every parameter, and what ``from_pretrained`` computes from our own export. `tests/models/test_parity.py` holds each
case to its bounds; benchmarks/models_table.py writes the table of docs/models.md from the committed results.

A new family is one entry in CASES.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from modelwright.base.measured import write_result
from modelwright.models.layout import pack, to_published
from modelwright.models.weights import load_model, save_model

LENGTH = 150
WRITTEN = 90  # tokens of an encoder-decoder's decoder
SEPARATORS = [50, 51, 100]  # where two texts in one row end; no padding of the cases covers them
MAX_ERROR = 1e-4  # of outputs, absolute
MAX_GRADIENT_ERROR = 1e-3  # relative, in norm, a parameter at a time
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """A tiny model of one family."""

    config: str  # class in transformers
    values: dict[str, Any]  # its arguments
    model: str = "AutoModelForCausalLM"  # class in transformers that is compared
    outputs: dict[str, str] = field(default_factory=lambda: {"logits": "logits"})  # ours -> theirs
    inputs: str = "text"  # text, pair of texts, text to text, image, image and text, speech: see make_inputs
    file: str = ""  # our file in models/
    source: str = ""  # the paper
    checks: tuple[str, ...] = ("outputs", "padding", "packing", "steps", "gradients", "export")
    note: str = ""  # what is deliberately not compared, and why


SMALL = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
MAMBA2 = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "num_heads": 12, "head_dim": 8, "state_size": 8}
BAMBA = (SMALL | HEADS) | {
    "num_hidden_layers": 4,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 32,
}
STATES = {"last_hidden_state": "last_hidden_state"}
LOGITS = {"logits": "logits"}
ENCODER_HEADS = {  # class in transformers -> what is compared
    "AutoModel": STATES | {"pooled": "pooler_output"},
    "AutoModelForMaskedLM": LOGITS,
    "AutoModelForSequenceClassification": LOGITS,
    "AutoModelForTokenClassification": LOGITS,
    "AutoModelForQuestionAnswering": {"start_logits": "start_logits", "end_logits": "end_logits"},
}
T5 = {
    "vocab_size": 101,
    "d_model": 64,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "initializer_factor": 0.4,
}
# 81 patches: beyond 64 positions
VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 36, "patch_size": 4}
TEXT = SMALL | {"num_attention_heads": 4, "max_position_embeddings": 160, "eos_token_id": 100}
PAIRS = {"text_config": TEXT, "vision_config": VISION}
SCORED = {name: name for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")}
READ = {"last_hidden_state": "last_hidden_state", "pooled": "pooler_output"}
SEES = {
    "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 20},
    "text_config": SMALL | HEADS | {"model_type": "llama"},
    "image_token_index": 100,
    "image_seq_length": 25,
}
HEARS = {"vocab_size": 101, "num_mel_bins": 20, "d_model": 48, "max_source_positions": 75, "max_target_positions": 100}
HEARS |= {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_layers": 3}
HEARS |= {"decoder_attention_heads": 3, "decoder_ffn_dim": 80, "pad_token_id": 0, "bos_token_id": 1}
HEARS |= {"eos_token_id": 2, "decoder_start_token_id": 3}
SEEN = {"last_hidden_state": "last_hidden_state", "pooled": "pooler_output"}
SEEING = ("outputs", "gradients", "export")
WRITES = {"logits": "logits", "encoder_last_hidden_state": "encoder_last_hidden_state"}
WRITING = ("outputs", "padding", "steps", "gradients", "export")

LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
}

CASES: dict[str, Case] = {
    "llama": Case("LlamaConfig", SMALL | HEADS, file="llama", source="arXiv 2302.13971"),
    "llama 3.1 rope": Case(
        "LlamaConfig",
        SMALL
        | HEADS
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        file="llama",
        source="arXiv 2407.21783",
    ),
    "mistral, window": Case(
        "MistralConfig", SMALL | HEADS | {"sliding_window": 48}, file="llama", source="arXiv 2310.06825"
    ),
    "qwen2": Case("Qwen2Config", SMALL | HEADS, file="llama", source="arXiv 2407.10671"),
    "qwen2, window": Case(
        "Qwen2Config",
        SMALL | HEADS | {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        file="llama",
        source="arXiv 2407.10671",
    ),
    "qwen3": Case(
        "Qwen3Config",
        SMALL | HEADS | {"head_dim": 32, "tie_word_embeddings": True},
        file="llama",
        source="arXiv 2505.09388",
    ),
    "gpt2": Case(
        "GPT2Config",
        {"vocab_size": 101, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96},
        file="gpt2",
        source="Radford et al. 2019",
    ),
    "gemma": Case("GemmaConfig", SMALL | HEADS | {"head_dim": 32}, file="gemma", source="arXiv 2403.08295"),
    "gemma2": Case(
        "Gemma2Config",
        SMALL
        | HEADS
        | {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 40}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        file="gemma",
        source="arXiv 2408.00118",
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        SMALL
        | HEADS
        | {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 40}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
        file="gemma",
        source="arXiv 2503.19786",
    ),
    "deepseek_v2": Case(
        "DeepseekV2Config",
        SMALL | LATENT | {"q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 1.5},
        file="deepseek",
        source="arXiv 2405.04434",
    ),
    "deepseek_v2, groups": Case(
        "DeepseekV2Config",
        SMALL | LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "attention_bias": True},
        file="deepseek",
        source="arXiv 2405.04434",
    ),
    "deepseek_v3": Case(
        "DeepseekV3Config",
        SMALL | LATENT | {"n_group": 4, "topk_group": 2},
        file="deepseek",
        source="arXiv 2412.19437",
    ),
    "deepseek_v3, yarn": Case(
        "DeepseekV3Config",
        SMALL
        | LATENT
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rms_norm_eps": 1e-3}
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
            }
        },
        file="deepseek",
        source="arXiv 2412.19437",
    ),
    "mixtral": Case(
        "MixtralConfig",
        SMALL | HEADS | {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 40},
        file="mixtral",
        source="arXiv 2401.04088",
    ),
    "qwen2_moe": Case(
        "Qwen2MoeConfig",
        SMALL
        | HEADS
        | {"num_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 2, "num_hidden_layers": 4}
        | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
        file="qwen_moe",
        source="arXiv 2407.10671",
    ),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        SMALL
        | HEADS
        | {"num_experts": 6, "num_experts_per_tok": 3, "mlp_only_layers": [1], "norm_topk_prob": True}
        | {"moe_intermediate_size": 32, "head_dim": 32, "attention_bias": True},
        file="qwen_moe",
        source="arXiv 2505.09388",
    ),
    "phi3": Case("Phi3Config", SMALL | HEADS | {"pad_token_id": 0}, file="phi3", source="arXiv 2404.14219"),
    "phi3, window, half of a head": Case(
        "Phi3Config",
        SMALL
        | HEADS
        | {"pad_token_id": 0, "sliding_window": 40, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        file="phi3",
        source="arXiv 2503.01743",
    ),
    "phi3, longrope within": Case(
        "Phi3Config",
        SMALL | HEADS | {"pad_token_id": 0, "original_max_position_embeddings": 160, "rope_parameters": LONGROPE},
        file="phi3",
        source="arXiv 2402.13753",
    ),
    "phi3, longrope beyond": Case(
        "Phi3Config",
        SMALL | HEADS | {"pad_token_id": 0, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
        file="phi3",
        source="arXiv 2402.13753",
        checks=("outputs", "padding", "gradients", "export"),
        note="the rotation of what is cached depends on the length at that time, in both",
    ),
    "mamba": Case(
        "MambaConfig",
        {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 4},
        file="mamba",
        source="arXiv 2312.00752",
    ),
    "mamba2": Case("Mamba2Config", MAMBA2 | {"n_groups": 2}, file="mamba2", source="arXiv 2405.21060"),
    "mamba2, one group, tied": Case(
        "Mamba2Config",
        MAMBA2 | {"n_groups": 1, "tie_word_embeddings": True, "time_step_limit": (0.01, 0.5), "chunk_size": 16},
        file="mamba2",
        source="arXiv 2405.21060",
    ),
    "rwkv": Case(
        "RwkvConfig",
        SMALL | {"context_length": 256, "use_cache": False},
        file="rwkv",
        source="arXiv 2305.13048",
        checks=("outputs", "packing", "steps", "gradients", "export"),
        note="padding: the reference does not use the attention mask; tests/models/test_state_decoder.py has it",
    ),
    "rwkv, 8 layers": Case(  # the reference halves its stream after six
        "RwkvConfig",
        SMALL | {"num_hidden_layers": 8, "context_length": 256, "use_cache": False},
        file="rwkv",
        source="arXiv 2305.13048",
        checks=("outputs", "export"),
        note="gradients: the reference halves weights in place in evaluation mode, and with them the gradients",
    ),
    "bamba": Case("BambaConfig", BAMBA | {"attn_layer_indices": [1, 3]}, file="hybrid", source="arXiv 2405.21060"),
    "bamba, biases": Case(
        "BambaConfig",
        BAMBA | {"attn_layer_indices": [0], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        file="hybrid",
        source="arXiv 2405.21060",
    ),
    "t5": Case(
        "T5Config",
        T5,
        model="AutoModelForSeq2SeqLM",
        outputs=WRITES,
        inputs="text to text",
        file="t5",
        source="arXiv 1910.10683",
        checks=WRITING,
    ),
    "t5, gated": Case(
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
        model="AutoModelForSeq2SeqLM",
        outputs=WRITES,
        inputs="text to text",
        file="t5",
        source="arXiv 2210.11416 (Flan-T5), 2205.05131 (UL2)",
        checks=WRITING,
    ),
    "t5, encoder": Case(
        "T5Config",
        T5,
        model="T5EncoderModel",
        outputs={"last_hidden_state": "last_hidden_state"},
        file="t5",
        source="arXiv 1910.10683",
        checks=("outputs", "padding", "gradients", "export"),
    ),
}

BERT = SMALL | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 1}

READS_PADDING = "padded on the left, the published head reads the state of padding, which differs"


def encoder_cases(
    family: str, config: str, values: dict[str, Any], source: str, *, heads: tuple[str, ...] = (), **rest: Any
) -> dict[str, Case]:
    """Return a case for the encoder and for each of its heads; ``heads`` alone where given."""
    cases = {}
    for model, outputs in ENCODER_HEADS.items():
        head = model.removeprefix("AutoModel").removeprefix("For") or "encoder"
        if heads and head not in heads:
            continue
        labels = {"num_labels": 3} if head.endswith("Classification") else {}
        details = {"file": family, "checks": ("outputs", "padding", "gradients", "export")} | rest
        wanted = STATES if head == "encoder" and details.pop("is_unpooled", False) else outputs
        details.pop("is_unpooled", None)
        name = details.pop("name", family)
        cases[f"{name}, {head}"] = Case(
            config, BERT | values | labels, model, outputs=wanted, inputs="pair of texts", source=source, **details
        )
    return cases


CASES |= encoder_cases("bert", "BertConfig", {}, "arXiv 1810.04805")
CASES |= encoder_cases("roberta", "RobertaConfig", {"type_vocab_size": 1}, "arXiv 1907.11692")
CASES |= encoder_cases(
    "roberta", "XLMRobertaConfig", {"type_vocab_size": 1}, "arXiv 1911.02116", name="xlm-roberta", heads=("MaskedLM",)
)
MODERNBERT = {"num_hidden_layers": 3, "local_attention": 24, "hidden_activation": "gelu"}
CASES |= encoder_cases(
    "modernbert",
    "ModernBertConfig",
    MODERNBERT,
    "arXiv 2412.13663",
    heads=("encoder", "MaskedLM", "TokenClassification", "QuestionAnswering"),
    is_unpooled=True,
)
CASES |= encoder_cases(
    "modernbert",
    "ModernBertConfig",
    MODERNBERT,
    "arXiv 2412.13663",
    heads=("SequenceClassification",),
    checks=("outputs", "padding right", "gradients", "export"),
    note=READS_PADDING,
)
CASES |= encoder_cases(
    "modernbert",
    "ModernBertConfig",
    MODERNBERT
    | {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False}
    | {"classifier_pooling": "mean", "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "arXiv 2412.13663",
    heads=("MaskedLM", "SequenceClassification"),
    name="modernbert, biases, mean",
)

CASES |= {
    "vit": Case(
        "ViTConfig",
        VISION,
        model="AutoModel",
        outputs=SEEN,
        inputs="image",
        file="vit",
        source="arXiv 2010.11929",
        checks=SEEING,
    ),
    "vit, classifier": Case(
        "ViTConfig",
        VISION | {"num_labels": 7, "qkv_bias": False},
        model="AutoModelForImageClassification",
        inputs="image",
        file="vit",
        source="arXiv 2010.11929",
        checks=SEEING,
    ),
    "clip": Case(
        "CLIPConfig",
        PAIRS | {"projection_dim": 40},
        model="CLIPModel",
        outputs=SCORED,
        inputs="image and text",
        file="clip",
        source="arXiv 2103.00020",
        checks=("padding", *SEEING),
    ),
    "clip, gelu, first end token": Case(
        "CLIPConfig",
        {
            "text_config": TEXT | {"hidden_act": "gelu", "eos_token_id": 2},
            "vision_config": VISION | {"hidden_act": "gelu"},
            "projection_dim": 40,
        },
        model="CLIPModel",
        outputs=SCORED,
        inputs="image and text",
        file="clip",
        source="arXiv 2103.00020",
        checks=("padding", *SEEING),
    ),
    "clip, vision": Case(
        "CLIPVisionConfig",
        VISION,
        model="CLIPVisionModel",
        outputs=SEEN,
        inputs="image",
        file="clip",
        source="arXiv 2103.00020",
        checks=SEEING,
    ),
    "siglip": Case(
        "SiglipConfig",
        {"text_config": TEXT | {"projection_size": 48}, "vision_config": VISION},
        model="SiglipModel",
        outputs=SCORED,
        inputs="image and text",
        file="siglip",
        source="arXiv 2303.15343",
        checks=("padding", *SEEING),
    ),
    "siglip, vision": Case(
        "SiglipVisionConfig",
        VISION,
        model="SiglipVisionModel",
        outputs=SEEN,
        inputs="image",
        file="siglip",
        source="arXiv 2303.15343",
        checks=SEEING,
    ),
    "llava": Case(
        "LlavaConfig",
        SEES,
        model="LlavaForConditionalGeneration",
        inputs="image in text",
        file="llava",
        source="arXiv 2310.03744",
        checks=("padding", "steps", *SEEING),
    ),
    "llava, siglip and qwen2": Case(
        "LlavaConfig",
        SEES
        | {
            "vision_config": VISION | {"model_type": "siglip_vision_model", "image_size": 20, "vision_use_head": False},
            "text_config": SMALL | HEADS | {"model_type": "qwen2", "tie_word_embeddings": True},
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
        model="LlavaForConditionalGeneration",
        inputs="image in text",
        file="llava",
        source="arXiv 2310.03744",
        checks=("padding", "steps", *SEEING),
    ),
    "whisper": Case(
        "WhisperConfig",
        HEARS,
        model="WhisperForConditionalGeneration",
        outputs=WRITES,
        inputs="speech",
        file="whisper",
        source="arXiv 2212.04356",
        checks=WRITING,
    ),
}  # of images and speech
DEBERTA_V3 = {
    **{"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 16, "share_att_key": True},
    **{"norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0},
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2}
CASES |= encoder_cases(
    "deberta",
    "DebertaV2Config",
    DEBERTA_V3,
    "arXiv 2111.09543",
    name="deberta-v3",
    heads=("encoder", "MaskedLM", "TokenClassification", "QuestionAnswering"),
    is_unpooled=True,
)
CASES |= encoder_cases(
    "deberta",
    "DebertaV2Config",
    DEBERTA_V3,
    "arXiv 2111.09543",
    name="deberta-v3",
    heads=("SequenceClassification",),
    checks=("outputs", "padding right", "gradients", "export"),
    note=READS_PADDING,
)
CASES |= encoder_cases(
    "deberta",
    "DebertaV2Config",
    DEBERTA | {"max_relative_positions": 40, "conv_kernel_size": 3, "conv_act": "gelu", "embedding_size": 48},
    "arXiv 2006.03654",
    name="deberta-v2, convolution, own projections",
    heads=("encoder", "MaskedLM"),
    is_unpooled=True,
)
CASES |= encoder_cases(
    "deberta",
    "DebertaV2Config",
    DEBERTA | {"legacy": False, "pos_att_type": ["p2c"], "position_buckets": 32, "max_relative_positions": 100},
    "arXiv 2006.03654",
    name="deberta-v2, own head",
    heads=("MaskedLM",),
)
LONGFORMER = {"attention_window": [12, 24], "type_vocab_size": 1}
CASES |= encoder_cases("longformer", "LongformerConfig", LONGFORMER, "arXiv 2004.05150")
CASES |= encoder_cases(
    "longformer",
    "LongformerConfig",
    LONGFORMER | {"attention_window": 160},
    "arXiv 2004.05150",
    name="longformer, dense",
    heads=("encoder", "SequenceClassification"),
)
BIGBIRD = {"block_size": 8, "num_random_blocks": 2, "sep_token_id": 2, "hidden_act": "gelu_new"}
CASES |= encoder_cases(
    "bigbird",
    "BigBirdConfig",
    BIGBIRD,
    "arXiv 2007.14062",
    note="in evaluation, where the published random blocks are all the first; those of training have a test",
)
CASES |= encoder_cases(
    "bigbird",
    "BigBirdConfig",
    BIGBIRD | {"attention_type": "original_full", "use_bias": False, "rescale_embeddings": True},
    "arXiv 2007.14062",
    name="bigbird, full",
    heads=("encoder", "MaskedLM"),
)


@dataclass
class Report:
    """Largest differences of one case; None: not compared."""

    name: str
    outputs: float | None = None
    padding: float | None = None
    packing: float | None = None
    steps: float | None = None
    gradients: float | None = None
    export: float | None = None

    @property
    def is_equal(self) -> bool:
        """Whether every difference is within its bound."""
        errors = {k: v for k, v in asdict(self).items() if isinstance(v, float)}
        gradients = errors.pop("gradients", 0.0)
        return all(v < MAX_ERROR for v in errors.values()) and gradients <= MAX_GRADIENT_ERROR


def make_reference(case: Case, seed: int = 0) -> Any:
    """Return the reference model with every parameter away from its first value."""
    torch.manual_seed(seed)
    config = getattr(transformers, case.config)(**case.values)
    if case.model.startswith("Auto"):
        model = getattr(transformers, case.model).from_config(config, attn_implementation="eager")
    else:
        model = getattr(transformers, case.model)(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.1 * torch.randn(buffer.shape)
    return model.eval()


def make_inputs(case: Case, config: Any, seed: int = 1) -> dict[str, Tensor]:
    """Return the arguments of a forward pass, the same for both sides."""
    generator = torch.Generator().manual_seed(seed)
    if case.inputs == "text":
        return {"input_ids": random_ids(config.vocab_size, 2, LENGTH, generator)}
    if case.inputs == "text to text":
        ids = random_ids(config.vocab_size, 2, LENGTH, generator)
        return {"input_ids": ids, "decoder_input_ids": random_ids(config.vocab_size, 2, WRITTEN, generator)}
    if case.inputs == "pair of texts":
        ids = random_ids(config.vocab_size, 2, LENGTH, generator)
        ids[:, SEPARATORS] = 2
        types = (torch.arange(LENGTH) > SEPARATORS[1]).long().expand(2, -1)
        return {"input_ids": ids} | ({"token_type_ids": types} if getattr(config, "type_vocab_size", 0) > 1 else {})
    if case.inputs == "image and text":
        ids = random_ids(TEXT["vocab_size"] - 1, 2, LENGTH, generator)
        ids[0, 105], ids[1, 95] = TEXT["eos_token_id"], TEXT["eos_token_id"]
        return {"input_ids": ids, "pixel_values": random_images(config, 2, generator)}
    if case.inputs == "image in text":  # in different rows, at different places
        ids = random_ids(config.image_token_id, 2, LENGTH, generator)
        count = config.image_seq_length
        ids[0, 42 : 42 + count] = ids[1, 44 : 44 + count] = config.image_token_id
        return {"input_ids": ids, "pixel_values": random_images(config, 2, generator)}
    if case.inputs == "speech":
        frames = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return {
            "input_features": frames,
            "decoder_input_ids": random_ids(config.vocab_size, 2, WRITTEN, generator),
        }
    if case.inputs == "image":
        return {"pixel_values": random_images(config, 2, generator)}
    raise ValueError(f"no inputs of the kind {case.inputs!r}")


def random_ids(vocab_size: int, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return token ids, (B, T); the first ten, where special tokens stand, are left out."""
    return torch.randint(10, vocab_size, (batch, length), generator=generator)


def random_images(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    """Return pixel values, (B, 3, H, W)."""
    size = getattr(config, "vision_config", config).image_size
    return torch.randn(batch, 3, size, size, generator=generator)


def run_case(name: str, folder: Path, seed: int = 0) -> Report:
    """Compare one family in every way that applies to it."""
    case = CASES[name]
    theirs = make_reference(case, seed)
    theirs.save_pretrained(folder / "theirs")
    ours: Any = load_model(folder / "theirs")
    inputs = make_inputs(case, theirs.config)
    report = Report(name)
    report.outputs = _difference(case, ours(**inputs), theirs(**inputs))
    if "gradients" in case.checks:
        report.gradients = gradient_error(case, ours, theirs, inputs)
    with torch.no_grad():
        if "padding" in case.checks or "padding right" in case.checks:
            sides = ("left", "right") if "padding" in case.checks else ("right",)
            report.padding = max(padding_error(case, ours, theirs, inputs, side) for side in sides)
        if "packing" in case.checks:
            report.packing = packing_error(ours, inputs["input_ids"])
        if "steps" in case.checks:
            report.steps = writing_error(ours, inputs) if "decoder_input_ids" in inputs else step_error(ours, inputs)
        if "export" in case.checks:
            save_model(ours, folder / "ours")
            again = type(theirs).from_pretrained(folder / "ours", attn_implementation="eager").eval()
            report.export = _difference(case, again(**inputs), theirs(**inputs), is_ours=False)
    return report


def _difference(case: Case, first: Any, second: Any, is_ours: bool = True, keep: tuple[Tensor, ...] = ()) -> float:
    worst = 0.0
    for mine, theirs in case.outputs.items():
        a, b = getattr(first, mine if is_ours else theirs), getattr(second, theirs)
        assert a is not None and a.shape == b.shape, f"{mine}: {None if a is None else a.shape} against {b.shape}"
        gap = (a - b).abs()
        for tokens in keep:
            if gap.shape[:2] == tokens.shape:
                gap = gap[tokens]
                break
        # max() passes a NaN over when it comes second, so one would look like perfect agreement.
        assert torch.isfinite(gap).all(), f"{mine}: not a number in ours or theirs"
        worst = max(worst, float(gap.max()))
    return worst


def gradient_error(case: Case, ours: Any, theirs: Any, inputs: dict[str, Tensor]) -> float:
    """Return the largest relative difference of a parameter's gradient, a published tensor at a time."""
    for model, names in ((ours, list(case.outputs)), (theirs, list(case.outputs.values()))):
        model.zero_grad()
        out = model(**inputs)
        sum(_scalar(getattr(out, name)) for name in names).backward()
    mine = {n: (torch.zeros_like(p) if p.grad is None else p.grad) for n, p in ours.named_parameters()}
    tied = ours.tied_names() if hasattr(ours, "tied_names") else {}
    packed = pack(_Untied(ours), {n: g for n, g in mine.items() if n not in tied})
    for second, first in tied.items():  # theirs may list the shared tensor under either name
        packed[to_published(ours, second)] = packed[to_published(ours, first)]
    packed |= _as_in_memory(packed)
    packed |= _as_named_by(theirs, ours, packed)
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    worst = 0.0
    assert set(wanted) <= set(packed), f"no gradient here for {sorted(set(wanted) - set(packed))[:3]}"
    for name, gradient in wanted.items():
        other = _made(packed[name])
        # A gradient that is nothing but rounding (a key's bias: softmax does not see it) has no relative error.
        size = float(gradient.norm())
        assert torch.isfinite(gradient).all() and torch.isfinite(other).all(), f"gradient of {name}: not a number"
        if size > 1e-5:
            worst = max(worst, float((other - gradient).norm()) / size)
    return worst


def _as_in_memory(packed: dict[str, Any]) -> dict[str, Tensor]:
    """Stack the experts of each layer as transformers does after reading them one by one."""
    stacks: dict[str, dict[int, dict[str, Tensor]]] = {}
    renamed: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        renamed[name] = tensor
        if ".mlp.experts." in name:
            start, _, rest = name.partition(".mlp.experts.")
            number, part, _ = rest.split(".")
            part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(part, part)
            stacks.setdefault(f"{start}.mlp.experts", {}).setdefault(int(number), {})[part] = tensor
    for name, experts in stacks.items():
        order = [experts[i] for i in sorted(experts)]
        renamed[f"{name}.gate_up_proj"] = torch.stack([torch.cat((e["gate_proj"], e["up_proj"])) for e in order])
        renamed[f"{name}.down_proj"] = torch.stack([e["down_proj"] for e in order])
    return renamed


def _as_named_by(theirs: Any, ours: Any, packed: dict[str, Any]) -> dict[str, Any]:
    """Name gradients as the reference does in memory, where that is not as in its files: by the equal parameter."""
    values = pack(ours, ours.state_dict())
    renamed = {}
    for name, parameter in theirs.named_parameters():
        if name not in packed:
            same = [n for n, v in values.items() if v.shape == parameter.shape and _made(v).equal(parameter)]
            if same:
                renamed[name] = packed[same[0]]
    return renamed


def _made(tensor: Any) -> Tensor:
    return tensor.make() if hasattr(tensor, "make") else tensor


class _Untied:
    """A model's tables without its ties: what `pack` needs to name gradients."""

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name == "tied_names":
            return lambda: {}
        return getattr(self._model, name)


def _scalar(out: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return (out * weight).sum() / out.numel() ** 0.5


def padding_error(case: Case, ours: Any, theirs: Any, inputs: dict[str, Tensor], side: str) -> float:
    """Compare the outputs at tokens when rows of several lengths are padded on one side."""
    padded = dict(inputs)
    if "input_ids" in inputs:  # sound has none: it is filled up with silence
        ids = inputs["input_ids"]
        mask = torch.ones_like(ids)
        for row, missing in enumerate((40, 25)):
            mask[row, slice(0, missing) if side == "left" else slice(ids.shape[1] - missing, None)] = 0
        padded["attention_mask"] = mask
    if case.inputs == "pair of texts":  # RoBERTa and its kin read off the ids what is padding
        padded["input_ids"] = ids.masked_fill(mask == 0, theirs.config.pad_token_id)
    if "decoder_input_ids" in inputs:  # what is read is padded, and what is written too
        written = torch.ones_like(inputs["decoder_input_ids"])
        written[0, slice(0, 15) if side == "left" else slice(WRITTEN - 15, None)] = 0
        padded["decoder_attention_mask"] = written
    mine, other = ours(**padded), theirs(**padded)
    for name in case.outputs:
        assert torch.isfinite(getattr(mine, name)).all(), f"{name} is not finite in padded rows"
    return _difference(case, mine, other, keep=tuple(m.bool() for n, m in padded.items() if n.endswith("_mask")))


def packing_error(ours: Any, ids: Tensor) -> float:
    """Compare two documents in one row with the same two alone."""
    first, second = ids[:1, :70], ids[1:2, :80]
    positions = torch.cat([torch.arange(70), torch.arange(80)])[None]
    document = torch.tensor([0] * 70 + [1] * 80)
    mask = (document[:, None] == document)[None, None]
    packed = ours(torch.cat([first, second], dim=1), positions=positions, mask=mask).logits
    alone = torch.cat([ours(first).logits, ours(second).logits], dim=1)
    return float((packed - alone).abs().max())


def writing_error(ours: Any, inputs: dict[str, Tensor]) -> float:
    """Compare the pieces that an encoder-decoder writes through a state with the whole; the input is read once."""
    read = {name: x for name, x in inputs.items() if name != "decoder_input_ids"}
    encoded = ours.encode(**read)
    ids = inputs["decoder_input_ids"]
    state = ours.new_state(batch_size=ids.shape[0])
    pieces = [ours.decode(piece, encoded, state=state) for piece in ids.split([40, 1, 1, 20, *[1] * (WRITTEN - 62)], 1)]
    assert state.length == ids.shape[1]
    return float((torch.cat(pieces, dim=1) - ours(**inputs).logits).abs().max())


def step_error(ours: Any, inputs: dict[str, Tensor]) -> float:
    """Compare pieces through a decode state, single tokens among them, with the whole sequence."""
    ids = inputs["input_ids"]
    images = {name: x for name, x in inputs.items() if name == "pixel_values"}
    state = ours.new_state(batch_size=ids.shape[0])
    pieces = []
    for piece in ids.split([70, 1, 1, 30, *[1] * (LENGTH - 102)], dim=1):
        seen = {} if pieces else images  # all images stand in the first piece
        pieces.append(ours(piece, **seen, positions=state.positions(piece.shape[1]), state=state).logits)
    assert state.length == ids.shape[1]
    return float((torch.cat(pieces, dim=1) - ours(ids, **images).logits).abs().max())


def main() -> None:
    """Run the cases and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one case by name")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    reports = []
    for name in [args.only] if args.only else CASES:
        with tempfile.TemporaryDirectory() as folder:
            reports.append(run_case(name, Path(folder)))
        print(reports[-1], "ok" if reports[-1].is_equal else "NOT EQUAL", flush=True)
    if args.json:
        figures = [asdict(r) | {"file": CASES[r.name].file, "source": CASES[r.name].source} for r in reports]
        write_result(args.json, {"cases": figures}, ("torch", "transformers"))
    sys.exit(not all(r.is_equal for r in reports))


if __name__ == "__main__":
    main()
