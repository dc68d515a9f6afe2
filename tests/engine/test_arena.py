"""AdapterArena with real image files, behind the real slots: the bytes, the table, the errors, the thread."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from adapters_store.compile.lora import LoweredSite
from adapters_store.errors import AdapterCorrupt, AdapterMismatch, AdapterUnavailable
from adapters_store.host import HostCache
from adapters_store.image import padded_rank, read_header, write_image
from adapters_store.manifest import BaseManifest, Site
from adapters_store.numeric import STORED_AS, narrow
from adapters_store.ref import AdapterRef
from server.adapters.arena import AdapterArena
from server.adapters.regions import ALIGNMENT
from server.adapters.slots import Acquire, AdapterSlots
from server.adapters.streams import Streams

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ABSENT = [0, 0, -1, 0, 0]


def make_manifest(dtype: str = "float32", digest: str = "base", hidden: int = 48) -> BaseManifest:
    def site(name, kind, k, n):
        return Site(name, f"model.{name}", kind, k, n, group=name, slice=0, offset=0)

    sites = (
        site("embed_tokens", "embedding", 100, hidden),
        site("0.q_proj", "linear", hidden, 64),
        site("0.down_proj", "linear", 96, hidden),
        site("1.q_proj", "linear", hidden, 64),
        site("lm_head", "head", hidden, 100),
    )
    return BaseManifest(
        digest=digest,
        name_or_path="tiny",
        model_type="llama",
        dtype=dtype,
        vocab_size=100,
        hidden_size=hidden,
        num_layers=2,
        is_tied=False,
        tokenizer_digest="",
        sites=sites,
    )


def lowered_sites(manifest: BaseManifest, seed: int) -> list[LoweredSite]:
    """A ragged subset of the sites, some with a bias, one with nothing else."""
    rng = np.random.default_rng(seed)
    stored = STORED_AS[manifest.dtype]

    def draw(*shape):
        return narrow(rng.standard_normal(shape, dtype=np.float32), stored)

    lowered = []
    for index, site in enumerate(manifest.sites):
        rank = (0, 1, 8, 13, 20)[(index + seed) % 5]
        bias = draw(site.out_features) if (index * seed) % 3 == 1 or rank == 0 else None
        if rank == 0 and seed % 2:
            continue
        a_shape = (site.in_features, rank) if site.kind == "embedding" else (rank, site.in_features)
        a, b = (draw(*a_shape), draw(site.out_features, rank)) if rank else (None, None)
        lowered.append(LoweredSite(site, rank, a, b, bias))
    return lowered


def compile_image(folder: Path, manifest: BaseManifest, seed: int, name: str = "") -> AdapterRef:
    path = folder / f"{seed}.safetensors"
    key = hashlib.sha256(f"{seed}".encode()).hexdigest()
    sites = lowered_sites(manifest, seed)
    header = write_image(path, sites, manifest, image_key=key, digest=f"d{seed}", compiler_version=1)
    return AdapterRef(
        name=name or f"adapter-{seed}",
        version="v",
        digest=f"d{seed}",
        image_key=key,
        image_path=str(path),
        data_offset=header.data_offset,
        data_bytes=header.data_bytes,
        checksum=header.checksum,
        max_rank=header.max_rank,
    )


class Rig:
    """`device` is where the arena takes it, by `streams` if it is not the CPU or something stands in for one."""

    def __init__(
        self,
        folder: Path,
        dtype: str = "float32",
        arena_bytes: int = 1 << 20,
        host: HostCache | None = None,
        device: str = "cpu",
        streams: Streams | None = None,
    ):
        self.manifest = make_manifest(dtype)
        self.folder = folder
        self.arena = AdapterArena(
            self.manifest,
            arena_bytes=arena_bytes,
            max_slots=8,
            dtype=DTYPES[dtype],
            host=host,
            device=device,
            streams=streams,
        )
        self.slots = AdapterSlots(arena_bytes=arena_bytes, max_slots=8, device=self.arena)
        self.lowered: dict[str, list[LoweredSite]] = {}

    def image(self, seed: int) -> AdapterRef:
        ref = compile_image(self.folder, self.manifest, seed)
        self.lowered[ref.image_key] = lowered_sites(self.manifest, seed)
        return ref

    def wait(self) -> list[tuple[str, Exception]]:
        failed = []
        deadline = time.monotonic() + 20
        while self.slots.num_loading:
            failed += self.slots.poll()
            assert time.monotonic() < deadline, "a load does not end"
            time.sleep(0.0005)
        return failed

    def hold(self, ref: AdapterRef) -> int:
        outcome, slot = self.slots.acquire(ref)
        if outcome is Acquire.LOADING:
            assert self.wait() == []
            outcome, slot = self.slots.acquire(ref)
        assert outcome is Acquire.READY
        return slot

    def check(self) -> None:
        """The books agree, and through the table every resident's tensors are those that were compiled."""
        self.slots.check_integrity()
        for slot, ref, _ in self.slots.residents():
            self.check_tensors(slot, ref)
        assert (self.arena.weights.table[0].cpu() == torch.tensor(ABSENT)).all()

    def check_tensors(self, slot: int, ref: AdapterRef) -> None:
        table, arena = self.arena.weights.table.cpu(), self.arena.weights.arena.cpu()
        assert self.arena.weights.slot_ranks[slot] == table[slot, :, 3].max()
        present = {lowered.site.name: lowered for lowered in self.lowered[ref.image_key]}
        for row, site in enumerate(self.manifest.sites):
            a_offset, b_offset, bias_offset, rank, stride = table[slot, row].tolist()
            lowered = present.get(site.name)
            if lowered is None:
                assert table[slot, row].tolist() == ABSENT
                continue
            assert rank == lowered.rank and stride == padded_rank(rank)
            assert (bias_offset >= 0) == (lowered.bias is not None)
            if lowered.bias is not None:
                assert self.equal(arena[bias_offset : bias_offset + site.out_features], lowered.bias)
            if rank:
                b = arena[b_offset : b_offset + site.out_features * stride].view(site.out_features, stride)
                a = arena[a_offset : a_offset + site.in_features * stride]
                a = a.view(site.in_features, stride).T if site.kind == "embedding" else a.view(stride, -1)
                assert self.equal(b[:, :rank], lowered.b) and not b[:, rank:].any()
                wanted = lowered.a.T if site.kind == "embedding" else lowered.a
                assert self.equal(a[:rank], wanted) and not a[rank:].any()

    @staticmethod
    def equal(tensor: torch.Tensor, array: np.ndarray) -> bool:
        raw = tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
        return np.array_equal(raw, np.ascontiguousarray(array).view(raw.dtype))


@pytest.mark.parametrize("has_host", [False, True], ids=["straight", "host"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_is_where_the_table_says(tmp_path, dtype, has_host):
    rig = Rig(tmp_path, dtype, host=HostCache(1 << 20) if has_host else None)
    for seed in range(1, 6):
        rig.hold(rig.image(seed))
    rig.check()
    assert rig.slots.resident == 5


def test_addresses_stay_while_images_come_and_go(tmp_path):
    rig = Rig(tmp_path)
    weights = rig.arena.weights
    addresses = weights.arena.data_ptr(), weights.table.data_ptr()
    versions = [weights.version]
    ref = rig.image(3)
    rig.slots.release(rig.hold(ref))
    versions.append(weights.version)
    rig.slots.drop(ref.image_key)
    versions.append(weights.version)
    assert versions[0] < versions[1] < versions[2]
    assert (weights.arena.data_ptr(), weights.table.data_ptr()) == addresses
    assert weights.arena.data_ptr() % ALIGNMENT == 0
    assert (weights.table == torch.tensor(ABSENT)).all()
    rig.check()


def test_moved_images_keep_their_bytes_and_their_table_follows(tmp_path):
    refs = [compile_image(tmp_path, make_manifest(), seed) for seed in range(1, 5)]
    pages = [-(-ref.data_bytes // ALIGNMENT) for ref in refs]
    rig = Rig(tmp_path, arena_bytes=sum(pages) * ALIGNMENT)
    refs = [rig.image(seed) for seed in range(1, 5)]
    held = [rig.hold(ref) for ref in refs]
    for slot in held:
        rig.slots.release(slot)
    rig.slots.drop(refs[0].image_key)
    rig.slots.drop(refs[2].image_key)
    version = rig.arena.weights.version
    newcomer = next(
        ref
        for ref in map(rig.image, range(5, 60))
        if max(pages[0], pages[2]) < -(-ref.data_bytes // ALIGNMENT) <= pages[0] + pages[2]
    )
    rig.hold(newcomer)
    assert rig.slots.moved_bytes > 0 and rig.slots.evictions == 0 and rig.slots.resident == 3
    assert rig.arena.weights.version > version
    rig.check()


def test_random_loads_evictions_and_drops_on_the_real_thread(tmp_path):
    rng = random.Random(7)
    rig = Rig(tmp_path, arena_bytes=64 * 1024, host=HostCache(64 * 1024))
    refs = [rig.image(seed) for seed in range(1, 13)]
    held: list[tuple[int, AdapterRef]] = []
    for step in range(600):
        ref = rng.choice(refs)
        action = rng.random()
        if action < 0.5 and len(held) < 4:
            outcome, slot = rig.slots.acquire(ref)
            if outcome is Acquire.READY:
                held.append((slot, ref))
        elif action < 0.6:
            rig.slots.drop(ref.image_key)
        elif action < 0.8 and held:
            rig.slots.release(held.pop(rng.randrange(len(held)))[0])
        else:
            rig.slots.prefetch(ref)
        assert rig.slots.poll() == []
        for slot, kept in held:
            rig.check_tensors(slot, kept)
        if step % 20 == 0:
            assert rig.wait() == []  # loads go on beside the other steps, and end however busy the machine is
            rig.check()
    rig.wait()
    rig.check()
    assert rig.slots.loads > 20 and rig.slots.evictions > 5


def damage(path: str, offset: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[offset] ^= 1
    Path(path).write_bytes(content)


def test_a_damaged_image_fails_alone_and_can_be_tried_again(tmp_path):
    rig = Rig(tmp_path)
    good, bad = rig.image(1), rig.image(2)
    original = Path(bad.image_path).read_bytes()
    damage(bad.image_path, bad.data_offset + bad.data_bytes // 2)
    rig.hold(good)
    used = rig.slots.bytes_used
    assert rig.slots.acquire(bad)[0] is Acquire.LOADING
    ((key, error),) = rig.wait()
    assert key == bad.image_key and isinstance(error, AdapterCorrupt) and "checksum" in str(error)
    assert rig.slots.bytes_used == used
    rig.check()
    Path(bad.image_path).write_bytes(original)
    rig.hold(bad)
    rig.check()


def test_typed_errors_for_what_is_not_the_image_of_this_base(tmp_path):
    rig = Rig(tmp_path)

    def error_of(ref: AdapterRef) -> Exception:
        assert rig.slots.acquire(ref)[0] is Acquire.LOADING
        ((_, error),) = rig.wait()
        rig.check()
        return error

    gone = rig.image(1)
    Path(gone.image_path).unlink()
    assert isinstance(error := error_of(gone), AdapterUnavailable) and "No such file" in str(error)

    truncated = rig.image(2)
    os.truncate(truncated.image_path, truncated.data_offset + truncated.data_bytes - 128)
    assert isinstance(error_of(truncated), AdapterCorrupt)

    other_base = compile_image(tmp_path, make_manifest(digest="another"), 3)
    assert isinstance(error := error_of(other_base), AdapterMismatch) and "another" in str(error)

    other_dtype = compile_image(tmp_path, make_manifest("bfloat16"), 4)
    assert isinstance(error := error_of(other_dtype), AdapterMismatch) and "bfloat16" in str(error)

    ref, impostor = rig.image(6), rig.image(7)
    Path(impostor.image_path).replace(ref.image_path)
    assert isinstance(error := error_of(ref), AdapterCorrupt) and "6.safetensors is not the image" in str(error)


@pytest.mark.parametrize("hidden", [8, 128])
@pytest.mark.parametrize("seed", range(1, 6))
def test_tensors_of_other_shapes_are_refused(tmp_path, hidden, seed):
    """The same base by digest, other shapes: a kernel would read the neighbouring tensor or adapter."""
    rig = Rig(tmp_path)
    ref = compile_image(tmp_path, make_manifest(hidden=hidden), seed)
    assert rig.slots.acquire(ref)[0] is Acquire.LOADING
    ((_, error),) = rig.wait()
    assert isinstance(error, AdapterMismatch) and "by the base's shapes" in str(error)


def test_a_site_that_the_base_lacks_is_refused(tmp_path):
    rig = Rig(tmp_path)
    manifest = make_manifest()
    more = manifest.sites + (Site("9.q_proj", "model.9", "linear", 48, 64, "9.q_proj", 0, 0),)
    wider = BaseManifest(**{**{f: getattr(manifest, f) for f in manifest.__struct_fields__}, "sites": more})
    ref = compile_image(tmp_path, wider, 3)
    assert "9.q_proj" in {site.site for site in read_header(Path(ref.image_path)).sites}
    assert rig.slots.acquire(ref)[0] is Acquire.LOADING
    ((_, error),) = rig.wait()
    assert isinstance(error, AdapterMismatch) and "9.q_proj" in str(error)


def test_phases_of_a_resident_image(tmp_path):
    rig = Rig(tmp_path)
    ref = rig.image(1)
    assert rig.arena.phases(ref.image_key) == {}
    rig.slots.release(rig.hold(ref))
    phases = rig.arena.phases(ref.image_key)
    assert list(phases) == ["queue", "header", "host", "device"] and min(phases.values()) >= 0
    assert phases["host"] > 0
    rig.slots.drop(ref.image_key)
    assert rig.arena.phases(ref.image_key) == {}


def test_check_table_sees_a_row_that_nobody_committed(tmp_path):
    rig = Rig(tmp_path)
    rig.hold(rig.image(1))
    rig.arena.weights.table[5, 0, 3] = 8
    with pytest.raises(AssertionError, match=r"slots \[5\]"):
        rig.arena.check_table(rig.slots.residents())


def test_the_engine_thread_never_waits_for_a_read(tmp_path):
    """A read that hangs (a named pipe without a writer) holds up neither acquire nor poll nor release."""
    rig = Rig(tmp_path)
    held = rig.hold(rig.image(1))
    stuck = rig.image(2)
    Path(stuck.image_path).unlink()
    os.mkfifo(stuck.image_path)
    started = time.monotonic()
    for _ in range(100):
        assert rig.slots.acquire(stuck)[0] is Acquire.LOADING and rig.slots.poll() == []
    rig.slots.release(held)
    rig.check()
    assert time.monotonic() - started < 1
    os.close(os.open(stuck.image_path, os.O_WRONLY))  # the pipe ends: so does the load
    ((_, error),) = rig.wait()
    assert isinstance(error, AdapterUnavailable)


def test_a_read_that_hangs_does_not_hold_up_the_exit(tmp_path):
    ref = compile_image(tmp_path, make_manifest(), 1)
    Path(ref.image_path).unlink()
    os.mkfifo(ref.image_path)
    script = (
        "import sys, msgspec\n"
        "from pathlib import Path\n"
        "from tests.engine.test_arena import Rig, AdapterRef\n"
        "rig = Rig(Path(sys.argv[1]))\n"
        "rig.slots.acquire(msgspec.json.decode(sys.argv[2], type=AdapterRef))\n"
        "rig.arena.close()\n"
        "print('done')\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path), msgspec.json.encode(ref).decode()]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_is_taken_as_images_come(tmp_path):
    before = resident_bytes()
    rig = Rig(tmp_path, arena_bytes=4 << 30)
    rig.hold(rig.image(1))
    assert resident_bytes() - before < 64 << 20
    assert rig.arena.weights.arena.numel() == 1 << 30
