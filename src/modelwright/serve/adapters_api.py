"""Adapters loaded and unloaded while the server runs, with the bodies of vLLM's routes.

A request names a folder under the one that the operator gave (``adapter_dir``), by a path that may be relative to it;
links are followed before it is looked at, so nothing else on the machine can be named. Without that folder, and with
API keys for a key without the scope ``admin``, both routes refuse.
"""

import asyncio
from pathlib import Path
from typing import Any

from modelwright.base.errors import CheckpointError, ConfigError, RequestError
from modelwright.serve import fields
from modelwright.serve.body import read_json
from modelwright.serve.served import Served
from modelwright.serve.web import FastAPI, Request, Response

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class AdapterRoutes:
    """The two routes."""

    def __init__(self, served: Served):
        self.served = served

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route(LOAD, self.load, methods=["POST"])
        app.add_api_route(UNLOAD, self.unload, methods=["POST"])

    async def load(self, request: Request) -> Response:
        """Read an adapter from a folder and serve it under a name."""
        body = await self._read(request, frozenset({"lora_name", "lora_path", "load_inplace"}))
        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        folder = self._inside(path)
        if name in self.served.adapter_names and not fields.flag(body, "load_inplace"):
            message = f"The adapter {name!r} is loaded already. Unload it, or send load_inplace: true."
            raise RequestError(message, param="lora_name", code="invalid_value")
        try:
            await asyncio.to_thread(self.served.load_adapter, name, folder)
        except ConfigError as error:
            raise RequestError(str(error), param="lora_name", code="invalid_value") from error
        except CheckpointError as error:
            raise RequestError(str(error), param="lora_path", code="invalid_adapter") from error
        return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain")

    async def unload(self, request: Request) -> Response:
        """Take an adapter's name away; requests that run with it end with it."""
        body = await self._read(request, frozenset({"lora_name", "lora_int_id"}))
        name = _text(body, "lora_name")
        assert self.served.engine is not None
        self.served.engine.engine.adapters.unload(name)
        return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")

    async def _read(self, request: Request, names: frozenset[str]) -> dict[str, Any]:
        config = self.served.config
        if config.adapter_dir is None or self.served.engine is None:
            message = "Adapters are not loaded over the network here. Start the server with --adapter-dir FOLDER."
            raise RequestError(message, code="adapters_not_managed", status=403)
        body = await read_json(request, config.max_body_bytes, config.body_timeout_seconds)
        fields.check_names(body, names)
        return body

    def _inside(self, path: str) -> Path:
        """Return the folder that a path names, which must be under the operator's."""
        assert self.served.config.adapter_dir is not None
        root = self.served.config.adapter_dir.resolve()
        try:
            folder = (root / path).resolve(strict=True)
            is_inside = folder != root and folder.is_relative_to(root) and folder.is_dir()
        except (OSError, RuntimeError, ValueError):
            is_inside = False
        if not is_inside:  # one message for what is outside and what is not there: neither is told
            message = f"lora_path is {path!r:.200}; it must be a folder under the server's adapter folder."
            raise RequestError(message, param="lora_path", code="invalid_value")
        return folder


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        fields.refuse(name, value, "a text")
    return str(value)
