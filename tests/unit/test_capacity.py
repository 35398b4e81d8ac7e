"""docs/capacity.md says what deploy/capacity.py computes, from figures that docs/benchmarks.md reports and defaults that are in force."""

import re
from dataclasses import replace
from pathlib import Path

from deploy.capacity import DAY_SECONDS, SIZES, Load, need, table
from service.settings import Settings

DOCS = Path(__file__).parent.parent.parent / "docs"
CAPACITY, BENCHMARKS = ((DOCS / name).read_text() for name in ("capacity.md", "benchmarks.md"))


def test_the_tables_are_what_is_computed() -> None:
    assert table(SIZES, Load()) in CAPACITY
    assert table(SIZES, replace(Load(), retention_days=1)) in CAPACITY


def test_measured_figures_are_those_of_the_benchmarks() -> None:
    load = Load()
    assert f"{load.gateway_chats:,.0f} chats a second" in BENCHMARKS
    assert re.search(rf"100,000 users, ten connections: feedbacks/s \| {load.gateway_feedbacks:.0f} \|", BENCHMARKS)
    assert re.search(rf"share of prompt tokens, all chats \| {load.cached:.2f} \|", BENCHMARKS)
    [stored_gib] = {float(text) for text in re.findall(r"stored by 100,000 users, GiB \| ([\d.]+) \|", BENCHMARKS)}
    assert abs(stored_gib * 2**30 / 100_000 / load.user_bytes - 1) < 0.01


def test_defaults_are_the_services() -> None:
    settings, load = Settings(_env_file=None), Load()
    assert load.retention_days * DAY_SECONDS == settings.interaction_retention_seconds
    assert load.due == settings.due_feedbacks
    assert load.versions <= settings.versions_kept + 2


def test_a_day_of_one_chat_a_second_by_hand() -> None:
    load = Load(active=1, chats=1, peak=1, feedback=0, output_tokens=100, input_tokens=1000, cached=0.5)
    load = replace(load, gateway_chats=1000, gpu_output=1000, gpu_input=5000, target=0.5, interaction_bytes=1000)
    found = need(DAY_SECONDS * 100, load)
    assert found.chats_a_second == 100
    # A hundredth of a second a chat would be one gateway; two at least.
    assert found.gateways == 2
    # 0.1 s to generate and 0.1 s to read, a hundred times a second, at half of what they can.
    assert found.gpus_serving == 40
    assert found.gpus_training == 0
    assert found.redis_interactions_gb == 86400 * 100 * 30 * 1000 / 1e9


def test_more_users_never_need_less() -> None:
    small, large = need(10_000, Load()), need(20_000, Load())
    assert all(getattr(large, name) >= getattr(small, name) for name in small.__dataclass_fields__)
