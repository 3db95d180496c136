"""The manifests: valid by the schemas of those who read them, and nothing that they name is missing."""

from __future__ import annotations

import re
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import DASHBOARDS, FOLDER, OVERLAYS, ROOT, cluster_spec, of_kind, raw, rendered, walk

README = (ROOT / "deploy" / "README.md").read_text()
CHECK = ROOT.parent / "shared" / "checks" / "check_kuberay.py"
THEIRS = ("ray.io/", "monitoring.coreos.com/")
"""APIs that Kubernetes itself does not know."""


@pytest.mark.skipif(not CHECK.exists(), reason=f"{CHECK} is not here")
@pytest.mark.parametrize("what", ["as they lie there", "put together"])
def test_kuberays_own_schemas(what, tmp_path):
    files = [FOLDER / "cluster/raycluster.yaml", FOLDER / "service/rayservice.yaml", FOLDER / "job/rayjob.yaml"]
    if what == "put together":
        files = [tmp_path / f"{name}.yaml" for name in OVERLAYS]
        for file in files:
            file.write_text(yaml.safe_dump_all(rendered(file.stem)))
    done = subprocess.run([sys.executable, CHECK, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert re.search(r"checked [34] Ray objects, 0 faults", done.stdout)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_kubernetes_own_schemas(folder):
    own = [manifest for manifest in rendered(folder) if not manifest["apiVersion"].startswith(THEIRS)]
    assert own or folder == "job"
    for manifest in own:
        kubernetes_validate.validate(manifest, "1.37", strict=True)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_of_ray_are_valid_pods(folder):
    """Neither schema looks into the templates as strictly as Kubernetes will."""
    for manifest in (m for m in rendered(folder) if m["apiVersion"].startswith("ray.io/")):
        templates = [
            value for path, value in walk(manifest) if path and path[-1] in ("template", "submitterPodTemplate")
        ]
        assert templates
        for template in templates:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, "1.37", strict=True)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_what_pods_refer_to_is_there(folder):
    applied = rendered(folder) + (rendered("cluster") if folder == "job" else ())
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in applied}
    namespaces = {manifest["metadata"].get("namespace") for manifest in applied if manifest["kind"] != "Namespace"}
    assert namespaces == {"moeray"}
    for path, value in (found for manifest in rendered(folder) for found in walk(manifest)):
        if path[-1:] == ("persistentVolumeClaim",):
            assert ("PersistentVolumeClaim", value["claimName"]) in names
        if path[-1:] == ("configMap",):
            assert ("ConfigMap", value["name"]) in names
        if path[-1:] == ("secretKeyRef",):
            assert value["key"] in secrets()[value["name"]]
        if path[-2:] == ("authOptions", "secretName"):
            assert "auth_token" in secrets()[value]
        if path[-1:] == ("redisAddress",):
            assert ("Service", value.partition(":")[0]) in names
        if path[-1:] == ("image",):
            assert re.fullmatch(r"moeray(-cuda)?:0\.1\.0|redis:[\w.-]+", value)


def secrets() -> dict[str, set[str]]:
    """Secret -> its keys, as the README makes them."""
    made = re.findall(
        r'create secret generic (\S+)((?:\s+--from-literal=[\w-]+="[^"]*")+)', README.replace("\\\n", " ")
    )
    return {name: set(re.findall(r"--from-literal=([\w-]+)=", keys)) for name, keys in made}


def test_volumes_that_are_mounted_are_declared():
    for path, spec in (f for name in OVERLAYS for m in rendered(name) for f in walk(m)):
        if path[-1:] == ("spec",) and "containers" in spec:
            declared = {volume["name"] for volume in spec.get("volumes", [])}
            declared |= {"data"} if "redis" in str(spec["containers"][0]["name"]) else set()  # a claim template
            for container in spec["containers"]:
                assert {mount["name"] for mount in container.get("volumeMounts", [])} <= declared


def test_the_services_cluster_is_the_cluster():
    """Two files, so that each can be read and applied by itself; they differ in what only jobs need."""
    service = cluster_spec(raw("service/rayservice.yaml"))
    cluster = cluster_spec(raw("cluster/raycluster.yaml"))
    head = cluster["headGroupSpec"]["template"]["spec"]
    for held in (head["volumes"], head["containers"][0]["volumeMounts"]):
        held[:] = [item for item in held if item["name"] not in ("data", "config")]
    assert service == cluster


def test_selectors_find_something():
    spec = cluster_spec(raw("service/rayservice.yaml"))
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    ports = {
        port["name"]: port["containerPort"]
        for port in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    for budget in of_kind("PodDisruptionBudget", rendered("service")):
        assert budget["spec"]["selector"]["matchLabels"]["ray.io/group"] in groups
    monitor = raw("monitoring/podmonitor.yaml")["spec"]
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= set(ports)
    for template in (spec["headGroupSpec"]["template"], *groups.values()):
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    # KubeRay names the Service of a RayService's endpoint, its label and its port so
    name = raw("service/rayservice.yaml")["metadata"]["name"]
    served = raw("monitoring/servicemonitor.yaml")["spec"]
    assert served["selector"]["matchLabels"] == {"ray.io/serve": f"{name}-serve"}
    assert {endpoint["port"] for endpoint in served["endpoints"]} == {"serve"}
    policy = next(
        m for m in rendered("service") if m["metadata"]["name"] == "moeray-ray" and m["kind"] == "NetworkPolicy"
    )
    open_ports = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    assert open_ports <= {*ports.values(), 52365}


def test_monitoring_is_put_together():
    if missing := [name for name in DASHBOARDS if not (ROOT / "dashboards" / f"{name}.json").exists()]:
        pytest.skip(f"no dashboard {', '.join(missing)} yet")
    maps = of_kind("ConfigMap", rendered("monitoring"))
    assert {name for m in maps for name in m["data"]} == {f"{name}.json" for name in DASHBOARDS}
    for manifest in maps:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
        assert manifest["metadata"]["labels"] == {"grafana_dashboard": "1"}
        assert sum(len(text) for text in manifest["data"].values()) < 1 << 20  # etcd takes no more
    assert len(of_kind("PrometheusRule", rendered("monitoring"))) == 1


def test_the_operators_rules_are_those_that_prometheus_reads():
    from tests.deploy.rules import prometheus_rule

    assert raw("monitoring/prometheusrule.yaml") == prometheus_rule(), "run `python -m tests.deploy.rules`"


def test_what_the_readme_names_is_there():
    """Every path under deploy/ or dashboards/, in every document here."""
    for document in (ROOT / "deploy").rglob("*.md"):
        for path in re.findall(r"(?:deploy|dashboards)/[\w./-]*\w", document.read_text()):
            assert (ROOT / path).exists(), f"{document} names {path}"
        for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document} links to {link}"
