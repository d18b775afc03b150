"""Many requests in a file, answered when there is room: OpenAI's ``/v1/batches``.

A batch is a JSON file in the state folder and an output that grows a line a request. A server that is killed goes on
where it stopped: what has its line is not asked again. Requests go through the very handlers that answer over HTTP,
without the network; they count for the key that made the batch, and wait while its rates are used up.

Source: the OpenAI API reference, "Batch". Not done: expiry after the completion window.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.base.files import read_json, read_jsonl, write_json
from modelwright.serve import fields
from modelwright.serve.body import read_json as read_body
from modelwright.serve.errors import describe
from modelwright.serve.files_api import FileStore, listed, owner
from modelwright.serve.keys import KeyRing, LimitError, current_key
from modelwright.serve.web import INSIDE, FastAPI, JSONResponse, Message, Request

LOG = logging.getLogger(__name__)
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
IMPLEMENTED = frozenset({"input_file_id", "endpoint", "completion_window", "metadata"})
ID = re.compile(r"batch_[0-9a-f]{32}")
MAX_REQUESTS = 50_000
MAX_ERRORS = 100
TURN_SECONDS = 0.5  # between two looks whether a key's rates let a line through
AGAIN_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)  # waits before a line is sent again, when its replica ended or none had room
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
Batch = dict[str, Any]


class BatchRunner:
    """Works on the batches of one server, one after the other, a few requests at a time."""

    def __init__(self, app: FastAPI, files: FileStore, folder: Path, keys: KeyRing | None, num_at_once: int = 8):
        self.app = app
        self.files = files
        self.folder = folder
        self.keys = keys
        self.num_at_once = num_at_once
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Begin, with what an earlier server left unfinished."""
        for path in sorted(self.folder.glob("batch_*.json"), key=lambda path: read_json(path)["created_at"]):
            if read_json(path)["status"] in UNFINISHED:
                self._queue.put_nowait(path.stem)
        self._task = asyncio.ensure_future(self._work())

    async def stop(self) -> None:
        """End at once; what is not done waits for the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def add(self, batch: Batch) -> None:
        """Take a new batch in."""
        self.save(batch)
        self._queue.put_nowait(batch["id"])

    def load(self, name: str) -> Batch:
        """Return a batch as it stands."""
        return dict(read_json(self.folder / f"{name}.json"))

    def save(self, batch: Batch) -> None:
        """Keep a batch as it stands."""
        write_json(self.folder / f"{batch['id']}.json", batch)

    async def _work(self) -> None:
        while True:
            name = await self._queue.get()
            try:
                await self._run(name)
            except Exception:
                LOG.exception("The batch %s failed for a reason of ours.", name)
                self._end(self.load(name), "failed")

    async def _run(self, name: str) -> None:
        batch = self.load(name)
        meters = self.keys.meters.values() if self.keys is not None else ()
        token = current_key.set(next((m for m in meters if m.config.name == batch["owner"]), None))
        try:
            rows = self._validate(batch)
            if rows is None:
                return
            done = {row["custom_id"]: row["response"]["status_code"] for row in self._answers(name)}
            batch["status"] = "in_progress" if batch["status"] != "cancelling" else "cancelling"
            batch["in_progress_at"] = batch["in_progress_at"] or int(time.time())
            batch["request_counts"] = {"total": len(rows), **_counts(done)}
            self.save(batch)
            await self._answer_all(name, [row for row in rows if row["custom_id"] not in done])
            self._finish(self.load(name))
        finally:
            current_key.reset(token)

    def _validate(self, batch: Batch) -> list[dict[str, Any]] | None:
        """Return the requests of a batch; None: it has failed, and says why."""
        rows: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        seen: set[str] = set()
        path = self.files.content(batch["input_file_id"])
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                problem = _problem(line, batch["endpoint"], seen, rows) if line.strip() else None
                if problem is not None:
                    errors.append({"code": problem[0], "line": number, "message": problem[1], "param": problem[2]})
                if len(rows) > MAX_REQUESTS:
                    told = f"More than {MAX_REQUESTS} requests; make several batches."
                    errors.append({"code": "too_many_tasks", "line": number, "message": told, "param": None})
                if len(errors) >= MAX_ERRORS:
                    break
        if not rows and not errors:
            errors.append({"code": "empty_file", "line": None, "message": "The file holds no request.", "param": None})
        if not errors:
            return rows
        batch["errors"] = {"object": "list", "data": errors}
        self._end(batch, "failed")
        return None

    def _answers(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the lines that are there; a last one that a kill cut off is taken away."""
        path = self.folder / f"{name}.jsonl"
        if path.is_file():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                path.write_bytes(data[:whole])
            yield from read_jsonl(path)

    async def _answer_all(self, name: str, rows: list[dict[str, Any]]) -> None:
        waiting = iter(rows)

        async def one_after_another() -> None:
            for row in waiting:
                try:
                    if not await self._get_turn(name):
                        return
                    status, body = await self._answer(name, row)
                except LimitError as error:
                    status, body = describe(error)
                request_id = secrets.token_hex(12)
                line = {
                    "id": f"batch_req_{request_id}",
                    "custom_id": row["custom_id"],
                    "response": {"status_code": status, "request_id": request_id, "body": body},
                    "error": None,
                }
                with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as handle:
                    handle.write(json.dumps(line, ensure_ascii=False) + "\n")
                batch = self.load(name)
                batch["request_counts"]["completed" if status == 200 else "failed"] += 1
                self.save(batch)
                if self.keys is not None and self.keys.has_budgets:
                    self.keys.save_usage()

        await asyncio.gather(*(one_after_another() for _ in range(self.num_at_once)))

    async def _answer(self, name: str, row: dict[str, Any]) -> tuple[int, Any]:
        """Answer one line; when the house is full, or a replica ended with it, try again a little later.

        For room it waits as long as it takes, or until the batch is cancelled. A line that six replicas have ended
        with is told so.
        """
        waits, num_lost = iter(AGAIN_SECONDS), 0
        while True:
            status, body = await call(self.app, row["url"], row["body"])
            code = body["error"]["code"] if status == 503 else None
            num_lost += code == "replica_lost"
            is_over = num_lost > len(AGAIN_SECONDS) or self.load(name)["status"] == "cancelling"
            if is_over or code not in ("overloaded", "replica_lost"):
                return status, body
            await asyncio.sleep(next(waits, AGAIN_SECONDS[-1]))

    async def _get_turn(self, name: str) -> bool:
        """Wait until the key's rates let a line through; False: the batch was cancelled.

        Raises:
            LimitError: The key's budget is spent.
        """
        meter = current_key.get()
        while self.load(name)["status"] != "cancelling":
            try:
                if meter is not None:
                    meter.take_turn()
                return True
            except LimitError as error:
                if error.code == "insufficient_quota":
                    raise
            await asyncio.sleep(TURN_SECONDS)
        return False

    def _finish(self, batch: Batch) -> None:
        """Part the answers into the output and the errors, and make files of both."""
        is_cancelled = batch["status"] == "cancelling"
        parts = {"output_file_id": lambda status: status == 200, "error_file_id": lambda status: status != 200}
        for name, belongs in parts.items():
            work = self.folder / f".{batch['id']}-{name}"
            with open(work, "w", encoding="utf-8") as handle:
                for row in self._answers(batch["id"]):
                    if belongs(row["response"]["status_code"]):
                        handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            if work.stat().st_size:
                shown = f"{batch['id']}_{name.partition('_')[0]}.jsonl"
                batch[name] = self.files.add(shown, "batch_output", batch["owner"], work)["id"]
            work.unlink(missing_ok=True)
        self._end(batch, "cancelled" if is_cancelled else "completed")
        (self.folder / f"{batch['id']}.jsonl").unlink(missing_ok=True)

    def _end(self, batch: Batch, status: str) -> None:
        batch["status"], batch[f"{status}_at"] = status, int(time.time())
        self.save(batch)


def _counts(done: dict[str, int]) -> dict[str, int]:
    completed = sum(status == 200 for status in done.values())
    return {"completed": completed, "failed": len(done) - completed}


def _problem(
    line: bytes, endpoint: str, seen: set[str], rows: list[dict[str, Any]]
) -> tuple[str, str, str | None] | None:
    """Read one line of a batch into ``rows``; return (code, message, field) where it is none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return "invalid_json_line", f"This line is not JSON: {error}.", None
    if not isinstance(row, dict):
        return "invalid_json_line", f"This line is a JSON {type(row).__name__}; expected an object.", None
    name = row.get("custom_id")
    if not isinstance(name, str) or not name:
        return "missing_required_parameter", f"custom_id is {name!r}; expected a text.", "custom_id"
    if name in seen:
        return "duplicate_custom_id", f"custom_id {name!r} stands on an earlier line.", "custom_id"
    if row.get("method", "POST") != "POST":
        return "invalid_method", f"method is {row['method']!r}; expected POST.", "method"
    if row.get("url") != endpoint:
        return "mismatched_endpoint", f"url is {row.get('url')!r}; the batch's endpoint is {endpoint}.", "url"
    if not isinstance(row.get("body"), dict):
        return "invalid_request", f"body is {row.get('body')!r:.80}; expected an object.", "body"
    if row["body"].get("stream"):
        return "invalid_request", "stream is true; answers in a batch are whole.", "body.stream"
    seen.add(name)
    rows.append(row)
    return None


async def call(app: FastAPI, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Send one request to the handlers of ``app``, past its doors, and return the status and the JSON answer."""
    data = [json.dumps(body).encode()]
    status, pieces = 500, list[bytes]()
    gone = asyncio.Event()  # never set: this client stays

    async def receive() -> Message:
        if data:
            return {"type": "http.request", "body": data.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.append(message.get("body", b""))

    try:
        await app({**inner_scope(path), "client": None, "state": {}, INSIDE: True}, receive, send)
        return status, json.loads(b"".join(pieces))
    except Exception as error:  # an answer that broke off in its middle; the other lines go on
        return describe(error)


def inner_scope(path: str) -> dict[str, Any]:
    """Return what stands before the body of a request that the server makes itself."""
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "server": None,
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip


class BatchRoutes:
    """The handlers of one application."""

    def __init__(self, runner: BatchRunner, max_body_bytes: int, body_timeout_seconds: float):
        self.runner = runner
        self.limits = (max_body_bytes, body_timeout_seconds)

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/v1/batches", self.create, methods=["POST"])
        app.add_api_route("/v1/batches", self.list, methods=["GET"])
        app.add_api_route("/v1/batches/{name}", self.show, methods=["GET"])
        app.add_api_route("/v1/batches/{name}/cancel", self.cancel, methods=["POST"])

    async def create(self, request: Request) -> JSONResponse:
        """Take a batch in."""
        body = await read_body(request, *self.limits)
        for name in body:
            if name not in IMPLEMENTED:
                raise RequestError(f"Unrecognized field: {name}.", param=name, code="unknown_parameter")
        if body.get("endpoint") not in ENDPOINTS:
            fields.refuse("endpoint", body.get("endpoint"), f"one of {', '.join(ENDPOINTS)}", "invalid_value")
        if body.get("completion_window") != "24h":
            fields.refuse("completion_window", body.get("completion_window"), '"24h"', "invalid_value")
        notes = body.get("metadata")
        if notes is not None and not (isinstance(notes, dict) and all(isinstance(v, str) for v in notes.values())):
            fields.refuse("metadata", notes, "an object of texts")
        self.runner.files.find(body.get("input_file_id"), "input_file_id")
        now = int(time.time())
        batch: Batch = {
            "id": f"batch_{secrets.token_hex(16)}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "errors": None,
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": None,
            "expires_at": now + 24 * 3600,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": notes,
            "owner": owner(),
        }
        self.runner.add(batch)
        return JSONResponse(_told(batch))

    async def list(self, request: Request) -> JSONResponse:
        """List the batches of this key, newest first."""
        found = [self.runner.load(path.stem) for path in self.runner.folder.glob("batch_*.json")]
        mine = sorted((b for b in found if b["owner"] == owner()), key=lambda b: (-b["created_at"], b["id"]))
        return listed(request, map(_told, mine), most=100)

    async def show(self, name: str) -> JSONResponse:
        """Describe one batch."""
        return JSONResponse(_told(self._find(name)))

    async def cancel(self, name: str) -> JSONResponse:
        """Stop a batch; what is answered by then is kept."""
        batch = self._find(name)
        if batch["status"] not in UNFINISHED:
            raise RequestError(f"The batch {name!r} is {batch['status']}; only a running one ends.", code="conflict")
        batch["status"], batch["cancelling_at"] = "cancelling", int(time.time())
        self.runner.save(batch)
        return JSONResponse(_told(batch))

    def _find(self, name: str) -> Batch:
        path = self.runner.folder / f"{name}.json"
        batch = self.runner.load(name) if ID.fullmatch(name) and path.is_file() else None
        if batch is None or batch["owner"] != owner():
            raise RequestError(f"There is no batch {name!r} here.", code="not_found", status=404)
        return batch


def _told(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "owner"}
