"""Runs in processes of their own that start in a moment, to be killed."""

import errno
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from dinocomp import output
from dinocomp.callbacks import checkpoints
from dinocomp.cli import main as command
from dinocomp.evaluate import online
from dinocomp.method import DINOv2
from dinocomp.train import main

# A server that has imported everything once, and forks a child for each run.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.processes", "dinocomp.build", "dinocomp.callbacks", "streaming"])


def start(arguments: list[str], before: Callable[..., None] | None = None, *details: object) -> BaseProcess:
    """A training run in a new process; `before(*details)` is called in it first. Its exit code is that of `main`."""
    process = _SERVER.Process(target=_run, args=(dict(os.environ), arguments, before, details))
    process.start()
    return process


def start_ranks(
    arguments: list[str], number: int, port: int, before: Callable[..., None] | None = None, *details: object
) -> list[BaseProcess]:
    """The same on `number` ranks, as the launcher would start them."""
    ranks = []
    for environment in _of_ranks(number, port):
        ranks.append(_SERVER.Process(target=_run, args=(environment, arguments, before, details)))
        ranks[-1].start()
    return ranks


def start_command(arguments: list[str], number: int, port: int) -> list[BaseProcess]:
    """`dinocomp` with these arguments on `number` ranks."""
    ranks = [_SERVER.Process(target=_command, args=(each, arguments)) for each in _of_ranks(number, port)]
    for rank in ranks:
        rank.start()
    return ranks


def _of_ranks(number: int, port: int) -> list[dict[str, str]]:
    """What the launcher puts into the environment of each rank."""
    environments = []
    for rank in range(number):
        places = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environments.append(environment | {name: str(value) for name, value in places.items()})
    return environments


def finish(process: BaseProcess, timeout: float = 120) -> int:
    """Waits for a process; gives its exit code (-9 for a killed one)."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {timeout} s")
    return process.exitcode


def _run(environment: dict[str, str], arguments: list[str], before: Callable[..., None] | None, details: tuple) -> None:
    os.environ.clear()  # it is the server's, from when that started
    os.environ.update(environment)
    torch.set_num_threads(1)
    if before:
        before(*details)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def _command(environment: dict[str, str], arguments: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    code = command(arguments)
    sys.stdout.flush()
    os._exit(code)


def kill_at_file_operation(number: int, where: str, by: signal.Signals = signal.SIGKILL) -> None:
    """Makes this process kill itself just before its `number`-th operation on a path that holds `where`."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"):
            paths = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
            if any(where in path for path in paths):
                count += 1
                if count == number:
                    os.kill(os.getpid(), by)

    sys.addaudithook(watch)


def limit_file_size_from(iteration: int, size: int) -> None:
    """From an iteration on no file of this process may grow beyond `size` bytes, as on a disk that is full."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    _at_iteration(iteration, limit)


def signal_at_iteration(iteration: int, number: signal.Signals, rank: int = -1) -> None:
    """This process gets a signal while it is in an iteration (counted from 1); of several, only `rank`."""
    if rank in (-1, int(os.environ.get("RANK", "0"))):
        _at_iteration(iteration, lambda: os.kill(os.getpid(), number))


def fail_at_iteration(iteration: int, rank: int, mark: Path | None = None) -> None:
    """One rank has an error that nobody has foreseen, in an iteration (counted from 1), and makes a file then."""

    def fail() -> None:
        if mark:
            mark.touch()
        raise ArithmeticError("nobody has foreseen this")

    if rank == int(os.environ.get("RANK", "0")):
        _at_iteration(iteration, fail)


def write_centres(folder: Path) -> None:
    """Each rank writes the centre of DINO's targets that it starts from."""
    original, rank = DINOv2.begin_step, os.environ.get("RANK", "0")

    def begin_step(self: DINOv2, *arguments: object) -> None:
        if not (folder / f"{rank}.pt").exists():
            torch.save(self.dino_targets.center.clone(), folder / f"{rank}.pt")
        original(self, *arguments)

    DINOv2.begin_step = begin_step


def write_draws(folder: Path) -> None:
    """Each rank writes the masks of its first batch and the sequences that its student keeps in the first block."""
    original, rank = DINOv2.loss, os.environ.get("RANK", "0")

    def loss(self: DINOv2, outputs: object, batch: dict) -> object:
        kept = self.networks("student")["backbone"].draw_kept(64, torch.device("cpu"))[0]
        if not (folder / f"{rank}.pt").exists():
            torch.save({"masks": batch["masks"], "kept": kept, "index": batch["index"]}, folder / f"{rank}.pt")
        return original(self, outputs, batch)

    DINOv2.loss = loss


def pause_at_iteration(iteration: int, until: Path) -> None:
    """This process waits in an iteration (counted from 1) until there is a file."""

    def wait() -> None:
        while not until.exists():
            time.sleep(0.02)

    _at_iteration(iteration, wait)


def refuse_folders_from(iteration: int) -> None:
    """From an iteration on this process can make no folders."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _at_iteration(iteration, lambda: setattr(checkpoints, "begin", full))


def rename_before_lock(source: Path, target: Path) -> None:
    """Just before this process locks its output folder, a checkpoint turns up there."""
    original = output.FileLock

    def lock(path: Path) -> object:
        source.rename(target)
        return original(path)

    output.FileLock = lock


def signal_at_evaluation(number: signal.Signals) -> None:
    """This process gets a signal while it evaluates."""
    original = online.knn_accuracy

    def knn_accuracy(*arguments: object, **settings: object) -> object:
        os.kill(os.getpid(), number)
        return original(*arguments, **settings)

    online.knn_accuracy = knn_accuracy


def hang_while_saving() -> None:
    """This process never comes to the end of its first checkpoint."""

    def hang(*_: object) -> None:
        while True:
            time.sleep(0.1)

    checkpoints.publish = hang


def spoil(iterations: list[int], rank: int, how: str) -> None:
    """The loss of these iterations (counted from 1) is not finite on `rank` (-1: on all).

    Args:
        how: `loss` for an infinite loss without a gradient of its own, `gradient` for NaN in both.
    """
    original, done = DINOv2.loss, 0

    def loss(self: DINOv2, outputs: object, batch: object) -> dict[str, torch.Tensor]:
        nonlocal done
        done += 1
        found = original(self, outputs, batch)
        if done in iterations and rank in (-1, int(os.environ.get("RANK", "0"))):
            if how == "gradient":
                found["total"] = found["total"] * float("nan")
            self.terms = {name: term * float("inf") for name, term in self.terms.items()}
        return found

    DINOv2.loss = loss


def spoil_and_stop(iterations: list[int], rank: int, how: str) -> None:
    """As `spoil`, and a signal to stop in the last of these iterations."""
    spoil(iterations, rank, how)
    signal_at_iteration(iterations[-1], signal.SIGTERM)


def _at_iteration(iteration: int, action: Callable[[], object]) -> None:
    original = DINOv2.loss

    def loss(self: DINOv2, outputs: object, batch: object) -> object:
        nonlocal iteration
        iteration -= 1
        if iteration == 0:
            action()
        return original(self, outputs, batch)

    DINOv2.loss = loss
