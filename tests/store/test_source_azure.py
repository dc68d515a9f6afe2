"""az:// against Azure's own emulator, which is installed by npm; slow for that alone."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from email.utils import formatdate

import httpx
import pytest
from obstore.store import AzureStore

from adapters_store.errors import AdapterDenied
from adapters_store.limits import Limits
from adapters_store.sources.folder import FileChanged
from adapters_store.sources.remote import RemoteOptions, open_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
MIB = 1 << 20
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
QUICK = RemoteOptions(allow_private=True, attempts=2, first_backoff_s=0.01, part_bytes=MIB)


@pytest.fixture(scope="module")
def azurite(tmp_path_factory) -> Iterator[str]:
    """The emulator's endpoint; the key is the one that every emulator has."""
    folder = tmp_path_factory.mktemp("azurite")
    (folder / "package.json").write_text("{}")
    install = ["npm", "install", "--no-audit", "--no-fund", "azurite@3.37.0"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=300)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(folder / "node_modules/.bin/azurite-blob"), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--location", str(folder), "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
            time.sleep(0.1)
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        make_container(endpoint, "adapters")
        yield endpoint
    finally:
        process.terminate()
        process.wait(10)


def make_container(endpoint: str, name: str) -> None:
    """PUT it, signed with the account's key."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    lines = ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{version}", f"/{ACCOUNT}/{ACCOUNT}/{name}"]
    text = "\n".join([*lines, "restype:container"])
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
    httpx.put(f"{endpoint}/{name}?restype=container", headers=headers).raise_for_status()


def use(monkeypatch, endpoint: str, key: str = KEY) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", key)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)


async def test_resolve_fetch_and_replacement(azurite, monkeypatch, tmp_path):
    use(monkeypatch, azurite)
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": os.urandom(2 * MIB + 3)}
    store = AzureStore("adapters", client_options={"allow_http": True})
    for name, content in {**files, "adapter_model.bin": b"pickle"}.items():
        store.put(f"team/fr/{name}", content)
    source = open_source("az://adapters/team", options=QUICK)
    assert await source.names() == ["fr"]
    assert await source.resolve("nothing") is None
    version = await source.resolve("fr")
    assert version is not None
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    await source.fetch(version, fetched, Limits())
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == files
    store.put("team/fr/adapter_model.safetensors", files["adapter_model.safetensors"][::-1])
    assert await source.resolve("fr") != version
    with pytest.raises(FileChanged):
        await source.fetch(version, fetched, Limits())
    await source.close()


async def test_a_wrong_key_is_denied(azurite, monkeypatch):
    use(monkeypatch, azurite, base64.b64encode(b"another").decode())
    source = open_source("az://adapters/team", options=QUICK)
    with pytest.raises(AdapterDenied, match="access denied to az://adapters/team"):
        await source.resolve("fr")
    await source.close()


async def test_a_container_that_is_not_there_has_no_adapters(azurite, monkeypatch):
    use(monkeypatch, azurite)
    source = open_source("az://nowhere", options=QUICK)
    assert await source.resolve("fr") is None and await source.names() == []
    await source.close()


def test_the_account_must_be_given(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    monkeypatch.delenv("AZURE_STORAGE_ENDPOINT", raising=False)
    with pytest.raises(ValueError, match="AZURE_STORAGE_ACCOUNT_NAME is not set"):
        open_source("az://adapters", options=QUICK)
