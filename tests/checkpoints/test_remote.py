"""A folder in a real S3 server, behind a proxy that does what networks do."""

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dinocomp.checkpoints import store
from dinocomp.checkpoints.manifest import DamagedError
from dinocomp.checkpoints.remote import RemoteFolder
from dinocomp.checkpoints.store import RemoteError
from dinocomp.errors import ConfigError
from tests.checkpoints.conftest import Bucket, halves, make_bucket, serving
from tests.checkpoints.proxy import Proxy

BASE = "runs/a/checkpoints/iteration-00000004"


@pytest.fixture
def remote(bucket: Bucket) -> RemoteFolder:
    return RemoteFolder(bucket.address, answer_seconds=5, retry_seconds=0.01)


def same(left: Path, right: Path) -> bool:
    """Whether two folders hold the same files."""
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (left, right)]
    return contents[0] == contents[1]


class TestCheck:
    def test_leaves_nothing_behind_and_stays_in_its_folder(self, remote: RemoteFolder, bucket: Bucket, proxy: Proxy):
        remote.check()
        assert bucket.names() == []
        assert remote.prunes
        touched = {path.partition("?")[0] for method, path in proxy.requests if method in ("PUT", "DELETE")}
        assert touched == {f"/{bucket.name}/runs/a/.dinocomp-probe"}

    @pytest.mark.parametrize(
        "address", ["/tmp/x", "file:///tmp/x", "s3://", "s3://bucket", "s3://bucket/", "ftp://a/b"]
    )
    def test_address_of_no_folder_in_a_store(self, address: str):
        with pytest.raises(ConfigError, match=r"checkpoint\.remote=.*s3://bucket/run"):
            RemoteFolder(address)

    def test_no_such_bucket(self, bucket: Bucket):
        with pytest.raises(ConfigError, match=r"checkpoint\.remote=s3://nowhere/run: .*make the bucket nowhere"):
            RemoteFolder("s3://nowhere/run").check()

    def test_key_that_the_server_does_not_know(self, credentials: None, monkeypatch: pytest.MonkeyPatch):
        with serving(INITIAL_NO_AUTH_ACTION_COUNT="1") as port:
            make_bucket(port, "guarded")  # the one action that needs no key
            monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            with pytest.raises(ConfigError, match=r"InvalidAccessKeyId.*check AWS_ACCESS_KEY_ID and AWS_SECRET"):
                RemoteFolder("s3://guarded/run").check()

    def test_key_that_may_not_write(self, remote: RemoteFolder, proxy: Proxy):
        proxy.inject("PUT", answer=(403, "AccessDenied"), times=9)
        with pytest.raises(ConfigError, match=r"AccessDenied.*must be allowed to read, write, list and delete below"):
            remote.check()

    def test_key_that_may_not_read(self, remote: RemoteFolder, proxy: Proxy):
        proxy.inject("GET", "probe", answer=(403, "AccessDenied"), times=9)
        with pytest.raises(ConfigError, match=r"AccessDenied.*check AWS_ACCESS_KEY_ID"):
            remote.check()

    def test_key_that_may_not_delete_only_loses_pruning(
        self, remote: RemoteFolder, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ):
        proxy.inject("DELETE", answer=(403, "AccessDenied"), times=9)
        remote.check()
        assert not remote.prunes
        assert caplog.text.count("old checkpoints will stay there") == 1

    def test_no_key_at_all(self, remote: RemoteFolder, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(ConfigError, match=r"Unable to locate credentials.*check AWS_ACCESS_KEY_ID"):
            remote.check()

    def test_nobody_listens(self, remote: RemoteFolder, proxy: Proxy):
        proxy.down()
        try:
            with pytest.raises(ConfigError, match=rf"at {proxy.url}: check S3_ENDPOINT_URL and the network"):
                remote.check()
        finally:
            proxy.up()

    def test_endpoint_that_is_no_url(self, remote: RemoteFolder, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("S3_ENDPOINT_URL", "localhost:9000")
        with pytest.raises(ConfigError, match=r"localhost:9000.*S3_ENDPOINT_URL"):
            remote.check()

    def test_server_that_never_answers(self, remote: RemoteFolder, proxy: Proxy):
        held = threading.Event()
        proxy.inject(hold=held, times=9)
        start = time.monotonic()
        with pytest.raises(ConfigError, match=rf"no answer within 1 s.*{proxy.url}"):
            remote.check(seconds=1)
        assert time.monotonic() - start < 3
        held.set()

    def test_server_errors_that_stay(self, remote: RemoteFolder, proxy: Proxy):
        proxy.inject("PUT", answer=(500, "InternalError"), times=9)
        with pytest.raises(ConfigError, match=r"InternalError.*check that the store is well"):
            remote.check()


class TestUpload:
    def test_round_trip(self, remote: RemoteFolder, bucket: Bucket, write: Callable[..., Path], tmp_path: Path):
        folder = write(4)
        assert remote.list_whole() == []
        assert not remote.holds(folder)
        remote.upload(folder)
        assert remote.list_whole() == [4]
        assert remote.holds(folder)
        (tmp_path / "other").mkdir()
        fetched = remote.download(4, tmp_path / "other")
        assert fetched == tmp_path / "other" / "iteration-00000004"
        assert same(fetched, folder)
        assert [path.name for path in (tmp_path / "other").iterdir()] == [fetched.name]

    def test_manifest_is_last(self, remote: RemoteFolder, proxy: Proxy, write: Callable[..., Path]):
        remote.upload(write(4))
        written = [path.rpartition("/")[2] for method, path in proxy.requests if method == "PUT"]
        assert written == ["checkpoint.pt", "teacher.safetensors", "manifest.json"]

    def test_stumbles_are_passed(self, remote: RemoteFolder, proxy: Proxy, write: Callable[..., Path]):
        proxy.inject("PUT", "checkpoint.pt", answer=(500, "InternalError"))
        proxy.inject("PUT", "teacher.safetensors", cut_request=3)
        proxy.inject("PUT", "manifest.json", delay=0.5)
        proxy.inject("HEAD", "manifest.json", answer=(503, "SlowDown"))
        remote.upload(write(4))
        assert remote.list_whole() == [4]

    def test_broken_off_is_not_seen_and_goes_on(self, remote: RemoteFolder, proxy: Proxy, write: Callable[..., Path]):
        folder = write(4)
        proxy.inject("PUT", "teacher.safetensors", answer=(500, "InternalError"), times=2)
        with pytest.raises(Exception, match="InternalError"):
            remote.upload(folder)
        assert remote.list_whole() == []
        assert halves(remote) == [4]
        remote.upload(folder)
        assert remote.list_whole() == [4]
        assert len([path for method, path in proxy.requests if method == "PUT" and "checkpoint.pt" in path]) == 1

    def test_half_that_was_deleted_in_between_is_sent_again(
        self, remote: RemoteFolder, proxy: Proxy, write: Callable[..., Path], tmp_path: Path
    ):
        folder = write(4)
        proxy.inject("PUT", "teacher.safetensors", answer=(500, "InternalError"), times=2)
        with pytest.raises(Exception, match="InternalError"):
            remote.upload(folder)
        remote.delete(4)
        remote.upload(folder)
        assert same(remote.download(4, tmp_path), folder)

    def test_slower_than_the_limit_fails_instead_of_hanging(
        self, bucket: Bucket, proxy: Proxy, write: Callable[..., Path]
    ):
        held = threading.Event()
        proxy.inject("PUT", hold=held, times=9)
        start = time.monotonic()
        with pytest.raises(Exception, match="Read timeout"):
            RemoteFolder(bucket.address, answer_seconds=0.3).upload(write(4))
        assert time.monotonic() - start < 5
        held.set()

    def test_object_of_another_size_is_noticed(self, remote: RemoteFolder, bucket: Bucket, write: Callable[..., Path]):
        folder = write(4)
        upload = remote._store.upload_object

        def cut(name: str, path: str) -> None:
            upload(name, path)
            if name.endswith("checkpoint.pt"):
                bucket.put(name, b"half")

        remote._store.upload_object = cut
        with pytest.raises(RemoteError, match=r"checkpoint\.pt has 4 bytes after the upload"):
            remote.upload(folder)
        assert remote.list_whole() == []

    def test_another_content_of_the_same_iteration(
        self, remote: RemoteFolder, proxy: Proxy, write: Callable[..., Path], tmp_path: Path
    ):
        remote.upload(write(4))
        folder = write(4, content=b"another")
        assert not remote.holds(folder)
        proxy.inject("PUT", "teacher.safetensors", answer=(500, "InternalError"), times=2)
        with pytest.raises(Exception, match="InternalError"):
            remote.upload(folder)
        assert remote.list_whole() == []  # a mixture of both
        remote.upload(folder)
        assert same(remote.download(4, tmp_path), folder)

    def test_large_file_in_parts(
        self, remote: RemoteFolder, proxy: Proxy, write: Callable[..., Path], tmp_path: Path, monkeypatch
    ):
        monkeypatch.setattr(store, "PART_BYTES", 5 << 20)
        folder = write(4, content=random.Random(0).randbytes(12 << 20))
        proxy.inject("PUT", "partNumber=2", answer=(500, "InternalError"))
        proxy.inject("PUT", "partNumber=3", cut_request=1 << 20)
        proxy.inject("GET", "checkpoint.pt", cut_response=1 << 20)
        remote.upload(folder)
        assert [path for _, path in proxy.requests if "partNumber=3" in path]
        assert same(remote.download(4, tmp_path), folder)

    def test_damaged_here(self, remote: RemoteFolder, bucket: Bucket, write: Callable[..., Path]):
        folder = write(4)
        (folder / "checkpoint.pt").write_bytes(b"cut")
        with pytest.raises(DamagedError, match=r"checkpoint\.pt has 3 bytes, its manifest says"):
            remote.upload(folder)
        (folder / "checkpoint.pt").unlink()
        with pytest.raises(DamagedError, match=r"checkpoint\.pt cannot be read: No such file"):
            remote.upload(folder)
        assert bucket.names() == []


class TestList:
    def test_junk_is_not_listed(self, remote: RemoteFolder, bucket: Bucket, write: Callable[..., Path]):
        remote.upload(write(4))
        for name in ("iteration-8/manifest.json", "iteration-00000008", "iteration-x/manifest.json", "notes.txt"):
            bucket.put(f"runs/a/checkpoints/{name}", b"junk")
        bucket.put("runs/a/checkpoints/iteration-00000012/checkpoint.pt", b"half")
        bucket.put("runs/ab/checkpoints/iteration-00000016/manifest.json", b"another run's")
        assert remote.list_whole() == [4]
        assert halves(remote) == [12]

    def test_more_than_a_page(self, remote: RemoteFolder, bucket: Bucket):
        events = remote._store.client.meta.events  # the server's own pages have 1000 names
        events.register("before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=2))
        for number in range(5):
            bucket.put(f"{BASE}/part-{number:04d}", b"")
        bucket.put("runs/a/checkpoints/iteration-00000008/manifest.json", b"{}")
        assert remote.list_whole() == [8]
        remote.delete(4)
        assert len(bucket.names()) == 1

    def test_refusal_is_not_an_empty_folder(self, remote: RemoteFolder, proxy: Proxy):
        proxy.inject("GET", answer=(403, "AccessDenied"), times=9)
        with pytest.raises(RemoteError, match=r"AccessDenied.*check AWS_ACCESS_KEY_ID"):
            remote.list_whole()

    def test_server_errors_are_not_an_empty_folder(self, remote: RemoteFolder, proxy: Proxy, write):
        remote.upload(write(4))
        fault = proxy.inject("GET", "list-type", answer=(500, "InternalError"), times=5)
        assert remote.list_whole() == [4]
        fault.times = 1000
        with pytest.raises(RemoteError, match=r"\(5 tries\).*InternalError"):
            remote.list_whole()


class TestDownload:
    def test_dropped_connections_and_turned_bits(
        self, remote: RemoteFolder, proxy: Proxy, write: Callable[..., Path], tmp_path: Path
    ):
        folder = write(4)
        remote.upload(folder)
        proxy.inject("GET", "checkpoint.pt", cut_response=100)
        proxy.inject("GET", "checkpoint.pt", flip=True)
        proxy.inject("GET", "teacher.safetensors", answer=(503, "SlowDown"), times=3)
        proxy.inject("GET", "manifest.json", delay=0.3)
        assert same(remote.download(4, tmp_path), folder)

    @pytest.mark.parametrize("content", [b"another content", b"tea"], ids=["hash", "size"])
    def test_broken_there(
        self, remote: RemoteFolder, bucket: Bucket, write: Callable[..., Path], tmp_path: Path, content: bytes
    ):
        remote.upload(write(4, **{"teacher.safetensors": b"teacher content"}))
        bucket.put(f"{BASE}/teacher.safetensors", content)
        into = tmp_path / "other"
        into.mkdir()
        with pytest.raises(RemoteError, match=r"iteration-00000004/teacher\.safetensors.*manifest says.*delete that"):
            remote.download(4, into)
        assert list(into.iterdir()) == []

    def test_file_gone_there(self, remote: RemoteFolder, bucket: Bucket, write: Callable[..., Path], tmp_path: Path):
        remote.upload(write(4))
        bucket.client.delete_object(Bucket=bucket.name, Key=f"{BASE}/checkpoint.pt")
        with pytest.raises(RemoteError, match=r"iteration-00000004/checkpoint\.pt cannot be fetched"):
            remote.download(4, tmp_path)

    def test_no_such_checkpoint(self, remote: RemoteFolder, tmp_path: Path):
        with pytest.raises(RemoteError, match="no whole checkpoint of iteration 4"):
            remote.download(4, tmp_path)

    def test_never_over_a_local_one(self, remote: RemoteFolder, write: Callable[..., Path]):
        folder = write(4)
        remote.upload(folder)
        with pytest.raises(RemoteError, match="is there already"):
            remote.download(4, folder.parent)
        assert (folder / "checkpoint.pt").exists()

    @pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/../../evil"])
    def test_manifest_that_points_elsewhere(self, remote: RemoteFolder, bucket: Bucket, tmp_path: Path, name: str):
        files = {name: {"bytes": 1, "xxh64": "0"}}
        manifest = {"format": "dinocomp-checkpoint-1", "iteration": 4, "files": files}
        bucket.put(f"{BASE}/manifest.json", json.dumps(manifest).encode())
        with pytest.raises(DamagedError, match="not in its folder"):
            remote.download(4, tmp_path)

    @pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"format": "dinocomp-checkpoint-1", "files": 3}'])
    def test_damaged_manifest(self, remote: RemoteFolder, bucket: Bucket, tmp_path: Path, text: bytes):
        bucket.put(f"{BASE}/manifest.json", text)
        with pytest.raises(DamagedError, match=r"s3://bucket-.*/manifest\.json is damaged"):
            remote.download(4, tmp_path)

    def test_leftovers_of_a_killed_process(self, remote: RemoteFolder, write: Callable[..., Path], tmp_path: Path):
        folder = write(4)
        remote.upload(folder)
        left = tmp_path / ".partial-iteration-00000004"
        left.mkdir()
        (left / "half").write_bytes(b"half")
        assert same(remote.download(4, tmp_path), folder)

    def test_no_room(self, remote: RemoteFolder, write: Callable[..., Path], tmp_path: Path):
        remote.upload(write(4))
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(RemoteError, match="cannot be written to"):
            remote.download(4, tmp_path / "file")


class TestDelete:
    def test_manifest_is_first_and_half_deleted_is_not_seen(
        self, remote: RemoteFolder, bucket: Bucket, proxy: Proxy, write: Callable[..., Path]
    ):
        remote.upload(write(4))
        remote.upload(write(8))
        fault = proxy.inject("DELETE", "checkpoint.pt", answer=(500, "InternalError"), times=9)
        with pytest.raises(Exception, match="InternalError"):
            remote.delete(4)
        assert remote.list_whole() == [8]
        assert halves(remote) == [4]
        fault.times = 0
        remote.delete(4)
        assert [name for name in bucket.names() if name.startswith(BASE)] == []
        remote.delete(4)  # nothing there
        assert remote.list_whole() == [8]


class TestFiles:
    def test_round_trip(self, remote: RemoteFolder, bucket: Bucket, proxy: Proxy, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b"{}\n")
        remote.upload_file(path, "metrics.jsonl")
        assert bucket.get("runs/a/metrics.jsonl") == b"{}\n"
        proxy.inject("GET", answer=(500, "InternalError"), times=3)
        assert remote.download_file("metrics.jsonl", tmp_path / "back.jsonl")
        assert (tmp_path / "back.jsonl").read_bytes() == b"{}\n"

    def test_absent(self, remote: RemoteFolder, tmp_path: Path):
        assert not remote.download_file("metrics.jsonl", tmp_path / "back.jsonl")
        assert list(tmp_path.iterdir()) == []

    def test_growing(self, remote: RemoteFolder, bucket: Bucket, tmp_path: Path):
        path = tmp_path / "train.log"
        path.write_bytes(b"line\n" * 100_000)
        stop = threading.Event()

        def grow() -> None:
            with path.open("ab", buffering=0) as file:
                while not stop.is_set():
                    file.write(b"line\n")

        writer = threading.Thread(target=grow)
        writer.start()
        try:
            for _ in range(5):
                remote.upload_file(path, "train.log")
                assert bucket.get("runs/a/train.log").startswith(b"line\nline\n")
        finally:
            stop.set()
            writer.join()
