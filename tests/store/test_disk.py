"""Images on disk: leases, quota, what survives a restart and what does not."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from adapters_store.disk import MAX_SAME, DiskImages
from adapters_store.errors import AdapterUnavailable
from adapters_store.image import read_header, write_image
from adapters_store.ref import AdapterRef, SourceVersion
from tests.store.images import compile_folder


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(scope="module")
def template(base, plain_adapter, tmp_path_factory) -> Path:
    """One real image."""
    path = tmp_path_factory.mktemp("template") / "image"
    sites = compile_folder(plain_adapter, base).sites
    write_image(path, sites, base.manifest, image_key="k", digest="d", compiler_version=1)
    return path


def compiled(disk: DiskImages, template: Path, key: str, version: str | None = None) -> AdapterRef:
    """What the compiler leaves: an image in the folder and the ref to it."""
    path = disk.image_path(key)
    shutil.copyfile(template, path)
    header = read_header(path)
    return AdapterRef(
        name=key,
        version=version or f"version-{key}",
        digest="d",
        image_key=key,
        image_path=str(path),
        data_offset=header.data_offset,
        data_bytes=header.data_bytes,
        checksum=header.checksum,
        max_rank=header.max_rank,
        sites=tuple(site.site for site in header.sites),
        warnings=("careful",),
    )


def test_find_gives_what_was_adopted(tmp_path, template):
    disk = DiskImages(tmp_path)
    assert disk.find("version-a") is None
    ref = compiled(disk, template, "a")
    disk.adopt(ref)
    assert disk.find("version-a") == ref
    assert disk.bytes_used == template.stat().st_size


def test_a_restart_remembers_everything(tmp_path, template):
    disk = DiskImages(tmp_path / "old")
    refs = [compiled(disk, template, key) for key in "abc"]
    refs.append(compiled(disk, template, "a", "another version of the same bytes"))
    for ref in refs:
        disk.adopt(ref)
    disk.close()
    (tmp_path / "old").rename(tmp_path / "moved")
    again = DiskImages(tmp_path / "moved")
    for ref in refs:
        found = again.find(ref.version)
        assert found == msgspec.structs.replace(ref, image_path=str(again.image_path(ref.image_key)))
    assert again.bytes_used == disk.bytes_used


def test_folders_are_private(tmp_path):
    DiskImages(tmp_path / "cache")
    for folder in (tmp_path / "cache", tmp_path / "cache" / "images", tmp_path / "cache" / "index"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_another_bases_index_is_another(tmp_path, template):
    disk = DiskImages(tmp_path, scope="one")
    disk.adopt(compiled(disk, template, "a"))
    assert DiskImages(tmp_path, scope="two").find("version-a") is None
    assert DiskImages(tmp_path, scope="one").find("version-a") is not None


@pytest.mark.parametrize("damage", ["truncate", "remove", "header", "index"])
@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_damaged_image_is_dropped(damage, is_restarted, tmp_path, template):
    disk = DiskImages(tmp_path, scope="s")
    disk.adopt(compiled(disk, template, "a"))
    disk.adopt(compiled(disk, template, "b"))
    path = disk.image_path("a")
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "remove":
        path.unlink()
    elif damage == "header":
        path.write_bytes(b"\xff" * path.stat().st_size)
    else:
        (tmp_path / "index" / "s" / "version-a.json").write_text('{"name": ')
    if is_restarted:
        disk = DiskImages(tmp_path, scope="s")
    elif damage in ("header", "index"):
        return  # found at the restart, or by whoever reads the data
    assert disk.find("version-a") is None
    assert disk.find("version-b") is not None
    disk.adopt(compiled(disk, template, "a"))
    assert disk.find("version-a") is not None


def test_a_damaged_image_that_cant_be_deleted_is_not_used(tmp_path, template):
    """A folder in its place stands for a disk that has become read-only."""
    disk = DiskImages(tmp_path)
    disk.adopt(compiled(disk, template, "a"))
    disk.image_path("a").unlink()
    disk.image_path("a").mkdir()
    assert disk.find("version-a") is None
    assert disk.num_images == disk.bytes_used == 0


def test_versions_of_one_name_with_one_image_are_bounded(tmp_path, template):
    """Files that are written again and again with the same content; another name's, and another image's, stay."""
    disk = DiskImages(tmp_path)
    other = compiled(disk, template, "a", SourceVersion("s", "other", "p", ()).key)
    disk.adopt(msgspec.structs.replace(other, name="other"), SourceVersion("s", "other", "p", ()))
    versions = [SourceVersion("s", "fr", f"p{number}", ()) for number in range(MAX_SAME + 5)]
    before = adopted(disk, template, "before", versions[0])
    for version in versions[1:]:
        adopted(disk, template, "a", version)
    for again in (disk, DiskImages(tmp_path)):
        assert [key for key, _ in again.versions_of("fr")] == [v.key for v in reversed(versions[5:])] + [before.version]
        assert again.find(other.version) and again.find(before.version) and again.find(versions[-1].key)
        assert again.find(versions[4].key) is None
        assert len(list(tmp_path.glob("index/*/*.json"))) == MAX_SAME + 2
    disk.discard("a")
    assert len(list(tmp_path.glob("index/*/*.json"))) == 1


def adopted(disk: DiskImages, template: Path, key: str, version: SourceVersion) -> AdapterRef:
    ref = msgspec.structs.replace(compiled(disk, template, key, version.key), name=version.name)
    disk.adopt(ref, version)
    os.utime(disk._entry_path(version.key), (disk._clock(),) * 2)
    return ref


def test_the_least_recently_used_goes_but_not_what_is_leased(tmp_path, template):
    size = template.stat().st_size
    disk = DiskImages(tmp_path, 3 * size, grace_s=0, clock=Clock())
    for key in "abc":
        disk.adopt(compiled(disk, template, key))
    disk.lease("a")
    disk.find("version-b")
    disk.adopt(compiled(disk, template, "d"))  # c is the oldest without a lease
    assert [disk.find(f"version-{key}") is not None for key in "abcd"] == [True, True, False, True]
    assert not disk.image_path("c").exists()
    for key in "bd":
        disk.lease(key)
    disk.adopt(compiled(disk, template, "e"))
    assert not disk.image_path("e").exists()  # all others are leased
    with pytest.raises(AdapterUnavailable):
        disk.lease("e")


def test_a_release_makes_room(tmp_path, template):
    disk = DiskImages(tmp_path, 0, grace_s=0, clock=Clock())
    ref = compiled(disk, template, "a")
    disk.adopt(ref)
    assert disk.bytes_used == 0
    disk = DiskImages(tmp_path / "graceful", 0, grace_s=60, clock=Clock())
    disk.adopt(compiled(disk, template, "a"))
    disk.lease("a")  # the grace keeps it until it is leased
    disk.lease("a")
    disk._clock.now += 100
    disk.release("a")
    assert disk.find("version-a") is not None
    disk._clock.now += 100
    disk.release("a")
    assert disk.bytes_used == 0
    assert disk.num_leases == 0


def test_the_order_of_use_survives_a_restart(tmp_path, template):
    size, clock = template.stat().st_size, Clock()
    disk = DiskImages(tmp_path, 10 * size, grace_s=0, clock=clock)
    for key in "abc":
        disk.adopt(compiled(disk, template, key))
    clock.now += 100
    disk.find("version-a")
    disk.close()
    disk = DiskImages(tmp_path, 3 * size, grace_s=0, clock=clock)
    disk.adopt(compiled(disk, template, "d"))
    assert disk.find("version-a") is not None
    assert disk.find("version-b") is None


def test_a_lower_quota_holds_from_the_start_on(tmp_path, template):
    clock = Clock()
    disk = DiskImages(tmp_path, clock=clock)
    for key in "abc":
        disk.adopt(compiled(disk, template, key))
    disk.close()
    clock.now += 100
    again = DiskImages(tmp_path, template.stat().st_size, clock=clock)
    assert again.num_images == 1 and again.find("version-c") is not None


def test_who_evicts_is_alone_in_the_folder(tmp_path):
    sharing = [DiskImages(tmp_path), DiskImages(tmp_path)]
    with pytest.raises(OSError, match="in use by another server"):
        DiskImages(tmp_path, 1000)
    for disk in sharing:
        disk.close()
    alone = DiskImages(tmp_path, 1000)
    with pytest.raises(OSError, match="in use by another server"):
        DiskImages(tmp_path)
    alone.close()
    DiskImages(tmp_path)


def test_what_a_crash_left_half_written_is_swept(tmp_path):
    disk = DiskImages(tmp_path)
    images = disk.images_dir
    disk.close()
    for name in (".a.tmp", ".b.tmp"):
        (images / name).write_bytes(b"x")
    os.utime(images / ".a.tmp", (0, 0))
    DiskImages(tmp_path).close()
    assert [path.name for path in images.iterdir()] == [".b.tmp"]  # that one may still be written
    (tmp_path / "index" / "default" / ".c.tmp").write_bytes(b"x")
    DiskImages(tmp_path, 1000)
    assert not list(tmp_path.rglob(".*.tmp"))  # who is alone knows that nobody writes


class DiskMachine(RuleBasedStateMachine):
    """Adopt, find, lease, release, restart at random: leased images stay, the quota holds for the rest."""

    template: Path
    folder: Path
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        DiskMachine.runs += 1
        self.path = self.folder / str(self.runs)
        self.clock = Clock()
        self.size = self.template.stat().st_size
        self.quota = 3 * self.size
        self.leases: list[str] = []
        self.open()

    def open(self) -> None:
        self.disk = DiskImages(self.path, self.quota, grace_s=0, clock=self.clock)

    @rule(key=st.sampled_from("abcdef"))
    def adopt(self, key: str) -> None:
        self.disk.adopt(compiled(self.disk, self.template, key))

    @rule(key=st.sampled_from("abcdef"))
    def lease(self, key: str) -> None:
        if self.disk.find(f"version-{key}") is not None:
            self.disk.lease(key)
            self.leases.append(key)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.disk.release(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @rule(key=st.sampled_from("abcdef"))
    def discard(self, key: str) -> None:
        if key not in self.leases:
            self.disk.discard(key)
            assert self.disk.find(f"version-{key}") is None

    @rule()
    def restart(self) -> None:
        self.disk.close()
        self.leases.clear()
        self.open()

    @invariant()
    def leased_images_are_there(self) -> None:
        assert self.disk.num_leases == len(self.leases)
        for key in self.leases:
            assert self.disk.image_path(key).exists()

    @invariant()
    def the_books_are_right(self) -> None:
        files = list(self.disk.images_dir.iterdir())
        assert self.disk.bytes_used == self.size * len(files)
        assert len(files) <= max(3, len(set(self.leases)) + 3)
        entries = {path.stem.removeprefix("version-") for path in (self.path / "index" / "default").iterdir()}
        assert entries == {file.stem for file in files}

    def teardown(self) -> None:
        self.disk.close()


def test_disk_machine(tmp_path, template):
    machine = type("Machine", (DiskMachine,), {"template": template, "folder": tmp_path})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=25, deadline=None))
