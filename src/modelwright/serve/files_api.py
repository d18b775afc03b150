"""Files that clients upload for batches, and that batches leave behind: OpenAI's ``/v1/files``.

Each file is a folder named by its random id in the server's state folder, so no name that a client gives is ever a
path. A file belongs to the key that made it; others are told that there is none.

Source: the OpenAI API reference, "Files". Not done: expiry; purposes beside batch and user_data.
"""

import re
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modelwright.base.errors import MissingExtraError, RequestError
from modelwright.base.files import read_json, write_json
from modelwright.base.progress import human_bytes
from modelwright.serve import fields
from modelwright.serve.keys import current_key
from modelwright.serve.web import FastAPI, JSONResponse, Message, Receive, Request, Response

PURPOSES = ("batch", "user_data")
META, CONTENT = "meta.json", "content"
ID = re.compile(r"file-[0-9a-f]{32}")
MAX_LISTED = 10_000
PIECE = 1 << 20


def owner() -> str | None:
    """Return the name of the key of the request that is being served."""
    key = current_key.get()
    return None if key is None else key.config.name


class FileStore:
    """The files of one server."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, purpose: str, owned_by: str | None, content: Path) -> dict[str, Any]:
        """Take a file over (it is moved) and return its description."""
        id = f"file-{secrets.token_hex(16)}"
        told = {
            "id": id,
            "object": "file",
            "bytes": content.stat().st_size,
            "created_at": int(time.time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
        }
        place = self.folder / id
        place.mkdir()
        content.replace(place / CONTENT)
        write_json(place / META, {**told, "owner": owned_by})
        return told

    def find(self, name: Any, param: str | None = None) -> dict[str, Any]:
        """Return the description of a file of this request's key.

        Raises:
            RequestError: There is none.
        """
        place = self.folder / name / META if isinstance(name, str) and ID.fullmatch(name) else None
        found = read_json(place) if place is not None and place.is_file() else None
        if found is None or found.pop("owner") != owner():
            status = 404 if param is None else 400
            raise RequestError(f"There is no file {name!r} here.", param=param, code="not_found", status=status)
        return dict(found)

    def content(self, name: str) -> Path:
        """Return where a file's bytes are."""
        return self.folder / name / CONTENT

    def list(self) -> list[dict[str, Any]]:
        """Return the descriptions of this request's key's files, newest first."""
        found = (read_json(path) for path in self.folder.glob(f"*/{META}"))
        mine = [one for one in found if one.pop("owner") == owner()]
        return sorted(mine, key=lambda one: (-one["created_at"], one["id"]))

    def delete(self, name: str) -> None:
        """Remove a file."""
        self.find(name)
        shutil.rmtree(self.folder / name)


def listed(request: Request, items: Iterable[dict[str, Any]], most: int = MAX_LISTED) -> JSONResponse:
    """Return a page of a list: ``limit`` items behind the one that ``after`` names."""
    query, rows = request.query_params, list(items)
    limit = query.get("limit", "20" if most < MAX_LISTED else str(most))
    if not limit.isdecimal() or not 1 <= int(limit) <= most:
        fields.refuse("limit", limit, f"from 1 to {most}", "invalid_value")
    if query.get("order") == "asc":
        rows.reverse()
    if (after := query.get("after")) is not None:
        place = next((i for i, row in enumerate(rows) if row["id"] == after), None)
        if place is None:
            fields.refuse("after", after, "the id of an item of the list", "invalid_value")
        rows = rows[place + 1 :]
    shown = rows[: int(limit)]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return JSONResponse({"object": "list", "data": shown, "has_more": len(rows) > len(shown), **ends})


class FileRoutes:
    """The handlers of one application."""

    def __init__(self, store: FileStore, max_bytes: int):
        self.store = store
        self.max_bytes = max_bytes

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/v1/files", self.create, methods=["POST"])
        app.add_api_route("/v1/files", self.list, methods=["GET"])
        app.add_api_route("/v1/files/{name}", self.show, methods=["GET"])
        app.add_api_route("/v1/files/{name}", self.delete, methods=["DELETE"])
        app.add_api_route("/v1/files/{name}/content", self.content, methods=["GET"])

    async def create(self, request: Request) -> JSONResponse:
        """Take an upload: a form with ``file`` and ``purpose``."""
        try:
            import python_multipart  # noqa: F401 - what the framework reads forms with
        except ImportError:
            raise MissingExtraError("python-multipart", "serve", "Uploading files") from None
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            fields.refuse("content-type", request.headers.get("content-type"), "multipart/form-data with file, purpose")
        limited = Request(request.scope, _limited(request.receive, self.max_bytes + PIECE))
        async with limited.form(max_files=1, max_fields=4) as form:
            for name in form:
                if name not in ("file", "purpose"):
                    raise RequestError(f"Unrecognized field: {name}.", param=name, code="unknown_parameter")
            purpose, sent = form.get("purpose"), form.get("file")
            if purpose not in PURPOSES:
                fields.refuse("purpose", purpose, " or ".join(PURPOSES), "invalid_value")
            if sent is None or isinstance(sent, str):
                fields.refuse("file", sent, "a file with a name")
            work = self.store.folder / f".upload-{secrets.token_hex(8)}"
            try:
                size = 0
                with open(work, "wb") as handle:
                    while piece := await sent.read(PIECE):
                        size += handle.write(piece)
                if not 1 <= size <= self.max_bytes:
                    fields.refuse("file", human_bytes(size), f"from 1 byte to {human_bytes(self.max_bytes)}")
                told = self.store.add(_shown_name(sent.filename), str(purpose), owner(), work)
            finally:
                work.unlink(missing_ok=True)
        return JSONResponse(told)

    async def list(self, request: Request) -> JSONResponse:
        """List the files of this key."""
        purpose = request.query_params.get("purpose")
        return listed(request, (f for f in self.store.list() if purpose is None or f["purpose"] == purpose))

    async def show(self, name: str) -> JSONResponse:
        """Describe one file."""
        return JSONResponse(self.store.find(name))

    async def delete(self, name: str) -> JSONResponse:
        """Remove one file."""
        self.store.delete(name)
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    async def content(self, name: str) -> Response:
        """Send the bytes of one file."""
        from starlette.responses import FileResponse

        self.store.find(name)
        return FileResponse(self.store.content(name), media_type="application/octet-stream")


def _shown_name(name: str | None) -> str:
    """Return a client's name for a file as it may be shown: its last part, printable, of 200 characters at most."""
    last = (name or "file").replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in last if c.isprintable())[:200] or "file"


def _limited(receive: Receive, most: int) -> Receive:
    """Pass a request's body on, up to ``most`` bytes."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            told = f"The upload is larger than {human_bytes(most)}, the most that this server takes. Send less."
            raise RequestError(told, code="request_too_large", status=413)
        return message

    return counted
