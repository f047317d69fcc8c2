"""A folder served as an object store on loopback, with the faults that stores have."""

import functools
import http.server
import threading
import time
from collections import Counter
from pathlib import Path


class Store:
    """GET and HEAD of objects, which is all that reading takes: a file BUCKET/KEY below `folder` is s3://BUCKET/KEY.

    Attributes:
        asked: "GET /bucket/key" of every request.
        status: answer everything with this HTTP status instead; 0: don't.
        broken: how many of the next shards' contents come with a flipped byte.
        dropped: how many of the next shards' contents break off half-way.
        pause: seconds before a shard's content is sent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.status = self.broken = self.dropped = 0
        self.pause = 0.0
        self.port = 0
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Also again, at the same address."""
        handler = functools.partial(type("Handler", (_Handler,), {"store": self}), directory=str(self.folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> Counter[str]:
        """How often each shard was sent."""
        return Counter(line.rpartition("/bucket/")[2] for line in self.asked if line[:3] == "GET" and ".mds" in line)


class _Handler(http.server.SimpleHTTPRequestHandler):
    store: Store

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.store.asked.append(f"HEAD {self.path}")
        if self.store.status:
            self.send_error(self.store.status)
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        store = self.store
        store.asked.append(f"GET {self.path}")
        if store.status:
            self.send_error(store.status)
            return
        if not self.path.endswith(".mds"):
            super().do_GET()
            return
        time.sleep(store.pause)
        data = bytearray(Path(self.translate_path(self.path)).read_bytes())
        if store.broken:
            store.broken -= 1
            data[-1] ^= 255
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if store.dropped:
            store.dropped -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)
