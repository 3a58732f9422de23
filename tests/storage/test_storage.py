"""What may be named as a storage, how it is shown, and who a worker is. What is kept: test_storage_contract.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from search.errors import StorageError
from search.storage.database import connect, reserved, shown
from search.storage.worker import Worker, this_worker


def test_worker_identity() -> None:
    here = this_worker()
    assert Worker.from_json(here.to_json()) == here
    assert not here.is_known_dead(one_machine=True)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    reused = replace(here, pid=child.pid, started="1")
    assert reused.is_known_dead(one_machine=True), "a process id that was given to another process"
    child.communicate(b"\n")
    assert replace(here, host="elsewhere", pid=1).is_known_dead(one_machine=True) is False
    rebooted = replace(here, boot="before")
    assert rebooted.is_known_dead(one_machine=True)
    assert not rebooted.is_known_dead(one_machine=False), "many machines call themselves localhost"
    assert not replace(here, namespace="another container").is_known_dead(one_machine=True)


def test_urls() -> None:
    for url in ("mysql://x/y", "journal.log", "redis://localhost", "sqlite:///", "sqlite:///:memory:"):
        with pytest.raises(StorageError):
            connect(url, create=True)
    for url in (
        "postgresql+psycopg://me:secret@127.0.0.1:1/x",
        "postgresql+psycopg://127.0.0.1:1/x?user=me&password=secret&sslpassword=secret",
        "postgresql://me:se@secret@host/x",
        "postgresql://me:secret",
        "postgresql://me:se/secret@host:port/x",
        "postgresql://me:se@se/secret@host/x",
        "postgresql://me:se@secret?secret@host/x",
        "postgresql://me:se@host/x?host=secret@",
        "postgresql://me:se@h/x?oauth_client_secret=secret",
        "postgresql://?user=me&password=se@secret&host=h",
        "postgresql://host?password=se@secret",
        "postgresql://host/x?password=se&secret@",
        "host=127.0.0.1 user=me password=secret",
        "host=127.0.0.1 user=me password=secret://x",
        "me:secret@host/x",
        "mysql://me:secret@host/x",
    ):
        assert "secret" not in shown(url)
    assert shown("postgresql://host/x?user=me@realm") == "postgresql://host/x?user=me%40realm"
    assert shown("postgresql://me@realm:secret@host/x?sslmode=require") == (
        "postgresql://me%40realm:***@host/x?sslmode=require"
    )
    assert shown("runs/study.db") == "runs/study.db"
    for url in (
        "postgresql://me:se@secret@host/x",
        "postgresql://me:se@se/secret@host/x",
        "postgresql://me:secret",
        "postgresql://h:port/x",
    ):
        with pytest.raises(StorageError, match="not a URL of a server, wanted postgresql") as refusal:
            connect(url, create=True)
        assert "secret" not in str(refusal.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(StorageError, match=r"pip install 'mergefront\[postgresql\]'"):
            connect("postgresql://me@127.0.0.1:2/x", create=True)
    with pytest.raises(StorageError, match="no connection") as refusal:
        connect("postgresql+psycopg://me:secret@127.0.0.1:1/x", create=True)
    assert "secret" not in str(refusal.value)


def test_a_name_is_reserved_before_its_storage_exists(tmp_path: Path) -> None:
    with reserved(f"sqlite:///{tmp_path / 'not' / 'yet' / 'study.db'}", "one") as mine:
        assert mine
