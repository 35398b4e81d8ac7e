"""The command line and the environment that vLLM is started with."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.keys import ensure_keys, with_own_vllm_key
from service.settings import Settings
from workers.vllm_server import LORA_RANKS, PLUGINS, model_problem, vllm_argv, vllm_environment


def settings_of(**fields) -> Settings:
    return Settings(_env_file=None, **{"vllm_device": "cpu", **fields})


def value_of(flag: str, argv: list[str]) -> str:
    return argv[argv.index(flag) + 1]


def test_the_cpu_is_served_in_float32_and_in_small_blocks():
    argv = vllm_argv(settings_of())
    assert value_of("--dtype", argv) == "float32"
    assert value_of("--block-size", argv) == "32"


def test_cuda_keeps_the_models_dtype_and_vllms_blocks():
    argv = vllm_argv(settings_of(vllm_device="cuda"))
    assert value_of("--dtype", argv) == "auto"
    assert "--block-size" not in argv
    assert "VLLM_CPU_KVCACHE_SPACE" not in vllm_environment(settings_of(vllm_device="cuda"), {})


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 33, 64])
def test_every_rank_that_can_be_trained_can_be_served(rank):
    served = int(value_of("--max-lora-rank", vllm_argv(settings_of(lora_rank=rank))))
    assert served >= rank
    assert served in LORA_RANKS


def test_memory_holds_at_least_the_adapters_of_one_batch():
    argv = vllm_argv(settings_of(vllm_adapters_in_batch=8, vllm_adapters_in_memory=2))
    assert value_of("--max-cpu-loras", argv) == "8"


def test_the_output_layer_is_left_out_because_prompt_logprobs_would_kill_the_engine():
    argv = vllm_argv(settings_of())
    assert "lm_head" not in argv
    assert argv[argv.index("--lora-target-modules") + 1 :] == list(settings_of().lora_target_modules)


def test_only_our_plugins_are_loaded_and_they_see_the_same_folders(tmp_path):
    settings = settings_of(adapter_store="adapters", adapter_cache_dir=str(tmp_path), model_name="m")
    environment = vllm_environment(settings, {"PATH": "/bin", "VLLM_PLUGINS": "another"})
    assert environment["PATH"] == "/bin"
    assert environment["VLLM_PLUGINS"].split(",") == list(PLUGINS)
    assert environment["FASTSLOW_ADAPTER_STORE"] == str(Path("adapters").absolute())
    assert environment["FASTSLOW_ADAPTER_CACHE_DIR"] == str(tmp_path)
    assert environment["FASTSLOW_MODEL_NAME"] == "m"


def test_an_object_store_is_named_to_the_plugin_as_it_is_with_its_options_and_limits():
    options = {"endpoint_url": "http://minio:9000", "client_kwargs": {"region_name": "eu"}}
    settings = settings_of(adapter_store="s3://b/p", adapter_store_options=options, adapter_cache_gib=3.5)
    environment = vllm_environment(settings, {})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        read = Settings(_env_file=None)
    assert (read.adapter_store, read.adapter_store_options, read.adapter_cache_gib) == ("s3://b/p", options, 3.5)
    assert "minio" not in repr(settings), "options may hold secrets"


@pytest.mark.parametrize(
    ("store", "folder"),
    [("", "data/adapters"), ("/a/b", "/a/b"), ("file:///a/b", "/a/b"), ("s3://bucket/a", None), ("gs://bucket", None)],
)
def test_a_store_is_a_folder_unless_it_has_a_url_of_something_else(store, folder):
    assert settings_of(adapter_store=store).adapter_store_dir == (Path(folder) if folder else None)


def test_the_plugins_that_are_named_are_entry_points_of_ours():
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins", "vllm.platform_plugins")
    ours = {entry.name for group in groups for entry in entry_points(group=group)}
    assert set(PLUGINS) <= ours


def test_the_api_key_is_given_in_the_environment_and_never_in_the_arguments():
    settings = settings_of(vllm_api_key=SecretStr("secret"))
    assert vllm_environment(settings, {})["VLLM_API_KEY"] == "secret"
    assert not any("secret" in argument for argument in vllm_argv(settings))


def test_the_key_that_a_local_stack_gave_its_vllm_is_found_where_none_is_set(tmp_path):
    none = Settings(_env_file=None, data_dir=tmp_path)
    assert with_own_vllm_key(none) == none
    keys = ensure_keys(none.keys_path)
    assert with_own_vllm_key(none).vllm_api_key.get_secret_value() == keys.vllm_api_key
    named = none.model_copy(update={"vllm_api_key": SecretStr("another")})
    assert with_own_vllm_key(named) == named


def test_nothing_is_reported_to_others_and_a_local_model_asks_no_hub(tmp_path):
    environment = vllm_environment(settings_of(model=str(tmp_path)), {})
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == environment["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in vllm_environment(settings_of(model="an/id"), {})


def test_spans_go_where_those_of_the_gateway_go_and_nowhere_by_default():
    settings = settings_of(otlp_endpoint="http://collector:4318/")
    assert value_of("--otlp-traces-endpoint", vllm_argv(settings)) == "http://collector:4318/v1/traces"
    assert vllm_environment(settings, {})["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert "--otlp-traces-endpoint" not in vllm_argv(settings_of())
    assert not any(name.startswith("OTEL") for name in vllm_environment(settings_of(), {}))


def test_a_missing_model_is_one_clear_line(tmp_path):
    unprepared = model_problem(settings_of(data_dir=tmp_path))
    assert unprepared is not None
    assert "python -m workers.model" in unprepared
    assert "\n" not in unprepared
    assert "FASTSLOW_MODEL" in (model_problem(settings_of(model=str(tmp_path / "gone"))) or "")


def test_a_prepared_folder_and_a_hub_id_may_be_served(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert model_problem(settings_of(model=str(tmp_path))) is None
    assert model_problem(settings_of(model="HuggingFaceTB/SmolLM2-135M-Instruct")) is None
