"""A real S3 server on this machine, which keeps its objects in memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

BUCKET = "adapters"


class S3:
    """The server while it runs.

    `options` are fsspec's, `fs` looks at its objects past our own code.
    """

    def __init__(self, server: ThreadedMotoServer) -> None:
        self._server = server
        host, port = server.get_host_and_port()
        self.options: dict[str, Any] = {"endpoint_url": f"http://{host}:{port}", "key": "a-key", "secret": "a-secret"}
        self.fs = fsspec.filesystem("s3", use_listings_cache=False, **self.options)
        # Servers of one process have their objects in common.
        if not self.fs.exists(BUCKET):
            self.fs.mkdir(BUCKET)

    def stop(self) -> None:
        self._server.stop()


@contextmanager
def s3_server() -> Iterator[S3]:
    # It logs each request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    found = S3(server)
    try:
        yield found
    finally:
        server.stop()
