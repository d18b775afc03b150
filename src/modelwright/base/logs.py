"""Log lines: one logger for the house, quiet by default, with secrets masked before they are written."""

import logging
import re

_SECRET = re.compile(r"(?i)\b(sk-[\w-]{8,}|hf_\w{8,}|ghp_\w{8,}|AKIA[0-9A-Z]{12,}|bearer\s+[\w.~+/-]{8,}=*)")


def mask_secrets(text: str) -> str:
    """Return ``text`` with API keys and bearer tokens replaced.

    >>> mask_secrets("Authorization: Bearer abcdefghijkl")
    'Authorization: [secret]'
    """
    return _SECRET.sub("[secret]", text)


class _MaskingFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = mask_secrets(record.getMessage()), ()
        return True


def get_logger(name: str) -> logging.Logger:
    """Return the logger of one module; records pass through the masking filter."""
    logger = logging.getLogger(name)
    if not any(isinstance(f, _MaskingFilter) for f in logger.filters):
        logger.addFilter(_MaskingFilter())
    return logger
