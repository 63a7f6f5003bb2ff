"""Whose unfinished work may be removed: of a dead process of this host alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from kava.store.maker import is_gone, mark


def test_a_mark_is_gone_with_its_process() -> None:
    code = "from kava.store.maker import mark; print(mark(), flush=True); input()"
    made = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    theirs = made.stdout.readline().strip()
    assert f"-{made.pid}-" in theirs
    assert not is_gone(theirs)
    made.communicate("\n")
    assert is_gone(theirs)
    assert not is_gone(mark())
    assert mark() != mark()


def test_an_id_that_another_has_now_is_not_the_makers() -> None:
    host, pid, birth, word = mark().rsplit("-", 3)
    assert not is_gone(f"{host}-{pid}-{birth}-{word}")
    assert is_gone(f"{host}-{pid}-{int(birth) - 1}-{word}")
    ended, found = threading.Event(), list[int]()

    def run() -> None:
        found.append(threading.get_native_id())
        ended.wait()

    # A thread's id answers like a process's.
    (thread := threading.Thread(target=run)).start()
    while not found:
        pass
    os.kill(found[0], 0)
    assert is_gone(f"{host}-{found[0]}-{int(birth) - 1}-{word}")
    ended.set()
    thread.join()


def test_of_other_hosts_and_other_names_nothing_is_known() -> None:
    _, pid, birth, word = mark().rsplit("-", 3)
    for name in (
        f"another-host-{pid}-{int(birth) - 1}-{word}",
        "",
        "nonsense",
        f"{pid}-{birth}",
        f"-{pid}-{birth}-{word}",
    ):
        assert not is_gone(name)
