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
