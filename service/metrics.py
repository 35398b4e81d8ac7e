"""What the gateway counts, for Prometheus. One registry a process."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from service.counted import Counter, Histogram
from service.stored_metrics import StoredMetrics

# From a cached read to a slow generation.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# The gateway's own work: parts of a millisecond, where most of it lies, apart from each other.
OWN_SECONDS = (0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
# One event is folded in microseconds, a long log in tenths of a second.
FOLD_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 0.5, 1, 2.5)

SERVED_BY = ("base", "context", "adapter", "adapter+context")


class Metrics:
    """Counters and histograms; a fresh set for each application, so that tests don't share them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.stored = StoredMetrics()
        self.registry.register(self.stored)
        self.requests = Counter(
            "fastslow_requests_total", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.overhead = Histogram(
            "fastslow_chat_overhead_seconds",
            "The gateway's own time in a chat: all but the wait for vLLM",
            bounds=OWN_SECONDS,
            registry=self.registry,
        )
        chats = Histogram(
            "fastslow_chat_seconds",
            "A chat from request to last byte",
            ["stream"],
            bounds=SECONDS,
            registry=self.registry,
        )
        self.whole_chat, self.streamed_chat = chats.labels("no"), chats.labels("yes")
        self.feedback = Histogram(
            "fastslow_feedback_seconds",
            "A feedback from request to reply",
            bounds=SECONDS,
            registry=self.registry,
        )
        self.signals = Counter(
            "fastslow_feedback_signals_total", "Signals received", ["signal"], registry=self.registry
        )
        self.degraded = Counter(
            "fastslow_degraded_total",
            "Chats served with less than was due, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.adapter_failures = Counter(
            "fastslow_adapter_failures_total",
            "Adapter versions that vLLM could not serve, so that the base did",
            registry=self.registry,
        )
        self.context_tokens = Histogram(
            "fastslow_context_tokens",
            "Tokens of the rendered context",
            bounds=(0, 16, 32, 64, 128, 256, 512, 1024, 2048),
            registry=self.registry,
        )
        self.recall = Counter(
            "fastslow_recall_total",
            "Recalls of exemplars by outcome: ok, not-embedded yet, unavailable",
            ["outcome"],
            registry=self.registry,
        )
        self.served = Counter(
            "fastslow_chats_total",
            "Chats by the channel that served them: base, context, adapter, adapter+context",
            ["served_by"],
            registry=self.registry,
        )
        self.served_by = {channel: self.served.labels(channel) for channel in SERVED_BY}
        self.first_token = Histogram(
            "fastslow_first_token_seconds",
            "A streamed chat from request to the first piece of its text",
            bounds=SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "fastslow_prompt_tokens_total",
            "Tokens of prompts, context included, of chats whose usage vLLM told (streams tell it where the client asks)",
            registry=self.registry,
        )
        self.cached_tokens = Counter(
            "fastslow_prompt_tokens_cached_total",
            "Those of them that came from vLLM's prefix cache",
            registry=self.registry,
        )
        self.folds = Histogram(
            "fastslow_fold_seconds",
            "Folding feedback into fast weights: apply (one event), rebuild (a whole log)",
            ["work"],
            bounds=FOLD_SECONDS,
            registry=self.registry,
        )
        self.norm_checks = Counter(
            "fastslow_norm_checks_total",
            "Replies held against their scopes' norms, by kind of norm (its checker) and whether it was held: yes, no",
            ["norm", "held"],
            registry=self.registry,
        )
        self.norms_unchecked = Counter(
            "fastslow_norms_unchecked_total",
            "Replies that should have been held against norms and were not, by reason: busy, failed, long, store",
            ["reason"],
            registry=self.registry,
        )
        self.refused = Counter(
            "fastslow_refused_total",
            "Requests refused for load: gate, engine-queue, or the limit they were over (tenant-chats, user-tokens, ...)",
            ["reason"],
            registry=self.registry,
        )
        self.limits_unchecked = Counter(
            "fastslow_limits_unchecked_total",
            "Requests let in without a look at their rate limits, because Redis was away",
            registry=self.registry,
        )
        self.slow_clients = Counter(
            "fastslow_slow_clients_total",
            "Requests ended because their client took too long: to send the head or the body, to take the reply",
            ["with_the"],
            registry=self.registry,
        )
        self.chats_in_flight = Gauge("fastslow_chats_in_flight", "Chats that have a place", registry=self.registry)
        self.chats_waiting = Gauge("fastslow_chats_waiting", "Chats that wait for a place", registry=self.registry)

    def count_usage(self, usage: Mapping[str, Any] | None) -> None:
        """Count the prompt's tokens by vLLM's word, where it gave one."""
        if usage:
            self.prompt_tokens.inc(usage.get("prompt_tokens") or 0)
            if (details := usage.get("prompt_tokens_details")) and (cached := details.get("cached_tokens")):
                self.cached_tokens.inc(cached)
