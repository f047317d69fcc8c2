"""Getting single files out of an object store, and telling failures that pass from those that somebody must mend."""

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinocomp.errors import DataError

log = logging.getLogger(__name__)

_READ_SECONDS = 60.0  # without an answer; clients then try again by themselves a few times
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between tries


class StoreError(DataError):
    """A file could not be fetched.

    Attributes:
        passing: whether it may work later by itself: no answer, a server's error, too many requests.
        denied: whether the store says that there is no such file, or that it is not for the caller; some say the second
            for both.
    """

    def __init__(self, message: str, *, passing: bool = False, denied: bool = False) -> None:
        super().__init__(message)
        self.passing = passing
        self.denied = denied


class Downloads:
    """Fetches files of one store. Clients are slow to make, so that one is kept; a process that was forked has its own.

    Args:
        address: of anything in the store: `s3://bucket/…`, or what else Streaming speaks.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._process, self._client = 0, None

    def fetch(self, address: str, target: Path) -> None:
        """Fetch the file at `address` to `target`, in one try. A `target` that is there is written over.

        Raises:
            StoreError: with the remedy. The file may be there in part.
        """
        from streaming.base.storage.download import CloudDownloader

        target.unlink(missing_ok=True)  # Streaming takes any file that is there for the wanted one
        try:
            if self._client is None or self._process != os.getpid():
                self._process, self._client = os.getpid(), CloudDownloader.get(self.address)
            self._client.download(address, str(target), timeout=_READ_SECONDS)
        except Exception as error:  # every store's client has errors of its own
            self._client = None
            if isinstance(error, OSError) and error.errno in _DISK:
                raise StoreError(
                    f"{target.parent} cannot be written to: {error.strerror}; make room there, or set data.cache_limit "
                    "or data.cache_dir"
                ) from error
            raise _explained(address, error) from error
        finally:
            for left in target.parent.glob(f"{target.name}.*"):  # boto's own temporary file
                left.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "_process": 0, "_client": None}


def patiently(attempt: Callable[[], None], what: str, patience: float) -> None:
    """Call `attempt` until it succeeds, through an outage of the store of up to `patience` seconds (0: of any length).

    Raises:
        StoreError: a failure that does not pass by itself, or that outlasts the patience.
    """
    begin, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            attempt()
            break
        except StoreError as error:
            waited = time.monotonic() - begin
            if not error.passing:
                raise
            if patience and waited + pause > patience:
                raise StoreError(
                    f"{what} could not be fetched for {waited:.0f} s: {error}. Start again when the store answers (the "
                    "run resumes), or raise data.timeout_seconds to wait longer"
                ) from error
            log.warning("%s: %s; trying again in %.0f s", what, error, pause)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    if pause > _FIRST_PAUSE:
        log.warning("%s was fetched after an outage of %.0f s", what, time.monotonic() - begin)


def _explained(address: str, error: Exception) -> StoreError:
    name, status = type(error).__name__, _status(error)
    said = f"HTTP {status}" if status else f"{name}: {error}".removesuffix(".")
    if status in (401, 403) or "Credentials" in name or isinstance(error, PermissionError):
        return StoreError(
            f"the store refuses {address} ({said}): check the credentials (for s3 AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials) and what they may read",
            denied=status is not None,
        )
    if status == 404 or isinstance(error, FileNotFoundError):
        return StoreError(
            f"the store has no {address} ({said}): check the bucket, the path and the store's address (for s3 "
            "S3_ENDPOINT_URL)",
            denied=True,
        )
    known = status is not None and 400 <= status < 500 and status not in (408, 429)
    if known or isinstance(error, (ValueError, ImportError, TypeError)):
        return StoreError(f"{address} cannot be fetched ({said}): check the address, e.g. s3://bucket/folder")
    return StoreError(
        f"the store does not answer for {address} ({said}); its address may be wrong (for s3 S3_ENDPOINT_URL), or it "
        "or the network is down",
        passing=True,
    )


def _status(error: Exception) -> int | None:
    """The HTTP status in the errors of boto, Google's, Oracle's and Azure's clients."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for attribute in ("code", "status", "status_code"):
        value = getattr(error, attribute, None)
        if isinstance(value, int):
            return value
    return None
