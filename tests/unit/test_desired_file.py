"""--adapters-file: what it may say, and what is said of one that is wrong."""

from __future__ import annotations

import json
import os

import pytest

from server.desired_file import MAX_BYTES, Signature, read_adapters_file
from server.errors import ConfigError

YAML = """
adapters:
  - name: support-fr
    path: team/support-fr
    preload: true
  - {name: team/sql, source: "s3://bucket/sql", pin: true, weight: 2}
  - name: "123"
"""


def written(tmp_path, content, name="adapters.yaml"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_and_yaml_say_the_same(tmp_path):
    of_yaml = read_adapters_file(written(tmp_path, YAML)).entries
    entries = [
        {"name": "support-fr", "path": "team/support-fr", "preload": True},
        {"name": "team/sql", "source": "s3://bucket/sql", "pin": True, "weight": 2},
        {"name": "123"},
    ]
    for name in ("a.json", "a.JSON", "a.yml"):  # JSON is YAML too
        of_json = read_adapters_file(written(tmp_path, json.dumps({"adapters": entries}), name)).entries
        assert of_json == of_yaml
    first, second, third = of_yaml
    assert (first.name, first.path, first.source, first.preload, first.pin) == (
        *("support-fr", "team/support-fr", None, True, None),
    )
    assert (second.weight, second.pin, second.preload) == (2.0, True, False)
    assert (third.name, third.path, third.weight) == ("123", None, None)


def test_a_file_that_asks_for_nothing(tmp_path):
    assert read_adapters_file(written(tmp_path, "adapters: []")).entries == ()


WRONG = [
    ("", "list 'adapters'"),
    ("[]", "list 'adapters'"),
    ("adapters: {}", "list 'adapters'"),
    ("adapters: []\nversion: 1", "unknown key 'version'"),
    ("adapters: [x]", "entry 1: it must be an object"),
    ("adapters: [{path: x}]", "entry 1: 'name'"),
    ("adapters:\n- {name: a}\n- {name: b, weight: heavy}", r"entry 2 \('b'\): 'weight'"),
    ("adapters: [{name: a, weight: 0}]", r"entry 1 \('a'\): 'weight'"),
    ("adapters: [{name: a, weight: .nan}]", r"entry 1 \('a'\): 'weight'"),
    ("adapters: [{name: a, pin: 1}]", r"entry 1 \('a'\): 'pin'"),
    ("adapters: [{name: 7}]", "entry 1: 'name'"),
    ("adapters: [{name: a, replace: true}]", r"entry 1 \('a'\): 'replace'"),
    ("adapters: [{name: ../a}]", "entry 1 .*parts of letters"),
    ("adapters: [{name: a@b}]", "entry 1 .*parts of letters"),
    ("adapters: [{name: the-base}]", "entry 1 .*the base model's"),
    ("adapters: [{name: a, path: x, source: s3://b/x}]", r"entry 1 \('a'\): 'path' or 'source'"),
    ("adapters: [{name: a}, {name: b}, {name: a}]", "entry 3: the name 'a' is that of entry 1"),
    ("adapters:\n- name: a\n  path: 'x", "line "),
    ("adapters:\n\t- x", "line 2"),
    ("adapters:\n- name: a\n  path: x\n  name: b", "line 4, column 3: the key 'name' stands twice"),
    ("adapters: []\nadapters: [{name: a}]", "line 2, column 1: the key 'adapters' stands twice"),
    ("adapters: !!python/object/apply:os.getpid []", "line 1"),
    (b"adapters: [\xff]", "adapters.yaml"),
    ("[" * 100_000, "line 1: nested more than"),
]


@pytest.mark.parametrize(("content", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_named(tmp_path, content, words):
    with pytest.raises(ConfigError, match=words) as refused:
        read_adapters_file(written(tmp_path, content), ["the-base"])
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '{"adapters": [\n{"name": "a",}]}', "line 2, column 14"),
        ("a.json", b"\xff\xfe\xfd", "a.json"),
        ("a.json", '{"adapters": [{"name": "a", "name": "b"}]}', "the key 'name' stands twice"),
        ("a.json", "[" * 100_000, "nested too deeply|a.json"),
        ("a.toml", "", r"\.json, \.yaml"),
        ("adapters", "", r"\.json, \.yaml"),
    ],
)
def test_other_files(tmp_path, name, content, words):
    with pytest.raises(ConfigError, match=words):
        read_adapters_file(written(tmp_path, content, name))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r": No such file or directory$"):
        read_adapters_file(tmp_path / "missing.json")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("folder.json", "pipe.json", "device.json"):
        with pytest.raises(ConfigError, match=f"{name}: not a regular file"):
            read_adapters_file(tmp_path / name)
    path = written(tmp_path, "", "large.json")
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(ConfigError, match=str(MAX_BYTES)):
        read_adapters_file(path)


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = written(tmp_path, YAML)
    first = Signature.of(path)
    signatures = iter([first, first._replace(mtime_ns=1)])
    monkeypatch.setattr(Signature, "of", lambda path: next(signatures))
    with pytest.raises(ConfigError, match="changed while it was read"):
        read_adapters_file(path)


def test_a_signature_follows_links_and_sees_every_way_to_write(tmp_path):
    """A Kubernetes ConfigMap is a link to a link to a folder that is swapped."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "adapters.yaml").write_text("adapters: []")
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "adapters.yaml").symlink_to("data/adapters.yaml")
    path = tmp_path / "adapters.yaml"
    first = Signature.of(path)
    assert Signature.of(path) == first
    (tmp_path / "swap").symlink_to("two")
    (tmp_path / "swap").rename(tmp_path / "data")
    second = Signature.of(path)
    assert second != first
    os.utime(path, ns=(1, 1))
    assert Signature.of(path) not in (first, second)
