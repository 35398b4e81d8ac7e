"""The manifests are what Kubernetes takes, and name what exists: settings, modules, images, ports, volumes, secrets, pods, metrics."""

import copy
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from service.broker import KEY_PREFIX
from service.jobs import CONSOLIDATE_QUEUE, CONTROL_QUEUE
from service.replica_metrics import ReplicaStates
from service.replicas import Replicas
from service.settings import Settings
from tests.kubernetes_schema import problems
from tests.unit.test_deploy import SERVICES, modules, words

FOLDER = Path(__file__).parent.parent.parent / "deploy" / "kubernetes"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text())
KEDA: dict[str, Any] = yaml.safe_load((FOLDER / "keda" / "kustomization.yaml").read_text())
MONITORING: dict[str, Any] = yaml.safe_load((FOLDER / "monitoring" / "kustomization.yaml").read_text())
# Made by hand, as the kustomization's head says.
SECRETS = {
    ("fastslow-keys", "keys.json"),
    ("fastslow-vllm", "api-key"),
    ("fastslow-redis", "password"),
    ("fastslow-redis", "url"),
}


def loaded(folder: str, names: list[str]) -> list[dict[str, Any]]:
    return [found for name in names for found in yaml.safe_load_all((FOLDER / folder / name).read_text())]


BASE = loaded("base", KUSTOMIZATION["resources"])
SCALING = loaded("keda", KEDA["resources"])
WATCHING = loaded("monitoring", MONITORING["resources"])


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [manifest for manifest in BASE if manifest["kind"] in kinds]


def named(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']}-{manifest['metadata']['name']}"


WORKLOADS = of_kind("Deployment", "StatefulSet", "Job")
SERVING = {workload["metadata"]["name"]: workload for workload in WORKLOADS}
OURS = {name: workload for name, workload in SERVING.items() if name != "redis"}
SHARED: dict[str, str] = of_kind("ConfigMap")[0]["data"]


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = workload["spec"]["template"]["spec"]
    return found


def container(workload: dict[str, Any]) -> dict[str, Any]:
    [found] = pod(workload)["containers"]
    return dict(found)


def variables(workload: dict[str, Any]) -> dict[str, str]:
    """The environment of a container, as far as it is written down; what is secret has its own name as its value."""
    shared = SHARED if container(workload).get("envFrom") else {}
    own = {entry["name"]: entry.get("value", entry["name"]) for entry in container(workload).get("env", [])}
    return shared | own


def selected(selector: dict[str, Any]) -> set[str]:
    """Workloads whose pods a selector takes."""
    names = set(SERVING)
    for label, value in selector.get("matchLabels", {}).items():
        names &= {name for name in names if SERVING[name]["spec"]["template"]["metadata"]["labels"].get(label) == value}
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        names &= {
            name
            for name in names
            if SERVING[name]["spec"]["template"]["metadata"]["labels"].get(rule["key"]) in rule["values"]
        }
    return names


@pytest.mark.parametrize("manifest", BASE, ids=named)
def test_every_manifest_is_of_the_apis_own_type(manifest: dict[str, Any]) -> None:
    assert problems(manifest) == []


@pytest.mark.parametrize("manifest", [m for m in SCALING + WATCHING if "keda.sh" not in m["apiVersion"]], ids=named)
def test_what_a_component_adds_is_of_the_apis_own_type(manifest: dict[str, Any]) -> None:
    assert problems(manifest) == []


@pytest.mark.parametrize(
    ("spoilt", "found"),
    [
        (lambda c: c.update(imagePullPolice="Always"), "containers[0].imagePullPolice is unknown"),
        (lambda c: c.pop("name"), "missing required field `name`"),
        (lambda c: c["ports"][0].update(containerPort="8080"), "Expected `int`, got `str`"),
        (lambda c: c.update(ports={}), "got `object`"),
    ],
)
def test_a_wrong_manifest_would_be_found(spoilt: Any, found: str) -> None:
    gateway = copy.deepcopy(SERVING["gateway"])
    spoilt(pod(gateway)["containers"][0])
    assert [problem for problem in problems(gateway) if found in problem]


def test_every_file_is_used_and_no_two_manifests_have_one_name() -> None:
    for folder, kustomization in (("base", KUSTOMIZATION), ("keda", KEDA), ("monitoring", MONITORING)):
        files = {file.name for file in (FOLDER / folder).glob("*.yaml")} - {"kustomization.yaml"}
        assert files == set(kustomization["resources"])
    names = [named(manifest) for manifest in BASE + SCALING + WATCHING]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_that_reads_its_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in variables(SERVING[name]).items():
        assert variable.removeprefix("FASTSLOW_").lower() in Settings.model_fields, variable
        # The secret's URL is whatever it is.
        monkeypatch.setenv(variable, "redis://:secret@redis:6379/0" if value == "FASTSLOW_REDIS_URL" else value)
    settings = Settings(_env_file=None)
    assert settings.request_urls == ("dns+http://vllm:8000",)
    if name not in ("vllm", "prepare"):
        assert settings.redis_url == "redis://:secret@redis:6379/0"


@pytest.mark.parametrize("name", OURS)
def test_every_command_runs_what_the_same_service_of_compose_runs(name: str) -> None:
    spec = container(SERVING[name])
    command = [*spec["command"], *spec.get("args", [])]
    assert modules(command)
    for module in modules(command):
        assert importlib.util.find_spec(module.partition(":")[0]) is not None, module
    same = {"consolidate": "worker-gpu", "vllm": "vllm-gpu", "prepare": "prepare-gpu"}.get(name, name)
    composed = words(SERVICES[same].get("entrypoint")) + words(SERVICES[same].get("command"))
    if name != "prepare":
        assert command == composed
    image = SERVICES[same]["image"].split(":")
    assert spec["image"] == ":".join([*image, "latest"][:2])
    assert image[0] in {entry["name"] for entry in KUSTOMIZATION["images"]}


def test_what_is_mounted_and_what_is_secret_exists() -> None:
    claims = {claim["metadata"]["name"] for claim in of_kind("PersistentVolumeClaim")}
    for name, workload in SERVING.items():
        own = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"]: volume for volume in pod(workload).get("volumes", [])}
        assert {mount["name"] for mount in container(workload)["volumeMounts"]} == own | set(volumes), name
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {"claimName": "models"})["claimName"] in claims
            assert volume.get("secret", {"secretName": "fastslow-keys"})["secretName"] == "fastslow-keys"
        for entry in container(workload).get("env", []):
            if "valueFrom" in entry:
                reference = entry["valueFrom"]["secretKeyRef"]
                assert (reference["name"], reference["key"]) in SECRETS
    assert "Secret" not in {manifest["kind"] for manifest in BASE}


def test_services_probes_and_settings_name_ports_that_are_listened_on() -> None:
    for service in of_kind("Service"):
        [name] = selected({"matchLabels": service["spec"]["selector"]})
        ports = {port["name"]: port["containerPort"] for port in container(SERVING[name])["ports"]}
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports
    for workload in SERVING.values():
        ports = {port["name"] for port in container(workload).get("ports", [])}
        probes = [probe for key, probe in container(workload).items() if key.endswith("Probe")]
        assert all(probe.get("httpGet", {"port": None})["port"] in ports | {None} for probe in probes)
    listened = {name: container(SERVING[name])["ports"][0]["containerPort"] for name in ("vllm", "redis", "gateway")}
    assert listened == {"vllm": 8000, "redis": 6379, "gateway": 8080}
    assert variables(SERVING["vllm"])["FASTSLOW_VLLM_PORT"] == "8000"


def test_vllm_is_reached_by_the_gateway_and_the_workers_alone() -> None:
    policies = [m for m in BASE + SCALING + WATCHING if m["kind"] == "NetworkPolicy"]
    closed = {name for p in policies if not p["spec"].get("ingress") for name in selected(p["spec"]["podSelector"])}
    assert closed == set(SERVING)

    def reaching(name: str) -> set[str]:
        rules = [
            rule
            for policy in policies
            if name in selected(policy["spec"]["podSelector"])
            for rule in policy["spec"].get("ingress", [])
        ]
        found: set[str] = set()
        for rule in rules:
            for peer in rule.get("from", [{}]):
                found |= selected(peer["podSelector"]) if "podSelector" in peer else {"elsewhere"}
        return found

    # With Prometheus, where that watches, and KEDA's operator, where that is installed.
    assert reaching("vllm") == {"gateway", "control", "consolidate", "elsewhere"}
    assert reaching("redis") == {"gateway", "control", "consolidate", "beat", "elsewhere"}
    assert reaching("gateway") == {"elsewhere"}
    assert all(reaching(name) == set() for name in ("control", "consolidate", "beat", "prepare"))


def test_no_process_is_root_or_gets_more_rights_or_a_token() -> None:
    for name, workload in SERVING.items():
        assert pod(workload)["automountServiceAccountToken"] is False, name
        # A Service named `fastslow` would give them FASTSLOW_PORT, which is a setting.
        assert pod(workload)["enableServiceLinks"] is False, name
        assert pod(workload)["securityContext"]["runAsNonRoot"] is True, name
        context = container(workload)["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]}), name
        assert {"requests", "limits"} <= set(container(workload)["resources"]), name


def test_whatever_serves_is_probed_and_survives_a_drained_node() -> None:
    guarded = {name for budget in of_kind("PodDisruptionBudget") for name in selected(budget["spec"]["selector"])}
    # A consolidation that is cut off is done again.
    assert guarded == set(SERVING) - {"prepare", "consolidate"}
    for name in set(SERVING) - {"prepare", "beat"}:
        assert {"startupProbe", "livenessProbe"} <= set(container(SERVING[name])), name
    for name in ("gateway", "vllm", "redis"):
        assert "readinessProbe" in container(SERVING[name])


def test_pods_get_the_time_that_their_work_takes_to_end() -> None:
    settings = Settings(_env_file=None)
    grace = {name: pod(workload).get("terminationGracePeriodSeconds", 30) for name, workload in SERVING.items()}
    assert grace["vllm"] > settings.vllm_stop_seconds
    assert grace["control"] > settings.optimize_limit_seconds
    assert grace["consolidate"] > settings.job_limit_seconds
    stop = container(SERVING["gateway"])
    assert grace["gateway"] > int(stop["args"][-1]) + int(stop["lifecycle"]["preStop"]["exec"]["command"][-1])


def test_scaling_follows_queues_and_metrics_that_exist() -> None:
    registry = CollectorRegistry()
    registry.register(ReplicaStates(Replicas(["http://vllm:8000"], Settings(_env_file=None))))
    metrics = {sample.name for family in registry.collect() for sample in family.samples}
    targets = {}
    for scaled in (m for m in SCALING if m["kind"] == "ScaledObject"):
        target = scaled["spec"]["scaleTargetRef"]
        assert SERVING[target["name"]]["kind"] == target["kind"]
        [trigger] = scaled["spec"]["triggers"]
        targets[target["name"]] = trigger["metadata"].get("listName") or trigger["metadata"]["query"]
    assert targets["consolidate"] == KEY_PREFIX + CONSOLIDATE_QUEUE
    assert targets["control"] == KEY_PREFIX + CONTROL_QUEUE
    assert set(re.findall(r"fastslow_\w+", targets["vllm"])) <= metrics
    # KEDA's operator asks from a namespace of its own.
    addresses = {m["spec"]["triggers"][0]["metadata"].get("address") for m in SCALING if m["kind"] == "ScaledObject"}
    assert addresses == {None, f"redis.{KUSTOMIZATION['namespace']}:6379"}
    # Who is scaled by processor time is scaled by nothing else.
    by_processor = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in of_kind("HorizontalPodAutoscaler")}
    assert by_processor == {"gateway"}
    assert by_processor.isdisjoint(targets)


def test_all_that_is_put_together_is_in_one_namespace_and_has_one_label() -> None:
    # What a kustomization says holds for its own resources, not for those of a component beside it.
    for component in (KEDA, MONITORING):
        assert component["namespace"] == KUSTOMIZATION["namespace"]
        assert component["labels"][0]["pairs"] == KUSTOMIZATION["labels"][0]["pairs"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the path")
def test_kustomize_itself_puts_all_together(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    overlay = {"resources": ["base"], "components": ["keda", "object-store", "monitoring"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    adapters = "PersistentVolumeClaim-adapters"
    assert {named(manifest) for manifest in built} == {named(m) for m in BASE + SCALING + WATCHING} - {adapters}
    # Applied again, the manifests must not set back what KEDA has scaled.
    scaled = {m["spec"]["scaleTargetRef"]["name"] for m in SCALING if m["kind"] == "ScaledObject"}
    fixed = {m["metadata"]["name"] for m in built if "replicas" in m.get("spec", {})}
    assert (scaled, fixed) == ({"vllm", "control", "consolidate"}, {"beat", "redis"})
    assert {manifest["metadata"].get("namespace") for manifest in built} == {KUSTOMIZATION["namespace"]}
    images = {container(manifest)["image"] for manifest in built if manifest["kind"] in ("Deployment", "StatefulSet")}
    assert {image for image in images if image.startswith("fastslow-")} == set()
