"""Several machines, each with a launcher of its own, as one types it there; here all of them are this one."""

import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from .helpers import ROOT, launch, metrics, words, yaml_of_nothing

pytestmark = pytest.mark.usefixtures("one_cache")

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


def start_ignoring_usr1(node: int, port: int, log: Path, *arguments: str) -> subprocess.Popen:
    """The same as docs/multi-node.md has SLURM start it."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited, as from `trap "" USR1`
    try:
        return start_node(node, port, log, *arguments)
    finally:
        signal.signal(signal.SIGUSR1, before)


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


def test_documented_launches_are_the_launchers() -> None:
    """Every flag and variable of docs/multi-node.md's table, and its manifests, are what they are given as."""
    from composer.cli import launcher

    text = (ROOT / "docs" / "multi-node.md").read_text()
    rows = re.findall(r"^\| (`-.*?) \| (.*?) \|", text, re.MULTILINE)
    flags = [flag for row in rows for flag in re.findall(r"`(--?\w+)", row[0])]
    assert len(flags) == 8 and set(flags) <= set(launcher._get_parser()._option_string_actions)
    variables = [name for row in rows for name in re.findall(r"`(\w+)`", row[1])]
    source = inspect.getsource(launcher._parse_args)
    assert len(variables) == 6 and all(f"'{name}'" in source for name in variables)
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    kinds = [document.get("kind") for block in blocks for document in yaml.safe_load_all(block)]
    assert kinds == ["Service", "Job", None]
    commands = re.findall(r"^composer (.*)$", text, re.MULTILINE)
    parsed = [launcher._get_parser().parse_args(shlex.split(command)) for command in commands]
    assert [(p.nproc, p.world_size, p.node_rank, p.training_script) for p in parsed] == [
        (8, 16, node, "dinocomp/train.py") for node in range(2)
    ]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_scheduler_warns_all_machines(tmp_path: Path, free_port: int) -> None:
    """SIGUSR1 for every process of both machines, launchers and data workers included: saved, and 75 from both."""
    logs = [tmp_path / f"node-{node}" for node in range(2)]
    changes = {"train__num_workers": 1, "optim__epochs": 500, "checkpoint__save_frequency": 500}
    arguments = [yaml_of_nothing(tmp_path), *words(tmp_path / "run", **changes)]
    nodes = [start_ignoring_usr1(node, free_port, logs[node], *arguments) for node in range(2)]
    begin = time.monotonic()
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() - begin < 300:
        time.sleep(0.05)
    for node in nodes:
        os.killpg(node.pid, signal.SIGUSR1)
    codes = finish(nodes, 60)
    assert codes == [75, 75], "\n".join(log.read_text() for log in logs)
    done = metrics(tmp_path / "run")[-1]["iteration"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"iteration-{done:08d}"]
