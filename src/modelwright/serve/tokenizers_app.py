"""A server of the page of tokenizers alone, with no model and no documents: ``mw tokenizer page``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelwright.base.errors import ConfigError
from modelwright.serve.page_app import create_page_app
from modelwright.serve.tokenizers_api import TokenizerRoutes
from modelwright.serve.web import FastAPI

if TYPE_CHECKING:  # importing this room loads no heavy library
    from modelwright.tokenizer.bpe import Tokenizer

FIRST_FILE = "tokenizers.html"


def create_tokenizers_app(
    tokenizers: "Mapping[str, Tokenizer]", page: Path, allowed_hosts: tuple[str, ...] = ()
) -> FastAPI:
    """Return an application of the page of tokenizers alone, with no model and no documents.

    Args:
        tokenizers: By the name that the page shows.
        page: Folder of the web page's files.
        allowed_hosts: Names to be called by, beside localhost; empty off loopback: any.

    Raises:
        ConfigError: There is no tokenizer, or the folder has no page.
    """
    if not tokenizers:
        raise ConfigError("There is no tokenizer to show. Give one or more.")
    app = create_page_app("modelwright tokenizers", page, FIRST_FILE, allowed_hosts)
    TokenizerRoutes(tokenizers).install(app)
    return app
