"""S3 and what speaks its protocol, through s3fs: one request at a time, each with a time limit and tries of its own.

Objects of more than PART_BYTES are uploaded in parts, so that a failure costs a part and not the whole. An upload that
is cut short by a kill leaves parts that no listing shows; a life-cycle rule of the bucket removes them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from . import objects
from .digests import Buffer, total_bytes
from .errors import StoreError
from .objects import FsspecFiles
from .retries import limit_seconds, timeout_seconds

_CONNECTIONS = 64
_LONGEST_CONNECT = 10.0
_UPLOADS = 3  # how often an upload in parts is begun anew when the server has forgotten or refused it


class S3Files(FsspecFiles):
    """A bucket, or what is below a key of it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._fs.retries = 1  # trying again is done here, where it is known which answers may have been lost
        self._bucket, _, self._prefix = self._root.partition("/")

    def size(self, path: str) -> int | None:
        try:
            return int(self._call("look at", path, "head_object")["ContentLength"])
        except FileNotFoundError:
            return None

    def keep(self, path: str) -> None:
        source = {"Bucket": self._bucket, "Key": self._key(path)}
        with contextlib.suppress(FileNotFoundError):  # whoever relies on it finds out before publishing
            self._call("renew", path, "copy_object", CopySource=source, MetadataDirective="REPLACE")

    def _entries(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        prefix = f"{self._key(folder)}/".lstrip("/")
        skipped = len(f"{self._prefix}/") if self._prefix else 0
        token: str | None = ""
        while token is not None:
            page = self._request("list", folder, partial(self._page, prefix, token))
            for entry in page.get("Contents", []):
                yield entry["Key"][skipped:], {**entry, "size": entry["Size"]}
            token = page.get("NextContinuationToken")

    def _page(self, prefix: str, token: str) -> Any:
        """Up to a thousand objects whose keys begin so, from the token on."""
        more = {"ContinuationToken": token} if token else {}
        return self._fs.call_s3("list_objects_v2", Bucket=self._bucket, Prefix=prefix, timeout=limit_seconds(), **more)

    def delete(self, path: str) -> None:
        """S3 doesn't say whether the object was there."""
        self._call("delete", path, "delete_object")

    def _options(self) -> dict[str, Any]:
        import fsspec

        seconds = timeout_seconds()
        config = {
            "connect_timeout": min(seconds, _LONGEST_CONNECT),
            "read_timeout": seconds,
            "max_pool_connections": _CONNECTIONS,
            "retries": {"total_max_attempts": 1},
            "http_session_cls": _session_without_repeats(),
        }
        own = fsspec.config.conf.get(self._protocol, {}).get("config_kwargs", {})
        return {"config_kwargs": {**own, **config}}

    def _write(self, path: str, buffers: Sequence[Buffer], *, absent: bool) -> bool:
        condition = {"IfNoneMatch": "*"} if absent else {}
        if total_bytes(buffers) > objects.PART_BYTES:
            return self._write_parts(path, buffers, condition)
        data = b"".join(buffers)
        return self._appear(path, buffers, lambda: self._ask(path, "put_object", Body=data, **condition))

    def _write_parts(self, path: str, buffers: Sequence[Buffer], condition: dict[str, str]) -> bool:
        for _ in range(_UPLOADS):
            upload = self._call("write", path, "create_multipart_upload")["UploadId"]
            done = False
            try:
                parts = [
                    self._upload_part(path, upload, number, part)
                    for number, part in enumerate(_parts(buffers, objects.PART_BYTES), start=1)
                ]
                done = self._complete(path, upload, parts, buffers, condition)
                return done
            except FileNotFoundError:
                if self._holds(path, buffers):  # carried out, the answer lost, and the upload forgotten
                    return True
            finally:
                if not done:
                    with contextlib.suppress(FileNotFoundError, StoreError):
                        self._call("give up", path, "abort_multipart_upload", UploadId=upload)
        raise StoreError(f"could not write {self._where(path)}: the server forgot the upload {_UPLOADS} times")

    def _upload_part(self, path: str, upload: str, number: int, part: bytes) -> dict[str, Any]:
        sent = self._call("write", path, "upload_part", UploadId=upload, PartNumber=number, Body=part)
        return {"PartNumber": number, **{key: sent[key] for key in sent if key == "ETag" or key.startswith("Checksum")}}

    def _complete(
        self,
        path: str,
        upload: str,
        parts: Sequence[dict[str, Any]],
        buffers: Sequence[Buffer],
        condition: dict[str, str],
    ) -> bool:
        whole = {"UploadId": upload, "MultipartUpload": {"Parts": parts}, **condition}
        return self._appear(path, buffers, lambda: self._ask(path, "complete_multipart_upload", **whole))

    def _call(self, verb: str, path: str, method: str, **arguments: Any) -> Any:
        return self._request(verb, path, lambda: self._ask(path, method, **arguments))

    def _ask(self, path: str, method: str, **arguments: Any) -> Any:
        """One request, made once."""
        limit = limit_seconds(len(arguments.get("Body", b"")))
        return self._fs.call_s3(method, Bucket=self._bucket, Key=self._key(path), timeout=limit, **arguments)

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".strip("/")


def _parts(buffers: Sequence[Buffer], size: int) -> Iterator[bytes]:
    """The concatenated buffers in parts of `size` bytes, one in memory at a time."""
    part = bytearray()
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while len(view):
            room = size - len(part)
            part += view[:room]
            view = view[room:]
            if len(part) == size:
                yield bytes(part)
                part.clear()
    if part:
        yield bytes(part)


@functools.cache
def _session_without_repeats() -> type:
    """The HTTP client, made to leave trying again to us.

    aiohttp repeats a PUT of which the answer was lost; the first one's effect would then look like somebody else's.
    """
    from aiobotocore.httpsession import AIOHTTPSession

    class Session(AIOHTTPSession):
        async def _get_session(self, proxy_url: Any) -> Any:
            session = await super()._get_session(proxy_url)
            session._retry_connection = False  # there is no public setting; tests count requests
            return session

    return Session
