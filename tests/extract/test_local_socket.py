"""The socket of the handover: strangers are refused, and whoever is silent keeps nobody waiting."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import pytest

from kava.errors import CaptureError
from kava.extract.vllm import local_socket
from kava.extract.vllm.handover import Address, Inbox, Outbox

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed, which only root can become")
STRANGER = """
import os, socket, sys
os.setuid(65534)
opened = socket.socket(socket.AF_UNIX)
try:
    opened.connect(sys.argv[1])
except OSError as error:
    sys.exit(type(error).__name__)
sys.exit(f"answered {opened.recv(100)!r}")
"""


@pytest.fixture
def inbox() -> Any:
    made = Inbox(lambda rank, note, data: None)
    yield made
    made.close()


def test_silent_callers_keep_no_worker_waiting(inbox: Inbox) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    for opened in silent:
        opened.connect(inbox.address.name)
    began = time.monotonic()
    outbox = Outbox(inbox.address, rank=2, ring_bytes=4096)
    inbox.wait(1, seconds=10)
    assert time.monotonic() - began < 5
    assert list(inbox.pids) == [2]
    outbox.close()
    inbox.close()  # Does not wait for the silent ones either.
    assert time.monotonic() - began < 10
    for opened in silent:
        opened.close()


def test_a_silent_caller_is_hung_up_on() -> None:
    listening = local_socket.listen()
    caller = socket.socket(socket.AF_UNIX)
    caller.connect(listening.name)
    opened, _ = listening.socket.accept()
    began = time.monotonic()
    with pytest.raises(BlockingIOError):
        local_socket.welcome(opened, b"key", seconds=0.3)
    assert 0.2 < time.monotonic() - began < 5
    for one in (caller, opened, listening.socket):
        one.close()
    listening.hide()


def test_a_worker_does_not_wait_for_a_silent_process() -> None:
    listening = local_socket.listen()
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.3 s"):
        local_socket.connect(listening.name, b"key", seconds=0.3)
    listening.socket.close()
    listening.hide()


def test_both_sides_must_know_the_key(inbox: Inbox) -> None:
    with pytest.raises((AuthenticationError, EOFError, ConnectionError)):
        Outbox(Address(inbox.address.name, b"wrong"), rank=0, ring_bytes=4096)
    listening = local_socket.listen()
    failed: list[BaseException] = []

    def greet() -> None:
        opened, _ = listening.socket.accept()
        with opened:
            try:
                local_socket.welcome(opened, b"other")
            except (AuthenticationError, EOFError, OSError) as error:
                failed.append(error)

    thread = threading.Thread(target=greet)
    thread.start()
    with pytest.raises((AuthenticationError, EOFError, ConnectionError)):
        local_socket.connect(listening.name, b"key")
    thread.join()
    assert failed
    listening.socket.close()
    listening.hide()


def test_a_connection_is_not_cut_off_when_both_are_busy(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is that of the handshake alone."""
    monkeypatch.setattr("kava.extract.vllm.handover.welcome", _hasty)
    outbox = Outbox(inbox.address, rank=0, ring_bytes=4096)
    inbox.wait(1, seconds=10)
    time.sleep(1.0)
    outbox.send("note")
    outbox.close()


def _hasty(opened: socket.socket, key: bytes) -> Any:
    return local_socket.welcome(opened, key, seconds=0.5)


def test_only_this_user_may_enter_the_folder(inbox: Inbox) -> None:
    folder = Path(inbox.address.name).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    outbox = Outbox(inbox.address, rank=0, ring_bytes=4096)
    inbox.wait(1, seconds=10)
    assert not folder.exists()  # Nobody else is to call.
    outbox.close()


def test_a_worker_that_does_not_call_is_not_waited_for(inbox: Inbox) -> None:
    with pytest.raises(CaptureError, match=r"0 of 2 workers of the engine called within 0\.2 s"):
        inbox.wait(2, seconds=0.2)


@ROOT_ONLY
def test_another_user_is_kept_out_by_the_folder_and_known_by_the_kernel(inbox: Inbox) -> None:
    run = [sys.executable, "-S", "-c", STRANGER, inbox.address.name]
    assert "PermissionError" in subprocess.run(run, capture_output=True, text=True).stderr
    folder = Path(inbox.address.name).parent
    folder.chmod(0o755)
    Path(inbox.address.name).chmod(0o777)  # As if the folder were no protection.
    found = subprocess.run(run, capture_output=True, text=True).stderr
    assert "answered b''" in found or "ConnectionResetError" in found  # Not even the challenge was sent.
    assert inbox.pids == {}


@ROOT_ONLY
def test_a_worker_does_not_talk_to_another_users_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listening = local_socket.listen()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(AuthenticationError, match="belongs to user 0, expected 12345"):
        local_socket.connect(listening.name, b"key")
    listening.socket.close()
    listening.hide()


def test_a_long_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    made = Inbox(lambda rank, note, data: None)
    assert made.address.name.startswith("/tmp/kava-")
    made.close()
    assert not Path(made.address.name).parent.exists()
