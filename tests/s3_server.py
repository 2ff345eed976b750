"""An S3 server of the tests' own: moto behind HTTP, in threads of this process, its requests one after another.

moto looks and then writes; real S3 decides between rivals. The lock makes its conditional writes worth testing against.
"""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

REGION = "eu-central-1"
BUCKET = "presses"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}
_PLACE = (
    '<CreateBucketConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    f"<LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>"
)
Application = Callable[[Mapping[str, Any], Callable[..., Any]], Iterable[bytes]]


@contextmanager
def s3_server() -> Iterator[str]:
    """Serves a bucket called BUCKET while the context lasts; gives the endpoint's URL."""
    os.environ["S3_UPLOAD_PART_MIN_SIZE"] = "1"  # real ones ask for 5 MiB; read when moto is imported
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = _one_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        make_bucket = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT", data=_PLACE.encode())
        with urllib.request.urlopen(make_bucket) as response:
            assert response.status == 200
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def _one_at_a_time(application: Application) -> Application:
    lock = threading.Lock()

    def locked(environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with lock:
            return list(application(environ, start_response))

    return locked
