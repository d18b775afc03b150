"""Which replica answers a request: the one that has the beginning of its prompt in its cache, unless it is too busy.

A request's key is how its conversation begins: tenant, model, and everything up to and with the first message of the
user, so that each later turn comes back to the blocks of the turns before, while two conversations under one system
prompt may part. Replicas are ranked by rendezvous hashing: when one comes or goes, only its own keys move. A replica
that has more than its share of the work, times a slack, is passed over for the next in rank.

Source: Thaler and Ravishankar, 1998 (highest random weight); Mirrokni, Thorup and Zadimoghaddam, 2018 (consistent
hashing with bounded loads). Not done: asking replicas what they hold.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

KEY_CHARS = 2048  # of the beginning; of a bare prompt, a quarter of them, as no turn marks where it begins to differ
SLACK = 1.25  # how much more than the mean a replica may have to do before requests pass it by
KEPT = ("/v1/responses", "/api/chats")  # what is kept in the memory of the replica that made it


def placement_key(path: str, body: Mapping[str, Any], tenant: str = "") -> str:
    """Return what decides where a request goes.

    Args:
        path: The route.
        body: The request; what is no request is refused by the replica that gets it.
        tenant: The name of the key that asks; each has a cache of its own.

    >>> talk = [{"role": "user", "content": "Hi"}]
    >>> later = [*talk, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "And?"}]
    >>> placement_key("/v1/x", {"messages": talk}) == placement_key("/v1/x", {"messages": later})
    True
    """
    kept = next((route for route in KEPT if path.startswith(route)), None)
    if kept is not None:
        return f"{kept}\n{tenant}"
    turns = body.get("messages")
    if isinstance(turns, list):
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
        beginning = json.dumps([body.get("system"), turns[: roles.index("user") + 1 if "user" in roles else 1]])
        beginning = beginning[:KEY_CHARS]
    else:
        prompt = body.get("prompt", body.get("input", body.get("query")))
        beginning = (prompt if isinstance(prompt, str) else json.dumps(prompt))[: KEY_CHARS // 4]
    return f"{tenant}\n{body.get('model')}\n{beginning}"


def is_pinned(path: str) -> bool:
    """Tell whether a request must go where its key says, however busy that replica is."""
    return path.startswith(KEPT)


def weight(key: str, replica: str) -> int:
    """Return the weight of a replica for a key; the heaviest is asked."""
    return int.from_bytes(hashlib.blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest())


def ranked(key: str, replicas: Sequence[str]) -> list[str]:
    """Return the replicas, the best for a key first.

    >>> first, *rest = ranked("a key", ["r1", "r2", "r3"])
    >>> ranked("a key", rest) == rest
    True
    """
    return sorted(replicas, key=lambda replica: weight(key, replica), reverse=True)


def placed(key: str, loads: Mapping[str, int], slack: float = SLACK) -> list[str]:
    """Return the replicas in the order in which they are to be tried.

    Those within their share stand first, by rank; of the others the least busy is the next best.

    Args:
        key: What `placement_key` returned.
        loads: The requests that each replica has now.
        slack: How far above the mean a load may be; infinite: rank alone decides.
    """
    order = ranked(key, list(loads))
    if not math.isfinite(slack) or not order:
        return order
    bound = math.ceil(slack * (sum(loads.values()) + 1) / len(loads))
    within = [replica for replica in order if loads[replica] < bound]
    return within + sorted((r for r in order if loads[r] >= bound), key=lambda replica: loads[replica])
