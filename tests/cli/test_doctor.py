"""`moeray doctor`: each check green and red by a table, then as a user runs it, on a machine that is broken indeed."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from moeray.cli.checks import cluster, files, gather, machine, named, nodes, secrets, software
from moeray.cli.checks.finding import Finding
from moeray.cli.checks.gather import surveying
from moeray.config import Config
from moeray.settings.engine import EngineConfig
from moeray.settings.wire import WireConfig
from moeray.threads import cpu_quota
from tests.checkpoints import make_tiny

pytestmark = pytest.mark.ray


def check(finding: Finding, verdict: str, words: str = "") -> None:
    """It has the verdict, says `words` in what it found or advises, and advises where there is something to do."""
    assert finding.verdict == verdict, finding
    assert words in f"{finding.what} -> {finding.mend}", finding
    assert bool(finding.mend) == (verdict in ("warn", "fail")), finding


@pytest.mark.parametrize(
    ("version", "verdict", "words"), [("3.11.7", "ok", "3.11.7"), ("3.14.0rc1", "ok", ""), ("3.10.2", "fail", ">=3.11")]
)
def test_python(version, verdict, words):
    check(software.python(version, ">=3.11"), verdict, words)


HAVE = {"torch": "2.13.0+cpu", "ray": "2.60.0", "transformers": "5.23.1"}


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "ok", "torch 2.13.0+cpu, transformers 5.23.1, ray 2.60.0; all 3 as asked for"),
        ({"torch": "2.9.1"}, "fail", "pip install 'torch<2.14,>=2.11'"),
        ({"transformers": None}, "fail", "transformers is missing"),
        ({"ray": "2.61.0"}, "fail", "ray 2.61.0"),
    ],
)
def test_packages(changes, verdict, words):
    asked = ["torch<2.14,>=2.11", "transformers<5.24,>=5.23", "ray[serve]<2.61,>=2.54", 'pytest>=8; extra == "test"']
    check(software.packages(asked, (HAVE | changes).get), verdict, words)


@pytest.mark.parametrize(
    ("instructions", "wanted", "verdict", "words"),
    [
        ("AVX512", "auto", "ok", "avx512"),
        ("PORTABLE", "auto", "warn", "AVX2"),
        (None, "auto", "warn", "C compiler"),
        (None, "native", "fail", "C compiler"),
    ],
)
def test_kernels(instructions, wanted, verdict, words):
    check(software.kernels(instructions, wanted), verdict, words)


@pytest.mark.parametrize(
    ("cores", "quota", "computing", "verdict", "words"),
    [
        (8, None, 8, "ok", "8 cores"),
        (8, 8.0, 2, "ok", "8 cores"),
        (8, 2.5, 2, "warn", "router.threads: 2"),
        (1, None, 1, "warn", "at least 2"),
        (4, None, 6, "warn", "6 threads"),
    ],
)
def test_cpu(cores, quota, computing, verdict, words):
    check(machine.cpu(cores, quota, computing), verdict, words)


@pytest.mark.parametrize(
    ("present", "seen", "build", "wanted", "verdict", "words"),
    [
        (0, 0, None, False, "ok", "CPU"),
        (2, 2, "12.8", True, "ok", "2 of 2"),
        (2, 0, None, False, "fail", "build for CPUs"),
        (2, 0, "12.8", False, "fail", "nvidia-smi"),
        (0, 0, "12.8", True, "fail", "device: auto"),
    ],
)
def test_gpus(present, seen, build, wanted, verdict, words):
    check(machine.gpus(present, seen, build, wanted), verdict, words)


@pytest.mark.parametrize(
    ("finding", "verdict", "words"),
    [
        (machine.shared_memory(None, 32 << 20, 8 << 30), "ok", "32 MiB, 8.0 GiB"),
        (machine.shared_memory(None, 9 << 30, 8 << 30), "fail", "wire.shared_memory_bytes"),
        (machine.shared_memory("Function not implemented", 1, 2), "fail", "memfd_create"),
        (machine.object_store(2 << 30), "ok", "2.0 GiB"),
        (machine.object_store(64 << 20), "warn", "--shm-size"),
        (machine.object_store(None), "warn", "tmpfs"),
        (machine.open_files(65536, 65536), "ok", "65536"),
        (machine.open_files(1024, 65536), "warn", "ulimit -n"),
        (machine.open_files(512, 65536), "fail", "ulimit -n"),
        (machine.open_files(512, 512), "fail", "hard limit"),
        (machine.port("127.0.0.1", 8000, None, None, False), "ok", "free"),
        (machine.port("127.0.0.1", 8000, "in use", "nginx (pid 7)", False), "fail", "nginx (pid 7)"),
        (machine.port("127.0.0.1", 8000, "in use", "ray (pid 7)", True), "ok", "moeray endpoint"),
        (machine.port("10.9.8.7", 8000, "Cannot assign requested address", None, False), "fail", "--host"),
        (machine.wire("127.0.0.1", None, ["tcp", "grpc"]), "ok", "for tcp and grpc"),
        (machine.wire("10.9.8.7", "Cannot assign requested address", ["tcp"]), "fail", "wire.host"),
        (machine.wire("127.0.0.1", None, []), "skipped", "off"),
        (secrets.token(None), "ok", "one is made"),
        (secrets.token("x" * 32), "ok", "32 characters"),
        (secrets.token("short"), "fail", "openssl rand"),
        (secrets.token("x" * 32 + "\n"), "fail", "white space"),
        (secrets.api_key(None, "127.0.0.1"), "ok", ""),
        (secrets.api_key("key", "0.0.0.0"), "ok", "set"),
        (secrets.api_key(None, "0.0.0.0"), "warn", "MOERAY_API_KEY"),
        (secrets.api_key("", "127.0.0.1"), "fail", "MOERAY_API_KEY"),
    ],
)
def test_the_machine_and_its_secrets(finding, verdict, words):
    check(finding, verdict, words)


HERE = {"python": "3.11.7", "ray": "2.60.0", "moeray": "0.1.0", "code": "ab", "torch": "2.13.0", "transformers": "5.23"}
NODE = HERE | {
    "address": "10.0.0.1", "cpus": 8.0, "ray_gpus": 0.0, "gpus": 0, "cuda_build": None, "skew_s": 0.0, "node": "n",
}  # fmt: skip
FAR = NODE | {"address": "10.0.0.2"}


@pytest.mark.parametrize(
    ("name", "survey", "verdict", "words"),
    [
        ("ray", {"absent": "no Ray cluster runs here"}, "skipped", "no Ray cluster runs here"),
        ("ray", {"error": "nothing answers at 10.0.0.1:6379"}, "fail", "RAY_ADDRESS"),
        ("ray", [NODE, FAR], "ok", "2 nodes, 16 CPUs"),
        ("nodes", [NODE, FAR], "ok", ""),
        ("nodes", [NODE, FAR | {"error": "No module named 'moeray'"}], "fail", "10.0.0.2 (No module named 'moeray')"),
        ("versions", [NODE, FAR], "ok", "Ray 2.60.0"),
        ("versions", [NODE, FAR | {"python": "3.12.1"}], "fail", "10.0.0.2 has python 3.12.1 instead of 3.11.7"),
        ("versions", [FAR | {"code": "cd"}, FAR | {"code": "cd"}], "fail", "and 1 more has other sources"),
        ("clocks", [NODE, FAR | {"skew_s": 0.4}], "ok", ""),
        ("clocks", [NODE, FAR | {"skew_s": 3.0}], "warn", "10.0.0.2 is 3.0 s off"),
        ("node GPUs", [NODE, FAR | {"ray_gpus": 2.0, "gpus": 2, "cuda_build": "12.8"}], "ok", "2, usable"),
        ("node GPUs", [NODE, FAR | {"ray_gpus": 2.0, "gpus": 2}], "fail", "build for CUDA"),
        ("node GPUs", [NODE, FAR | {"gpus": 2, "cuda_build": "12.8"}], "warn", "--num-gpus 2"),
        ("node network", [NODE, NODE], "ok", "one machine"),
        ("node network", [NODE, FAR], "fail", "wire.host: 0.0.0.0"),
    ],
)
def test_the_cluster(name, survey, verdict, words):
    told = survey if isinstance(survey, dict) else {"address": "10.0.0.1:6379", "nodes": survey}
    found = {finding.name: finding for finding in cluster.examine(told, HERE, "127.0.0.1", ["tcp"])}
    check(found[name], verdict, words)


@pytest.mark.parametrize(("remotes", "verdict"), [(["grpc"], "ok"), ([], "fail")])
def test_actors_of_two_machines_reach_each_other(remotes, verdict):
    check(cluster.network([NODE, FAR], "0.0.0.0", remotes), verdict)


# -- the facts ----------------------------------------------------------------------------------------------------


def test_ports_that_are_held_and_free():
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert gather.bind_error("127.0.0.1", port) == "in use"
        assert f"pid {os.getpid()}" in (gather.holder_of(port) or "")
    assert gather.bind_error("127.0.0.1", port) is None
    assert gather.holder_of(port) is None
    assert "assign" in (gather.bind_error("192.0.2.7", 0) or "")
    assert not gather.is_endpoint("127.0.0.1", port)


@pytest.mark.parametrize(("text", "quota"), [("max 100000", None), ("150000 100000", 1.5), ("", None)])
def test_a_cgroups_quota(tmp_path, text, quota):
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == quota
    assert cpu_quota(tmp_path / "none") is None


def test_shared_memory_is_tried():
    before = len(os.listdir("/proc/self/fd"))
    assert gather.ring_error(1 << 20) is None
    assert gather.ring_error(1 << 60) is not None
    assert len(os.listdir("/proc/self/fd")) == before
    assert gather.ring_bytes(Config()) == 2 * 2 * 2 * 32 << 20  # either half's, two actors', both ways
    assert gather.ring_bytes(Config(engine=EngineConfig(overlap="off"))) == 2 * 2 * 32 << 20
    assert gather.shm_free("/nowhere") is None


def test_what_a_node_says_of_itself():
    facts = nodes.facts()
    assert facts["code"] == nodes.code_digest()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert json.dumps(facts)
    assert nodes.version_of("no-such-distribution") is None


def test_the_runtime_folder(short_path, monkeypatch):
    monkeypatch.setenv("MOERAY_RUNTIME_DIR", str(short_path))
    check(files.runtime_folder(), "ok", str(short_path))
    own = next(short_path.iterdir())
    assert list(own.iterdir()) == []
    own.chmod(0o777)
    check(files.runtime_folder(), "fail", "mode 0700")
    monkeypatch.setenv("MOERAY_RUNTIME_DIR", str(short_path / ("x" * 90)))
    check(files.runtime_folder(), "fail", "choose a shorter folder")
    (short_path / "file").touch()
    monkeypatch.setenv("MOERAY_RUNTIME_DIR", str(short_path / "file"))
    check(files.runtime_folder(), "fail", "MOERAY_RUNTIME_DIR")


def test_the_cache_folder(tmp_path):
    check(files.cache_folder(tmp_path / "new", lambda path: 50 << 30), "ok", "50.0 GiB")
    check(files.cache_folder(tmp_path, lambda path: 5 << 30), "warn", "MOERAY_CACHE_DIR")
    check(files.cache_folder(tmp_path, lambda path: 5 << 20), "fail", "0.0 GiB")
    (tmp_path / "file").touch()
    check(files.cache_folder(tmp_path / "file" / "cache"), "fail", "MOERAY_CACHE_DIR")


def test_the_model(tmp_path):
    check(files.model("", None), "skipped")
    check(files.model(str(make_tiny("olmoe", tmp_path / "mute")), None), "warn", "no tokenizer")
    tiny = make_tiny("olmoe", tmp_path / "tiny", tokenizer=True)
    check(files.model(str(tiny), None), "ok", "olmoe, 24 experts in 3 layers")
    next(tiny.glob("*.safetensors")).unlink()
    check(files.model(str(tiny), None), "fail")
    check(files.model(str(tmp_path / "none"), None), "fail", "hub id")


def test_what_the_config_names(tmp_path):
    check(named.policies(("idle", "hot_experts")), "ok", "idle, hot_experts")
    check(named.policies(()), "ok", "nothing scales by itself")
    check(named.policies(("idel",)), "fail", "nearest is 'idle'")
    check(named.policies(("no_such_package:policy",)), "fail", "is its package installed here?")
    check(named.template("{{ messages }}"), "ok")
    check(named.template(str(tmp_path / "none.jinja")), "fail", "none.jinja")
    check(named.template("{% broken"), "fail", "no Jinja template")
    (tmp_path / "cert.pem").write_text("no certificate")
    wire = WireConfig(tls_cert=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "key.pem"))
    check(named.tls(wire), "fail", "tls_key")
    (tmp_path / "key.pem").touch()
    check(named.tls(wire), "fail", "name files that go together")
    config = Config(wire=wire, chat_template="{{ messages }}")
    assert [finding.name for finding in named.examine(config)] == ["policies", "TLS", "chat template"]


def test_a_survey_that_hears_nothing(monkeypatch):
    monkeypatch.setattr(gather, "SURVEY_S", 0.0)
    with surveying(None) as survey:
        assert "not answered" in survey.result()["error"]


# -- as a user runs it --------------------------------------------------------------------------------------------


@pytest.fixture
def lonely():
    """The environment of a machine without a Ray cluster."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="doc") as folder:  # Ray's sockets want a short path
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOERAY_"))}
        yield env | {"RAY_TMPDIR": folder, "MOERAY_RUNTIME_DIR": folder, "MOERAY_CACHE_DIR": f"{folder}/cache"}


def doctor(env: dict[str, str], *args: str, code: str = "", **options) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit code, findings by name, and stderr."""
    run = f"{code}\nfrom moeray.cli.main import main\nmain()"
    command = [sys.executable, "-c", run, "doctor", "--output", "json", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **options)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert told["healthy"] == (done.returncode == 0)
    return done.returncode, {finding["name"]: finding for finding in told["findings"]}, done.stderr


def test_green_on_a_fresh_machine(lonely, tmp_path):
    port = _free_port()
    code, found, err = doctor(lonely, str(make_tiny("olmoe", tmp_path / "tiny", tokenizer=True)), "--port", str(port))
    red = {name: finding for name, finding in found.items() if finding["verdict"] == "fail"}
    assert (code, red) == (0, {}), err
    assert found["model"]["verdict"] == "ok"
    assert found["ray"]["verdict"] == "skipped"
    assert str(port) in found["port"]["what"]
    assert found["packages"]["what"].startswith("torch ")


def test_red_with_a_mend_on_a_broken_one(lonely, tmp_path):
    Path(lonely["MOERAY_RUNTIME_DIR"], f"moeray-{os.getuid()}").mkdir(mode=0o755)
    (tmp_path / "file").touch()
    lonely |= {
        "RAY_ADDRESS": "127.0.0.1:1", "MOERAY_CLUSTER_TOKEN": "tooshort", "MOERAY_CACHE_DIR": f"{tmp_path}/file/x",
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as held:
        config = tmp_path / "moeray.yaml"
        config.write_text(f"serve: {{port: {held.getsockname()[1]}}}")
        code, found, err = doctor(
            lonely, str(tmp_path), "--config", str(config),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)),
        )  # fmt: skip
    assert code == 1
    red = {name for name, finding in found.items() if finding["verdict"] == "fail"}
    assert red == {"open files", "port", "runtime folder", "cache folder", "cluster token", "model", "ray"}
    assert all(found[name]["mend"] for name in red)
    assert "tooshort" not in json.dumps(found)
    assert "mended" in err


def test_red_within_seconds_where_the_head_of_the_cluster_says_nothing(lonely):
    with socket.create_server(("127.0.0.1", 0)) as held:
        begun = time.monotonic()
        code, found, _ = doctor(lonely, "--address", f"127.0.0.1:{held.getsockname()[1]}", "--port", str(_free_port()))
        assert time.monotonic() - begun < gather.SURVEY_S / 2
    assert code == 1
    check(Finding(**found["ray"]), "fail", "has said nothing")
    assert "RAY_ADDRESS" in found["ray"]["mend"]


def test_a_config_that_is_wrong_and_packages_that_are_missing(lonely, tmp_path):
    config = tmp_path / "moeray.yaml"
    config.write_text("wire: {hots: 0.0.0.0}")
    code, found, _ = doctor(lonely, "--config", str(config), code="import sys; sys.modules['torch'] = None")
    assert code == 1
    assert "wire.host" in found["config"]["mend"] + found["config"]["what"]
    assert "torch" in found["imports"]["what"]
    assert found["ray"]["verdict"] == "skipped"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
