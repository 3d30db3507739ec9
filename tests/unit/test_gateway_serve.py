"""The gateway's command line, as far as it goes without a service."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gateway.serve import listen, main


def test_small_chunks_are_not_held_back() -> None:
    """Without TCP_NODELAY every second chunk waits up to 40 ms for an acknowledgement."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main([f"--port={port}"]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be listened on" in error
    assert "GATEWAY_PORT=" in error


def test_no_keys_where_keys_are_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.touch()
    assert main([f"--api-keys={file}"]) == 1
    assert "holds no key" in capsys.readouterr().err
