"""A port that is taken is found out at once, and the message says what to do."""

import socket
import subprocess
import sys

import pytest

from modelwright.base.errors import DeviceError
from modelwright.serve.port import check_port


def test_a_free_port_passes_and_stays_free():
    check_port("127.0.0.1", 0)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_port_in_use_is_refused_with_a_way_out():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(DeviceError, match=f"Port {port} of 127.0.0.1 is in use.*--port {port + 1}"):
            check_port("127.0.0.1", port)


@pytest.mark.parametrize("host, port", [("127.0.0.1", 70000), ("203.0.113.9", 8000), ("no host", 8000)])
def test_an_address_that_cannot_be_is_refused(host, port):
    with pytest.raises(DeviceError, match=str(port)):
        check_port(host, port)


def test_the_check_loads_nothing_heavy():
    code = "import sys, modelwright.serve.port; print([m for m in ('torch', 'fastapi', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
