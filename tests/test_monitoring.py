"""Alerts and the dashboard, against the service's own metrics and Prometheus's evaluation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.telemetry import Metrics
from tests.kits.patience import PATIENCE
from tests.kits.programs import require

ROOT = Path(__file__).parents[1]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "pimc.json"
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? \S+$", re.MULTILINE)
SELECTOR = re.compile(r"\b((?:pimc|process)_\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\b(?:by|on) \(([^)]*)\)")
OF_PROMETHEUS = {"instance", "job", "le"}


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of each metric that a service gives once it has done a bit of everything."""
    metrics = Metrics(per_key=True)
    metrics.provider("CPUExecutionProvider")
    metrics.request_completed(
        route="/embed",
        method="POST",
        status=200,
        seconds=1.0,
        code="overloaded",
        model="a@1",
        key="anna",
    )
    metrics.batch("a@1", 128, 0.1)
    metrics.decoded(1)
    metrics.watch_cache(lambda: 1, lambda: 1)
    metrics.range_looked_up("hit")
    metrics.watch_memory(limit=1, taken=lambda: 0, awaited=lambda: 0)
    metrics.build("1")
    metrics.watch_disk(state=ROOT)
    metrics.swept("done")
    metrics.ran(task="embed", pixels=1, stages={"read": 1.0}, key="anna")
    metrics.jobs({"running": 1})
    metrics.job_ran(task="embed", seconds=1.0)
    metrics.connection_given_up("head")
    metrics.quota_exceeded("jobs")
    metrics.watch_keys(lambda: 1)
    metrics.watch_cluster(workers=lambda: 1, threads=lambda: 2, refused=lambda: 0)
    metrics.cluster_window("written")
    metrics.watch_admission(
        run_slots=1,
        held=lambda: 0,
        awaited=lambda: 0,
        uploads=lambda: 0,
        spooled=lambda: 0,
        parsed=lambda: 0,
    )
    metrics.download_rejected("caller")
    metrics.callback("success", "delivered")
    text = metrics.text()
    return {
        name: set(re.findall(r"(\w+)=", inside))
        for name, inside in SAMPLE.findall(text if isinstance(text, str) else text.decode())
    }


def expressions() -> dict[str, str]:
    """Every query of the alerts and the dashboard, by where it stands."""
    rules = yaml.safe_load(RULES.read_text())["groups"]
    found = {rule["alert"]: rule["expr"] for group in rules for rule in group["rules"]}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    return found


@pytest.mark.parametrize(("place", "query"), expressions().items())
def test_queries_use_metrics_and_labels_of_the_service(place, query, labels):
    found = SELECTOR.findall(query)
    assert found or query.startswith("up{")
    known = set(OF_PROMETHEUS)
    for name, matchers in found:
        assert name in labels, name
        known |= labels[name]
        matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert matched <= labels[name] | OF_PROMETHEUS, name
    for group in GROUPED.findall(query):
        assert {label.strip() for label in group.split(",")} <= known


def test_the_dashboard_shows_each_metric_of_the_service(labels):
    shown = " ".join(expressions().values())
    ours = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in labels if "pimc_" in name}
    assert {name for name in ours if name.removesuffix("_total") not in shown} == set()


def test_the_dashboard_uses_the_data_source_that_is_provisioned():
    folder = ROOT / "deploy" / "grafana" / "provisioning" / "datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yml").read_text())["datasources"]
    dashboard = json.loads(DASHBOARD.read_text())
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert used == {source["uid"]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool") or os.environ.get("PROMTOOL")
    require(found, "promtool, on the PATH or as PROMTOOL", "prometheus")
    return found


@pytest.mark.slow
def test_each_alert_fires_for_its_cause_and_not_without(promtool):
    for command in (["check", "rules", RULES.name], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            [promtool, *command],
            cwd=RULES.parent,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    rules = yaml.safe_load(RULES.read_text())["groups"]
    tested = yaml.safe_load((RULES.parent / "alerts_test.yml").read_text())["tests"]
    fired = {
        case["alertname"] for t in tested for case in t["alert_rule_test"] if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for group in rules for rule in group["rules"]}


@pytest.mark.slow
def test_prometheus_reads_its_configuration(promtool):
    done = subprocess.run(
        [promtool, "check", "config", "prometheus.yml"],
        cwd=RULES.parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
