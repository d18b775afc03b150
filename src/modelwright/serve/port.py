"""Whether a server can listen here: asked before anything heavy is loaded, so this file imports nothing heavy."""

import errno
import socket
from dataclasses import dataclass
from pathlib import Path

from modelwright.base.errors import DeviceError


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None  # a chain in PEM, for HTTPS; None: plain HTTP
    key: Path | None = None  # of the certificate; None: it stands in the same file
    head_seconds: float = 10.0  # for the head of a request to arrive

    @property
    def tls(self) -> tuple[Path, Path | None] | None:
        """The certificate and its key, if there is one."""
        return None if self.certificate is None else (self.certificate, self.key)

    @property
    def url(self) -> str:
        """How the server is reached."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.certificate is None else 'https'}://{shown}:{self.port}"


def check_port(host: str, port: int) -> None:
    """See whether a server can listen here, before anything heavy is loaded.

    Raises:
        DeviceError: The port is in use, or this machine may not listen there; the message says what to do.
    """
    if not 0 <= port <= 65535:
        raise DeviceError(f"The port is {port}; ports are 1 to 65535. Give another with --port.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = (
                f"Port {port} of {host} is in use by another program. "
                f"Stop that program, or choose another port, for example --port {port + 1}."
            )
        elif error.errno == errno.EACCES:
            message = f"Port {port} of {host} needs privileges that this user lacks. Choose one above 1023 with --port."
        else:
            message = f"This machine cannot listen on {host}, port {port}: {error}. Check the address and the port."
        raise DeviceError(message) from error
