import os
import subprocess
import sys
import threading

from moeray.actors.cores import claim


def test_cores_are_claimed_once(tmp_path):
    first = claim(2, tmp_path, range(5))
    second = claim(2, tmp_path, range(5))
    assert first.numbers == {0, 1}
    assert second.numbers == {2, 3}
    assert claim(2, tmp_path, range(5)) is None
    assert claim(1, tmp_path, range(5)).numbers == {4}
    first.release()
    assert claim(2, tmp_path, range(5)).numbers == {0, 1}


def test_a_claim_that_fails_holds_nothing(tmp_path):
    assert claim(3, tmp_path, range(2)) is None
    assert claim(2, tmp_path, range(2)) is not None


def test_a_process_that_dies_leaves_its_cores(tmp_path):
    code = (
        f"from pathlib import Path; from moeray.actors.cores import claim; claim(2, Path({str(tmp_path)!r}), range(2))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('claimed', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        # The claim is dropped at once, as nothing keeps it; a lock lives as long as its descriptor.
        assert child.stdout.readline() == "claimed\n"
        assert claim(1, tmp_path, range(2)) is None
        child.kill()
        child.wait()
        assert claim(2, tmp_path, range(2)).numbers == {0, 1}


def test_only_the_calling_thread_keeps_to_them(tmp_path):
    before, seen = os.sched_getaffinity(0), []
    cores = claim(1, tmp_path)

    def run():
        cores.keep()
        inner = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        inner.start()
        inner.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [cores.numbers]
    assert os.sched_getaffinity(0) == before
