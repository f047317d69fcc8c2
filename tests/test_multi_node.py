"""Several machines, each with a launcher of its own, as one types it there; here all of them are this one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .helpers import ROOT, launch, metrics, words, yaml_of_nothing

pytestmark = [pytest.mark.usefixtures("one_cache"), pytest.mark.slow]

GRACE = 30  # seconds that the launcher gives its processes


def start_node(node: int, port: int, log: Path, *arguments: str, script: str = "dinocomp/train.py") -> subprocess.Popen:
    """The launcher of one of two machines with one process each; what it shows goes to `log`."""
    command = [Path(sys.executable).with_name("composer"), "-n", "1", "--world_size", "2", "--node_rank", str(node)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port), script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "w") as shown:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=shown, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def finish(nodes: list[subprocess.Popen], seconds: float) -> list[int]:
    """The exit codes of all launchers, which come within so many seconds."""
    try:
        end = time.monotonic() + seconds
        return [node.wait(max(0.1, end - time.monotonic())) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()


def test_two_machines_are_one(tmp_path: Path, free_port: int) -> None:
    """Two launchers with a rendezvous train exactly as one with two processes does."""
    changes = {"optim__epochs": 1, "train__num_workers": 1}
    logs = [tmp_path / f"node-{node}" for node in range(2)]
    arguments = [yaml_of_nothing(tmp_path), *words(tmp_path / "two", **changes)]
    nodes = [start_node(node, free_port, logs[node], *arguments) for node in range(2)]
    codes = finish(nodes, 300)
    shown = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(shown)
    assert "training: 4 iterations of 16 images on 2 CPU process(es)" in shown[0]
    assert "training:" not in shown[1] and "Traceback" not in shown[1]  # rank 0 speaks for all
    one = launch(yaml_of_nothing(tmp_path), *words(tmp_path / "one", **changes), processes=2)
    assert one.returncode == 0, one.stderr
    machine = ("images_per_second", "seconds_per_iteration", "data_wait", "memory")
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        names = [name for name in a if not name.startswith(machine)]
        assert len(names) > 10 and {n: a[n] for n in names} == {n: b[n] for n in names}


FAILING = """
import sys
from pathlib import Path
from dinocomp.train import main
from tests.processes import fail_at_iteration
fail_at_iteration(2, 1, Path({mark!r}))
sys.exit(main(sys.argv[1:]))
"""


def test_a_machine_that_fails_ends_all(tmp_path: Path, free_port: int) -> None:
    """The second one shows why; the first one does not wait for it."""
    script, mark = tmp_path / "failing.py", tmp_path / "failed"
    script.write_text(FAILING.format(mark=str(mark)))
    logs = [tmp_path / f"node-{node}" for node in range(2)]
    arguments = [yaml_of_nothing(tmp_path), *words(tmp_path / "run", train__num_workers=1)]
    nodes = [start_node(node, free_port, logs[node], *arguments, script=str(script)) for node in range(2)]
    ended, begin = {}, time.monotonic()
    while len(ended) < 2 and time.monotonic() - begin < 300:
        ended |= {node: time.time() for node in nodes if node not in ended and node.poll() is not None}
        time.sleep(0.05)
    codes = finish(nodes, 1)
    shown = [log.read_text() for log in logs]
    assert mark.exists(), "\n".join(shown)
    assert all(0 < code < 128 for code in codes), (codes, *shown)
    failed = mark.stat().st_mtime
    assert len(ended) == 2 and all(end - failed < GRACE for end in ended.values()), (ended, failed)
    assert "ArithmeticError: nobody has foreseen this" in shown[1] and "Traceback" in shown[1]
    assert "nobody has foreseen this" not in shown[0]
