"""What a number of users needs: `python -m deploy.capacity [--users 1000000] [--set chats=20 ...]` prints docs/capacity.md's table.

Every figure is one of the fields below, with where it is from; what no benchmark of ours has measured says "assumed".
"""

import argparse
import math
from dataclasses import dataclass, fields, replace

DAY_SECONDS = 86400
MONTH_DAYS = 30
MONTH_HOURS = MONTH_DAYS * 24
SIZES = (10_000, 1_000_000, 100_000_000)


@dataclass(frozen=True)
class Load:
    """What users do, and what each of it takes."""

    # -- what users do (assumed: put your own) --
    active: float = 0.2
    """Share of the users who chat on a day."""
    chats: float = 10
    """A day, of an active user."""
    peak: float = 3
    """Load at the busiest time over the day's mean."""
    feedback: float = 0.05
    """Feedbacks a chat."""
    input_tokens: float = 1000
    """Of a prompt, context included."""
    output_tokens: float = 300
    interaction_bytes: float = 4500
    """An interaction as it is stored: the conversation without its context, the reply, 500 bytes besides."""
    retention_days: float = 30
    """FASTSLOW_INTERACTION_RETENTION_SECONDS, by default."""
    with_adapter: float = 0.1
    """Share of the users who have an adapter of their own."""
    # -- measured (docs/benchmarks.md, "Figures") --
    gateway_chats: float = 919
    """Chats a second of one gateway process on one core, beside its peers."""
    gateway_feedbacks: float = 529
    """Feedbacks a second of one, comments read: 100,000 users, ten connections."""
    user_bytes: float = 19_080
    """Redis's memory for a user of four feedbacks: log, fold, two interactions; 1.77 GiB over 100,000 users."""
    cached: float = 0.54
    """Share of the prompt tokens in vLLM's prefix cache, over all chats."""
    # -- by arithmetic --
    adapter_bytes: float = 42e6
    """Rank 8 on seven layers of a model of 8 billion parameters (hidden 4096, 32 layers): 21 million numbers of 16 bits."""
    versions: float = 2
    """Of an adapter that are kept, on average; at most seven by default (`versions_kept`, the one in use, where a rollback goes)."""
    due: float = 20
    """Feedbacks from one consolidation to the next (FASTSLOW_DUE_FEEDBACKS)."""
    # -- of the hardware (assumed: measure your model on your GPU) --
    gpu_output: float = 2000
    """Tokens a second that a GPU generates with adapters, at the latency that is wanted."""
    gpu_input: float = 20_000
    """Prompt tokens a second that it reads."""
    consolidation_seconds: float = 30
    """Of a GPU for an adapter, 32 trained side by side."""
    target: float = 0.6
    """Share of what a process, a GPU or a Redis node could do that is asked of it at the peak."""
    redis_node_gb: float = 64
    # -- prices in dollars (assumed) --
    gpu_hour: float = 2.5
    core_hour: float = 0.04
    redis_gb_month: float = 8.0
    store_gb_month: float = 0.05


@dataclass(frozen=True)
class Need:
    """What it takes."""

    chats_a_second: float
    gateways: int
    gpus_serving: int
    gpus_training: float
    adapters: float
    adapters_tb: float
    redis_users_gb: float
    redis_interactions_gb: float
    redis_nodes: int
    dollars_a_month: float


def need(users: float, load: Load) -> Need:
    """The formulas of docs/capacity.md."""
    chats_a_day = users * load.active * load.chats
    at_peak = chats_a_day * load.peak / DAY_SECONDS
    cores = at_peak * (1 / load.gateway_chats + load.feedback / load.gateway_feedbacks) / load.target
    read = load.input_tokens * (1 - load.cached) / load.gpu_input
    serving = at_peak * (load.output_tokens / load.gpu_output + read) / load.target
    training = chats_a_day * load.feedback / load.due * load.consolidation_seconds / DAY_SECONDS / load.target
    adapters = users * load.with_adapter
    adapters_gb = adapters * load.versions * load.adapter_bytes / 1e9
    users_gb = users * load.user_bytes / 1e9
    interactions_gb = chats_a_day * load.retention_days * load.interaction_bytes / 1e9
    # Two at least of whatever serves; a copy of everything in Redis.
    gateways, gpus = max(2, math.ceil(cores)), max(2, math.ceil(serving))
    redis_gb = 2 * (users_gb + interactions_gb) / load.target
    dollars = (
        MONTH_HOURS * ((gpus + training) * load.gpu_hour + gateways * load.core_hour)
        + redis_gb * load.redis_gb_month
        + adapters_gb * load.store_gb_month
    )
    return Need(
        chats_a_second=at_peak,
        gateways=gateways,
        gpus_serving=gpus,
        gpus_training=training,
        adapters=adapters,
        adapters_tb=adapters_gb / 1000,
        redis_users_gb=users_gb,
        redis_interactions_gb=interactions_gb,
        redis_nodes=max(2, 2 * math.ceil(redis_gb / 2 / load.redis_node_gb)),
        dollars_a_month=dollars,
    )


ROWS = {
    "chats_a_second": "chats a second at the peak",
    "gateways": "gateways, a core each",
    "gpus_serving": "GPUs that serve",
    "gpus_training": "GPUs that consolidate",
    "adapters": "adapters",
    "adapters_tb": "adapter store, TB",
    "redis_users_gb": "Redis: logs and folds, GB",
    "redis_interactions_gb": "Redis: interactions, GB",
    "redis_nodes": "Redis nodes of 64 GB, replicas included",
    "dollars_a_month": "dollars a month",
}


def table(sizes: tuple[float, ...], load: Load) -> str:
    """Markdown: a column for each number of users."""
    needs = [need(users, load) for users in sizes]
    lines = [f"| users | {' | '.join(_shown(users) for users in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    for name, title in ROWS.items():
        lines.append(f"| {title} | {' | '.join(_shown(getattr(one, name)) for one in needs)} |")
    user = [f"{one.dollars_a_month / users:.2f}" for one, users in zip(needs, sizes, strict=True)]
    return "\n".join([*lines, f"| dollars a month, a user | {' | '.join(user)} |"])


def _shown(number: float) -> str:
    """Three digits: no figure here is better than that."""
    if number < 10:
        return f"{number:.2g}"
    digits = max(0, int(math.log10(number)) - 2)
    return f"{round(number, -digits):,.0f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=float, nargs="*", default=SIZES)
    parser.add_argument("--set", nargs="*", default=(), metavar="NAME=VALUE", help="figures of your own")
    given = parser.parse_args()
    known = {field.name for field in fields(Load)}
    changed = dict(text.split("=", 1) for text in given.set)
    if unknown := changed.keys() - known:
        parser.error(f"no figure is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    print(table(tuple(given.users), replace(Load(), **{name: float(value) for name, value in changed.items()})))


if __name__ == "__main__":
    main()
