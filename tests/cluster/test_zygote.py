"""Scripts that run warm: as `python SCRIPT` would, in a fork; and nothing is left when their owner is gone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

pytestmark = pytest.mark.ray

LIMIT_S = 120.0
WARM = f"{sys.executable} -m moeray.cluster.warm"
SCRIPT = """
import os, sys
heavy = sorted({"torch", "ray", "transformers"} & sys.modules.keys())
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), "OPENBLAS_NUM_THREADS" in os.environ, heavy)
print(sys.stdin.readline().strip(), file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
JOB = """
import os, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
job_and_parent = ray.remote(lambda: (ray.get_runtime_context().get_job_id(), os.getppid()))
warm = job_and_parent.options(runtime_env={"py_executable": sys.argv[2]})
print(ray.get_runtime_context().get_job_id(), *ray.get(warm.remote(), timeout=45))
"""
WAITS = "import os, signal\nprint(os.getpid(), os.getppid(), flush=True)\nsignal.pause()\n"


@pytest.fixture
def script(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOERAY_RUNTIME_DIR", str(short_path))
    path = short_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def waits(script: Path) -> Path:
    script.write_text(WAITS)
    return script


def shell(commands: str) -> subprocess.Popen[str]:
    """A shell that runs these: it is the owner of the zygote, as a raylet is."""
    pipe = subprocess.PIPE
    return subprocess.Popen(["sh", "-c", commands], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def ended(pid: int) -> bool:
    """Whether a process is gone, or goes now."""
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([end], [], [], LIMIT_S)[0])
    finally:
        os.close(end)


def test_threads_wait_passively_in_the_zygote_too_unless_the_user_has_chosen_otherwise(script: Path) -> None:
    script.write_text(
        "import os\nenvs = [dict(os.environ), dict(line.split('=', 1) for line in "
        "open(f'/proc/{os.getppid()}/environ').read().split(chr(0)) if line)]\n"
        "print([(env['OMP_WAIT_POLICY'], env['GOMP_SPINCOUNT']) for env in envs])\n"
    )
    with shell(f"unset OMP_WAIT_POLICY; GOMP_SPINCOUNT=0 {WARM} {script}") as owner:
        out, _ = owner.communicate(timeout=LIMIT_S)
    assert out == f"{[('PASSIVE', '0')] * 2}\n"


def test_a_script_runs_as_python_would_run_it(script: Path, tmp_path: Path) -> None:
    with shell(f"cd {tmp_path}; COLOUR=blue {WARM} {script} 7 'two words'; echo status $?") as owner:
        out, err = owner.communicate("from stdin\n", timeout=LIMIT_S)
    warm = "False ['ray', 'torch', 'transformers']"
    assert out == f"__main__ ['7', 'two words'] {tmp_path} blue {warm}\nstatus 7\n"
    assert err == "from stdin\n"


def test_the_zygote_forks_for_all_and_ends_with_its_owner(waits: Path) -> None:
    with shell(f"{WARM} {waits} & {WARM} {waits} & wait") as owner:
        assert owner.stdout is not None
        (one, zygote), (other, same) = (map(int, owner.stdout.readline().split()) for _ in range(2))
        assert one != other
        assert zygote == same
        os.kill(one, signal.SIGKILL)
        assert ended(one)
        os.kill(other, 0)  # it lives
        owner.kill()
        assert ended(zygote)
        os.kill(other, signal.SIGKILL)  # scripts watch their owner by themselves, as Ray's workers do


def test_a_client_and_its_script_end_together(waits: Path) -> None:
    with shell(f"{WARM} {waits} & echo $! >&2; wait $!; {WARM} {waits}; echo status $?") as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        client = int(owner.stderr.readline())
        first = int(owner.stdout.readline().split()[0])
        os.kill(client, signal.SIGKILL)
        assert ended(first)
        second = int(owner.stdout.readline().split()[0])
        os.kill(second, signal.SIGTERM)
        assert owner.stdout.readline() == f"status {128 + signal.SIGTERM}\n"


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        ("raise ImportError('no torch here')", "ImportError: no torch here"),
        ("raise RuntimeError('no\\ndevice')", "RuntimeError: no device"),
        ("raise SystemExit('not on this machine')", "SystemExit: not on this machine"),
    ],
)
def test_a_zygote_that_cannot_be_is_not_tried_again(script: Path, tmp_path: Path, torch: str, reason: str) -> None:
    """Its imports fail, as those of an installation without torch would."""
    (tmp_path / "torch.py").write_text(f"{torch}\n")
    with shell(f"export PYTHONPATH={tmp_path}; {WARM} {script} 3; {WARM} {script} 3; echo status $?") as owner:
        out, err = owner.communicate("\n", timeout=LIMIT_S)
    assert out.endswith("status 3\n")
    assert err.count("moeray: no zygote") == 2
    assert f"it did not start: {reason}; remove " in err


def test_without_a_zygote_the_script_runs_all_the_same(script: Path, short_path: Path) -> None:
    (short_path / f"moeray-{os.getuid()}").mkdir()
    (short_path / f"moeray-{os.getuid()}").chmod(0o755)
    with shell(f"{WARM} {script} 3; echo status $?") as owner:
        out, err = owner.communicate("\n", timeout=LIMIT_S)
    assert "[]\nstatus 3" in out
    assert "must be private to this user" in err


def test_each_ray_job_has_a_zygote_of_its_own(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs start an actor at once, on one node: each gets a process that is its own job's."""
    monkeypatch.setenv("MOERAY_RUNTIME_DIR", str(short_path))
    with ray.init("local", num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False) as context:
        job = [sys.executable, "-c", JOB, context.address_info["gcs_address"], WARM]
        jobs = [subprocess.Popen(job, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outs = [each.communicate(timeout=LIMIT_S)[0].split() for each in jobs]
    assert all(mine == the_actors for mine, the_actors, _ in outs)
    assert len({zygote for _, _, zygote in outs}) == 2
