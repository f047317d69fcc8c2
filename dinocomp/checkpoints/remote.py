"""A run's folder in an object store: whole checkpoints, and the small files beside them."""

import errno
import logging
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TypeVar

from composer.utils import ObjectStore

from dinocomp.checkpoints import store as stores
from dinocomp.checkpoints.manifest import (
    MANIFEST,
    DamagedError,
    Entry,
    folder_name,
    parse_manifest,
    read_manifest,
    xxh64,
)
from dinocomp.checkpoints.store import CREDENTIALS, RemoteError, cause_of, is_refused
from dinocomp.errors import ConfigError

log = logging.getLogger(__name__)
T = TypeVar("T")

FOLDER = "checkpoints"
PROBE = ".dinocomp-probe"
READ_TRIES = 5
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class RemoteFolder:
    """The folder of one run in an object store.

    A checkpoint is `checkpoints/iteration-N/…` below the address. Its manifest.json is put there last and deleted
    first: where there is one, the checkpoint is whole, and where there is none, nobody sees it. Nothing is asked of the
    store before the first call.

    Args:
        address: such as s3://bucket/run; also gs://, oci://, azure://.
        answer_seconds: longest wait for a sign of life from an S3 store before a request counts as failed.
        retry_seconds: first wait before a failed read is tried again; each next one is twice as long.

    Attributes:
        prunes: whether old checkpoints can be deleted there.

    Raises:
        ConfigError: `address` is not one of a folder in an object store.
    """

    def __init__(self, address: str, *, answer_seconds: float = 30, retry_seconds: float = 1) -> None:
        self._scheme, self._bucket, self._prefix = stores.split_address(address)
        self.address = f"{self._scheme}://{self._bucket}/{self._prefix}"
        self.prunes = True
        self._answer_seconds = answer_seconds
        self._retry_seconds = retry_seconds
        self._sent: dict[str, Entry] = {}  # verified files of a checkpoint whose upload failed half-way

    @cached_property
    def _store(self) -> ObjectStore:
        return stores.open_store(self.address, self._answer_seconds)

    def check(self, seconds: float = 20) -> None:
        """Write, list, read and delete a small object, so that a wrong setting shows before the first step.

        Args:
            seconds: give up when that has not been done after so long.

        Raises:
            ConfigError: one of them fails, with the cause and what to change.
        """
        try:
            stores.within(seconds, self._probe)
        except Exception as error:
            raise ConfigError(f"checkpoint.remote={self.address}: {cause_of(error)}; {self.advice(error)}") from error

    def list_whole(self) -> list[int]:
        """Iterations of the whole checkpoints there, in rising order.

        Raises:
            RemoteError: the store does not answer, or refuses.
        """
        listing = self._patiently(self.listing, FOLDER)
        return sorted(iteration for iteration, names in listing.items() if MANIFEST in names)

    def listing(self) -> dict[int, set[str]]:
        """Names of the files of each checkpoint there, whole or not, by iteration. Other objects are none of ours.

        Raises:
            Exception: what the store's library raises; nothing is tried again.
        """
        start = self._name(f"{FOLDER}/iteration-")
        found: dict[int, set[str]] = {}
        for name in stores.list_names(self._store, start):
            if match := re.fullmatch(r"(\d{8,})/(.+)", name[len(start) :]):
                found.setdefault(int(match[1]), set()).add(match[2])
        return found

    def holds(self, folder: Path) -> bool:
        """Whether the very checkpoint in the local `folder` is there, whole. One of another content is not."""
        there = self._read(f"{FOLDER}/{folder.name}/{MANIFEST}")
        return there == (folder / MANIFEST).read_bytes()

    def upload(self, folder: Path) -> None:
        """Copy a whole local checkpoint there: its files, each checked by its size, then the manifest.

        A failed upload goes on with the file that failed when it is asked for again.

        Args:
            folder: …/iteration-N with a manifest.json.

        Raises:
            DamagedError: the local checkpoint is damaged or gone.
            Exception: the store's library's own, or RemoteError where an object has another size than its file.
        """
        base = f"{FOLDER}/{folder.name}"
        manifest = self._name(f"{base}/{MANIFEST}")
        files = read_manifest(folder)
        if self.prunes:  # one of an earlier attempt at this iteration; with half of its files replaced it is not whole
            stores.delete_object(self._store, manifest)
        for file, entry in files.items():
            name = self._name(f"{base}/{file}")
            if self._sent.get(name) != entry:
                self._put(folder / file, name, entry.bytes)
                self._sent[name] = entry
        self._put(folder / MANIFEST, manifest, (folder / MANIFEST).stat().st_size)
        self._sent.clear()

    def download(self, iteration: int, into: Path) -> Path:
        """Fetch a whole checkpoint. It appears under its name only when every file has the manifest's size and hash.

        Args:
            iteration: one of `list_whole()`.
            into: the local folder of checkpoints.

        Returns:
            The checkpoint's folder, `into`/iteration-N.

        Raises:
            RemoteError: it is not there, a file of it comes broken again and again, or `into` cannot be written to.
        """
        final = into / folder_name(iteration)
        partial = into / f".partial-{final.name}"
        base = f"{FOLDER}/{final.name}"
        if final.exists():
            raise RemoteError(f"{final} is there already; remove it to fetch the one of {self.address}")
        text = self._patiently(lambda: self._read(f"{base}/{MANIFEST}"), f"{base}/{MANIFEST}")
        if text is None:
            raise RemoteError(f"{self.address} has no whole checkpoint of iteration {iteration}")
        files = parse_manifest(text, f"{self.address}/{base}/{MANIFEST}")
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            for file, entry in files.items():
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                self._patiently(lambda file=file, entry=entry: self._get(base, file, entry, partial), f"{base}/{file}")
            (partial / MANIFEST).write_bytes(text)
            partial.rename(final)
        except OSError as error:
            raise RemoteError(f"{into} cannot be written to: {error.strerror or error}; make room there") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final

    def download_part(self, iteration: int, file: str, into: Path) -> Path:
        """Fetch one file of a whole checkpoint, with the manifest's size and hash, to the folder `into`.

        Raises:
            RemoteError: it is not there, or comes broken again and again.
        """
        base = f"{FOLDER}/{folder_name(iteration)}"
        text = self._patiently(lambda: self._read(f"{base}/{MANIFEST}"), f"{base}/{MANIFEST}")
        entry = None if text is None else parse_manifest(text, f"{self.address}/{base}/{MANIFEST}").get(file)
        if entry is None:
            raise RemoteError(f"{self.address} has no whole checkpoint of iteration {iteration} with a {file}")
        self._patiently(lambda: self._get(base, file, entry, into), f"{base}/{file}")
        return into / file

    def delete(self, iteration: int) -> None:
        """Delete a checkpoint, whole or not: the manifest first, so that nobody sees half of one.

        Raises:
            Exception: what the store's library raises; nothing is tried again.
        """
        base = f"{FOLDER}/{folder_name(iteration)}"
        self._sent.clear()
        names = self.listing().get(iteration, set())
        for name in sorted(names, key=lambda name: name != MANIFEST):
            stores.delete_object(self._store, self._name(f"{base}/{name}"))

    def abort_parts(self) -> None:
        """Throw away what killed processes sent of large files. Nothing may be on its way there.

        Raises:
            Exception: what the store's library raises; nothing is tried again.
        """
        stores.abort_parts(self._store, self._name(f"{FOLDER}/iteration-"))

    def upload_file(self, path: Path, name: str) -> None:
        """Copy one small file of the run to `name` below the address; it may be growing."""
        self._store.upload_object(self._name(name), str(path.absolute()))

    def download_file(self, name: str, path: Path) -> bool:
        """Fetch the file called `name` below the address to `path`. Gives False where there is none.

        Raises:
            RemoteError: it cannot be fetched.
        """
        content = self._patiently(lambda: self._read(name), name)
        if content is None:
            return False
        partial = path.with_name(f".partial-{path.name}")
        partial.write_bytes(content)
        partial.replace(path)
        return True

    def advice(self, error: Exception) -> str:
        """What to do about `error`, in words."""
        if isinstance(error, DamagedError):
            return "delete that checkpoint there to go on from an older one"
        if stores.status_of(error) == 404:
            return f"make the bucket {self._bucket}, or correct its name"
        if is_refused(error):
            return (
                f"check {CREDENTIALS[self._scheme]}; the account must be allowed to read, write, list and delete "
                f"below {self.address}"
            )
        if self._scheme == "s3" and stores.is_silent(error):
            return f"nothing useful answers at {stores.s3_endpoint()}: check S3_ENDPOINT_URL and the network"
        return f"check that the store is well, and {CREDENTIALS[self._scheme]}"

    def _name(self, relative: str) -> str:
        return f"{self._prefix}/{relative}"

    def _put(self, path: Path, name: str, size: int) -> None:
        self._store.upload_object(name, str(path.absolute()))
        there = stores.size_of(self._store, name)
        if there != size:
            raise RemoteError(f"{self._scheme}://{self._bucket}/{name} has {there} bytes after the upload, not {size}")

    def _get(self, base: str, file: str, entry: Entry, folder: Path) -> None:
        path = (folder / file).absolute()
        self._store.download_object(self._name(f"{base}/{file}"), str(path), overwrite=True)
        size = path.stat().st_size
        if size != entry.bytes:
            raise DamagedError(f"it has {size} bytes, its manifest says {entry.bytes}")
        if (found := xxh64(path)) != entry.xxh64:
            raise DamagedError(f"its xxh64 is {found}, its manifest says {entry.xxh64}")

    def _read(self, relative: str) -> bytes | None:
        return stores.read_object(self._store, self._name(relative))

    def _patiently(self, function: Callable[[], T], what: str) -> T:
        """What `function` gives, tried again when the store stumbles.

        Raises:
            RemoteError: it failed every time, or in a way that another try does not mend.
        """
        for attempt in count(1):
            try:
                return function()
            except Exception as error:
                where = f"{self.address}/{what}"
                if isinstance(error, OSError) and error.errno in _LOCAL:
                    raise RemoteError(
                        f"{where} cannot be written to {error.filename or 'disk'}: {error.strerror}; make room there"
                    ) from error
                if is_refused(error) or attempt == READ_TRIES:
                    tries = f" ({attempt} tries)" if attempt > 1 else ""
                    raise RemoteError(
                        f"{where} cannot be fetched{tries}: {cause_of(error)}; {self.advice(error)}"
                    ) from error
                log.debug("%s: %s; trying again", where, cause_of(error))
            time.sleep(self._retry_seconds * 2 ** (attempt - 1))

    def _probe(self) -> None:
        name = self._name(PROBE)
        token = uuid.uuid4().hex.encode()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe")
            path.write_bytes(token)
            self._store.upload_object(name, str(path))
        stores.list_names(self._store, name)
        there = self._read(PROBE)
        if there != token:
            raise RemoteError(f"what was written to {name} is not what is read there")
        self.prunes = stores.can_delete(self._store)
        try:
            if self.prunes:
                stores.delete_object(self._store, name)
        except Exception as error:
            if not is_refused(error):
                raise
            self.prunes = False
        if not self.prunes:
            log.warning("objects in %s cannot be deleted; old checkpoints will stay there", self.address)
