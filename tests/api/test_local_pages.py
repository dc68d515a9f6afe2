"""Names are given on loopback: by this machine's programs and pages, not by a site that its browser visits."""

from __future__ import annotations

import pytest

from server.api.service import ApiLimits
from tests.api.conftest import serve

HOSTS = {
    "localhost": True,
    "localhost:8000": True,
    "LOCALHOST": True,
    "app.localhost:8000": True,
    "127.0.0.1": True,
    "127.8.9.10:80": True,
    "[::1]:8000": True,
    "evil.example": False,
    "evil.example:8000": False,
    "localhost.evil.example": False,
    "127.0.0.1.evil.example": False,
    "evil.example#localhost": False,
    "localhost@evil.example": False,
    "notlocalhost": False,
    "192.168.1.5": False,
    "0.0.0.0": False,
    "[::2]": False,
    "[::1": False,
    "": False,
}
ORIGINS = {
    "http://localhost:3000": True,
    "https://127.0.0.1": True,
    "https://app.example": True,  # by --allowed-origins
    "https://app.example.evil.example": False,
    "http://app.example": False,
    "https://evil.example": False,
    "null": False,
    "": False,
}


@pytest.fixture
async def by_loopback(tokenizer, adapters_dir):
    limits = ApiLimits(allowed_origins=("https://app.example", "*"))
    options = {"may_load_adapters": True, "guards_loading": True, "limits": limits}
    async with serve(tokenizer, adapters_dir, **options) as server:
        yield server


@pytest.fixture
async def by_flag(tokenizer, adapters_dir):
    async with serve(tokenizer, adapters_dir, may_load_adapters=True) as server:
        yield server


async def statuses(served, headers: dict[str, str]) -> tuple[int, int, int]:
    """Of a load, an unload and a listing."""
    async with served.http() as http:
        load = {"lora_name": "given", "lora_path": "team/sql"}
        answers = (
            await http.post("/v1/load_lora_adapter", json=load, headers=headers),
            await http.post("/v1/unload_lora_adapter", json={"lora_name": "given"}, headers=headers),
            await http.get("/v1/adapters", headers=headers),
        )
    return tuple(answer.status_code for answer in answers)


@pytest.mark.parametrize("header", [*(("host", host) for host in HOSTS), *(("origin", origin) for origin in ORIGINS)])
async def test_who_may_give_and_take_names(by_loopback, header):
    name, value = header
    is_local = (HOSTS if name == "host" else ORIGINS)[value]
    assert await statuses(by_loopback, {name: value}) == ((200, 200, 200) if is_local else (403, 403, 200))


async def test_the_refusal_says_what_to_do(by_loopback):
    async with by_loopback.http() as http:
        body = {"lora_name": "given", "lora_path": "team/sql"}
        response = await http.post("/v1/load_lora_adapter", json=body, headers={"host": "evil.example"})
    error = response.json()["error"]
    assert error["type"] == "PermissionDeniedError"
    for part in ("host", "evil.example", "--allow-runtime-loading", "--allowed-origins"):
        assert part in error["message"]


async def test_the_flag_lets_every_name_in(by_flag):
    assert await statuses(by_flag, {"host": "lora.example", "origin": "https://other.example"}) == (200, 200, 200)
