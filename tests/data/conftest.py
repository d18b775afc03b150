"""The default corpus, written once for all tests of the room."""

import pytest

from modelwright.data.read import read_documents
from modelwright.data.reference import write_reference


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "reference"
    write_reference(folder)
    return folder


@pytest.fixture(scope="session")
def reference_documents(reference_folder):
    return read_documents(reference_folder).documents
