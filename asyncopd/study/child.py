"""A worker process's stdin: lines to work on, and the sign that its parent is gone."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator


def lines_while_parent_lives() -> Iterator[bytes]:
    """Lines of stdin, one at a time. At the end of stdin the process ends at once, in the middle of work or not:
    either the parent closed it because there is no more work, or the parent died."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        # Not sys.stdin: a daemon thread inside its lock makes the interpreter abort at exit.
        buffer = b""
        while chunk := os.read(0, 65536):
            *whole, buffer = (buffer + chunk).split(b"\n")
            for line in whole:
                lines.put(line)
        os._exit(0)

    threading.Thread(target=read, name="read-stdin", daemon=True).start()
    while True:
        yield lines.get()
