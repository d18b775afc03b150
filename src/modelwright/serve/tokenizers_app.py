"""A server of the page of tokenizers alone, with no model and no documents: ``mw tokenizer page``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelwright.base.errors import ConfigError
from modelwright.serve.app import FrontDoor
from modelwright.serve.errors import install_handlers
from modelwright.serve.metrics import Metrics
from modelwright.serve.page import PageFile, read_page
from modelwright.serve.tokenizers_api import TokenizerRoutes
from modelwright.serve.web import FastAPI, HTTPException, Response

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
    files = read_page(page)
    app = FastAPI(title="modelwright tokenizers", docs_url=None, redoc_url=None)
    install_handlers(app)
    TokenizerRoutes(tokenizers).install(app)

    async def first() -> Response:
        return _send(files, FIRST_FILE)

    async def file(name: str) -> Response:
        return _send(files, name)

    app.add_api_route("/", first, methods=["GET"], include_in_schema=False)
    app.add_api_route("/page/{name}", file, methods=["GET"], include_in_schema=False)
    app.add_middleware(FrontDoor, metrics=Metrics(None), allowed_hosts=allowed_hosts)  # type: ignore[arg-type]
    return app


def _send(files: Mapping[str, PageFile], name: str) -> Response:
    if name not in files:
        raise HTTPException(404)
    return Response(files[name].content, media_type=files[name].media_type, headers={"cache-control": "no-cache"})
