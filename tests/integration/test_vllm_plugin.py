"""Our plugin inside a real vLLM on the CPU: adapters by name, eviction, and what a replica does not answer."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.integration.replica import BASE, chat_body

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

UNKNOWN = "fs-0123456789ab-0001-0123456789ab"


def test_a_name_in_the_store_is_served_on_its_first_use_and_changes_the_reply(vllm_server, publish):
    name = publish()
    response, base = (vllm_server.chat(model, max_tokens=24) for model in (name, BASE))
    assert response.status_code == 200, response.text
    assert response.json()["model"] == name
    assert response.json()["choices"][0]["message"] != base.json()["choices"][0]["message"]
    assert name in vllm_server.http.get("/fastslow/adapters").json()["adapters"]


def test_an_unknown_name_is_404_and_the_replica_lives(vllm_server):
    response = vllm_server.chat(UNKNOWN)
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
    assert vllm_server.reply(BASE)


@pytest.mark.parametrize(
    "fault", [{"spoil": True}, {"base_model": "another-model"}], ids=["spoilt", "of another model"]
)
def test_a_version_that_is_not_what_it_claims_is_refused_and_the_log_says_so(vllm_server, publish, fault):
    name = publish(**fault)
    assert vllm_server.chat(name).status_code == 404
    assert f"Adapter {name} is not served" in vllm_server.log()
    assert not (vllm_server.cache / name).exists()
    assert vllm_server.reply(BASE)


def test_an_adapter_over_the_largest_rank_is_400_and_the_replica_lives(vllm_server, publish):
    assert vllm_server.chat(publish(rank=32)).status_code == 400
    assert vllm_server.reply(BASE)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/adapters"),
        ("DELETE", f"/adapters/{UNKNOWN}"),
        ("POST", "/invocations"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/v1/responses"),
        ("GET", "/openapi.json"),
    ],
)
def test_a_path_that_the_service_does_not_use_is_404(vllm_server, method, path):
    body = {"lora_name": "x", "lora_path": str(vllm_server.store)} if method == "POST" else None
    assert vllm_server.http.request(method, path, json=body).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/fastslow/adapters"),
        ("DELETE", f"/fastslow/adapters/{UNKNOWN}"),
        ("POST", "/fastslow/score"),
        ("POST", "/tokenize"),
        ("POST", "/v1/chat/completions"),
    ],
)
def test_a_request_without_the_api_key_is_refused(vllm_server, method, path):
    url = vllm_server.http.base_url.join(path)
    assert httpx.request(method, url).status_code == 401
    assert httpx.request(method, url, headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_an_evicted_adapter_is_gone_and_resolves_again(vllm_server, publish):
    name = publish()
    before = vllm_server.reply(name)
    response = vllm_server.http.delete(f"/fastslow/adapters/{name}")
    assert (response.status_code, response.json()) == (200, {"name": name, "evicted": True})
    assert name not in vllm_server.http.get("/fastslow/adapters").json()["adapters"]
    assert not (vllm_server.cache / name).exists()
    assert vllm_server.reply(name) == before


def test_evicting_what_is_not_loaded_is_fine_and_what_is_no_name_is_404(vllm_server):
    assert vllm_server.http.delete(f"/fastslow/adapters/{UNKNOWN}").json()["evicted"] is True
    assert vllm_server.http.delete("/fastslow/adapters/..%2Fsecrets").status_code == 404
    assert vllm_server.http.delete("/fastslow/adapters/secrets").status_code == 404


def test_an_eviction_waits_for_a_reply_that_uses_the_adapter(vllm_server, publish):
    name = publish()
    copy = vllm_server.cache / name
    body = chat_body(name, 48, stream=True, ignore_eos=True)
    with vllm_server.http.stream("POST", "/v1/chat/completions", json=body) as stream, ThreadPoolExecutor(1) as pool:
        lines = stream.iter_lines()
        next(lines)
        evicting = pool.submit(vllm_server.http.delete, f"/fastslow/adapters/{name}")
        copy_was_there = [copy.exists() for line in lines if "delta" in line]
    assert len(copy_was_there) >= 48
    assert all(copy_was_there)
    assert evicting.result().status_code in (200, 202)
    deadline = time.monotonic() + 10
    while copy.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not copy.exists()
    assert vllm_server.reply(BASE)


def test_an_adapter_is_served_on_after_the_store_lost_it_and_memory_needed_its_room(vllm_server, publish):
    """The first of the known killers: the engine reads the files again, and dies if they are gone."""
    name, *others = publish(), publish(), publish(), publish()
    before = vllm_server.reply(name)
    shutil.rmtree(vllm_server.store / name)
    for other in others:
        vllm_server.reply(other)
    assert vllm_server.reply(name) == before
    assert vllm_server.reply(BASE)


def test_eight_first_uses_at_once_are_all_served(vllm_server, publish):
    name = publish()
    start = threading.Barrier(8)

    def first_use(_: int) -> int:
        start.wait()
        return vllm_server.chat(name, max_tokens=4).status_code

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first_use, range(8))) == [200] * 8


def test_what_the_base_model_says_beside_adapters_is_what_it_says_alone(vllm_server, publish):
    models = [BASE, publish(), publish()] * 3
    alone = {model: vllm_server.reply(model) for model in models}
    with ThreadPoolExecutor(len(models)) as pool:
        beside = list(pool.map(vllm_server.reply, models))
    assert beside == [alone[model] for model in models]


def test_tokenize_loads_an_adapter_without_generating(vllm_server, publish):
    name = publish()
    assert vllm_server.http.post("/tokenize", json={"model": name, "prompt": "x"}).status_code == 200
    assert name in vllm_server.http.get("/fastslow/adapters").json()["adapters"]


def test_the_request_id_becomes_the_id_of_the_completion(vllm_server):
    response = vllm_server.chat(BASE, max_tokens=1, headers={"X-Request-Id": "one-of-ours"})
    assert response.json()["id"] == "chatcmpl-one-of-ours"


def test_a_prefix_is_shared_under_one_salt_and_never_across_salts(vllm_server):
    def cached_tokens(salt: str) -> int:
        usage = vllm_server.chat(BASE, max_tokens=1, cache_salt=salt).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached_tokens("a" * 64) == 0
    assert cached_tokens("a" * 64) > 0
    assert cached_tokens("b" * 64) == 0


def test_a_client_that_hangs_up_ends_the_generation(vllm_server):
    body = chat_body(BASE, 1500, stream=True, ignore_eos=True)
    with vllm_server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        next(stream.iter_lines())
        assert vllm_server.metric("num_requests_running") == 1
    # The whole reply would take a minute.
    deadline = time.monotonic() + 5
    while vllm_server.metric("num_requests_running") > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert vllm_server.metric("num_requests_running") == 0
