"""Stores that no server on this machine speaks for: what can be held without one."""

from unittest.mock import create_autospec

import oci
import pytest
from botocore.exceptions import ClientError
from composer.utils import GCSObjectStore, OCIObjectStore, S3ObjectStore

from dinocomp.checkpoints import store as stores
from dinocomp.checkpoints.store import RemoteError


@pytest.fixture
def oci_store() -> OCIObjectStore:
    """Composer's, with a client that knows the real one's methods and their arguments, but no network."""
    store = OCIObjectStore.__new__(OCIObjectStore)
    store.bucket, store.prefix, store.namespace = "bucket", "", "namespace"
    store.client = create_autospec(oci.object_storage.ObjectStorageClient, instance=True)
    return store


def oci_error(status: int) -> oci.exceptions.ServiceError:
    return oci.exceptions.ServiceError(status, "code", {}, "message")


def test_oci_size_and_delete(oci_store: OCIObjectStore):
    oci_store.client.head_object.return_value.headers = {"content-length": "12"}
    assert stores.size_of(oci_store, "run/a") == 12
    assert stores.can_delete(oci_store)
    stores.delete_object(oci_store, "run/a")
    oci_store.client.delete_object.assert_called_once_with("namespace", "bucket", "run/a")


def test_oci_delete_of_nothing_and_refused(oci_store: OCIObjectStore):
    oci_store.client.delete_object.side_effect = oci_error(404)
    stores.delete_object(oci_store, "run/a")
    oci_store.client.delete_object.side_effect = oci_error(401)
    with pytest.raises(oci.exceptions.ServiceError) as caught:
        stores.delete_object(oci_store, "run/a")
    assert stores.is_refused(caught.value)


def test_google_with_hmac_keys_is_asked_in_s3s_language(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GCS_KEY", "key")
    monkeypatch.setenv("GCS_SECRET", "secret")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")  # another store's
    store = stores.open_store("gs://bucket/run", 30)
    assert isinstance(store, S3ObjectStore)
    assert store.client.meta.endpoint_url == "https://storage.googleapis.com"
    assert store.client.meta.config.connect_timeout == stores.CONNECT_SECONDS
    assert stores.can_delete(store)


def test_store_that_cannot_delete():
    class Other:
        pass

    assert not stores.can_delete(Other())
    assert stores.can_delete(GCSObjectStore.__new__(GCSObjectStore))
    with pytest.raises(RemoteError, match="delete run/a yourself"):
        stores.delete_object(Other(), "run/a")


def test_errors_are_told_apart_through_wrappers():
    """Composer and boto wrap what a store says; Composer calls a 403 "not found"."""
    refusal = ClientError({"Error": {"Code": "403"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "HeadObject")
    wrapped = FileNotFoundError("Object s3://bucket/a not found")
    wrapped.__cause__ = refusal
    assert stores.is_refused(wrapped)
    assert not stores.is_missing(wrapped)
    assert stores.is_missing(FileNotFoundError("Object gs://bucket/a not found"))
    assert stores.is_silent(ConnectionResetError())
    assert not stores.is_silent(refusal)
    assert not stores.is_refused(ConnectionResetError())


def test_time_limit():
    assert stores.within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        stores.within(5, lambda: 1 // 0)
