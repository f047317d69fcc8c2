"""What Composer's object stores lack: deleting, cheap sizes, time limits, and errors that tell what to change."""

import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from composer.utils import (
    GCSObjectStore,
    ObjectStore,
    OCIObjectStore,
    S3ObjectStore,
    maybe_create_object_store_from_uri,
    parse_uri,
)

from dinocomp.errors import ConfigError, DinocompError

T = TypeVar("T")

# What each kind of store reads its credentials from.
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and S3_ENDPOINT_URL for a store other than "
    "Amazon's",
    "gs": "GCS_KEY and GCS_SECRET, or GOOGLE_APPLICATION_CREDENTIALS",
    "oci": "~/.oci/config, or OCI_CONFIG_FILE for another place",
    "azure": "AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY",
}
CONNECT_SECONDS = 5
RETRY_SECONDS = 0.5
PART_BYTES = 32 << 20


class RemoteError(DinocompError):
    """An object store does not give or take what it should."""


def split_address(address: str) -> tuple[str, str, str]:
    """Scheme, bucket and folder of `address`, such as ("s3", "bucket", "run").

    Raises:
        ConfigError: it is not an address that checkpoints can be copied to.
    """
    scheme, bucket, folder = parse_uri(address)
    folder = folder.strip("/")
    if scheme not in CREDENTIALS or not bucket or not folder:
        kinds = ", ".join(f"{name}://" for name in CREDENTIALS)
        raise ConfigError(
            f"checkpoint.remote={address} is not a folder in an object store; give one such as s3://bucket/run "
            f"(one of {kinds}), or checkpoint.remote='' for none"
        )
    return scheme, bucket, folder


def open_store(address: str, answer_seconds: float) -> ObjectStore:
    """Composer's store for the bucket of `address`. Names of objects are whole ones, from the bucket's root.

    Composer's own way to make one gives no time limits: boto then waits 60 s for an answer, several times over. Its
    transfers start threads that keep a finished process alive; here a transfer stays in the thread that asks for it.

    Args:
        address: such as s3://bucket/run.
        answer_seconds: longest wait for a sign of life from an S3 store that has been connected to.
    """
    scheme, bucket, _ = split_address(address)
    for library in ("boto3", "botocore", "s3transfer", "urllib3", "google", "oci"):
        noisy = logging.getLogger(library)
        if noisy.level == logging.NOTSET:  # every failure reaches our caller as an exception and is told once
            noisy.setLevel(logging.CRITICAL)
    client: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": answer_seconds,
        "retries": {"mode": "standard", "total_max_attempts": 1},  # `_second_try` makes it two
        "tcp_keepalive": True,
    }
    transfer = {"use_threads": False, "multipart_chunksize": PART_BYTES, "preferred_transfer_client": "classic"}
    account: dict[str, str] = {}
    if scheme == "gs" and "GCS_KEY" in os.environ and "GCS_SECRET" in os.environ:
        account = {
            "region_name": "auto",
            "endpoint_url": "https://storage.googleapis.com",
            "aws_access_key_id": os.environ["GCS_KEY"],
            "aws_secret_access_key": os.environ["GCS_SECRET"],
        }
        client["request_checksum_calculation"] = "when_required"  # Google's S3 dialect refuses boto's newer ones
    elif scheme != "s3":
        return cast(ObjectStore, maybe_create_object_store_from_uri(address))
    store = S3ObjectStore(bucket, client_config=client, transfer_config=transfer, **account)
    store.client.meta.events.register("needs-retry.s3", _second_try)
    return store


def _second_try(response: tuple | None, attempts: int, caught_exception: Exception | None, **_: Any) -> float | None:
    """Tells boto to repeat a request or a part of a large file once, after so many seconds.

    boto's own retries draw from Python's global random numbers, so that a server's hiccup would change the state that
    the training saves.
    """
    stumbled = response is not None and (response[0].status_code == 429 or response[0].status_code >= 500)
    return RETRY_SECONDS if attempts == 1 and (stumbled or is_silent(caught_exception)) else None


def list_names(store: ObjectStore, prefix: str) -> list[str]:
    """Names of the objects whose names start with `prefix`."""
    if isinstance(store, S3ObjectStore):  # Composer's gives an empty list when one page of many has nothing on it
        pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return store.list_objects(prefix)


def read_object(store: ObjectStore, name: str) -> bytes | None:
    """What the small object `name` holds, or None if there is none."""
    try:
        if isinstance(store, S3ObjectStore):  # Composer's names its temporary file with global random numbers
            return store.client.get_object(Bucket=store.bucket, Key=name)["Body"].read()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "object")
            store.download_object(name, str(path))
            return path.read_bytes()
    except Exception as error:
        if is_missing(error):
            return None
        raise


def size_of(store: ObjectStore, name: str) -> int:
    """Bytes of the object `name`."""
    if isinstance(store, S3ObjectStore):  # Composer's starts to download the object and leaves it at that
        return store.client.head_object(Bucket=store.bucket, Key=name)["ContentLength"]
    if isinstance(store, OCIObjectStore):
        return int(store.client.head_object(store.namespace, store.bucket, name).headers["content-length"])
    return store.get_object_size(name)


def can_delete(store: ObjectStore) -> bool:
    """Whether `delete_object` knows this kind of store."""
    return isinstance(store, (S3ObjectStore, GCSObjectStore, OCIObjectStore))


def delete_object(store: ObjectStore, name: str) -> None:
    """Delete the object `name`; it need not be there."""
    try:
        if isinstance(store, S3ObjectStore):
            store.client.delete_object(Bucket=store.bucket, Key=name)
        elif isinstance(store, GCSObjectStore):
            store.bucket.blob(name).delete()
        elif isinstance(store, OCIObjectStore):
            store.client.delete_object(store.namespace, store.bucket, name)
        else:
            raise RemoteError(
                f"objects in a {type(store).__name__} cannot be deleted from here; delete {name} yourself"
            )
    except Exception as error:
        if isinstance(store, S3ObjectStore) or status_of(error) != 404:
            raise


def abort_parts(store: ObjectStore, prefix: str) -> None:
    """Throw away the parts of large files whose upload to a name that starts with `prefix` a killed process left.

    They are in no listing, but take room that is paid for. No upload to such a name may be under way.
    """
    if isinstance(store, S3ObjectStore):
        pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.bucket, Prefix=prefix)
        for upload in [upload for page in pages for upload in page.get("Uploads", [])]:
            store.client.abort_multipart_upload(Bucket=store.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def s3_endpoint() -> str:
    """Where S3 is asked, for messages."""
    names = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # Composer's, then boto's own
    return next((os.environ[name] for name in names if name in os.environ), "Amazon S3")


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that a store answered with (S3's, Google's or OCI's), or None if it did not answer."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for attribute in ("status", "code"):
            value = getattr(link, attribute, None)
            if isinstance(value, int):
                return int(value)
    return None


def is_missing(error: BaseException) -> bool:
    """Whether `error` says that an object is not there. Composer says so of a 403, too."""
    if "NoSuchBucket" in cause_of(error):  # an S3 code, with the same status
        return False
    return status_of(error) == 404 or (isinstance(error, FileNotFoundError) and status_of(error) is None)


def is_refused(error: BaseException) -> bool:
    """Whether the store answers, but not to these credentials or for this bucket, which trying again does not mend."""
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    if any(isinstance(link, (NoCredentialsError, PartialCredentialsError)) for link in _chain(error)):
        return True
    return status_of(error) in (401, 403, 404)


def is_silent(error: BaseException | None) -> bool:
    """Whether nobody answered, or hung up half-way."""
    from botocore.exceptions import ConnectionError as BotoConnectionError
    from botocore.exceptions import HTTPClientError

    kinds = (BotoConnectionError, HTTPClientError, ConnectionError, TimeoutError)
    return status_of(error) is None and any(isinstance(link, kinds) for link in _chain(error))


def cause_of(error: BaseException) -> str:
    """The reason of a failure in one line: what the store said, if it said anything."""
    from botocore.exceptions import ClientError

    said = [link for link in _chain(error) if isinstance(link, ClientError)]
    text = " ".join(str(said[0] if said else error).split())
    text = re.sub(r" \(reached max retries: \d+\)", "", text)  # boto's, not ours
    return text.rstrip(".") or type(error).__name__


def within(seconds: float, function: Callable[[], T]) -> T:
    """What `function` gives, if it is done within `seconds`.

    It runs in a thread of its own, for libraries have waits that no setting shortens (name look-ups, credential
    services); the thread is left behind when the time is over.

    Raises:
        TimeoutError: it is not done.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((function(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it came from. boto's transfer errors keep only the text of the store's answer themselves."""
    link = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
