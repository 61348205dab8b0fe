"""Files that are there as a whole or not at all, with the rights that any new file has."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which is put in place of `path` when the block is left without an error.

    It has the rights of the file that it replaces, or those of a new one (the umask). A symbolic link stays one. On
    Linux the file has no name until it is whole, so that a process that is killed leaves nothing behind; elsewhere it
    leaves a `.nngeo.*` beside it. What is no file (a device, a pipe) is written to as it is.

    Raises:
        OSError: no such folder, no right to write there, a full disk.
    """
    place = Path(os.path.realpath(path))
    mode = place.stat().st_mode if place.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        with open(place, "wb") as file:
            yield file
        return
    beside = place.with_name(f".nngeo.{os.getpid()}.{threading.get_ident()}")
    unnamed = _unnamed(place.parent)
    try:
        with open(beside, "xb") if unnamed is None else open(unnamed, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if mode is not None:
                os.chmod(beside if unnamed is None else unnamed, stat.S_IMODE(mode))
            if unnamed is not None and _named(unnamed, place):
                return
            if unnamed is not None:
                _named(unnamed, beside)
        os.replace(beside, place)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def _unnamed(folder: Path) -> int | None:
    """A descriptor of a file without a name in the folder; None where the system or file system has no such files."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:
        return None  # whatever else is wrong with the folder is said when a file with a name is opened there


def _named(descriptor: int, place: Path) -> bool:
    """Give an unnamed file a name; whether nothing had it."""
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        # With a folder's descriptor Python calls linkat, which follows the link in /proc; else link, which doesn't.
        os.link(f"/proc/self/fd/{descriptor}", place.name, dst_dir_fd=folder, follow_symlinks=True)
    except FileExistsError:
        return False
    finally:
        os.close(folder)
    return True
