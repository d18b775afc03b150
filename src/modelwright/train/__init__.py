"""Changing weights: one loop, objectives that say what a step is, checkpoints, budgets."""

# What a recipe's ``method`` names: the settings it is read into, and the function that runs them.
METHODS = {
    "pretrain": "modelwright.train.pretrain:run_pretrain",
    "finetune": "modelwright.train.finetune:run_finetune",
}

METHOD_CONFIGS = {
    "pretrain": "modelwright.train.pretrain:PretrainConfig",
    "finetune": "modelwright.train.finetune:FinetuneConfig",
}
