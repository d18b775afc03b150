"""What the web page needs: its own files, the facts it shows, and the text of a document that an answer cites.

The page's files are read once, from a folder that the command line passes in; a document is looked up by its id in
the index. No request names a path, so no request can reach a file.
"""

import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.base.errors import ConfigError, RequestError
from modelwright.serve.served import Served
from modelwright.serve.web import FastAPI, HTTPException, JSONResponse, Request, Response

FIRST_FILE = "index.html"
NUM_EXAMPLES = 4
# Only what the page brings with it may run, load or be contacted; text can only be inserted as text.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
    ]
)


@dataclass(frozen=True)
class PageFile:
    """One file of the page, ready to send."""

    content: bytes
    media_type: str


def read_page(folder: Path) -> dict[str, PageFile]:
    """Read the files of the page, by name.

    Raises:
        ConfigError: The folder has no ``index.html``.
    """
    files = {}
    for file in sorted(Path(folder).glob("*.*")):
        kind = mimetypes.guess_type(file.name)[0] if file.is_file() else None
        if kind is not None:
            files[file.name] = PageFile(file.read_bytes(), kind)
    if FIRST_FILE not in files:
        raise ConfigError(f"The page folder {folder} has no {FIRST_FILE}. Give the folder that the package brings.")
    return files


def install_page(app: FastAPI, files: Mapping[str, PageFile], first_file: str) -> None:
    """Add the routes of the page: ``/`` sends ``first_file``, ``/page/NAME`` a file that it loads."""

    async def send(name: str = first_file) -> Response:
        if name not in files:
            raise HTTPException(404)
        return Response(files[name].content, media_type=files[name].media_type, headers={"cache-control": "no-cache"})

    async def first() -> Response:
        return await send()

    app.add_api_route("/", first, methods=["GET"], include_in_schema=False)
    app.add_api_route("/page/{name}", send, methods=["GET"], include_in_schema=False)


class PageRoutes:
    """The handlers behind the page."""

    def __init__(self, served: Served, folder: Path | None):
        self.served = served
        self.files = read_page(folder) if folder is not None else {}

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/api/info", self.info, methods=["GET"])
        app.add_api_route("/api/document", self.document, methods=["GET"])
        if self.files:
            install_page(app, self.files, FIRST_FILE)

    async def info(self) -> JSONResponse:
        """Tell who answers, from what, and what could be asked."""
        served = self.served
        index = served.index
        facts: dict[str, Any] = {
            "model": served.documents_name if index is not None else served.model_name,
            "name": served.model_name,
            "mode": served.config.answer_mode if index is not None else "chat",
            "num_documents": len(index.documents) if index is not None else 0,
            "examples": list(served.config.examples[:NUM_EXAMPLES]) or self._examples(),
        }
        return JSONResponse(facts)

    def _examples(self) -> list[str]:
        if self.served.index is None:
            return []
        titles = [d.title or d.id for d in self.served.index.documents]
        step = max(1, len(titles) // NUM_EXAMPLES)
        return [f"What is {title}?" for title in titles[::step][:NUM_EXAMPLES]]

    async def document(self, request: Request) -> JSONResponse:
        """Send the text of one indexed document."""
        if self.served.index is None:
            raise RequestError("No documents are served here.", code="document_not_found", status=404)
        id = request.query_params.get("id")
        if not id:
            raise RequestError("id is missing; give the id of a document.", param="id", code="missing_parameter")
        document = self.served.index.document(id)  # raises the 404
        return JSONResponse({"id": document.id, "title": document.title, "text": document.text})
