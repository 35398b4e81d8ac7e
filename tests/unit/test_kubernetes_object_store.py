"""The manifests with adapters in an object store: what the component's patches make of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.kubernetes_schema import problems
from tests.unit.test_kubernetes import BASE, FOLDER, named

COMPONENT: dict[str, Any] = yaml.safe_load((FOLDER / "object-store" / "kustomization.yaml").read_text())
# By these Kubernetes tells the entries of its lists apart; other lists are replaced as a whole.
KEYS = {"containers": "name", "volumes": "name", "volumeMounts": "mountPath"}


def merged(target: dict[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Kubernetes' strategic merge, as far as it is needed here."""
    out = dict(target)
    for field, value in patch.items():
        if isinstance(value, dict):
            out[field] = merged(out.get(field, {}), value)
        elif field in KEYS:
            out[field] = merged_lists(out.get(field, []), value, key=KEYS[field])
        else:
            out[field] = value
    return out


def merged_lists(targets: list[dict[str, Any]], patches: list[dict[str, Any]], *, key: str) -> list[dict[str, Any]]:
    found = {entry[key]: entry for entry in targets}
    for patch in patches:
        if patch.get("$patch") == "delete":
            del found[patch[key]]
        else:
            found[patch[key]] = merged(found.get(patch[key], {}), patch)
    return list(found.values())


def patched() -> dict[str, dict[str, Any]]:
    """All manifests by name. A patch of what is not there is an error, as for kustomize."""
    found = {named(manifest): manifest for manifest in BASE}
    for entry in COMPONENT["patches"]:
        patch = yaml.safe_load((FOLDER / "object-store" / entry["path"]).read_text())
        name = named(patch)
        if patch.get("$patch") == "delete":
            del found[name]
        else:
            found[name] = merged(found[name], patch)
    return found


PATCHED = patched()


@pytest.mark.parametrize("name", PATCHED)
def test_every_manifest_is_still_of_the_apis_own_type(name: str) -> None:
    assert problems(PATCHED[name]) == []


def test_every_file_is_a_patch() -> None:
    files = {file.name for file in Path(FOLDER / "object-store").glob("*.yaml")} - {"kustomization.yaml"}
    assert files == {entry["path"] for entry in COMPONENT["patches"]}


def test_nobody_has_the_shared_volume_any_more_and_who_reads_versions_has_a_disk_for_them() -> None:
    assert "PersistentVolumeClaim-adapters" not in PATCHED
    cache = {}
    for manifest in PATCHED.values():
        pod = manifest.get("spec", {}).get("template", {}).get("spec", {})
        for container in pod.get("containers", []):
            mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
            own = {entry["metadata"]["name"] for entry in manifest["spec"].get("volumeClaimTemplates", [])}
            assert set(mounts.values()) <= {volume["name"] for volume in pod.get("volumes", [])} | own
            assert "/data/adapters" not in mounts
            cache[container["name"]] = "/cache" in mounts
    assert {name for name, has in cache.items() if has} == {"vllm", "consolidate"}


@pytest.mark.parametrize("name", ["StatefulSet-vllm", "Deployment-consolidate", "Deployment-control"])
def test_who_asks_the_store_is_told_where_it_is_and_with_which_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [container] = PATCHED[name]["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [
        {"configMapRef": {"name": "settings"}},
        {"secretRef": {"name": "fastslow-store"}},
    ]
    for variable, value in PATCHED["ConfigMap-settings"]["data"].items():
        monkeypatch.setenv(variable, value)
    settings = Settings(_env_file=None)
    assert settings.adapter_store_dir is None
    assert settings.adapter_cache == Path("/cache/adapters")
    volumes = {v["name"]: v for v in PATCHED[name]["spec"]["template"]["spec"]["volumes"]}
    if "cache" in volumes:
        assert settings.adapter_cache_gib < int(volumes["cache"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))


def test_vllm_reaches_the_store_and_is_reached_by_nobody_else_than_before() -> None:
    before = next(manifest for manifest in BASE if named(manifest) == "NetworkPolicy-vllm")
    after = PATCHED["NetworkPolicy-vllm"]
    assert after["spec"]["ingress"] == before["spec"]["ingress"]
    assert {port["port"] for rule in after["spec"]["egress"] for port in rule["ports"]} == {443, 53}
