"""Which processes the stack has, by its layout: those of `fastslow up`, with a second gateway and other upstreams."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from service.keys import Keys
from service.settings import Settings
from service.stack.children import children, gateway_command, mark_of, redis_argv
from service.stack.leftovers import MARK
from service.stack.probes import http_ok, redis_answers
from service.stack.process import Child
from tests.gateway import free_port

REPOSITORY = Path(__file__).parents[2]
GATEWAYS = ("gateway-0", "gateway-1")
UPSTREAMS = ("vllm-0", "vllm-1")
PRIMARY, REPLICA, SENTINEL = "redis-primary", "redis-replica", "sentinel"
# A primary that is silent for so long is taken for dead.
SILENT_MILLISECONDS = 1000
VLLM_READY_SECONDS = 600.0
VLLM_KEY = "vllm-key-of-the-suite"


@dataclass(frozen=True)
class Layout:
    """What a fault needs of the stack that it breaks."""

    sentinels: bool = False
    """Redis is a primary, a replica and a sentinel; Celery has a Redis of its own."""
    settings: tuple[tuple[str, object], ...] = ()
    """Of the service, beyond the suite's own."""
    gateway_factory: str = ""
    """In place of the gateway's own."""
    real_vllm: bool = False
    """One real vLLM in place of the two that echo."""
    restart_seconds: float = 0.5
    """How long the supervisor waits before it starts again what has died."""


@dataclass(frozen=True)
class Ports:
    """Where everything listens."""

    redis: int
    gateways: tuple[int, ...]
    upstreams: tuple[int, ...]
    primary: int
    replica: int
    sentinel: int


def free_ports(layout: Layout) -> Ports:
    upstreams = 1 if layout.real_vllm else len(UPSTREAMS)
    return Ports(
        redis=free_port(),
        gateways=tuple(free_port() for _ in GATEWAYS),
        upstreams=tuple(free_port() for _ in range(upstreams)),
        primary=free_port(),
        replica=free_port(),
        sentinel=free_port(),
    )


def suite_settings(layout: Layout, ports: Ports, *, folder: Path, model: Path) -> Settings:
    """The service's settings: its defaults, but that what runs every few minutes runs every few seconds."""
    changed: dict[str, object] = {
        "data_dir": folder,
        "model": str(model),
        "redis_port": ports.redis,
        "vllm_api_key": VLLM_KEY,
        "vllm_replica_urls": tuple(f"http://127.0.0.1:{port}" for port in ports.upstreams),
        # An embedding model in each gateway would take the cores.
        "recall": False,
        # The scheduler's tick that is waited for.
        "sweep_seconds": 2.0,
        "due_feedbacks": 1_000_000,
        # A log is cut in the midst of each trial.
        "log_keep_events": 10,
        "archive_seconds": 2.0,
        # Some optimizations run beside the load; more would take the cores.
        "optimize_feedbacks": 40,
        "optimize_silence_seconds": 3600.0,
        "optimize_metric_calls": 2,
        "optimize_limit_seconds": 2,
        "failed_adapter_seconds": 2.0,
    }
    if layout.sentinels:
        changed |= {
            "redis_url": f"redis+sentinel://127.0.0.1:{ports.sentinel}/main/0",
            "broker_url": f"redis://127.0.0.1:{ports.redis}/0",
        }
    if layout.real_vllm:
        changed |= {"vllm_port": ports.upstreams[0], "max_model_len": 1024}
    return Settings(_env_file=None, **changed | dict(layout.settings))  # type: ignore[call-arg,arg-type]


def members(
    layout: Layout, ports: Ports, settings: Settings, keys: Keys, *, seen_by_gateways: Mapping[str, str]
) -> list[Child]:
    """The processes in the order of their start.

    Args:
        seen_by_gateways: environment variables that differ for gateways, for proxies stand before what they name.
    """
    full = {child.name: child for child in children(settings, keys)}
    env = {**full["gateway"].env, "PYTHONPATH": str(REPOSITORY)}
    of_celery = [replace(full[name], env=env) for name in ("control", "beat")]
    found = [
        *(_sentinels(ports, settings) if layout.sentinels else ()),
        _on_a_disk(_redis("redis", settings, ports.redis), settings),
        *_upstreams(layout, ports, settings, env),
        *of_celery,
        *(
            _gateway(name, port, layout, settings, full["gateway"], env | dict(seen_by_gateways))
            for name, port in zip(GATEWAYS, ports.gateways, strict=True)
        ),
    ]
    # None is left behind, whatever ends the suite.
    return [replace(child, env={MARK: mark_of(settings.data_dir), **child.env}) for child in found]


def full_disk(name: str, settings: Settings) -> Path:
    """The file that says that a member's disk is full (`limited.py`)."""
    return settings.data_dir / f"{name}.full"


def adapter_cache(name: str, settings: Settings) -> Path:
    """Where an upstream keeps its copies of adapters."""
    return settings.data_dir / f"{name}-adapters"


def _on_a_disk(child: Child, settings: Settings) -> Child:
    limited = (sys.executable, "-m", "tests.faults.limited", str(full_disk(child.name, settings)))
    return replace(child, argv=(*limited, *child.argv), env={**child.env, "PYTHONPATH": str(REPOSITORY)})


def _redis(name: str, settings: Settings, port: int, *more: str) -> Child:
    home = settings.data_dir / name
    (home / "redis").mkdir(parents=True, exist_ok=True)
    argv = redis_argv(settings.model_copy(update={"data_dir": home, "redis_port": port}))
    return Child(name, name, (*argv, *more), redis_answers(f"redis://127.0.0.1:{port}/0"))


def _sentinels(ports: Ports, settings: Settings) -> list[Child]:
    watch = settings.data_dir / "sentinel.conf"
    watch.write_text(
        f"sentinel monitor main 127.0.0.1 {ports.primary} 1\n"
        f"sentinel down-after-milliseconds main {SILENT_MILLISECONDS}\n"
        "sentinel failover-timeout main 5000\n"
    )
    server = redis_argv(settings)[0]
    quick = ("--repl-diskless-sync-delay", "0")
    return [
        _redis(PRIMARY, settings, ports.primary, *quick),
        _redis(REPLICA, settings, ports.replica, *quick, "--replicaof", f"127.0.0.1 {ports.primary}"),
        Child(
            SENTINEL,
            SENTINEL,
            (server, str(watch), "--sentinel", "--port", str(ports.sentinel), "--bind", "127.0.0.1"),
            redis_answers(f"redis://127.0.0.1:{ports.sentinel}/0"),
        ),
    ]


def _upstreams(layout: Layout, ports: Ports, settings: Settings, env: Mapping[str, str]) -> list[Child]:
    found = []
    for name, port in zip(UPSTREAMS, ports.upstreams, strict=False):
        argv: Sequence[str] = (sys.executable, "-m", "tests.faults.upstream", str(port))
        if layout.real_vllm:
            argv = (sys.executable, "-m", "workers.vllm_server")
        own = {**env, "FASTSLOW_ADAPTER_CACHE_DIR": str(adapter_cache(name, settings))}
        ready = http_ok(f"http://127.0.0.1:{port}/health")
        child = Child(name, name, tuple(argv), ready, own, stop_seconds=40.0, ready_seconds=VLLM_READY_SECONDS)
        found.append(_on_a_disk(child, settings))
    return found


def _gateway(name: str, port: int, layout: Layout, settings: Settings, model: Child, env: Mapping[str, str]) -> Child:
    command = gateway_command(settings.model_copy(update={"port": port}))
    if layout.gateway_factory:
        command = tuple(layout.gateway_factory if part == "service.api.app:app_from_env" else part for part in command)
    own = {**env, "FASTSLOW_PORT": str(port)}
    ready = http_ok(f"http://127.0.0.1:{port}/health/ready")
    return replace(model, name=name, title=name, argv=(sys.executable, "-m", *command), env=own, probe=ready)
