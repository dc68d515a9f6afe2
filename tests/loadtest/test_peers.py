"""Servers in turns: the command lines, and a whole run over a tiny base with ours and PEFT."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from loadtest import peers
from loadtest.launch import launched
from loadtest.peer_commands import PEERS, PeerOptions
from tests.e2e.tiny_server import World

OPTIONS = PeerOptions(
    model=Path("m"),
    adapters=(Path("l/a0"), Path("l/a1")),
    out=Path("out"),
    prompt_tokens=128,
    output_tokens=64,
    highest_id=300,
    min_requests=2,
    max_adapters=2,
    max_concurrency=8,
    max_rank=64,
    threads=2,
    timeout_s=60,
    vllm_python="vpy",
    llama_server="ls",
    llama_model=Path("m.gguf"),
    llama_adapters=(Path("g/a0.gguf"), Path("g/a1.gguf")),
    flags=(("vllm", "--enforce-eager"),),
)


def after(command, flag):
    return command[command.index(flag) + 1]


def test_command_lines_with_adapters_and_without():
    vllm = PEERS["vllm"].command(OPTIONS, 9, 2)
    assert vllm[0] == "vpy" and vllm[-1] == "--enforce-eager"
    assert (after(vllm, "--max-loras"), after(vllm, "--max-lora-rank"), after(vllm, "--port")) == ("2", "64", "9")
    assert after(vllm, "--lora-modules") == f"a0={Path('l/a0').resolve()}"
    assert "--enable-lora" not in PEERS["vllm"].command(OPTIONS, 9, 0)
    llama = PEERS["llamacpp"].command(OPTIONS, 9, 2)
    assert (after(llama, "--lora"), after(llama, "--parallel")) == ("g/a0.gguf,g/a1.gguf", "8")
    assert int(after(llama, "--ctx-size")) >= 8 * (128 + 64)
    assert "--lora" not in PEERS["llamacpp"].command(OPTIONS, 9, 0)
    assert PEERS["llamacpp"].dialect(OPTIONS, 2).kind == "llamacpp"
    assert after(PEERS["ours"].command(OPTIONS, 9, 2), "--adapters") == "l"
    assert "--adapters" not in PEERS["ours"].command(OPTIONS, 9, 0)


def test_what_is_not_there_is_named():
    without = dataclasses.replace(OPTIONS, llama_model=None, vllm_python=None, max_adapters=3)
    assert PEERS["vllm"].missing(without) == "--vllm-python"
    assert PEERS["llamacpp"].missing(without) == "--llama-model"
    assert PEERS["ours"].missing(without) == "3 adapters, and --adapters has 2"
    assert not any(PEERS[name].missing(OPTIONS) for name in ("ours", "vllm", "llamacpp"))


@pytest.mark.parametrize("text", ["8", "8@", "@8", "8@0", "-1@2", "a@b"])
def test_a_scenario_that_makes_no_sense_is_named(text):
    with pytest.raises(ValueError, match="scenario"):
        peers.parse_scenario(text)


def test_a_scenario_is_whole_waves():
    spec = peers.Scenario(8, 3).spec(dataclasses.replace(OPTIONS, min_requests=7), seed=4)
    assert (spec.num_requests, spec.arrivals, spec.num_adapters, spec.seed) == (9, "closed:3", 8, 4)


def test_a_server_that_does_not_start_says_why(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        pytest.raises(RuntimeError, match=r"status 3[^$]*no such model"),
        launched(command, "http://127.0.0.1:9", tmp_path / "log", timeout_s=60),
    ):
        pass


def test_ours_and_peft_in_turns_over_a_tiny_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "BANDWIDTH_BYTES", 1 << 20)
    World.make(tmp_path, 2)
    where = [
        "--model",
        str(tmp_path / "base"),
        "--adapters",
        str(tmp_path / "adapters"),
        "--out",
        str(tmp_path / "out"),
    ]
    sizes = ["--prompt-tokens", "5", "--output-tokens", "4", "--highest-id", "250", "--threads", "1"]
    chosen = ["--scenarios", "2@2", "--repeats", "1", "--peers", "ours", "peft", "--peft-python", sys.executable]
    peers.main([*where, *sizes, *chosen, "--ours-flags", "--max-num-seqs 4"])
    found = [json.loads((tmp_path / "out" / "2@2" / f"{name}-1.json").read_text()) for name in ("ours", "peft")]
    counts = [(result["completed"], result["failed"], result["total_output_tokens"]) for result in found]
    assert counts == [(2, 0, 8)] * 2
    assert all(set(result["adapters"]) == {"a0", "a1"} for result in found)
    assert found[0]["workload"] == found[1]["workload"]
    shown = capsys.readouterr().out
    assert "ours (1)" in shown and "peft (1)" in shown
    assert json.loads((tmp_path / "out" / "machine.json").read_text())["read_bytes_per_s"][0] > 0


def test_a_peer_that_is_not_configured_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        peers.main(
            ["--model", "m", "--out", str(tmp_path), "--peers", "vllm", "--vllm-python", "", "--scenarios", "0@1"]
        )
    assert ended.value.code == 2
    assert "--vllm-python" in capsys.readouterr().err
