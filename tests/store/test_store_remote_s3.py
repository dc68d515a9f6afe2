"""The store over a real S3 server: found, fetched, compiled, replaced, deleted, and served on without the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterNotFound, AdapterUnavailable
from adapters_store.host import HostCache
from adapters_store.image import read_header
from adapters_store.remote_names import NamePolicy
from adapters_store.remote_tier import RemoteTier
from adapters_store.sources.remote import RemoteOptions, open_source
from adapters_store.store import AdapterStore
from tests.store.bases import peft_model
from tests.store.fault_proxy import FaultProxy, fault_proxy
from tests.store.images import Image, worst_error
from tests.store.s3_server import S3Server, s3_server
from tests.store.test_source_objects import use
from tests.store.test_store_remote import Clock, scaled

OPTIONS = RemoteOptions(attempts=2, first_backoff_s=0.01, max_backoff_s=0.05, connect_timeout_s=2, allow_private=True)


@pytest.fixture
def server(tmp_path) -> Iterator[S3Server]:
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3") as running:
        yield running


@pytest.fixture
async def proxy(server, monkeypatch) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(server.port) as running:
        use(monkeypatch, running.url)
        yield running


async def test_an_adapter_from_a_bucket(server, proxy, base, plain_adapter, tmp_path):
    files = {path.name: path.read_bytes() for path in plain_adapter.iterdir() if path.suffix != ".md"}
    files |= {"chat_template.jinja": b"hello", "optimizer.pt": b"never fetched"}
    bucket, clock = server.store("adapters"), Clock()

    def put(written: dict[str, bytes]) -> None:
        for name, content in written.items():
            bucket.put(f"team/org/fr/{name}", content)

    def open_store() -> AdapterStore:
        sources = [open_source("s3://adapters/team", options=OPTIONS)]
        tier = RemoteTier(sources, tmp_path / "cache", policy=NamePolicy(patience_s=5.0), clock=clock)
        return AdapterStore(tmp_path / "cache", base.manifest, Catalog([], ["base"], remote=tier))

    async def ensured(store: AdapterStore):
        return await store.ensure(await store.resolve("org/fr"))

    put(files)
    store = open_store()
    with pytest.raises(AdapterNotFound):
        await store.resolve("org/de")
    assert [item.name for item in await store.list()] == ["org/fr"]
    template = await store.catalog.chat_template(await store.resolve("org/fr"))
    assert template is not None and template.source == "hello"
    ref = await ensured(store)
    image = Image(read_header(Path(ref.image_path)), bytes(HostCache(1 << 20).get(ref)), base.manifest)
    assert worst_error(peft_model(base, plain_adapter), image, base) < 3e-6
    fetched = sorted(path.name for path in (tmp_path / "cache" / "raw").glob("*/*"))
    template_alone = ["chat_template.jinja", "record.json"]
    assert fetched == sorted(["adapter_config.json", "adapter_model.safetensors", *2 * template_alone])

    put(scaled(files, 2))
    clock.now += 10
    newer = await ensured(store)
    assert newer.checksum != ref.checksum and store.lookup(ref.version) == ref
    await store.close()

    proxy.always.append(("", "reset"))
    offline = open_store()
    assert await ensured(offline) == newer
    assert (offline.compiles, offline.tier().raw.fetches, offline.tier().raw.stale_uses) == (0, 0, 1)
    with pytest.raises(AdapterUnavailable):
        await offline.resolve("org/never-seen")
    await offline.close()
    proxy.always.clear()

    again = open_store()
    for name in files:
        bucket.delete(f"team/org/fr/{name}")
    with pytest.raises(AdapterNotFound):
        await ensured(again)
    await again.close()
