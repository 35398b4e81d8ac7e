"""The replicas benchmark over fake vLLMs: which replica a user's chats go to in each arm, and what is counted."""

import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from service.settings import Settings
from service.store import Store
from service.tokens import Tokens
from tests.benchmarks.adapter_loads import ACTIVATED, LOADED, LOGGING, Logs
from tests.benchmarks.replica_adapters import put_in_use, write_adapters
from tests.benchmarks.replicas import AFFINITY, ROUND_ROBIN, Arm, Asked, Round, compared, one_round
from tests.conftest import gateway_client
from tests.fakes import MODEL, FakeVllm, RecordedJobs
from workers.adapter_store import Copies, FolderStore

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}
USERS = [f"user-{n}" for n in range(12)]


@pytest.fixture
async def replicas() -> AsyncIterator[list[FakeVllm]]:
    found = [FakeVllm(), FakeVllm()]
    for replica in found:
        await replica.start()
    yield found
    for replica in found:
        await replica.stop()


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    (tmp_path / "one.log").write_text("")
    return Logs([tmp_path / "one.log"])


async def played(
    name: str,
    replicas: list[FakeVllm],
    settings: Settings,
    store: Store,
    tokens: Tokens,
    logs: Logs,
    folder: Path,
    *,
    passes: int,
) -> tuple[Round, dict[str, set[int]]]:
    """A round of an arm; and which replicas each adapter was asked of."""
    versions = write_adapters(folder, CONFIG, USERS, tenant="acme")
    await put_in_use(store, versions)
    for replica in replicas:
        replica.adapters |= {version.name for version in versions}
    urls = tuple(replica.url for replica in replicas)
    over = [urls] if name == AFFINITY else [(url,) for url in urls]
    async with AsyncExitStack() as stack:
        gateways = [
            await stack.enter_async_context(
                gateway_client(
                    settings.model_copy(
                        update={
                            "vllm_url": "",
                            "vllm_replica_urls": known,
                            "replica_probe_timeout_seconds": 60.0,
                            # The fake's own gauge.
                            "replica_spill_waiting": 100,
                        }
                    ),
                    tokens,
                    RecordedJobs(),
                )
            )
            for known in over
        ]
        found = await one_round(Arm(name, gateways), versions, logs, number=3, passes=passes, at_once=4)
    asked = defaultdict(set)
    for n, replica in enumerate(replicas):
        for body in replica.bodies:
            asked[body["model"]].add(n)
    assert asked.keys() == {version.name for version in versions}
    return found, asked


async def test_with_affinity_each_adapter_is_asked_of_one_replica(replicas, settings, store, tokens, logs, tmp_path):
    found, asked = await played(AFFINITY, replicas, settings, store, tokens, logs, tmp_path / "a", passes=2)
    assert {len(where) for where in asked.values()} == {1}
    assert {n for where in asked.values() for n in where} == {0, 1}
    assert len(found.asked) == 2 * len(USERS), "the first pass is not counted"
    assert sum(len(replica.bodies) for replica in replicas) == 3 * len(USERS)
    assert {(chat.prompt_tokens, chat.cached_tokens) for chat in found.asked} == {(9, 4)}
    assert all(chat.seconds > 0 for chat in found.asked)


async def test_in_turn_the_replicas_get_as_many_chats_and_most_adapters_are_asked_of_both(
    replicas, settings, store, tokens, logs, tmp_path
):
    _, asked = await played(ROUND_ROBIN, replicas, settings, store, tokens, logs, tmp_path / "a", passes=3)
    assert len(replicas[0].bodies) == len(replicas[1].bodies)
    assert sum(len(where) == 2 for where in asked.values()) > len(USERS) / 2


async def test_a_chat_that_is_not_served_by_its_adapter_ends_the_benchmark(
    replicas, settings, store, tokens, logs, tmp_path
):
    versions = write_adapters(tmp_path / "a", CONFIG, USERS[:1], tenant="acme")
    await put_in_use(store, versions)
    async with gateway_client(settings, tokens, RecordedJobs()) as client:
        with pytest.raises(RuntimeError, match="not by"):
            await one_round(Arm(AFFINITY, [client]), versions, logs, number=0, passes=1, at_once=1)


def test_adapters_are_distinct_and_pass_the_checks_of_a_replica(tmp_path):
    versions = write_adapters(tmp_path / "a", CONFIG, USERS, tenant="acme")
    assert len({version.content_sha256 for version in versions}) == len(USERS)
    copies = Copies(tmp_path / "c", most_bytes=1 << 30, base_model=MODEL)
    for version in versions:
        copy = copies.take(version.name, FolderStore(tmp_path / "a").copy_to)
        weights = (copy.folder / "adapter_model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == version.content_sha256
        copy.release()


def test_loads_are_counted_by_vllms_own_words_and_figures_are_of_all_counted_chats(tmp_path):
    log = tmp_path / "workers.vllm_server.log"
    log.write_text(f"{LOADED}: 3, int id: 3\n{ACTIVATED}: 3, slot index: 0\nother\n{ACTIVATED}: 4, slot index: 1\n")
    assert Logs([log, log]).counts() == (2, 4)
    quick, slow = Asked(0.1, 100, 50), Asked(1.0, 100, 0)
    rounds = {
        AFFINITY: [Round([quick] * 9 + [slow], loads=1, activations=4)],
        ROUND_ROBIN: [Round([quick] * 3, loads=5, activations=6), Round([slow], loads=7, activations=8)],
    }
    found = compared(rounds)
    assert {key: found[AFFINITY][key] for key in ("ttft_p50_ms", "ttft_p95_ms", "loads", "stalls", "cached_share")} == {
        "ttft_p50_ms": 100.0,
        "ttft_p95_ms": 1000.0,
        "loads": 1,
        "stalls": 1,
        "cached_share": 0.45,
    }
    assert (found[ROUND_ROBIN]["loads"], found[ROUND_ROBIN]["activations"], found[ROUND_ROBIN]["chats"]) == (12, 14, 4)


def test_vllm_can_configure_its_logs_so():
    # In a process of its own, for it changes the process's logs.
    code = """
import json, logging, logging.config, sys
logging.config.dictConfig(json.loads(sys.argv[1]))
log = logging.getLogger("vllm.lora.model_manager")
log.debug("Activating LoRA. int id: %d, slot index: %d", 7, 1)
log.debug("Successfully loaded LoRA weights for module %s.", "x")
logging.getLogger("vllm.other").debug("quiet")
logging.getLogger("vllm.other").info("told")
"""
    command = [sys.executable, "-c", code, json.dumps(LOGGING)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["Activating LoRA. int id: 7, slot index: 1", "told"]
