"""The Ray cluster: that it is there, and that its nodes are alike. Functions of what `nodes` has gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeray.cli.checks.finding import Finding, fail, ok, skipped, warn

Node = Mapping[str, Any]

SKEW_S = 1.0
_ALIKE = ("python", "ray", "moeray", "code", "torch", "transformers")


def examine(
    survey: Mapping[str, Any], here: Mapping[str, Any], wire_host: str, remotes: Sequence[str]
) -> list[Finding]:
    """`survey`: `address` and `nodes`, or `error` (no cluster where one was named), or `absent` (none was named, and
    why there is none here). `here`: the facts of this machine."""
    if "absent" in survey:
        return [skipped("ray", survey["absent"])]
    if "error" in survey:
        mend = "see RAY_ADDRESS or --address (`ray start --head` prints HOST:PORT), the network, and `ray status` there"
        return [fail("ray", survey["error"], mend)]
    known = [node for node in survey["nodes"] if "error" not in node]
    return [
        ray(survey["address"], survey["nodes"]),
        nodes(survey["nodes"]),
        versions(known, here),
        clocks(known),
        node_gpus(known),
        network(survey["nodes"], wire_host, remotes),
    ]


def ray(address: str, all_nodes: Sequence[Node]) -> Finding:
    cpus, gpus = (sum(node[key] for node in all_nodes) for key in ("cpus", "ray_gpus"))
    return ok("ray", f"a cluster at {address}: {len(all_nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs")


def nodes(all_nodes: Sequence[Node]) -> Finding:
    silent = [f"{node['address']} ({node['error']})" for node in all_nodes if "error" in node]
    if silent:
        mend = "install moeray on each node for the Python that runs Ray there, and see `ray logs` of the node"
        return fail("nodes", f"no answer from {'; '.join(silent)}", mend)
    return ok("nodes", "all answer")


def versions(known: Sequence[Node], here: Mapping[str, Any]) -> Finding:
    """Every node runs what this machine runs."""
    for key in _ALIKE:
        wrong = [node for node in known if node[key] != here[key]]
        if wrong:
            what = "other sources of moeray" if key == "code" else f"{key} {wrong[0][key]} instead of {here[key]}"
            others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            mend = "install the same release on every node, and start Ray there anew"
            return fail("versions", f"node {wrong[0]['address']}{others} has {what}", mend)
    return ok("versions", f"moeray {here['moeray']}, Ray {here['ray']}, Python {here['python']} on every node")


def clocks(known: Sequence[Node]) -> Finding:
    worst = max(known, key=lambda node: node["skew_s"], default=None)
    if worst is not None and worst["skew_s"] > SKEW_S:
        what = f"node {worst['address']} is {worst['skew_s']:.1f} s off"
        return warn("clocks", what, "let NTP (chrony, systemd-timesyncd) keep the nodes' clocks: logs are read by time")
    return ok("clocks", f"within {SKEW_S:g} s")


def node_gpus(known: Sequence[Node]) -> Finding:
    """What Ray may hand out can be used, and what is there is handed out."""
    for node in known:
        if node["ray_gpus"] and node["cuda_build"] is None:
            what = f"node {node['address']} offers {node['ray_gpus']:g} GPUs, but its torch is a build for CPUs"
            return fail("node GPUs", what, "install torch's build for CUDA there")
    for node in known:
        if node["gpus"] and not node["ray_gpus"]:
            what = f"node {node['address']} has {node['gpus']} GPUs that Ray does not know of"
            return warn("node GPUs", what, f"ray start --num-gpus {node['gpus']}, and give its container the devices")
    return ok("node GPUs", f"{sum(node['ray_gpus'] for node in known):g}, usable where Ray has any")


def network(all_nodes: Sequence[Node], wire_host: str, remotes: Sequence[str]) -> Finding:
    """Actors of different machines reach each other."""
    addresses = {node["address"] for node in all_nodes}
    if len(addresses) < 2:
        return ok("node network", "one machine")
    mend = "set wire.remote: auto and wire.host: 0.0.0.0 in the config"
    if not remotes:
        return fail("node network", f"{len(addresses)} machines, and wire.remote is off", mend)
    if wire_host.startswith("127.") or wire_host in ("localhost", "::1"):
        return fail("node network", f"{len(addresses)} machines, and wire.host {wire_host} is for one alone", mend)
    return ok("node network", f"{len(addresses)} machines, {remotes[0]} at {wire_host}")
