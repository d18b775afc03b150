"""Changing weights: one loop, objectives that say what a step is, checkpoints, budgets."""

# What a recipe's ``method`` names: the settings it is read into, and the function that runs them.
METHODS = {
    "pretrain": "modelwright.train.pretrain:run_pretrain",
    "finetune": "modelwright.train.finetune:run_finetune",
    "masked": "modelwright.train.masked_run:run_masked",
    "write": "modelwright.train.write:run_write",
    "classify": "modelwright.train.classify:run_classify",
    "embed": "modelwright.train.embed:run_embed",
    "forecast": "modelwright.train.forecast:run_forecast",
}

METHOD_CONFIGS = {
    "pretrain": "modelwright.train.pretrain:PretrainConfig",
    "finetune": "modelwright.train.finetune:FinetuneConfig",
    "masked": "modelwright.train.masked_run:MaskedConfig",
    "write": "modelwright.train.write:WriteConfig",
    "classify": "modelwright.train.classify:ClassifyConfig",
    "embed": "modelwright.train.embed:EmbedConfig",
    "forecast": "modelwright.train.forecast:ForecastConfig",
}

# Methods with a head of their own: what they prepare before the first step, so that it can be planned too.
PREPARED = {
    "masked": "modelwright.train.masked_run:prepare_masked",
    "write": "modelwright.train.write:prepare_write",
    "classify": "modelwright.train.classify:prepare_classify",
    "embed": "modelwright.train.embed:prepare_embed",
    "forecast": "modelwright.train.forecast:prepare_forecast",
}

# How a method is made small for `mw selfcheck`, and what is checked: each entry is one row of its answer.
SUBJECTS = {
    "pretrain": "modelwright.train.selfcheck:pretrain_subject",
    "finetune": "modelwright.train.selfcheck:finetune_subject",
    "masked": "modelwright.train.selfcheck_tasks:masked_subject",
    "write": "modelwright.train.selfcheck_tasks:write_subject",
    "classify": "modelwright.train.selfcheck_tasks:classify_subject",
    "embed": "modelwright.train.selfcheck_tasks:embed_subject",
    "forecast": "modelwright.train.selfcheck_tasks:forecast_subject",
}

CHECKS = {
    "accumulation": "modelwright.train.selfcheck:check_accumulation",
    "packing": "modelwright.train.selfcheck:check_packing",
    "resuming": "modelwright.train.selfcheck:check_resuming",
    "recomputing": "modelwright.train.selfcheck:check_recomputing",
    "pieces": "modelwright.train.selfcheck:check_pieces",
    "compiling": "modelwright.train.selfcheck:check_compiling",
    "ranks_data": "modelwright.train.selfcheck_ranks:check_data",
    "ranks_shard": "modelwright.train.selfcheck_ranks:check_shard",
    "ranks_tensor": "modelwright.train.selfcheck_ranks:check_tensor",
    "ranks_pipeline": "modelwright.train.selfcheck_ranks:check_pipeline",
    "ranks_context": "modelwright.train.selfcheck_ranks:check_context",
    "ranks_2x2": "modelwright.train.selfcheck_ranks:check_two_by_two",
}

# Services that a run's figures can go to (`tracking.to`).
TRACKERS = {
    "mlflow": "modelwright.train.tracking:MlflowSink",
    "wandb": "modelwright.train.tracking:WandbSink",
    "tensorboard": "modelwright.train.tracking:TensorBoardSink",
}

# Methods in PEFT's files, by ``peft_type``; LORA itself is in `modelwright.train.adapter`.
PEFT_FORMATS = {
    "ADALORA": {
        "write": "modelwright.train.peft_formats:write_adalora",
        "read": "modelwright.train.peft_formats:read_adalora",
    },
    "IA3": {
        "write": "modelwright.train.peft_formats:write_ia3",
        "read": "modelwright.train.peft_formats:read_ia3",
    },
    "PREFIX_TUNING": {
        "write": "modelwright.train.peft_formats:write_prefix",
        "read": "modelwright.train.peft_formats:read_prefix",
    },
    "PROMPT_TUNING": {
        "write": "modelwright.train.peft_formats:write_prompt",
        "read": "modelwright.train.peft_formats:read_prompt",
    },
    "BOTTLENECK": {
        "write": "modelwright.train.peft_formats:write_bottleneck",
        "read": "modelwright.train.peft_formats:read_bottleneck",
    },
}
