"""The three special tokens of the house, and what each is for.

``<|endoftext|>`` ends a document in pre-training (the model's EOS, also used as padding); ``<|im_start|>`` and
``<|im_end|>`` stand around one turn of a conversation (ChatML). There is no beginning-of-sequence token. They get
the ids 0, 1, 2 and are never part of a merge.
"""

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

# The roles that a published tokenizer gives to its special tokens, as named in tokenizer_config.json.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
