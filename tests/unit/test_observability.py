"""Alerts and dashboard ask only for what the service or vLLM exposes, in expressions that parse; what each file names exists."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from service.counted import Counter, Histogram
from service.metrics import Metrics
from service.replica_metrics import ReplicaStates
from service.replicas import Replicas
from service.settings import Settings
from service.store.backlog import QUEUES, Memory, Queue

ROOT = Path(__file__).parent.parent.parent
PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana"
SCRAPE: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "fastslow.json").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCS = (ROOT / "docs" / "observability.md").read_text()

RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
DURATION = re.compile(r"(\d+(ms|[smhdwy]))+")
ADDED_BY_PROMETHEUS = {"job", "instance"}


def counted() -> Metrics:
    """A gateway's metrics once all has happened that is counted."""
    metrics = Metrics()
    metrics.registry.register(ReplicaStates(Replicas(("http://a",), Settings(_env_file=None))))
    stored, names = (
        metrics.stored,
        ("optimize", "optimize_without", "consolidate", "move", "undone", "stages", "stage_seconds"),
    )
    stored.counted = {(name, "x"): 1.0 for name in names} | {("sweep", ""): 1.0}
    stored.counted |= {("kl", "user/text"): 0.01, ("kl_budget", "user/text"): 0.02}
    stored.queues, stored.memory = {name: Queue(0, 0.0) for name in QUEUES}, Memory(1, 2, fullest=0.5)
    # What has labels shows nothing before it has counted something.
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Histogram):
            metric.labels(*("x" for _ in metric.label_names))
    return metrics


@cache
def exposed() -> dict[str, set[str]]:
    """Every sample that a gateway can show, and the names of its labels."""
    found: dict[str, set[str]] = {}
    for sample in (sample for family in counted().registry.collect() for sample in family.samples):
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


@dataclass(frozen=True)
class Asked:
    """One selector of an expression."""

    name: str
    matched: frozenset[str]
    """Labels that it is narrowed by."""
    grouped: frozenset[str]
    """Labels that it is aggregated by."""
    nearest: str
    """The aggregation right around it, as `max`; empty without one."""


def selectors(node: Any, grouped: frozenset[str] = frozenset(), nearest: str = "") -> Iterator[Asked]:
    """Every selector of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield Asked(node.name or "", frozenset(m.name for m in node.matchers.matchers), grouped, nearest)
    if isinstance(node, promql_parser.AggregateExpr):
        nearest = str(node.op)
        grouped |= set(node.modifier.labels if node.modifier else ())
    for part in ("lhs", "rhs", "expr", "vector_selector"):
        if (below := getattr(node, part, None)) is not None:
            yield from selectors(below, grouped, nearest)
    for argument in getattr(node, "args", ()):
        yield from selectors(argument, grouped, nearest)


def asked(expression: str) -> list[Asked]:
    return list(selectors(promql_parser.parse(expression.replace("$__rate_interval", "5m"))))


def expressions() -> list[tuple[str, str]]:
    return [(rule["alert"], rule["expr"]) for rule in RULES] + [(title, target["expr"]) for title, target in TARGETS]


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_every_expression_asks_for_series_that_are_exposed_by_labels_that_they_have(
    where: str, expression: str
) -> None:
    found = asked(expression)
    assert found, where
    for series in found:
        labels = (series.matched | series.grouped) - ADDED_BY_PROMETHEUS
        if series.name.startswith("vllm:"):
            assert f'name="{re.sub("_(total|bucket|sum|count)$", "", series.name)}"' in vllm_source(), series
            assert not labels, series
        elif series.name != "up":
            assert labels <= exposed().get(series.name, set()), series
            assert series.name in exposed(), series


def test_what_every_gateway_tells_alike_is_never_added_up_over_gateways() -> None:
    shared = {sample.name for family in counted().stored.collect() for sample in family.samples}
    series = [(where, found) for where, expression in expressions() for found in asked(expression)]
    assert shared & {found.name for _, found in series}
    assert [
        (where, found) for where, found in series if found.name in shared and found.nearest not in ("max", "min")
    ] == []


@cache
def vllm_source() -> str:
    """Where vLLM names its metrics; read and not imported, since that takes many seconds."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()


def test_every_alert_has_what_prometheus_and_a_reader_need() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert DURATION.fullmatch(rule.get("for", "1m")), rule["alert"]
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"]["summary"]
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / file).exists()
        assert anchor == rule["alert"].lower()
        assert f"### {rule['alert']}\n" in DOCS, rule["alert"]
    assert set(re.findall(r"^### (Fastslow\w+)$", DOCS, re.MULTILINE)) == {rule["alert"] for rule in RULES}


def test_every_metric_of_ours_is_explained() -> None:
    families = {re.sub("_(total|bucket|sum|count|created)$", "", name) for name in exposed()}
    missing = {name for name in families if f"`{name}" not in DOCS}
    assert missing == set()


def test_the_dashboard_is_laid_out_and_needs_no_certain_data_source() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource"]


def test_compose_mounts_what_is_there_and_scrapes_what_runs() -> None:
    for name in ("prometheus", "grafana"):
        for volume in COMPOSE["services"][name]["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists(), source
    networks = {alias for spec in COMPOSE["services"].values() for alias in aliases(spec)} | set(COMPOSE["services"])
    scraped = [sd for job in SCRAPE["scrape_configs"] for sd in job["dns_sd_configs"]]
    assert {name for sd in scraped for name in sd["names"]} <= networks
    assert "8080" in COMPOSE["services"]["gateway"]["command"]
    assert COMPOSE["services"]["vllm"]["environment"]["FASTSLOW_VLLM_PORT"] == 8000
    assert SCRAPE["rule_files"] == ["/etc/prometheus/alerts.yml"]
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    assert [source["url"] for source in sources["datasources"]] == ["http://prometheus:9090"]


def aliases(spec: dict[str, Any]) -> list[str]:
    networks = spec["networks"]
    return networks["inside"]["aliases"] if isinstance(networks, dict) else []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (of Prometheus) is not on the path")
@pytest.mark.parametrize("arguments", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")])
def test_prometheus_own_tool_agrees(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
