"""The dashboard asks only for metrics that exist, and is laid out as Grafana wants it."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from cellray.train.telemetry import METRICS, TAG_KEYS, exported_name

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "dashboards" / "grafana" / "cellray.json"
# Ray's own, seen on the metrics page of a Ray 2.60 cluster during a training run, with the labels
# that the queries use.
SEEN = {
    "ray_node_cpu_utilization": {"ip"},
    "ray_node_mem_used": {"ip"},
    "ray_node_mem_total": {"ip"},
    "ray_object_store_used_memory": {"NodeAddress"},
    "ray_object_store_memory": {"NodeAddress", "Location"},
    "ray_object_store_fallback_memory": {"NodeAddress"},
    "ray_resources": {"Name", "State"},
    "ray_data_cpu_usage_cores": {"dataset", "operator"},
    "ray_data_operator_queued_blocks": {"dataset", "operator"},
    "ray_train_controller_state": {"ray_train_run_name", "ray_train_controller_state"},
    "ray_train_report_total_blocked_time_s": {
        "ray_train_run_name",
        "ray_train_worker_world_rank",
    },
    "ray_train_checkpoint_transfer_total_time_s": {"ray_train_run_name"},
    "ray_train_checkpoint_sync_total_time_s": {"ray_train_run_name"},
    "ray_train_worker_group_start_total_time_s": {"ray_train_run_name"},
}
# Exported on GPU machines only; looked up in Ray itself below.
GPU = {"ray_node_gpus_utilization": {"ip", "GpuIndex"}, "ray_node_gram_used": {"ip", "GpuIndex"}}
OURS = {exported_name(metric): set(TAG_KEYS) for metric in METRICS}
KNOWN = {**OURS, **SEEN, **GPU}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def _panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for p in dashboard["panels"] if p["type"] != "row"]


def _targets(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    return [(t["expr"], t["legendFormat"]) for p in _panels(dashboard) for t in p["targets"]]


def _names(expression: str) -> set[str]:
    """Metric names: words that begin with ray_, outside label selectors and groupings."""
    bare = re.sub(r"\{[^}]*\}|\b(?:by|without) \([^)]*\)", "", expression)
    return set(re.findall(r"\bray_\w+", bare))


def test_every_metric_of_a_query_exists(dashboard: dict[str, Any]) -> None:
    for expression, _ in _targets(dashboard):
        assert _names(expression), expression
        assert _names(expression) <= set(KNOWN), expression


def test_every_metric_of_cellray_is_shown(dashboard: dict[str, Any]) -> None:
    shown = set().union(*(_names(expression) for expression, _ in _targets(dashboard)))
    assert shown >= set(OURS)


def test_every_label_exists_and_survives_the_grouping(dashboard: dict[str, Any]) -> None:
    for expression, legend in _targets(dashboard):
        labels = set.union(*(KNOWN[name] for name in _names(expression)))
        wanted = set(re.findall(r"\{\{(\w+)\}\}", legend))
        selected = set(re.findall(r"[{,](\w+)=", expression))
        assert wanted | selected <= labels, expression
        grouping = re.search(r"\bby \(([^)]*)\)", expression)
        if grouping:
            assert wanted == set(grouping.group(1).split(", ")), expression


def test_counters_over_time_are_rates_or_increases(dashboard: dict[str, Any]) -> None:
    for panel in _panels(dashboard):
        for target in panel["targets"]:
            if panel["type"] == "timeseries" and "_total{" in target["expr"]:
                assert re.search(r"\b(rate|increase)\(", target["expr"]), target["expr"]


def test_gpu_metrics_are_in_this_ray() -> None:
    reporter = pytest.importorskip("ray.dashboard.modules.reporter.reporter_agent")
    for name in GPU:
        assert name.removeprefix("ray_") in reporter.METRICS_GAUGES
    assert "GpuIndex" in reporter.GPU_TAG_KEYS


def test_ids_are_unique_and_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    ids = [p["id"] for p in panels]
    assert len(set(ids)) == len(ids)
    for p in panels:
        grid = p["gridPos"]
        assert grid["x"] >= 0
        assert grid["x"] + grid["w"] <= 24, p["title"]
    for a, b in combinations(panels, 2):
        one, two = a["gridPos"], b["gridPos"]
        apart = (
            one["x"] + one["w"] <= two["x"]
            or two["x"] + two["w"] <= one["x"]
            or one["y"] + one["h"] <= two["y"]
            or two["y"] + two["h"] <= one["y"]
        )
        assert apart, (a["title"], b["title"])


def test_what_grafana_needs_is_there(dashboard: dict[str, Any]) -> None:
    assert dashboard["uid"] == "cellray"
    assert dashboard["schemaVersion"] >= 36
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "run"]
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["definition"] == "label_values(ray_cellray_step, run)"
    for panel in _panels(dashboard):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"].endswith("."), panel["title"]
        references = [t["refId"] for t in panel["targets"]]
        assert len(set(references)) == len(references)
        assert panel["fieldConfig"]["defaults"]["unit"]
    ours = [e for e, _ in _targets(dashboard) if "ray_cellray_" in e]
    assert all('{run=~"$run"}' in expression for expression in ours)


def test_prometheus_reads_the_list_that_ray_writes() -> None:
    config = yaml.safe_load((ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    [found] = job["file_sd_configs"]
    constants = pytest.importorskip("ray._private.ray_constants")
    assert found["files"] == [f"/tmp/ray/{constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    interval, timeout = (
        int(config["global"][f"scrape_{x}"].rstrip("s")) for x in ("interval", "timeout")
    )
    assert timeout <= interval


def test_provisioning_names_the_data_source_and_the_folder() -> None:
    folder = ROOT / "dashboards" / "grafana" / "provisioning"
    source = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())
    assert source["apiVersion"] == 1
    assert source["datasources"][0]["type"] == "prometheus"
    assert source["datasources"][0]["url"].startswith("http://")
    provider = yaml.safe_load((folder / "dashboards" / "cellray.yml").read_text())["providers"][0]
    path = provider["options"]["path"]
    assert provider["type"] == "file"
    assert f"cellray.json:{path}/cellray.json" in (ROOT / "dashboards" / "README.md").read_text()
