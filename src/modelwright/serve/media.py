"""Pictures that requests bring: inside the request as ``data:`` URLs, or fetched from hosts that the operator named.

A server that fetches what strangers name is a way into its own network, so fetching is off unless hosts are allowed,
and then held on every side: scheme and port; the host by its name; its addresses, looked up once, all of which must be
public; the connection goes to the address that was checked, so a second answer of the name server changes nothing; a
redirect is checked like a first request; no proxy, no cookies, no compressed transfer; a limit of bytes and of
seconds for all of it. Pictures are opened by a few known formats, after their size in pixels has been read from
their heads, so that a small file cannot ask for a large memory.

Source: OWASP, "Server-side request forgery prevention". Not here: videos, audio, SVG.
"""

import asyncio
import base64
import binascii
import io
import ipaddress
import ssl
import urllib.parse
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelwright.base.errors import ConfigError, MissingExtraError, RequestError
from modelwright.base.types import Message

PORTS = {"http": 80, "https": 443}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Addresses that stand for IPv4 ones inside: what they stand for is what counts.
WRAPPED = tuple(ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "fec0::/10"))
Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True)
class MediaLimits:
    """What one request may bring, and how long fetching may take."""

    max_images: int = 16
    max_bytes: int = 10 * 1024 * 1024  # of one picture, as it is sent
    max_pixels: int = 20_000_000
    max_seconds: float = 10.0  # for one picture, with all its redirects
    max_redirects: int = 3


def is_public(address: str) -> bool:
    """Tell whether an address belongs to the public network.

    >>> [is_public(a) for a in ("8.8.8.8", "127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1")]
    [True, False, False, False, False, False]
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if inner is not None:
            return is_public(str(inner)) and (found.ipv4_mapped is not None or found.is_global)
        if any(found in network for network in WRAPPED):
            return False
    return found.is_global and not found.is_multicast


async def look_up(host: str, port: int) -> list[str]:
    """Return the addresses of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, proto=6)  # TCP
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def refuse_media(url: str, why: str, do: str, code: str = "invalid_image_url") -> RequestError:
    """Return the error about a picture; of its URL only the beginning is shown."""
    shown = url if len(url) <= 80 else url[:77] + "..."
    return RequestError(f"The picture {shown!r} {why}. {do}", param="messages", code=code)


class MediaReader:
    """Turns the pictures of messages, given as URLs, into Pillow images.

    Args:
        hosts: Hosts that pictures may be fetched from: ``name`` or ``name:port``; none: nothing is fetched.
        limits: Of size and time.
        resolve: Looks a name up; for tests.
        is_allowed: Tells whether an address may be connected to; for tests.
    """

    def __init__(
        self,
        hosts: Sequence[str] = (),
        limits: MediaLimits | None = None,
        *,
        resolve: Resolve = look_up,
        is_allowed: Callable[[str], bool] = is_public,
    ):
        self.limits = limits or MediaLimits()
        self._hosts = frozenset(_host_port(host) for host in hosts)
        self._resolve, self._is_allowed = resolve, is_allowed

    async def read(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with pictures in place of their URLs.

        Raises:
            RequestError: There are too many, or one cannot be had; the message says which and why.
        """
        count = sum(len(message.images) for message in messages)
        if count > self.limits.max_images:
            raise RequestError(
                f"The request has {count} pictures; {self.limits.max_images} are allowed. Send fewer.",
                param="messages",
                code="invalid_value",
            )
        read = []
        for message in messages:  # one after the other, so that one request holds one connection
            images = [(place, await self._picture(url)) for place, url in message.images]
            read.append(replace(message, images=tuple(images)) if images else message)
        return read

    async def _picture(self, url: str) -> Any:
        if url[:5].lower() == "data:":
            data = self._inline(url)
        else:
            data = await self._fetch(url)
        return await asyncio.to_thread(open_picture, data, self.limits.max_pixels, url)

    def _inline(self, url: str) -> bytes:
        head, comma, body = url[5:].partition(",")
        kind, *more = head.lower().split(";")
        if not comma or not kind.startswith("image/") or more[-1:] != ["base64"]:
            raise refuse_media(url, "is no data: URL of an image", "Send data:image/png;base64,... or the like.")
        if len(body) > 4 * (self.limits.max_bytes + 2) // 3 + 4:
            raise self._too_large(url)
        try:
            return base64.b64decode(urllib.parse.unquote(body), validate=True)
        except (binascii.Error, ValueError) as error:
            raise refuse_media(url, f"is not base64 ({error})", "Encode its bytes as base64.") from None

    def _too_large(self, url: str) -> RequestError:
        most = f"{self.limits.max_bytes:,} bytes"
        return refuse_media(url, f"is larger than {most}, the most that is read", "Send a smaller one.")

    async def _fetch(self, url: str) -> bytes:
        if not self._hosts:
            raise refuse_media(
                url, "is an address, and this server fetches nothing", "Send the picture itself as a data: URL."
            )
        try:
            async with asyncio.timeout(self.limits.max_seconds):
                return await self._follow(url)
        except TimeoutError:
            raise refuse_media(
                url, f"did not arrive within {self.limits.max_seconds:g} seconds", "Send it as a data: URL."
            ) from None

    async def _follow(self, url: str) -> bytes:
        at = url
        for _ in range(self.limits.max_redirects + 1):
            answer = await self._get(url, at)
            if isinstance(answer, bytes):
                return answer
            at = urllib.parse.urljoin(at, answer)
        raise refuse_media(url, f"redirects more than {self.limits.max_redirects} times", "Give its final address.")

    async def _check(self, url: str, at: str) -> tuple[str, str, int, str]:
        """Return scheme, host, port and the address to connect to."""
        try:
            parts = urllib.parse.urlsplit(at)
            host, port = (parts.hostname or "").rstrip("."), parts.port or PORTS.get(parts.scheme, 0)
        except ValueError as error:
            raise refuse_media(url, f"has no readable address ({error})", "Mend the URL.") from None
        if parts.scheme not in PORTS or parts.username is not None or not host:
            raise refuse_media(
                url, f"leads to {parts.scheme or 'no'} scheme or a user name", "Use http:// or https:// and a host."
            )
        if (host, port) not in self._hosts:
            allowed = ", ".join(sorted(f"{name}:{number}" for name, number in self._hosts))
            raise refuse_media(url, f"leads to {host}:{port}; allowed are {allowed}", "Send it as a data: URL.")
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise refuse_media(url, f"is at {host}, which has no address ({error})", "Mend the URL.") from None
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            # Which addresses those are is not told: it would map the network for whoever asks.
            raise refuse_media(url, f"is at {host}, which is no public address", "Send it as a data: URL.")
        return parts.scheme, host, port, addresses[0]

    async def _get(self, url: str, at: str) -> bytes | str:
        """Return the bytes at an address, or where it redirects to."""
        http = _client_library()
        scheme, host, port, address = await self._check(url, at)
        pinned = f"[{address}]" if ":" in address else address
        parts = urllib.parse.urlsplit(at)
        target = urllib.parse.urlunsplit((scheme, f"{pinned}:{port}", parts.path or "/", parts.query, ""))
        named = f"[{host}]" if ":" in host else host
        headers = {
            "host": named if port == PORTS[scheme] else f"{named}:{port}",
            "accept": "image/*",
            "accept-encoding": "identity",
            "user-agent": "modelwright",
        }
        try:
            # The certificate is checked against the name, though the connection goes to the address.
            async with (
                http.AsyncClient(trust_env=False, follow_redirects=False, timeout=self.limits.max_seconds) as client,
                client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as answer,
            ):
                if answer.status_code in REDIRECTS and "location" in answer.headers:
                    return str(answer.headers["location"])
                return await self._body(url, answer)
        except (http.HTTPError, http.InvalidURL, ssl.SSLError, OSError) as error:
            raise refuse_media(url, f"could not be fetched ({type(error).__name__})", "Check the address.") from None

    async def _body(self, url: str, answer: Any) -> bytes:
        if answer.status_code != 200:
            raise refuse_media(url, f"is answered with status {answer.status_code}", "Check the address.")
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") or answer.headers.get("content-encoding", "identity") != "identity":
            raise refuse_media(url, f"is of the type {kind!r:.60}, or compressed", "Give the address of an image.")
        pieces, size = [], 0
        async for piece in answer.aiter_raw():
            size += len(piece)
            if size > self.limits.max_bytes:
                raise self._too_large(url)
            pieces.append(piece)
        return b"".join(pieces)


def _client_library() -> Any:
    try:
        import httpx2
    except ImportError:
        raise MissingExtraError("httpx2", "gateway", "Fetching pictures from other hosts") from None
    return httpx2


def _host_port(text: str) -> tuple[str, int]:
    """Read a host that pictures may come from; without a port it is that of https.

    >>> _host_port("Images.Example.org"), _host_port("example.org:8080")
    (('images.example.org', 443), ('example.org', 8080))
    """
    try:
        parts = urllib.parse.urlsplit(f"//{text}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.path or "*" in host or parts.username is not None:
        raise ConfigError(f"The host of pictures is {text!r}; expected a name such as images.example.org or name:port.")
    return host.rstrip("."), PORTS["https"] if port is None else port


def open_picture(data: bytes, max_pixels: int, name: str) -> Any:
    """Return the first frame of a picture, whole, as a Pillow image.

    Raises:
        RequestError: It is of no known format, has too many pixels, or is damaged.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "vision", "Reading pictures") from None
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > max_pixels:
            raise refuse_media(
                name, f"has {picture.width} x {picture.height} pixels; {max_pixels:,} are allowed", "Make it smaller."
            )
        picture.load()
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, zlib.error, Image.DecompressionBombError) as error:
        known = ", ".join(FORMATS)
        raise refuse_media(name, f"cannot be read ({type(error).__name__})", f"Send one of: {known}.") from None
    return picture
