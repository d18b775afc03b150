"""What is learned from: reading, cleaning, removing duplicates, redaction, conversations, packing."""

PARSERS = {
    ".docx": "modelwright.data.parse:parse_docx",
    ".htm": "modelwright.data.parse:parse_html",
    ".html": "modelwright.data.parse:parse_html",
    ".md": "modelwright.data.parse:parse_markdown",
    ".pdf": "modelwright.data.parse:parse_pdf",
    ".txt": "modelwright.data.parse:parse_text",
}

# What a pipeline file calls a step; each target is a frozen dataclass of the step's settings (data/step.py).
STEPS: dict[str, str] = {}

# Formats of post-training data, the first that fits a row's keys is taken; rivals for a key stand before plainer ones.
FORMATS = {
    "self-instruct": "modelwright.data.formats:SelfInstruct",
    "alpaca": "modelwright.data.formats:Alpaca",
    "preference-sharegpt": "modelwright.data.preference_formats:PreferenceShareGPT",
    "kto-sharegpt": "modelwright.data.preference_formats:KtoShareGPT",
    "sharegpt": "modelwright.data.formats:ShareGPT",
    "kto-messages": "modelwright.data.preference_formats:KtoMessages",
    "messages": "modelwright.data.formats:Messages",
    "preference": "modelwright.data.preference_formats:Preference",
    "preference-text": "modelwright.data.preference_formats:PreferenceText",
    "hh": "modelwright.data.preference_formats:Transcripts",
    "preference-whole": "modelwright.data.preference_formats:PreferenceWhole",
    "kto": "modelwright.data.preference_formats:Kto",
    "kto-text": "modelwright.data.preference_formats:KtoText",
    "completion": "modelwright.data.formats:PromptCompletion",
    "completion-text": "modelwright.data.formats:PromptCompletionText",
}
