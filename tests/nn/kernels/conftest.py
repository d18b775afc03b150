"""The compiled CPU kernels, built once for all tests; skipped where they cannot be."""

import ctypes

import pytest

from modelwright.nn.kernels import build


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    found = build.wait()
    if found is None:
        pytest.skip(f"no CPU kernels: {build.failure()}")
    return found
