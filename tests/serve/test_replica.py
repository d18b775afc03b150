"""One replica, driven as Ray drives it, without Ray's processes."""

import asyncio
import json
from typing import Any

import pytest

from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.batches_api import inner_scope

pytest.importorskip(
    "ray.serve", reason="Ray Serve is not installed: pip install 'modelwright[ray]'", exc_type=ImportError
)
pytestmark = [pytest.mark.peer, pytest.mark.service]


def test_a_request_of_a_key_is_answered_and_tells_the_front_what_it_cost(build_engine: Any):
    from modelwright.serve.replica import SPENT, Replica

    with build_engine() as engine:
        replica = Replica(lambda: create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, None))
        path = "/v1/chat/completions"
        content = "A rather long question about nothing at all, " * 2
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 3}

        async def ask(tenant: str | None) -> tuple[int, Any, int]:
            messages = [m async for m in replica.ask(inner_scope(path), json.dumps(body).encode(), "", tenant)]
            assert messages[-1]["type"] == SPENT
            whole = b"".join(m.get("body", b"") for m in messages)
            return messages[0]["status"], json.loads(whole)["usage"], messages[-1]["tokens"]

        async def main() -> None:
            for tenant, is_cached in (("ann", False), ("ann", True), ("bob", False), (None, False)):
                status, usage, spent = await ask(tenant)
                assert status == 200
                assert spent == (usage["total_tokens"] if tenant else 0)
                assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == is_cached

        asyncio.run(main())
