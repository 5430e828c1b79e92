"""Manifests and the systemd unit: Kubernetes' schemas, the service's settings, routes and image."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.api.routes import health
from service.settings import PREFIX, Settings
from tests.kits.patience import PATIENCE
from tests.kits.programs import require

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "deploy" / "kubernetes"
UNIT = ROOT / "deploy" / "systemd" / "pimc.service"
OVERLAYS = ("base", "gpu", "replicas", "bucket", "cluster", "cluster-bucket")
SEVERAL = ("replicas", "bucket", "cluster", "cluster-bucket")
"""Overlays with several replicas."""
VERSIONS = ("1.33", "1.37")
DOCKERFILE = re.sub(r"\\\n\s*", " ", (ROOT / "docker" / "service.Dockerfile").read_text())


def written() -> list[tuple[str, dict[str, Any]]]:
    """Every object of the files, as it is written there."""
    found = []
    for path in sorted(MANIFESTS.glob("*/*.yaml")):
        if path.name != "kustomization.yaml":
            document = yaml.safe_load(path.read_text())  # one object a file
            found.append((str(path.relative_to(MANIFESTS)), document))
    return found


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """The objects that kustomize makes of an overlay: the service's by kind, all in `every`."""
    command = next(
        (
            [found, *words]
            for name, words in (("kubectl", ["kustomize"]), ("kustomize", ["build"]))
            if (found := shutil.which(name))
        ),
        None,
    )
    require(command, "kubectl or kustomize", "kubernetes-client")
    done = subprocess.run(
        [*command, str(MANIFESTS / request.param)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    documents = list(yaml.safe_load_all(done.stdout))
    assert len({(d["kind"], d["metadata"]["name"]) for d in documents}) == len(documents)
    dask = ("pimc-scheduler", "pimc-worker")
    service = [d for d in documents if d["metadata"]["name"] not in dask]
    kinds = {document["kind"]: document for document in service}
    assert len(kinds) == len(service)
    return {"overlay": request.param, "every": documents, **kinds}


def validate(document: Any, version: str) -> None:
    """Check a document against the schema of its kind; raises `InvalidDocument`."""
    import kubernetes_validate  # takes seconds: its JSON Schema compiles a grammar of addresses

    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise InvalidDocument(str(error)) from error


class InvalidDocument(Exception):
    """A document that does not fit the schema of its kind."""


@pytest.mark.parametrize("version", VERSIONS)
def test_the_output_of_kustomize_is_valid(rendered, version):
    assert len(rendered["every"]) >= 5
    for document in rendered["every"]:
        validate(document, version)


def test_a_misspelt_field_is_not_valid(rendered):
    stateful = yaml.safe_load(yaml.safe_dump(rendered["StatefulSet"]))
    stateful["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(InvalidDocument):
        validate(stateful, VERSIONS[0])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_file_is_part_of_its_overlay(overlay):
    folder = MANIFESTS / overlay
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert {n for n in kustomization["resources"] if not n.startswith("../")} == files


def test_selectors_match_the_pods(rendered):
    spec = rendered["StatefulSet"]["spec"]
    labels = spec["template"]["metadata"]["labels"].items()
    assert labels
    for selector in (
        spec["selector"]["matchLabels"],
        rendered["Service"]["spec"]["selector"],
        rendered["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        rendered["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels
    if rendered["overlay"] in SEVERAL:
        scaled = rendered["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        assert scaled["name"] == rendered["StatefulSet"]["metadata"]["name"]
        assert scaled["kind"] == "StatefulSet"
        assert "replicas" not in spec  # each apply would undo what the autoscaler did


def test_only_replicas_with_a_database_and_a_storage_in_common_are_several(rendered):
    spec = rendered["StatefulSet"]["spec"]
    claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
    template = spec["template"]["spec"]
    shared = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in template["volumes"]
              if "persistentVolumeClaim" in v}  # fmt: skip
    secrets = [
        e["secretRef"]["name"] for e in template["containers"][0]["envFrom"] if "secretRef" in e
    ]
    ports = [
        port["port"] for rule in rendered["NetworkPolicy"]["spec"].get("egress", [])
        for port in rule["ports"]
    ]  # fmt: skip
    if "bucket" in rendered["overlay"]:
        assert claims == set()
        assert shared == {}
        assert "PersistentVolumeClaim" not in rendered
        volumes = {volume["name"]: volume for volume in template["volumes"]}
        assert volumes["state"].keys() == {"name", "emptyDir"}
        assert secrets == ["pimc-keys", "pimc-database", "pimc-storage"]
        assert {53, 5432, 443} <= set(ports)
    elif rendered["overlay"] in SEVERAL:
        assert claims == set()
        claim = rendered["PersistentVolumeClaim"]
        assert shared == {"state": claim["metadata"]["name"]}
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        assert secrets == ["pimc-keys", "pimc-database"]
        assert 5432 in ports
    else:
        assert claims == {"state"}
        assert shared == {}
        assert secrets == ["pimc-keys"]
        assert ports == []
        assert spec["replicas"] == 1


def test_the_overlays_run_the_images_that_compose_builds(rendered):
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    expected = compose["gpu" if rendered["overlay"] == "gpu" else "cpu"]["image"]
    (container,) = rendered["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == expected
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == ("1" if rendered["overlay"] == "gpu" else None)


def named(rendered: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in rendered["every"] if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def test_workers_have_the_image_the_settings_and_the_files_of_the_service(rendered):
    if "cluster" not in rendered["overlay"]:
        pytest.skip("it has no workers")
    service = rendered["StatefulSet"]["spec"]["template"]["spec"]
    for name in ("pimc-scheduler", "pimc-worker"):
        deployment = named(rendered, "Deployment", name)
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"] == labels
        spec = deployment["spec"]["template"]["spec"]
        (own,) = spec["containers"]
        assert own["image"] == service["containers"][0]["image"]
        assert own["securityContext"] == service["containers"][0]["securityContext"]
        assert spec["securityContext"].items() <= service["securityContext"].items()
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
    settings = rendered["ConfigMap"]["data"]["PIMC_DASK_SCHEDULER"]
    ports = named(rendered, "Service", "pimc-scheduler")["spec"]["ports"]
    assert settings == f"tcp://pimc-scheduler:{ports[0]['port']}"
    (worker,) = spec["containers"]  # the last one
    assert {"configMapRef": {"name": "pimc-settings"}} in worker["envFrom"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"]
              if "persistentVolumeClaim" in v]  # fmt: skip
    mounts = {m["mountPath"]: m for m in worker["volumeMounts"]}
    assert {m["name"] for m in mounts.values()} == {v["name"] for v in spec["volumes"]}
    state = re.findall(r"PIMC_STATE_DIR=(\S+)", DOCKERFILE)[0]
    secrets = [e["secretRef"]["name"] for e in worker["envFrom"] if "secretRef" in e]
    if rendered["overlay"] == "cluster":
        assert secrets == []
        assert claims == [rendered["PersistentVolumeClaim"]["metadata"]["name"]]
        assert mounts[state] == {"name": "state", "mountPath": state, "readOnly": True}
        return
    # Workers get the bucket's credentials, and neither the keys nor the database's.
    assert secrets == ["pimc-storage"]
    assert claims == []
    assert state not in mounts
    assert rendered["ConfigMap"]["data"]["PIMC_DASK_FETCH"] == "workers"
    policy = named(rendered, "NetworkPolicy", "pimc-worker")["spec"]
    assert 443 in [port["port"] for rule in policy["egress"] for port in rule["ports"]]


def test_only_the_service_and_dask_reach_the_ports_of_dask(rendered):
    """They run any code that they receive."""
    if "cluster" not in rendered["overlay"]:
        pytest.skip("it has no workers")
    for name, others in (
        ("pimc-scheduler", {"pimc", "pimc-worker"}),
        ("pimc-worker", {"pimc", "pimc-scheduler"}),
    ):
        policy = named(rendered, "NetworkPolicy", name)["spec"]
        labels = named(rendered, "Deployment", name)["spec"]["template"]["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"] == labels
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        (rule,) = policy["ingress"]
        allowed = [one["podSelector"]["matchLabels"] for one in rule["from"]]
        assert {one["app.kubernetes.io/name"] for one in allowed} == others
    assert "Ingress" not in rendered


# The rest looks at the files, so that it needs no kubectl.


def pod() -> dict[str, Any]:
    (found,) = [document for _, document in written() if document["kind"] == "StatefulSet"]
    return found["spec"]


def container() -> dict[str, Any]:
    (found,) = pod()["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize(("place", "document"), written())
def test_each_object_is_valid_as_it_is_written(place, document):
    validate(document, VERSIONS[0])


def test_probes_request_paths_that_the_service_has():
    paths = {route.path for route in health.router.routes}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[name]["httpGet"]["path"] in paths
    # Readiness as liveness would restart a service that is busy or stopping in order.
    assert container()["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_a_pod_is_not_root_and_its_root_file_system_is_read_only():
    (user,) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    security = pod()["template"]["spec"]["securityContext"]
    assert (str(security["runAsUser"]), str(security["runAsGroup"])) == user
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    inside = container()["securityContext"]
    assert inside["readOnlyRootFilesystem"] is True
    assert inside["allowPrivilegeEscalation"] is False
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert pod()["template"]["spec"]["automountServiceAccountToken"] is False


def test_every_folder_that_the_image_writes_to_is_a_volume():
    (volumes,) = re.findall(r"^VOLUME \[(.*)\]$", DOCKERFILE, re.MULTILINE)
    written_to = {name.strip(' "') for name in volumes.split(",")} - {"/models"}
    mounted = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    assert written_to <= set(mounted)
    state = re.findall(r"PIMC_STATE_DIR=(\S+)", DOCKERFILE)[0]
    claims = {claim["metadata"]["name"] for claim in pod()["volumeClaimTemplates"]}
    assert mounted[state] in claims
    known = claims | {volume["name"] for volume in pod()["template"]["spec"]["volumes"]}
    assert set(mounted.values()) <= known


def test_settings_are_settings_and_no_key_is_among_them(monkeypatch):
    (settings,) = [document for _, document in written() if document["kind"] == "ConfigMap"]
    for name, value in settings["data"].items():
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields, name
        monkeypatch.setenv(name, value)
    assert "PIMC_API_KEYS" not in settings["data"]
    secrets = [s["secretRef"] for s in container()["envFrom"] if "secretRef" in s]
    assert secrets
    assert not any(secret.get("optional") for secret in secrets)
    grace = pod()["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > Settings().grace_seconds


def test_kubernetes_sets_no_variable_that_the_service_reads():
    """The Service `pimc` would make PIMC_PORT=tcp://10.0.0.1:80 in every pod."""
    assert pod()["template"]["spec"]["enableServiceLinks"] is False


# -- systemd ---------------------------------------------------------------------------------------


def unit() -> dict[str, str]:
    pairs = [line.partition("=") for line in UNIT.read_text().splitlines() if line[:1].isalpha()]
    return {name: value for name, _, value in pairs}


def test_systemd_waits_for_running_requests_and_does_not_restart_wrong_usage():
    from service import __main__ as start

    assert int(unit()["TimeoutStopSec"]) > Settings.model_fields["grace_seconds"].default
    assert int(unit()["RestartPreventExitStatus"]) == start._MISUSE
    assert int(unit()["LimitNOFILE"]) > 4 * Settings.model_fields["max_connections"].default


def test_systemd_reads_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    require(analyze, "systemd-analyze", "systemd")
    copy = tmp_path / UNIT.name
    text = UNIT.read_text().replace("/opt/pimc/.venv/bin/python", sys.executable)
    copy.write_text(text.replace("WorkingDirectory=/opt/pimc", f"WorkingDirectory={ROOT}"))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    own = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert own == []
