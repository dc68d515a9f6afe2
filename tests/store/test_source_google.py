"""gs:// with a service account: each request carries a token that the account's own key signed.

Google's XML interface is S3's but for that, so behind a door that checks tokens as Google does a real S3 server is one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from adapters_store.errors import AdapterDenied
from adapters_store.limits import Limits
from adapters_store.sources.folder import FileChanged
from adapters_store.sources.remote import RemoteOptions, open_source
from tests.store.fault_proxy import FaultProxy, fault_proxy
from tests.store.s3_server import PUBLIC_BUCKET, S3Server, s3_server

MIB = 1 << 20
QUICK = RemoteOptions(allow_private=True, attempts=2, first_backoff_s=0.01, part_bytes=MIB)
EMAIL = "reader@project.iam.gserviceaccount.com"
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": os.urandom(2 * MIB + 3)}


class Account:
    """A service account: its key file, and the check of a token against its public key."""

    def __init__(self, folder: Path) -> None:
        key = folder / "account.pem"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        shown = ["openssl", "rsa", "-in", str(key), "-noout", "-modulus"]
        said = subprocess.run(shown, check=True, capture_output=True, text=True).stdout
        self.modulus = int(said.partition("=")[2], 16)
        self.file = folder / "account.json"
        account = {"type": "service_account", "client_email": EMAIL, "private_key_id": "1"}
        self.file.write_text(json.dumps({**account, "private_key": key.read_text()}))

    def admits(self, token: str) -> bool:
        """Whether the token is of this account, for reading, for now, and signed (RS256) by its key."""
        signed, _, signature = token.rpartition(".")
        head, claims = (json.loads(_decoded(part)) for part in signed.split("."))
        number = pow(int.from_bytes(_decoded(signature)), 65537, self.modulus).to_bytes(256)
        is_signed = number.startswith(b"\0\1\xff") and number.endswith(hashlib.sha256(signed.encode()).digest())
        is_now = claims["iat"] - 60 <= time.time() < claims["exp"]
        is_right = (
            head["alg"] == "RS256"
            and claims["iss"] == EMAIL
            and claims["scope"].startswith("https://www.googleapis.com/auth/")
        )
        return is_signed and is_now and is_right


def _decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("gs")) as running:
        for name, content in FILES.items():
            running.store(PUBLIC_BUCKET).put(f"team/fr/{name}", content)
        yield running


@pytest.fixture(scope="module")
def account(tmp_path_factory) -> Account:
    return Account(tmp_path_factory.mktemp("account"))


@pytest.fixture
async def door(server, account, monkeypatch) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(server.port) as proxy:
        for name in [name for name in os.environ if name.startswith("GOOGLE_")]:
            monkeypatch.delenv(name)
        proxy.admits = account.admits
        monkeypatch.setenv("GOOGLE_BASE_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize("variable", ["GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"])
async def test_every_request_carries_a_token_of_the_account(door, account, server, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, str(account.file))
    source = open_source(f"gs://{PUBLIC_BUCKET}/team", options=QUICK)
    assert await source.names() == ["fr"] and await source.resolve("nothing") is None
    version = await source.resolve("fr")
    assert version is not None
    await source.fetch(version, tmp_path, Limits())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    tokens = {re.search(rb"(?i)bearer ([^\r]*)", request.head)[1] for request in door.requests}
    assert len(door.requests) > 5 and len(tokens) == 1, "one token serves for its life"
    server.store(PUBLIC_BUCKET).put("team/fr/adapter_config.json", FILES["adapter_config.json"])
    assert await source.resolve("fr") is not None
    server.store(PUBLIC_BUCKET).put("team/fr/adapter_model.safetensors", FILES["adapter_model.safetensors"][::-1])
    with pytest.raises(FileChanged):
        await source.fetch(version, tmp_path, Limits())
    server.store(PUBLIC_BUCKET).put("team/fr/adapter_model.safetensors", FILES["adapter_model.safetensors"])
    await source.close()


async def test_another_account_is_denied(door, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(Account(tmp_path).file))
    source = open_source(f"gs://{PUBLIC_BUCKET}/team", options=QUICK)
    with pytest.raises(AdapterDenied, match=f"access denied to gs://{PUBLIC_BUCKET}/team") as denied:
        await source.resolve("fr")
    assert EMAIL not in denied.value.message and len(door.requests) == 1
    await source.close()
