"""An S3 server on this machine, behind a proxy that can fail."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import xxhash

from dinocomp.checkpoints import store
from dinocomp.checkpoints.remote import RemoteFolder
from tests.checkpoints.proxy import Proxy

_numbers = itertools.count()
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever HTTP_PROXY says


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(**environment: str) -> Iterator[int]:
    """moto's server in a process of its own; gives its port."""
    port = unused_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, **environment}, **quiet)
    try:
        for _ in range(300):
            try:
                _direct.open(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise TimeoutError("moto's server does not start")
        yield port
    finally:
        process.kill()
        process.wait()


def make_bucket(port: int, name: str) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")
    _direct.open(request, timeout=10).close()


@dataclass
class Bucket:
    """A bucket of its own for one test, seen past the proxy."""

    name: str
    client: Any

    @property
    def address(self) -> str:
        return f"s3://{self.name}/runs/a"

    def names(self) -> list[str]:
        """Names of its objects."""
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])]

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=name, Body=content)

    def get(self, name: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=name)["Body"].read()


def halves(remote: RemoteFolder) -> list[int]:
    """Iterations of which there are some files, but not a whole checkpoint."""
    return [iteration for iteration, names in remote.listing().items() if "manifest.json" not in names]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RETRY_SECONDS", 0.01)


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    with serving() as port:
        yield port


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some, and none of the user's."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    nothing = tmp_path / "no-such-file"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nothing))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(nothing))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture
def proxy(s3_port: int, credentials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the server that S3_ENDPOINT_URL names."""
    proxy = Proxy(unused_port(), s3_port)
    proxy.up()
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.down()


@pytest.fixture(scope="session")
def client(s3_port: int) -> Any:
    """A way to the server past the proxy."""
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}", **keys)


@pytest.fixture
def bucket(s3_port: int, client: Any, proxy: Proxy) -> Bucket:
    name = f"bucket-{next(_numbers)}"
    make_bucket(s3_port, name)
    return Bucket(name, client)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a whole local checkpoint: `write(iteration, name=content, ...)` gives its folder."""

    def write(iteration: int, content: bytes = b"", **files: bytes) -> Path:
        folder = tmp_path / "run" / "checkpoints" / f"iteration-{iteration:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        state = content or b"state %d " % iteration * 1000
        contents = {"checkpoint.pt": state, "teacher.safetensors": b"teacher %d" % iteration, **files}
        entries = {}
        for name, data in contents.items():
            (folder / name).write_bytes(data)
            entries[name] = {"bytes": len(data), "xxh64": xxhash.xxh64_hexdigest(data)}
        manifest = {"format": "dinocomp-checkpoint-1", "iteration": iteration, "files": entries}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return write
