"""moeray's config in the manifests, and whether what its actors ask of Ray fits into the worker groups."""

from __future__ import annotations

import math
import re

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from moeray.cli.main import cli
from moeray.cluster.resources import for_experts, for_router
from moeray.config import load_config
from moeray.serve.app import changed
from tests.deploy.manifests import FOLDER, ROOT, cluster_spec, of_kind, raw, rendered

SERVED = {
    "serve.yaml": lambda: (ROOT / "deploy" / "serve.yaml").read_text(),
    "service": lambda: of_kind("RayService", rendered("service"))[0]["spec"]["serveConfigV2"],
    "kind": lambda: of_kind("RayService", rendered("kind"))[0]["spec"]["serveConfigV2"],
}


def served(name):
    """Serve's application, and moeray's config as an ingress replica reads it."""
    application = yaml.safe_load(SERVED[name]())["applications"][0]
    ingress = application["deployments"][0]
    return application, changed(load_config(None, application["args"]), ingress["user_config"])


def config_of(name):
    return load_config(FOLDER / "cluster" / "moeray.yaml") if name == "cluster" else served(name)[1]


def manifest_of(name):
    kind = "RayCluster" if name == "cluster" else "RayService"
    return of_kind(kind, rendered(name))[0]


@pytest.mark.parametrize("name", SERVED)
def test_serve_takes_the_config_and_moeray_knows_its_keys(name):
    ServeDeploySchema.model_validate(yaml.safe_load(SERVED[name]()))
    application, config = served(name)
    assert application["import_path"] == "moeray.serve.app:build"
    assert [deployment["name"] for deployment in application["deployments"]] == ["ingress"]
    assert application["deployments"][0]["graceful_shutdown_timeout_s"] >= config.serve.request_timeout_s
    if name != "serve.yaml":
        assert config.serve.wait_for_system
        assert not config.control.check_room
        assert config.wire.host == "0.0.0.0"


def node_types(name):
    """Group -> resources and most pods, as Ray's own autoscaler reads them from the manifest."""
    manifest = manifest_of(name)
    cluster = {"metadata": {"name": "moeray", "namespace": "moeray"}, "spec": cluster_spec(manifest)}
    return _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]


def requests_of(config):
    """(what one actor asks for, how many there may be), for each group of actors."""
    for group in config.experts.resolved():
        yield for_experts(group, 1.0, 1), group.actors_span[1]
    yield for_router(config.router, 1.0, 1), config.router.actors_span[1]


def fit(request, resources):
    """How many such actors a pod holds."""
    asked = {"CPU": request.num_cpus, "GPU": request.num_gpus, **request.resources}
    return min(math.floor(resources.get(key, 0) / amount + 1e-9) for key, amount in asked.items() if amount)


@pytest.mark.parametrize("name", ["service", "cluster", "kind"])
def test_every_actor_fits_into_a_pod_and_the_most_of_them_into_the_most_pods(name):
    types = node_types(name)
    for request, most in requests_of(config_of(name)):
        room = {group: fit(request, node["resources"]) * node["max_workers"] for group, node in types.items()}
        assert sorted(room.values())[-2] == 0, f"one worker group for each group of actors: {request}, {room}"
        assert max(room.values()) >= most, f"{request} up to {most} times, but there is room for {room}"
        if request.device == "cuda":
            assert request.num_gpus


def test_the_config_for_bursts_is_the_one_whose_figures_are_told():
    path = ROOT / "deploy" / "bursts.yaml"
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "moeray" / "control" / "README.md").read_text(), re.DOTALL)
    (told,) = (block for block in blocks if path.name in block)
    assert yaml.safe_load(told) == yaml.safe_load(path.read_text())
    assert load_config(path).control.slo_pace is not None


@pytest.mark.parametrize("name", ["service", "kind"])
def test_the_ingress_replicas_fit_beside_the_routers(name):
    application, config = served(name)
    ingress = application["deployments"][0]
    asked = ingress["ray_actor_options"]
    routers = node_types(name)["routers"]
    assert asked["resources"].items() <= routers["resources"].items()
    assert asked["num_cpus"] + config.router.num_cpus <= routers["resources"]["CPU"]
    assert ingress["num_replicas"] <= routers["min_workers"]
    assert config.router.actors <= routers["min_workers"]


@pytest.mark.parametrize("name", ["service", "cluster", "kind"])
def test_threads_and_processors(name):
    """The threads of a pod's experts are as many as its processors, at most."""
    types = node_types(name)
    for group in config_of(name).experts.resolved():
        (resource,) = group.resources
        assert group.threads <= types[resource]["resources"]["CPU"]


def options_of(command_line):
    """The command that a manifest runs, parsed by the command itself; raises for an option that there is not."""
    program, name, *rest = command_line.split()
    assert program == "moeray"
    command = cli.get_command(None, name)
    if command is None:
        pytest.skip(f"there is no `moeray {name}` yet")
    return command.make_context(name, rest).params


def test_the_commands_in_the_manifests_exist():
    for group in cluster_spec(raw("cluster/raycluster.yaml"))["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        script = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
        options = options_of(script.split(";")[0])
        assert options["here"]
        assert options["wait"]
        assert options["within"] < spec["terminationGracePeriodSeconds"]
    assert options_of(raw("job/rayjob.yaml")["spec"]["entrypoint"])["config_file"] == "/etc/moeray/moeray.yaml"
