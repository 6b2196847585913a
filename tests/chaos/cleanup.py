"""Leaves nothing of a chaos run, whatever ended it: Ctrl-C, SIGTERM or SIGKILL.

chaos --stdin pipe--> this process, in a session of its own
the pipe ends with chaos  -->  every process that carries its mark is ended, its disk unmounted, its folder removed
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from asyncopd.local import stack
from asyncopd.local.processes import STACK_HOME, marked_processes


@contextlib.contextmanager
def cleaned_up(folder: Path) -> Iterator[None]:
    """While the body runs, everything this process starts is marked; afterwards none of it, nor `folder`, is left."""
    home = str(folder / "home")
    inherited = {key: value for key, value in os.environ.items() if key != STACK_HOME}
    cleaner = subprocess.Popen(
        [sys.executable, "-m", "chaos.cleanup", str(folder)],
        stdin=subprocess.PIPE,
        env=inherited | {"ASYNCOPD_HOME": home, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    os.environ |= {"ASYNCOPD_HOME": home, STACK_HOME: home}
    try:
        yield
    finally:
        del os.environ[STACK_HOME]
        cleaner.communicate()


def main() -> None:
    """Wait for the end of stdin, then clean up."""
    sys.stdin.buffer.read()
    for process in marked_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()  # one that is stopped takes no SIGTERM
    stack.down(lambda line: None)
    folder = Path(sys.argv[1])
    if (folder / "disk").is_mount():
        subprocess.run(["umount", "--lazy", str(folder / "disk")], check=False)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
