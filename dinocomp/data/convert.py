"""Images -> MDS shards, in parallel, restartable, with nothing half-done that looks finished.

    DST/train/part-00000/shard.00000.mds …   the images
    DST/train/dinocomp.json                  the manifest: classes, settings, what was left out
    DST/train/index.json                     Streaming's index; a folder with this file is a dataset

While it runs everything lies in DST/.train.partial. Work is cut into parts of a fixed number of images; a part that is
finished has an entry in `.train.partial/done` and is used again after an interruption. The folder gets its name last.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from dinocomp.data.listing import Source
from dinocomp.data.part import Job, gunzip, initialise_worker, write_part
from dinocomp.data.progress import Progress
from dinocomp.data.report import MANIFEST, Report, SplitReport, split_report
from dinocomp.data.sources import find_sources, hold_out
from dinocomp.errors import DataError

FORMAT_VERSION = 1
PART_IMAGES = 2048  # about 230 MB of ImageNet; a kill loses at most this much work for each worker
_SHUFFLE_SEED = 0


def convert(
    src: str,
    dst: str,
    *,
    workers: int | None = None,
    max_size: int | None = None,
    compression: str | None = None,
    strict: bool = False,
    val_fraction: float = 0.0,
    progress: bool = True,
    part_images: int = PART_IMAGES,
    sources: dict[str, Source] | None = None,
) -> Report:
    """Write every split of `src` as a folder of MDS shards below `dst`.

    Samples have the columns `image` (bytes), `label` (int, -1 for none) and `key` (str). They are stored in a fixed
    random order, because shards sorted by class shuffle badly when they are streamed. Every image is decoded once.
    The shards do not depend on the number of workers or on interruptions. If `dst` already holds them, nothing is done;
    a second process converting to the same place waits for the first and uses its result.

    Args:
        src: see `sources.find_sources`.
        workers: processes; None takes one for each available core.
        max_size: pixels; images whose shorter side is larger are made smaller (see `images.checked_bytes`).
        compression: of whole shards, e.g. "zstd" or "zstd:7"; images hardly get smaller by it. None: none.
        strict: an unreadable image is an error; else it is left out and reported.
        val_fraction: hold this share of the images out as `val`; for sources with only a `train` split.
        part_images: images of one part.
        sources: what to convert, if it has been listed already.

    Raises:
        DataError: no such source, no images, unreadable images with `strict`, `dst` holds other data or cannot be
            written to.
    """
    begin = time.monotonic()
    if max_size is not None and max_size < 1:
        raise DataError(f"--max-size is {max_size}; it is the shorter side in pixels, e.g. 256")
    _check_compression(compression)
    sources = sources or find_sources(src)
    if val_fraction:
        if set(sources) != {"train"}:
            raise DataError(f"--val-fraction is for sources with one split; {src} has {', '.join(sources)}: drop it")
        sources = hold_out(sources["train"], val_fraction)
    settings = {"max_size": max_size, "compression": compression, "part_images": part_images}
    target = Path(dst).expanduser()
    _make_folder(target)
    workers = workers or available_cores()
    try:
        with _alone_in(target):
            reports = [_convert_split(s, target, settings, workers, strict, progress) for s in sources.values()]
    except OSError as error:  # a full disk, a read-only folder; images that cannot be read do not end up here
        raise DataError(
            f"writing to {target} failed: {error}; mend that and run the same again, finished parts are kept"
        ) from error
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process died while converting to {target}, perhaps for want of memory; run the same again with "
            "fewer --workers, finished parts are kept"
        ) from error
    return Report(reports, time.monotonic() - begin)


def listing_digest(source: Source) -> str:
    """A fingerprint of names, labels, sizes and times of change: the same if and only if there is nothing new."""
    digest = hashlib.sha256(repr(source.classes).encode())
    for item in source.items:
        digest.update(f"{item.key}\0{item.label}\0{item.offset}\0{item.size}\0{item.changed}\n".encode())
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a finished split, or None where there is none."""
    try:
        return json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{folder}/{MANIFEST} is damaged ({error}); delete the folder and convert again") from None


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _convert_split(
    source: Source, target: Path, settings: dict[str, Any], workers: int, strict: bool, progress: bool
) -> SplitReport:
    final, partial = target / source.split, target / f".{source.split}.partial"
    wanted = {"format": FORMAT_VERSION, "digest": listing_digest(source), "settings": settings}
    manifest = read_manifest(final)
    if manifest is None and final.exists() and any(final.iterdir()):
        raise DataError(f"{final} holds something that is not a conversion; give another DST or empty that folder")
    if manifest is not None:
        if {key: manifest.get(key) for key in wanted} != wanted:
            raise DataError(
                f"{final} holds a conversion of other images or with other settings "
                f"({manifest.get('source')}, {manifest.get('samples')} images); give another DST or delete that folder"
            )
        shutil.rmtree(partial, ignore_errors=True)
        _refuse(manifest["unreadable"], strict)
        return split_report(manifest, final, reused=True)
    if progress:
        what = f"converting {len(source.items)} images of {source.origin} ({source.kind}) to {final}"
        print(what, file=sys.stderr, flush=True)
    _prepare(partial, wanted)
    done = _write_parts(source, partial, settings, workers, strict, progress)
    manifest = wanted | _manifest(source, done)
    _refuse(manifest["unreadable"], strict)
    if not manifest["samples"]:
        raise DataError(f"none of the {len(source.items)} images of {source.origin} can be read; {_first(manifest)}")
    shards = partial / "shards"
    _write_json(shards / MANIFEST, manifest)
    index = {"version": 2, "shards": [shard for part in done for shard in part["shards"]]}
    _write_json(shards / "index.json", index)
    if final.exists():
        final.rmdir()  # an empty folder
    shards.rename(final)
    shutil.rmtree(partial)
    return split_report(manifest, final, reused=False)


def _prepare(partial: Path, wanted: dict[str, Any]) -> None:
    """Keep the parts of an interrupted conversion of the same images and settings; clear away everything else."""
    state = partial / "state.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        if json.loads(state.read_text(encoding="utf-8")) == wanted:
            for left in (partial / "shards").glob("*.writing-*"):
                shutil.rmtree(left, ignore_errors=True)
            return
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "shards").mkdir(parents=True)
    (partial / "done").mkdir()
    _write_json(state, wanted)


def _write_parts(
    source: Source, partial: Path, settings: dict[str, Any], workers: int, strict: bool, progress: bool
) -> list[dict[str, Any]]:
    """Write all parts that are not done yet; gives every part's entry, in order."""
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(source.items))
    size = settings["part_images"]
    results: dict[int, dict[str, Any]] = {}
    todo: list[Job] = []
    for number, start in enumerate(range(0, len(order), size)):
        entry = partial / "done" / f"{number:05d}.json"
        if entry.is_file():
            results[number] = json.loads(entry.read_text(encoding="utf-8"))
            continue
        items = [source.items[i] for i in order[start : start + size]]
        todo.append(Job(number, items, str(partial), settings["max_size"], settings["compression"]))
    with Progress(f"converting {source.split}", len(order), enabled=progress) as bar:
        bar.advance(len(order) - sum(len(job.items) for job in todo))
        for number, result in _results(_unpacked(todo, partial), workers, bar.advance):
            _refuse(result["unreadable"], strict)
            _write_json(partial / "done" / f"{number:05d}.json", result)
            results[number] = result
    return [results[number] for number in sorted(results)]


def _results(jobs: list[Job], workers: int, advance: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job.number, write_part(job, advance)
        return
    # A fork server: torch's threads make a plain fork unsafe, and spawning would import everything in each worker.
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload(["dinocomp.data.preload"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=initialise_worker)
    try:
        waiting = {pool.submit(write_part, job): job for job in jobs}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                yield job.number, future.result()
                advance(len(job.items))
    finally:  # also on an error or ctrl-C: parts not begun are dropped, those being written are waited for
        pool.shutdown(cancel_futures=True)


def _unpacked(jobs: list[Job], partial: Path) -> list[Job]:
    """Compressed tars cannot be read from the middle: unpack each once, beside the parts, and point the jobs there."""
    packed = sorted({i.path for job in jobs for i in job.items if i.offset >= 0 and i.path.lower().endswith("gz")})
    plain = {}
    for path in packed:  # named after the file, not its place: after an interruption fewer of them are left
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        plain[path] = gunzip(path, partial / "unpacked" / f"{name}.tar")
    if not plain:
        return jobs
    return [job._replace(items=[i._replace(path=plain.get(i.path, i.path)) for i in job.items]) for job in jobs]


def _manifest(source: Source, done: list[dict[str, Any]]) -> dict[str, Any]:
    unreadable = sorted(entry for part in done for entry in part["unreadable"])
    return {
        "source": source.origin,
        "kind": source.kind,
        "split": source.split,
        "samples": sum(shard["samples"] for part in done for shard in part["shards"]),
        "bytes": sum((s["zip_data"] or s["raw_data"])["bytes"] for part in done for s in part["shards"]),
        "labelled": source.labelled,
        "classes": [entry._asdict() for entry in source.classes],
        "unreadable": unreadable,
        "skipped": source.skipped,
        "notes": list(source.notes),
        "columns": {"image": "bytes of the image file", "label": "index into classes, -1 for none", "key": "name"},
    }


def _refuse(unreadable: list[list[str]], strict: bool) -> None:
    if strict and unreadable:
        listed = "\n".join(f"  {key}: {reason}" for key, reason in unreadable[:20])
        raise DataError(
            f"{len(unreadable)} images cannot be read:\n{listed}\nmend or remove them, or convert without --strict"
        )


def _first(manifest: dict[str, Any]) -> str:
    key, reason = manifest["unreadable"][0]
    return f"the first one is {key}: {reason}"


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from converting to the same folder; says so if it has to wait."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".convert.lock")
    try:
        lock.acquire(timeout=3)
    except Timeout:
        print(f"waiting for another process that is converting to {folder}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_compression(compression: str | None) -> None:
    if compression is None:
        return
    from streaming.base.compression import is_compression

    if not is_compression(compression):
        raise DataError(f"--compression {compression!r} is not known; use zstd or zstd:LEVEL with LEVEL 1 to 22")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {path} cannot be made: {error.strerror}; give a place you may write to") from None


def _write_json(path: Path, value: Any) -> None:
    """All or nothing: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(value, sort_keys=True, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
