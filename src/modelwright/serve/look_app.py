"""A server of the page that shows optimizers, activations and attention: ``mw look page``.

Routes: GET /api/look (what there is), POST /api/look/optimizers, /api/look/activations, /api/look/attention.
"""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.base.errors import ConfigError, RequestError
from modelwright.serve.page_app import create_page_app
from modelwright.serve.web import FastAPI

if TYPE_CHECKING:  # importing this room loads no heavy library
    from torch import nn

    from modelwright.tokenizer.bpe import Tokenizer

FIRST_FILE = "look.html"
MAX_TEXT_CHARS = 2000
MAX_TOKENS = 64  # a map of more cannot be read
MAX_STEPS = 1000


class LookRoutes:
    """What the page asks for, answered from one model that is read by one request at a time."""

    def __init__(self, model: "nn.Module | None", tokenizer: "Tokenizer | None", name: str):
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._lock = threading.Lock()  # hooks of one reading must not see another

    def install(self, app: FastAPI) -> None:
        """Add the routes."""
        app.add_api_route("/api/look", self.describe, methods=["GET"])
        for kind in (self.optimizers, self.activations, self.attention):
            app.add_api_route(f"/api/look/{kind.__name__}", kind, methods=["POST"])

    def describe(self) -> dict[str, Any]:
        """Return surfaces and rules, and the model's name."""
        from modelwright.train.paths import RULES, SURFACES

        limits = {"max_text_chars": MAX_TEXT_CHARS, "max_tokens": MAX_TOKENS, "max_steps": MAX_STEPS}
        return {"model": self._name or None, "surfaces": list(SURFACES), "rules": list(RULES), **limits}

    def optimizers(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the paths over a surface, and its heights."""
        from modelwright.train.paths import RULES, SURFACES, optimizer_path, surface_heights

        surface, steps, rate = asked.get("surface", "rosenbrock"), asked.get("steps", 200), asked.get("learning_rate")
        if not isinstance(surface, str) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
            raise RequestError(f"steps is {steps!r}; it must be a whole number from 1 to {MAX_STEPS}.", param="steps")
        if rate is not None and (not isinstance(rate, (int, float)) or not 0 < rate < 1e6):
            raise RequestError(f"learning_rate is {rate!r}; it must be a number above 0.", param="learning_rate")
        if surface not in SURFACES:
            raise RequestError(f"surface is {surface!r}; known: {', '.join(SURFACES)}.", param="surface")
        x, y, z = surface_heights(surface)
        paths = {rule: optimizer_path(rule, surface, steps, rate) for rule in RULES}
        minimum = SURFACES[surface].minimum
        return {"x": x.tolist(), "y": y.tolist(), "z": z.tolist(), "paths": paths, "minimum": minimum}

    def activations(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return each layer's histogram over a text."""
        from modelwright.train.look import look_at_activations

        model, ids, tokens = self._read(asked)
        with self._lock:
            layers = look_at_activations(model, ids)
        return {"tokens": tokens, "layers": [vars(layer) for layer in layers]}

    def attention(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the weights of every head of a layer over a text."""
        from modelwright.train.look import look_at_attention

        model, ids, tokens = self._read(asked)
        with self._lock:
            maps = look_at_attention(model, ids)
        layer = asked.get("layer", 0)
        if not isinstance(layer, int) or not 0 <= layer < len(maps):
            raise RequestError(f"layer is {layer!r}; the model has 0 to {len(maps) - 1}.", param="layer")
        weights = [[[round(w, 4) for w in row] for row in head] for head in maps[layer].tolist()]
        return {"tokens": tokens, "num_layers": len(maps), "layer": layer, "heads": weights}

    def _read(self, asked: dict[str, Any]) -> Any:
        import torch

        if self._model is None or self._tokenizer is None:
            raise RequestError("No model is served here. Start `mw look page MODEL`.", status=404)
        text = asked.get("text")
        if not isinstance(text, str) or not text or len(text) > MAX_TEXT_CHARS:
            raise RequestError(f"text must be 1 to {MAX_TEXT_CHARS} characters.", param="text")
        ids = self._tokenizer.encode(text)[:MAX_TOKENS]
        return self._model, torch.tensor([ids]), [self._tokenizer.decode([one]) for one in ids]


def create_look_app(
    page: Path,
    model: "nn.Module | None" = None,
    tokenizer: "Tokenizer | None" = None,
    name: str = "",
    allowed_hosts: tuple[str, ...] = (),
) -> FastAPI:
    """Return an application of the page alone.

    Args:
        page: Folder of the web page's files.
        model: Whose activations and attention are shown; None: optimizers alone.
        tokenizer: The model's.
        name: Of the model.
        allowed_hosts: Names to be called by, beside localhost; empty off loopback: any.

    Raises:
        ConfigError: A model is given without its tokenizer.
    """
    if (model is None) != (tokenizer is None):
        raise ConfigError("A model and its tokenizer belong together. Give both or neither.")
    app = create_page_app("modelwright look", page, FIRST_FILE, allowed_hosts)
    LookRoutes(model, tokenizer, name).install(app)
    return app
