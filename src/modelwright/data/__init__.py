"""What is learned from: reading, cleaning, removing duplicates, redaction, conversations, packing."""

# One document a file: bytes in, text out.
PARSERS = {
    ".docx": "modelwright.data.parse:parse_docx",
    ".htm": "modelwright.data.parse:parse_html",
    ".html": "modelwright.data.parse:parse_html",
    ".jpeg": "modelwright.data.parse:parse_image",
    ".jpg": "modelwright.data.parse:parse_image",
    ".md": "modelwright.data.parse:parse_markdown",
    ".pdf": "modelwright.data.parse:parse_pdf",
    ".png": "modelwright.data.parse:parse_image",
    ".tif": "modelwright.data.parse:parse_image",
    ".tiff": "modelwright.data.parse:parse_image",
    ".txt": "modelwright.data.parse:parse_text",
    ".webp": "modelwright.data.parse:parse_image",
}

# One document a row.
TABLES = {
    ".arrow": "modelwright.data.tables:read_arrow_rows",
    ".csv": "modelwright.data.tables:read_csv_rows",
    ".json": "modelwright.data.json_array:read_json_rows",
    ".jsonl": "modelwright.data.tables:read_jsonl_rows",
    ".ndjson": "modelwright.data.tables:read_jsonl_rows",
    ".parquet": "modelwright.data.tables:read_parquet_rows",
    ".tsv": "modelwright.data.tables:read_csv_rows",
}

# Files within a file.
ARCHIVES = {
    ".bz2": "modelwright.data.archive:unpack_stream",
    ".gz": "modelwright.data.archive:unpack_stream",
    ".tar": "modelwright.data.archive:unpack_tar",
    ".tar.bz2": "modelwright.data.archive:unpack_tar",
    ".tar.gz": "modelwright.data.archive:unpack_tar",
    ".tar.xz": "modelwright.data.archive:unpack_tar",
    ".tar.zst": "modelwright.data.archive:unpack_tar",
    ".tgz": "modelwright.data.archive:unpack_tar",
    ".warc": "modelwright.data.warc:unpack_warc",
    ".warc.gz": "modelwright.data.warc:unpack_warc",
    ".wet": "modelwright.data.warc:unpack_warc",
    ".wet.gz": "modelwright.data.warc:unpack_warc",
    ".xz": "modelwright.data.archive:unpack_stream",
    ".zip": "modelwright.data.archive:unpack_zip",
    ".zst": "modelwright.data.archive:unpack_stream",
}

# What a pipeline file calls a step; each target is a frozen dataclass of the step's settings (data/step.py).
STEPS: dict[str, str] = {
    "clean": "modelwright.data.clean:Clean",
    "readable": "modelwright.data.clean:Readable",
    "gopher_quality": "modelwright.data.filters:GopherQuality",
    "gopher_repetition": "modelwright.data.filters:GopherRepetition",
    "c4_lines": "modelwright.data.boilerplate:C4Lines",
    "c4_page": "modelwright.data.filters:C4Page",
    "fineweb_lines": "modelwright.data.filters:FineWebLines",
    "page_furniture": "modelwright.data.boilerplate:PageFurniture",
    "scrub": "modelwright.data.scrub:Scrub",
    "quality": "modelwright.data.quality:QualityFilter",
    "toxicity": "modelwright.data.toxicity:ToxicityFilter",
    "perplexity": "modelwright.data.quality:PerplexityFilter",
    "language": "modelwright.data.language:LanguageFilter",
    "exact_duplicates": "modelwright.data.dedup:ExactDuplicates",
    "near_duplicates": "modelwright.data.dedup:NearDuplicates",
    "repeated_pieces": "modelwright.data.dedup:RepeatedPieces",
    "repeated_sentences": "modelwright.data.sentences:RepeatedSentences",
    "repeated_passages": "modelwright.data.substring:RepeatedPassages",
    "decontaminate": "modelwright.data.decontaminate:Decontaminate",
}

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
