"""Debian's radosgw as a real S3 server: one monitor, one OSD in memory and one gateway, from packages that are
downloaded and extracted into build/radosgw, never installed.

    monitor <-- OSD (memstore) <-- radosgw <-- S3 requests          all on 127.0.0.1, no authentication but S3's
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from s3_servers import ACCESS_KEY, SECRET_KEY, free_port, make_bucket, wait_until_answering

CACHE = Path(__file__).parent.parent / "build" / "radosgw"
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common")
CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
erasure_code_dir = {lib}/ceph/erasure-code
plugin_dir = {lib}/ceph
osd_class_dir = {lib}/rados-classes
run_dir = {folder}
crash_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_run_sync_thread = false
"""


@contextlib.contextmanager
def radosgw_server() -> Iterator[str]:
    """URL of a radosgw with the bucket `runs` in it; everything it started has ended afterwards.

    Raises RuntimeError or CalledProcessError when it cannot be downloaded or started.
    """
    root = extracted()
    # Ceph's sockets do not fit a long path such as pytest's.
    folder = Path(tempfile.mkdtemp(prefix="rgw-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        yield _start(root, folder, stack)


def extracted() -> Path:
    """The folder the packages are extracted in; filled on the first call (66 MB to download, about 15 s)."""
    root = CACHE / "root"
    if not root.exists():
        debs, half = CACHE / "debs", CACHE / "half"
        shutil.rmtree(half, ignore_errors=True)
        (debs / "partial").mkdir(parents=True, exist_ok=True)
        download = [
            "apt-get",
            "install",
            "--download-only",
            "--yes",
            "--no-install-recommends",
            "--reinstall",
            "-o",
            "Debug::NoLocking=true",
            "-o",
            f"Dir::Cache::archives={debs}",
            *PACKAGES,
        ]
        result = subprocess.run(download, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                f"the packages of radosgw cannot be downloaded:\n{result.stderr[-1000:]}\nExpected Debian 12 with "
                "apt-get and its package lists; `apt-get update` refreshes them."
            )
        for deb in debs.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(deb), str(half)], check=True)
        half.rename(root)
    return root


def _start(root: Path, folder: Path, stack: contextlib.ExitStack) -> str:
    lib, port, mon_port, fsid = root / "usr/lib/x86_64-linux-gnu", free_port(), free_port(), uuid.uuid4()
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    configuration = folder / "ceph.conf"
    configuration.write_text(
        CONFIGURATION.format(fsid=fsid, mon_port=mon_port, port=port, lib=lib, folder=folder), encoding="ascii"
    )
    environment = {
        "PATH": f"{root}/usr/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{root}/lib/x86_64-linux-gnu:{lib}:{lib}/ceph",
        "PYTHONPATH": f"{root}/usr/lib/python3/dist-packages",
    }

    def run(program: str, *arguments: str) -> None:
        result = subprocess.run(
            [f"{root}/usr/bin/{program}", *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        if result.returncode:
            raise RuntimeError(f"{program} failed with status {result.returncode}:\n{result.stderr[-1500:]}")

    def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (folder / f"{program}.out").open("wb") as output:
            process = subprocess.Popen(
                [f"{root}/usr/bin/{program}", "-c", str(configuration), "-f", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        stack.callback(_end, process)
        return process

    conf = ("-c", str(configuration))
    run("monmaptool", "--create", "--fsid", str(fsid), "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", f"{folder}/monmap")
    run("ceph-mon", *conf, "--mkfs", "-i", "a", "--monmap", f"{folder}/monmap")
    start("ceph-mon", "-i", "a")
    osd = str(uuid.uuid4())
    # Debian's own interpreter: the bindings in the packages are built for it.
    subprocess.run(
        ["/usr/bin/python3", f"{root}/usr/bin/ceph", *conf, "--connect-timeout", "30", "osd", "new", osd],
        env=environment,
        check=True,
        capture_output=True,
        timeout=60,
    )
    run("ceph-osd", *conf, "--mkfs", "-i", "0", "--osd-uuid", osd)
    for _ in range(5):
        # As systemd would: it ends with 'wrong fsid' when it asks before the monitor's map has come (1 start in 5).
        if _is_active(start("ceph-osd", "-i", "0"), folder / "osd.0.log"):
            break
    gateway = start("radosgw", "-n", "client.rgw")
    endpoint = f"http://127.0.0.1:{port}"
    try:
        wait_until_answering(gateway, endpoint, timeout_s=90)
    except RuntimeError as error:
        logs = "\n".join(f"{log.name}: ...{log.read_text()[-1500:]}" for log in folder.glob("*.log"))
        raise RuntimeError(f"{error}\n{logs}") from None
    run(
        "radosgw-admin",
        *conf,
        "user",
        "create",
        "--uid",
        "test",
        "--display-name",
        "test",
        "--access-key",
        ACCESS_KEY,
        "--secret-key",
        SECRET_KEY,
    )
    make_bucket(endpoint)
    return endpoint


def _is_active(osd: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until the OSD serves; False when it ends first."""
    deadline = time.monotonic() + 60
    while osd.poll() is None and time.monotonic() < deadline:
        if log.exists() and "state: booting -> active" in log.read_text():
            return True
        time.sleep(0.05)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
