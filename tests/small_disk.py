"""Disks that are really full and folders that really cannot be written, for root and for everybody else.

A body, a function of a test module, runs in a child process in a mount namespace of its own: what it mounts is seen by
no other process and is gone when it ends, however it ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.child import in_child

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000  # <sched.h>
_READ_ONLY, _REMOUNT, _RECURSIVE, _PRIVATE = 1, 32, 16384, 1 << 18  # <sys/mount.h>
_OVERRIDE, _READ_SEARCH = 1, 2  # <linux/capability.h>: what lets root ignore permission bits


def on_small_disk(folder: Path, kib: int, body: Callable[..., Any], *arguments: Any) -> Any:
    """What `body(folder, *arguments)` returns in a child while a disk of this size is mounted at `folder`.

    Skips the test where nobody may mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refusal, value = in_child(_mounted, folder, kib, body, arguments)
    if refusal:
        pytest.skip(f"a disk cannot be mounted here: {refusal}")
    return value


def _mounted(folder: Path, kib: int, body: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        _own_namespace()
        _mount("tmpfs", str(folder), "tmpfs", 0, f"size={kib}k")
    except OSError as error:
        return str(error), None
    return "", body(folder, *arguments)


def _own_namespace() -> None:
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_MOUNTS if user == 0 else _NEW_USER | _NEW_MOUNTS)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", "/", "", _RECURSIVE | _PRIVATE, "")


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    texts = [text.encode() or None for text in (source, target, kind, options)]
    _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def make_read_only(disk: Path) -> None:
    """Of a disk that `on_small_disk` mounted: nothing on it can be written any more, by root either."""
    _mount("none", str(disk), "", _REMOUNT | _READ_ONLY, "")


def make_writable(disk: Path) -> None:
    """Takes `make_read_only` back."""
    _mount("none", str(disk), "", _REMOUNT, "")


def fill(disk: Path) -> None:
    """Writes `filler` until there is not a byte left."""
    with (disk / "filler").open("ab", buffering=0) as stream:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    stream.write(b"x" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def heed_permissions() -> None:
    """Makes permission bits count for this process even if it is root's. Call it in a child: it is for ever."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    _call("capget", header, sets)
    for place in (0, 1, 2):
        sets[place] &= ~(1 << _OVERRIDE | 1 << _READ_SEARCH)
    _call("capset", header, sets)


def _call(name: str, *arguments: Any) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
