"""No secret reaches a log."""

import logging

import pytest

from modelwright.base.logs import get_logger, mask_secrets


@pytest.mark.parametrize(
    "secret",
    ["sk-abcdefgh12345678", "hf_abcdefgh1234", "ghp_abcdefgh1234", "AKIAIOSFODNN7EXAMPLE", "Bearer abc.def-ghi12345=="],
)
def test_keys_are_masked_wherever_they_stand(secret: str):
    masked = mask_secrets(f"key={secret}, and again {secret}")
    assert secret not in masked
    assert masked.count("[secret]") == 2


@pytest.mark.parametrize("text", ["ask-me", "the bearer of news", "hf_x", "risk-free-of-secrets", "task-12345678-abc"])
def test_ordinary_words_are_left_alone(text: str):
    assert mask_secrets(text) == text


def test_log_arguments_are_masked_too(caplog: pytest.LogCaptureFixture):
    logger = get_logger("modelwright.test_logs")
    with caplog.at_level(logging.WARNING):
        logger.warning("called with %s and %d", "hf_abcdefgh1234", 3)
    assert caplog.messages == ["called with [secret] and 3"]


def test_asking_twice_does_not_filter_twice():
    assert get_logger("modelwright.test_logs") is get_logger("modelwright.test_logs")
    assert len(get_logger("modelwright.test_logs").filters) == 1
