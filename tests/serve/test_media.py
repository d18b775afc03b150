"""Pictures from elsewhere: what may be fetched, what is refused before a byte is sent, and what on the way."""

import asyncio
import base64
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from modelwright.base.errors import ConfigError, RequestError
from modelwright.base.types import Message
from modelwright.serve.media import MediaLimits, MediaReader, is_public, open_picture


def png(color: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def read(reader: MediaReader, *urls: str) -> list[Any]:
    message = Message("user", "look", images=tuple((0, url) for url in urls))
    (found,) = asyncio.run(reader.read([message]))
    return [image for _, image in found.images]


def refusal(reader: MediaReader, *urls: str) -> str:
    with pytest.raises(RequestError) as caught:
        read(reader, *urls)
    assert caught.value.status == 400
    return str(caught.value)


class Handler(BaseHTTPRequestHandler):
    """A host of pictures that also behaves badly."""

    seen: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["host"]))
        kind, status, body, more = "image/png", 200, png(), {}
        if self.path == "/endless":
            return self._send_endlessly()
        if self.path == "/slow":
            time.sleep(1.5)
        elif self.path.startswith("/to?"):
            status, body, more = 302, b"", {"location": self.path[4:]}
        elif self.path == "/page":
            kind, body = "text/html", b"<html>"
        elif self.path == "/gzip":
            more, body = {"content-encoding": "gzip"}, zlib.compress(b"0" * 10**6)
        elif self.path == "/missing":
            status = 404
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_endlessly(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "image/png")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"0" * 65536)
        except OSError:
            pass

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def local_reader(port: int, **limits: Any) -> MediaReader:
    """A reader for which a name stands for this machine, and this machine is allowed."""

    async def resolve(host: str, number: int) -> list[str]:
        return ["127.0.0.1"]

    hosts = [f"pictures.example:{port}"]
    return MediaReader(hosts, MediaLimits(**limits), resolve=resolve, is_allowed=lambda a: a == "127.0.0.1")


def test_a_picture_inside_the_request():
    first, second = read(MediaReader(), data_url(png("red")), data_url(png("blue")).replace("=", "%3D"))
    assert (first.size, second.size) == ((8, 6), (8, 6))
    assert first.getpixel((0, 0)) == (255, 0, 0) and second.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1",
    "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
    "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808", "2002:7f00:1::",
    "2002:0a00:0001::1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "fec0::1", "not an address", "",
])  # fmt: skip
def test_addresses_that_are_never_connected_to(address: str):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str):
    assert is_public(address)


@pytest.mark.parametrize("url", [
    "https://pictures.example/a.png", "http://127.0.0.1/a.png", "file:///etc/passwd", "/etc/passwd", "gopher://x/",
])  # fmt: skip
def test_nothing_is_fetched_unless_a_host_is_allowed(url: str):
    assert "this server fetches nothing" in refusal(MediaReader(), url)


@pytest.mark.parametrize("url", [
    "file:///etc/passwd", "ftp://pictures.example/a.png", "gopher://pictures.example:80/", "//pictures.example/a.png",
    "http://user@pictures.example/a.png", "http://pictures.example:99999/", "http://[::1/", "https:///a.png",
])  # fmt: skip
def test_other_schemes_and_broken_addresses_are_refused(url: str):
    reader = MediaReader(["pictures.example"])
    assert "scheme" in (text := refusal(reader, url)) or "no readable address" in text


@pytest.mark.parametrize("url", [
    "https://other.example/a.png", "https://pictures.example.evil.example/a.png", "https://pictures.example:8443/a.png",
    "http://pictures.example/a.png", "https://127.0.0.1/", "https://[::1]/", "https://2130706433/",
])  # fmt: skip
def test_hosts_and_ports_that_were_not_named_are_refused_before_they_are_looked_up(url: str):
    async def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("looked up")

    assert "allowed are pictures.example:443" in refusal(MediaReader(["pictures.example"], resolve=resolve), url)


@pytest.mark.parametrize("answer", [["127.0.0.1"], ["169.254.169.254"], ["::1"], ["8.8.8.8", "10.0.0.1"], []])
def test_a_name_that_stands_for_something_inside_is_refused(answer: list[str]):
    """One private address among public ones is enough; which it was is not told."""

    async def resolve(host: str, port: int) -> list[str]:
        return answer

    text = refusal(MediaReader(["pictures.example"], resolve=resolve), "https://pictures.example/a.png")
    assert "no public address" in text and not any(address in text for address in answer)


def test_a_name_that_stands_for_nothing_is_refused():
    async def resolve(host: str, port: int) -> list[str]:
        raise OSError("unknown name")

    assert "has no address" in refusal(MediaReader(["x.example"], resolve=resolve), "https://x.example/a.png")


def test_a_picture_is_fetched_from_the_address_that_was_checked(port: int):
    """The name is looked up once; the connection goes to that address and carries the name."""
    asked: list[str] = []

    async def resolve(host: str, number: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]  # a name server that changes its mind

    reader = MediaReader(
        [f"pictures.example:{port}"], resolve=resolve, is_allowed=lambda address: address == "127.0.0.1"
    )
    Handler.seen.clear()
    (image,) = read(reader, f"http://pictures.example:{port}/a.png?x=1#part")
    assert image.size == (8, 6) and asked == ["pictures.example"]
    assert Handler.seen == [("/a.png?x=1", f"pictures.example:{port}")]
    assert "no public address" in refusal(reader, f"http://pictures.example:{port}/a.png")


def test_redirects_are_followed_and_each_is_checked(port: int):
    reader = local_reader(port)
    base = f"http://pictures.example:{port}"
    assert read(reader, f"{base}/to?/a.png")[0].size == (8, 6)
    assert read(reader, f"{base}/to?{base}/a.png")[0].size == (8, 6)
    for target in (
        "http://127.0.0.1/",
        f"http://localhost:{port}/a.png",
        "http://169.254.169.254/latest",
        "//evil.example/",
    ):
        assert "allowed are" in refusal(reader, f"{base}/to?{target}")
    assert "scheme" in refusal(reader, f"{base}/to?file:///etc/passwd")
    assert "redirects more than 3 times" in refusal(reader, f"{base}/to?/to?/to?/to?/to?/a.png")


@pytest.mark.parametrize(("path", "words"), [
    ("/page", "of the type 'text/html'"), ("/gzip", "compressed"), ("/missing", "status 404"),
    ("/endless", "larger than 100,000 bytes"), ("/slow", "did not arrive within 0.5 seconds"),
])  # fmt: skip
def test_what_comes_is_held_to_type_size_and_time(port: int, path: str, words: str):
    reader = local_reader(port, max_bytes=100_000, max_seconds=0.5)
    started = time.monotonic()
    assert words in refusal(reader, f"http://pictures.example:{port}{path}")
    assert time.monotonic() - started < 5


def test_a_host_that_does_not_listen(free_port: int):
    assert "could not be fetched" in refusal(local_reader(free_port), f"http://pictures.example:{free_port}/a.png")


@pytest.mark.parametrize(("url", "words"), [
    ("data:image/png;base64,@@@", "is not base64"),
    ("data:text/plain;base64,aGk=", "no data: URL of an image"),
    ("data:image/png,abc", "no data: URL of an image"),
    ("data:image/png;base64", "no data: URL of an image"),
    (data_url(b"hello"), "cannot be read"),
    (data_url(png(size=(300, 300))[:120]), "cannot be read"),
    (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "cannot be read"),
    (data_url(b"0" * 2000), "larger than 1,000 bytes"),
])  # fmt: skip
def test_what_is_inside_is_held_to_the_same(url: str, words: str):
    assert words in refusal(MediaReader(limits=MediaLimits(max_bytes=1000)), url)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is very large."""

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0" * 10**6)) + part(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (5_000, 5_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_not_unpacked(size: tuple[int, int]):
    data = bomb(*size)
    assert len(data) < 5000
    started = time.monotonic()
    text = refusal(MediaReader(), data_url(data))
    assert "pixels; 20,000,000 are allowed" in text or "DecompressionBombError" in text
    assert time.monotonic() - started < 2


def test_a_text_that_unpacks_to_much_is_not_unpacked():
    """PNG may carry compressed texts; they are bounded by Pillow."""
    packed = b"k\0\0" + zlib.compress(b"0" * 10**8)
    whole = png()
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    data = whole[:33] + chunk + whole[33:]
    try:
        assert open_picture(data, 10**6, "x").size == (8, 6)
    except RequestError as error:
        assert "cannot be read" in str(error)


def test_too_many_pictures():
    assert "17 pictures; 16 are allowed" in refusal(MediaReader(), *[data_url(png())] * 17)


@pytest.mark.parametrize("host", ["", "*", "*.example.org", "http://x.example", "x.example/a", "user@x.example", "x:y"])
def test_hosts_are_names(host: str):
    with pytest.raises(ConfigError, match="The host of pictures is"):
        MediaReader([host])
