"""How much memory the system, the process and its container leave: of the CPU, in bytes."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

NO_LIMIT = 2**62  # what the kernel writes for none is near 2^63


def free_bytes(root: str = "/") -> int | None:
    """The least of what the system has free, what rlimits leave the process, and what control groups leave it."""
    found = [*_of_the_system(root), *_of_the_process(root), *_of_the_container(root)]
    return max(0, min(found)) if found else None


def _of_the_system(root: str) -> Iterator[int]:
    # MemAvailable counts the disk cache as free, which sysconf does not.
    available = _entry(f"{root}proc/meminfo", "MemAvailable:")
    if available is not None:
        yield available * 1024
        return
    try:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return


def _of_the_process(root: str) -> Iterator[int]:
    """What is left of the limits on the address space (`ulimit -v`) and on data (`ulimit -d`)."""
    if resource is None:
        return
    for kind, used in (("RLIMIT_AS", "VmSize:"), ("RLIMIT_DATA", "VmData:")):
        limit = resource.getrlimit(getattr(resource, kind))[0]
        if 0 <= limit < NO_LIMIT and limit != resource.RLIM_INFINITY:
            yield limit - 1024 * (_entry(f"{root}proc/self/status", used) or 0)


def _of_the_container(root: str) -> Iterator[int]:
    """What is left of the limit of every control group that the process is in, of version 2 and 1.

    The files that the kernel has cached for a group are counted as used, and can be taken from it.
    """
    for line in _lines(f"{root}proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            mount, *names = V1 if controllers else V2
            # In a container the path may be that of the host, of which only the end, or nothing, is mounted.
            while True:
                yield from _left(f"{root}{mount}{path.rstrip('/')}", *names)
                if path in ("", "/"):
                    break
                path = posixpath.dirname(path)


V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _left(group: str, limit: str, used: str, cached: str) -> Iterator[int]:
    most = _number(f"{group}/{limit}")
    if most is not None and most < NO_LIMIT:
        yield most - (_number(f"{group}/{used}") or 0) + (_entry(f"{group}/memory.stat", cached) or 0)


def _entry(path: str, key: str) -> int | None:
    """The number after a key at the beginning of a line."""
    for line in _lines(path):
        words = line.split()
        if words[:1] == [key]:
            return int(words[1])
    return None


def _number(path: str) -> int | None:
    """The number that is all of a file; None for "max", or without a file."""
    words = [line.strip() for line in _lines(path)]
    return int(words[0]) if words and words[0].isdigit() else None


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []
