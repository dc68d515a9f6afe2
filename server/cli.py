"""The `multilora` command: serve, demo, inspect, bench."""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adapters_store.remote_names import NamePolicy, SourceDelete, SourceDown
from server.adapter_metrics import MAX_TOP
from server.config import EngineConfig, KernelBackend, ServerConfig, default_cache_dir, parse_bytes
from server.errors import ConfigError
from server.vllm_flags import explain_vllm_flags, parse_lora_modules, split_names, spread_lora_modules

app = typer.Typer(
    name="multilora",
    help="Serve many LoRA adapters on one resident base model, in one batch, behind the OpenAI API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

Model = Annotated[str, typer.Option("--model", help="Folder of the base model (safetensors, config.json).")]
Adapters = Annotated[
    list[str] | None,  # not Path, to which nothing is the folder of now
    typer.Option("--adapters", help="Folder whose sub-folders are adapters; repeat for several, first wins."),
]
AdapterSource = Annotated[
    list[str] | None,
    typer.Option(
        help="Remote folder of adapters: s3://, gs://, az://, https://, hf://, file://; repeat for several. They come "
        "after --adapters, the first that has a name wins."
    ),
]
AdapterSourceAllowPrivate = Annotated[
    bool,
    typer.Option(
        "--adapter-source-allow-private",
        help="Let --adapter-source use http:// and addresses of this machine or network.",
    ),
]
AdapterSourceAllowHost = Annotated[
    list[str] | None,
    typer.Option(help="Host, or host:port, that https:// and hf:// sources may redirect to; repeat for several."),
]
AdapterPollInterval = Annotated[
    float,
    typer.Option(help="Seconds that a remote adapter's version is served before its source is asked again.", min=0),
]
AdapterMissTtl = Annotated[
    float, typer.Option(help='Seconds that "no such adapter" and failures of a remote source are remembered.', min=0)
]
OnSourceDown = Annotated[
    SourceDown,
    typer.Option(help="While a source can't be asked: serve the last version of its adapters, or fail with 503."),
]
OnSourceDelete = Annotated[
    SourceDelete,
    typer.Option(help="When a source has an adapter no longer: keep serving what is here of it, or drop its name."),
]
DiskQuota = Annotated[str | None, typer.Option(help="Disk for compiled adapters, e.g. 50GiB. Default: no bound.")]
RawQuota = Annotated[
    str | None, typer.Option(help="Disk for remote adapters' files as fetched, e.g. 20GiB. Default: no bound.")
]
ServedNames = Annotated[
    list[str] | None,
    typer.Option("--served-model-name", help="Name(s) of the base in the API. Default: the folder's name."),
]
DtypeOption = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest prompt plus output, tokens. Default: the model's own.", min=1)
]
MaxNumSeqs = Annotated[int, typer.Option(help="Requests in one step at most.", min=1)]
MaxBatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens",
        help="Token rows in one step: decodes and prefill chunks. Default: 512, on a GPU 2048.",
        min=1,
    ),
]
MaxAdaptersPerStep = Annotated[int, typer.Option(help="Distinct adapters in one step at most.", min=1)]
AdapterMemory = Annotated[
    str | None, typer.Option(help="Device memory for adapters, e.g. 2GiB. Default: from what is free.")
]
KvMemory = Annotated[
    str | None, typer.Option(help="Device memory for the KV cache, e.g. 4GiB. Default: from what is free.")
]
HostMemory = Annotated[
    str,
    typer.Option(help="Host memory that keeps evicted adapters, e.g. 1GiB; 0 reads them from disk again."),
]
MaxLoraRank = Annotated[int, typer.Option(help="Adapters of a higher rank are refused.", min=1, max=512)]
EnableLora = Annotated[
    bool, typer.Option("--enable-lora/--no-enable-lora", help="Accepted for vLLM's command lines: always on.")
]
LoraModules = Annotated[
    list[str] | None,
    typer.Option(help="Adapters by hand: name=folder, or JSON with name and path (or a list of such)."),
]
MaxLoras = Annotated[int | None, typer.Option("--max-loras", help="vLLM's name for --max-adapters-per-step.", min=1)]
MaxCpuLoras = Annotated[
    int | None, typer.Option("--max-cpu-loras", help="Accepted for vLLM's command lines; see --host-memory.", min=1)
]
Preload = Annotated[list[str] | None, typer.Option(help="Adapter(s) compiled before the server is ready: a,b.")]
Pin = Annotated[list[str] | None, typer.Option(help="Adapter(s) loaded at start and never evicted: a,b.")]
AdaptersFile = Annotated[
    Path | None,
    typer.Option(help="File (JSON, YAML) of adapters that there shall be: name, path or source, pin, preload, weight."),
]
AllowRuntimeLoading = Annotated[
    bool,
    typer.Option(
        "--allow-runtime-loading",
        help="Let clients load, unload, pin and reload adapters, below the sources. On by itself on loopback.",
    ),
]
MaxQueueWait = Annotated[float, typer.Option(help="Seconds a request may wait before it gets 503.", min=0.1)]
MaxQueueLen = Annotated[
    int, typer.Option(help="Choices (prompts times n) that may wait to run; further ones get 429.", min=1)
]
ShutdownTimeout = Annotated[
    float, typer.Option(help="Seconds that open requests may go on after SIGTERM before they are cut.", min=0)
]
EngineStallTimeout = Annotated[
    float, typer.Option(help="Seconds without a word or a step of the engine until /health turns red.", min=1)
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Require this key as `Authorization: Bearer`; repeat it, or list keys with commas, for several.",
        envvar="MULTILORA_API_KEY",
        show_envvar=True,
    ),
]
AdapterMetricsTop = Annotated[
    int,
    typer.Option(help="Adapters with metrics of their own, by tokens of late; others are `other`.", min=0, max=MAX_TOP),
]
DisableAccessLog = Annotated[
    bool, typer.Option("--disable-access-log", help="Write no line per request to standard output.")
]
AllowedOrigins = Annotated[
    str, typer.Option(help="Origins whose pages may call the API (CORS), as a JSON list, e.g. '[\"*\"]'.")
]
CacheDir = Annotated[Path | None, typer.Option(help="Where compiled adapters are kept. Default: ~/.cache/multilora.")]
Backend = Annotated[
    KernelBackend,
    typer.Option(
        help="Kernels: cpu (native, built on first use), torch; for NVIDIA triton, or cuda (built by nvcc on first use "
        "beside triton); or auto: by device and compiler."
    ),
]
EnforceEager = Annotated[
    bool, typer.Option("--enforce-eager", help="On a GPU: capture no graphs; starts faster, decodes slower.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of the model. Default: the CPU quota.", min=1, max=1024)]


@app.command()
def serve(
    model: Model,
    adapters: Adapters = None,
    adapter_source: AdapterSource = None,
    adapter_source_allow_private: AdapterSourceAllowPrivate = False,
    adapter_source_allow_host: AdapterSourceAllowHost = None,
    adapter_poll_interval: AdapterPollInterval = 10.0,
    adapter_miss_ttl: AdapterMissTtl = 5.0,
    on_source_down: OnSourceDown = "serve",
    on_source_delete: OnSourceDelete = "drop",
    served_model_name: ServedNames = None,
    dtype: DtypeOption = "auto",
    device: Device = "cpu",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxBatchedTokens = None,
    max_adapters_per_step: MaxAdaptersPerStep = 64,
    adapter_memory: AdapterMemory = None,
    kv_memory: KvMemory = None,
    host_memory: HostMemory = "0",
    disk_quota: DiskQuota = None,
    raw_quota: RawQuota = None,
    max_lora_rank: MaxLoraRank = 512,
    enable_lora: EnableLora = True,
    lora_modules: LoraModules = None,
    max_loras: MaxLoras = None,
    max_cpu_loras: MaxCpuLoras = None,
    preload: Preload = None,
    pin: Pin = None,
    adapters_file: AdaptersFile = None,
    allow_runtime_loading: AllowRuntimeLoading = False,
    max_queue_wait: MaxQueueWait = 60.0,
    max_queue_len: MaxQueueLen = 4096,
    shutdown_timeout: ShutdownTimeout = 25.0,
    engine_stall_timeout: EngineStallTimeout = 60.0,
    api_key: ApiKey = None,
    allowed_origins: AllowedOrigins = "[]",
    disable_access_log: DisableAccessLog = False,
    adapter_metrics_top: AdapterMetricsTop = 50,
    cache_dir: CacheDir = None,
    threads: Threads = None,
    backend: Backend = "auto",
    enforce_eager: EnforceEager = False,
) -> None:
    """Serve a base model and every adapter below --adapters; ones added while running are found on first use."""
    engine = _engine_config(
        model=model,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_num_batched_tokens,
        max_adapters_per_step=max_adapters_per_step if max_loras is None else max_loras,
        adapter_memory=_bytes("--adapter-memory", adapter_memory),
        kv_memory=_bytes("--kv-memory", kv_memory),
        host_memory=_bytes("--host-memory", host_memory) or 0,
        max_queue_wait_s=max_queue_wait,
        cache_dir=str(cache_dir or default_cache_dir()),
        threads=threads,
        backend=backend,
        max_lora_rank=max_lora_rank,
        enforce_eager=enforce_eager,
    )
    names = tuple(served_model_name or [Path(model).resolve().name])
    for line in explain_vllm_flags(enable_lora=enable_lora, max_cpu_loras=max_cpu_loras):
        console.print(line, style="yellow", highlight=False, markup=False)
    config = ServerConfig(
        engine=engine,
        served_names=names,
        lora_modules=_lora_modules(lora_modules, names),
        preload=split_names(preload),
        pin=split_names(pin),
        adapters_file=None if adapters_file is None else str(adapters_file),
        allow_runtime_loading=allow_runtime_loading,
        adapter_roots=tuple(adapters or ()),
        adapter_sources=tuple(adapter_source or ()),
        allow_private_sources=adapter_source_allow_private,
        source_redirect_hosts=tuple(adapter_source_allow_host or ()),
        names=NamePolicy(
            poll_interval_s=adapter_poll_interval,
            miss_ttl_s=adapter_miss_ttl,
            on_source_down=on_source_down,
            on_source_delete=on_source_delete,
        ),
        disk_quota=_bytes("--disk-quota", disk_quota),
        raw_quota=_bytes("--raw-quota", raw_quota),
        host=host,
        port=port,
        api_keys=split_names(api_key),
        allowed_origins=_origins(allowed_origins),
        max_queue_len=max_queue_len,
        shutdown_timeout_s=shutdown_timeout,
        engine_stall_timeout_s=engine_stall_timeout,
        has_access_log=not disable_access_log,
        adapter_metrics_top=adapter_metrics_top,
    )
    _run(config, adapter_examples={})


@app.command()
def demo(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    cache_dir: CacheDir = None,
    threads: Threads = None,
) -> None:
    """Serve the demo: SmolLM2-135M-Instruct and the adapters that ship with the project."""
    from server.demo import BASE_DIR_NAME, demo_adapters_dir, demo_examples, ensure_demo_base

    cache = cache_dir or default_cache_dir()
    try:
        with console.status("Preparing the demo base (the first time takes about 15 s)"):
            base = ensure_demo_base(cache, progress=lambda line: None)
        adapters = demo_adapters_dir()
    except ConfigError as error:
        _fail(str(error))
    config = ServerConfig(
        engine=_engine_config(model=str(base), cache_dir=str(cache), threads=threads),
        served_names=(BASE_DIR_NAME,),
        adapter_roots=(str(adapters),),
        host=host,
        port=port,
    )
    _run(config, adapter_examples={example.name: example.prompt for example in demo_examples()})


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter folder, or a folder of adapter folders.")],
    model: Model,
    dtype: DtypeOption = "auto",
    max_lora_rank: MaxLoraRank = 512,
    cache_dir: CacheDir = None,
) -> None:
    """Say what an adapter is, whether and how it would be served on --model, its bytes per tier, every problem."""
    from server.inspection import inspect_path

    try:
        reports = inspect_path(path, Path(model), dtype, max_lora_rank, cache_dir or default_cache_dir())
    except ConfigError as error:
        _fail(str(error))
    for report in reports:
        typer.echo(report.render())
    sys.exit(0 if all(report.is_served for report in reports) else 1)


@app.command(
    add_help_option=False,  # the parts have options of their own, and their own help
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(context: typer.Context) -> None:
    """Measure: throughput with and without adapters, memory, cold start. See docs/benchmarks.md."""
    from loadtest.bench import main as bench_main

    bench_main(context.args)


def _lora_modules(values: list[str] | None, base_names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    try:
        return parse_lora_modules(values or (), base_names)
    except ConfigError as error:
        _fail(f"--lora-modules {error}")


def _origins(text: str) -> tuple[str, ...]:
    import msgspec

    try:
        return msgspec.json.decode(text, type=tuple[str, ...])
    except msgspec.DecodeError as error:
        _fail(f"--allowed-origins {text}: not a JSON list of strings ({error})")


def _engine_config(**fields: object) -> EngineConfig:
    import msgspec

    try:
        return msgspec.convert(fields, EngineConfig)
    except msgspec.ValidationError:
        _fail(f"--dtype {fields['dtype']}: auto, float32, bfloat16 or float16")


def _bytes(flag: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ConfigError as error:
        _fail(f"{flag}: {error}")


def _run(config: ServerConfig, adapter_examples: dict[str, str]) -> None:
    from server.launch import run

    try:
        code = run(config, console, adapter_examples)
    except ConfigError as error:
        _fail(str(error))
    sys.exit(code)


def _fail(message: str) -> typing.NoReturn:
    console.print(f"multilora: {message}", style="red", highlight=False, markup=False)
    sys.exit(2)


def main() -> None:
    """Entry point of the console script."""
    app(args=spread_lora_modules(sys.argv[1:]))


if __name__ == "__main__":
    main()
