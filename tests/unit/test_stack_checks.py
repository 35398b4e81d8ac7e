"""What `fastslow up` looks at first: each problem is one line that says what to do."""

import socket
from pathlib import Path

import pytest

from service.keys import new_keys
from service.settings import Settings
from service.stack import checks
from service.stack.checks import StackProblem
from service.stack.children import address, children, environment, in_force
from service.stack.leftovers import MARK
from service.stack.welcome import welcome

KEYS = new_keys()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def settings(tmp_path: Path, **given: object) -> Settings:
    ports = {"port": free_port(), "redis_port": free_port(), "vllm_port": free_port()}
    return Settings(_env_file=None, **({"data_dir": tmp_path} | ports | given))


@pytest.mark.parametrize(
    ("field", "user", "setting"),
    [
        ("port", "the gateway", "--port or FASTSLOW_PORT"),
        ("redis_port", "Redis", "FASTSLOW_REDIS_PORT"),
        ("vllm_port", "vLLM", "FASTSLOW_VLLM_PORT"),
    ],
)
def test_a_taken_port_is_named_with_the_setting_that_changes_it(
    tmp_path: Path, field: str, user: str, setting: str
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StackProblem) as raised:
            checks.check_ports(settings(tmp_path, **{field: port}))
    assert raised.value.message == f"Port {port} for {user} is taken: choose another with {setting}."


def test_one_port_for_two_processes_is_refused(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(StackProblem, match=f"Port {port} for Redis is taken"):
        checks.check_ports(settings(tmp_path, port=port, redis_port=port))


def test_ports_of_what_is_not_started_do_not_matter(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        urls = {"redis_url": "redis://elsewhere:6379/0", "vllm_url": "http://elsewhere:8000"}
        checks.check_ports(settings(tmp_path, redis_port=port, vllm_port=port, **urls))


def test_a_data_folder_has_one_stack_at_a_time(tmp_path: Path) -> None:
    with (
        checks.data_folder(tmp_path),
        pytest.raises(StackProblem, match="Another `fastslow up` runs on the data folder"),
        checks.data_folder(tmp_path),
    ):
        pass
    with checks.data_folder(tmp_path):
        pass


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    full = checks.data_folder(tmp_path, needed_bytes=10**18)
    with pytest.raises(StackProblem, match=r"is full: \d+ MB are free and \d+ MB are needed") as raised, full:
        pass
    assert "\n" not in raised.value.message


def test_a_data_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(StackProblem, match=r"can't be used \(Not a directory\): choose another"),
        checks.data_folder(file),
    ):
        pass


async def test_an_unreachable_redis_url_is_one_line_without_its_password(tmp_path: Path) -> None:
    url = f"redis://:hunter2@127.0.0.1:{free_port()}/0"
    with pytest.raises(StackProblem, match="No Redis at FASTSLOW_REDIS_URL redis://:") as raised:
        await checks.check_urls(settings(tmp_path, redis_url=url))
    assert "hunter2" not in raised.value.message
    assert "\n" not in raised.value.message


async def test_a_redis_url_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StackProblem, match="No Redis at FASTSLOW_REDIS_URL localhost"):
        await checks.check_urls(settings(tmp_path, redis_url="localhost:6379"))


async def test_an_unreachable_vllm_url_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StackProblem, match="No vLLM at FASTSLOW_VLLM_URL"):
        await checks.check_urls(settings(tmp_path, vllm_url=f"http://127.0.0.1:{free_port()}"))


@pytest.mark.parametrize("model", ["/no/such/folder", "folder", "./models/mine"])
def test_a_missing_model_folder_is_one_line(tmp_path: Path, model: str) -> None:
    with pytest.raises(StackProblem, match="No model at"):
        checks.check_model(settings(tmp_path, model=model))


def test_a_model_folder_and_a_hub_id_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    checks.check_model(settings(tmp_path, model=str(tmp_path)))
    checks.check_model(settings(tmp_path, model="HuggingFaceTB/SmolLM2-135M-Instruct"))


def test_nothing_embedded_is_started_where_urls_are_given(tmp_path: Path) -> None:
    def names(**given: str) -> list[str]:
        return [child.name for child in children(settings(tmp_path, **given), KEYS)]

    assert names() == ["redis", "vllm", "worker", "control", "beat", "gateway"]
    assert names(redis_url="redis://elsewhere:6379/0") == ["vllm", "worker", "control", "beat", "gateway"]
    assert names(vllm_url="http://elsewhere:8000") == ["redis", "worker", "control", "beat", "gateway"]


def test_the_children_read_back_the_settings_that_are_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(
        tmp_path,
        sweep_scopes=("user", "cohort"),
        lora_target_modules=("q_proj",),
        jwt_key="s3cret",
        adapter_store="s3://adapters",
        adapter_store_options={"endpoint_url": "http://minio:9000"},
    )
    full = in_force(given, KEYS)
    for child in children(given, KEYS):
        assert child.env[MARK] == str(tmp_path)
        assert {name: value for name, value in child.env.items() if name in environment(full)} == environment(full)
    for name, value in environment(full).items():
        monkeypatch.setenv(name, value)
    assert Settings(_env_file=None) == full
    assert full.redis_url == given.effective_redis_url
    assert full.vllm_api_key.get_secret_value() == KEYS.vllm_api_key


def test_our_vllm_key_is_not_sent_to_a_vllm_that_is_not_ours(tmp_path: Path) -> None:
    full = in_force(settings(tmp_path, vllm_url="http://elsewhere:8000"), KEYS)
    assert full.vllm_api_key.get_secret_value() == ""
    full = in_force(settings(tmp_path, vllm_url="http://elsewhere:8000", vllm_api_key="theirs"), KEYS)
    assert full.vllm_api_key.get_secret_value() == "theirs"


def test_no_secret_is_in_a_command_line(tmp_path: Path) -> None:
    given = settings(tmp_path, jwt_key="s3cret")
    words = " ".join(word for child in children(given, KEYS) for word in child.argv)
    for secret in ("s3cret", KEYS.vllm_api_key, KEYS.cache_salt_secret, KEYS.first("client")):
        assert secret not in words


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("box", "box")]
)
def test_the_address_shown_is_one_that_can_be_called(tmp_path: Path, host: str, shown: str) -> None:
    assert address(settings(tmp_path, host=host, port=8080)) == f"http://{shown}:8080"


def test_the_welcome_has_the_url_both_keys_and_three_calls(tmp_path: Path) -> None:
    text = welcome(settings(tmp_path, port=8080), KEYS)
    assert "http://127.0.0.1:8080/v1\n" in text
    assert text.count(KEYS.first("client")) == 4
    assert text.count(KEYS.first("admin")) == 1
    assert text.count("curl -s http://127.0.0.1:8080/v1/") == 3


def test_too_little_shared_memory_for_vllm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_installed(settings(tmp_path))
    monkeypatch.setattr(checks, "SHARED_BYTES", 1 << 60)
    with pytest.raises(StackProblem, match="of shared memory") as raised:
        checks.check_installed(settings(tmp_path))
    assert "\n" not in raised.value.message
    checks.check_installed(settings(tmp_path, vllm_url="http://elsewhere:8000"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://user:s3:c@ret@h/0", "redis://user:***@h/0"),
        ("redis+cluster://:s3cret@a:7000,[::1]:7002", "redis+cluster://:***@a:7000,[::1]:7002"),
        ("redis+sentinel://a/main?sentinel_password=s3cret&db=1", "redis+sentinel://a/main?sentinel_password=***&db=1"),
        ("http://a:8000/v1", "http://a:8000/v1"),
    ],
)
def test_a_url_is_shown_without_its_passwords(url: str, shown: str) -> None:
    assert checks.without_password(url) == shown
