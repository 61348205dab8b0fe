"""One thread at a time runs models here, and changes what a whole process shares."""

from __future__ import annotations

import os
import threading
from contextlib import ContextDecorator
from types import TracebackType


class Turn(ContextDecorator):
    """A lock that a thread may take several times, for a block (`with TURN:`) or a function (`@TURN`).

    While a model is run, its flags, hooks, buffers and parameters are not the user's, nor are kernels, dual numbers,
    random numbers and warnings of the process; models may share modules. So there is one lock for all of them. It is
    held for one forward or backward pass at a time, so that threads take turns within a long sweep.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):  # a process that is forked must not wait for a thread that it has not
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()


TURN = Turn()
