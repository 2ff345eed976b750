"""S3 over HTTP: parts, conditions, lost answers, and failures that pass or don't.

What every kind of store promises is tested on S3 as well, in the other modules. Here a proxy lets requests fail.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable

import fsspec
import pytest
from coldpress.storage import objects, retries
from coldpress.storage.errors import StoreError
from coldpress.storage.files import open_files
from coldpress.storage.objects import FsspecFiles
from coldpress.storage.retries import TRIES
from coldpress.storage.s3 import S3Files
from coldpress.storage.store import Store
from samples import action, publish

from tests.faults.flaky_proxy import FlakyProxy

PART = 1000
LARGE = [bytes([number % 251]) * 700 for number in range(5)]  # four parts


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDPRESS_REMOTE_TIMEOUT_SECONDS", "1")
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)


@pytest.fixture
def files(proxy: FlakyProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> FsspecFiles:
    """The files at `s3_url` behind the proxy, with one object, `a`, and one request made."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": proxy.url})
    files = open_files(s3_url)
    assert isinstance(files, S3Files)
    assert files.atomic_create
    files.replace("a", [b"abc"])
    return files


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", PART)


def content(files: FsspecFiles, path: str) -> bytes:
    return bytes(files.read(path))


# Failures that pass

CALLS: dict[str, tuple[str, Callable[[FsspecFiles], object], object]] = {
    "read": ("GET", lambda files: content(files, "a"), b"abc"),
    "size": ("HEAD", lambda files: files.size("a"), 3),
    "list": ("GET", lambda files: list(files.list("")), [("a", 3)]),
    "create": ("PUT", lambda files: (files.create("b", [b"new"]), content(files, "b")), (True, b"new")),
    "replace": ("PUT", lambda files: (files.replace("a", [b"new"]), content(files, "a")), (None, b"new")),
    "delete": ("DELETE", lambda files: (files.delete("a"), files.size("a")), (None, None)),
    "move, copying": ("PUT", lambda files: (files.move("a", "b"), list(files.list(""))), (None, [("b", 3)])),
    "move, deleting": ("DELETE", lambda files: (files.move("a", "b"), list(files.list(""))), (None, [("b", 3)])),
}


@pytest.mark.parametrize(("way", "times"), [*itertools.product(["503", "429", "dropped", "lost"], [1, 2]), ("hang", 1)])
@pytest.mark.parametrize("call", CALLS)
def test_a_request_that_fails_is_made_again_and_done_once(
    files: FsspecFiles, proxy: FlakyProxy, call: str, way: str, times: int
) -> None:
    method, act, result = CALLS[call]
    proxy.fail_next(method, *[way] * times)
    assert act(files) == result
    assert proxy.fates.count(way) == times


def test_a_create_that_is_made_again_does_not_take_anothers_object_for_its_own(
    files: FsspecFiles, proxy: FlakyProxy
) -> None:
    proxy.fail_next("PUT", "dropped")
    assert not files.create("a", [b"xyz"])
    assert content(files, "a") == b"abc"


@pytest.mark.parametrize(("way", "words"), [("503", "503"), ("dropped", "closed before we received")])
def test_a_store_that_never_answers_is_named_with_what_was_tried(
    files: FsspecFiles, proxy: FlakyProxy, s3_url: str, way: str, words: str
) -> None:
    proxy.fate = lambda method, path: way
    with pytest.raises(
        StoreError, match=rf"could not write {s3_url}/never: .*{words}.*; gave up after {TRIES} tries in .* s"
    ):
        files.create("never", [b"abc"])
    assert proxy.count("PUT", "/never") == TRIES


def test_a_request_that_fails_again_and_again_is_said_once(
    files: FsspecFiles, proxy: FlakyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.fail_next("GET", *["503"] * 6)
    assert content(files, "a") == b"abc"
    assert [record.message.split(" (")[0] for record in caplog.records] == [f"could not read {files.url}/a 4 times"]


def test_a_fifth_of_the_requests_failing_costs_time_only(files: FsspecFiles, proxy: FlakyProxy) -> None:
    proxy.fail(0.2)
    written = {f"{number}": bytes([number]) * 10 for number in range(25)}
    assert all(files.create(path, [data]) for path, data in written.items())
    assert {path: content(files, path) for path in written} == written
    assert set(proxy.fates) == {"pass", "503", "dropped", "lost", "hang"}


# Failures that don't pass


@pytest.mark.parametrize("call", ["read", "size", "create", "delete"])
def test_a_refusal_is_final_and_says_what_to_check(files: FsspecFiles, proxy: FlakyProxy, call: str) -> None:
    method, act, _ = CALLS[call]
    proxy.fate = lambda method, path: "403"
    before = proxy.count(method)
    with pytest.raises(StoreError, match=rf"could not .* {files.url}/[ab]: .*403.*; check the credentials"):
        act(files)
    assert proxy.count(method) == before + 1


@pytest.mark.usefixtures("s3_endpoint")
@pytest.mark.parametrize("call", ["read", "list", "create", "replace"])
def test_a_bucket_that_is_not_there_is_final(call: str) -> None:
    with pytest.raises(
        StoreError, match=r"could not .* s3://nosuch/store.*: .*NoSuchBucket.*; there is no such bucket"
    ):
        CALLS[call][1](S3Files("s3://nosuch/store"))


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nonsense"])
def test_an_endpoint_that_was_never_reached_is_final(
    s3_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
    monkeypatch.setattr(retries, "TRIES", 1)  # what is final says so before it counts tries
    with pytest.raises(StoreError, match=rf"could not read {s3_url}/a: .*{endpoint}.*; check the endpoint"):
        open_files(s3_url).read("a")


def test_missing_credentials_are_final(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"client_kwargs": {"region_name": "eu-west-1"}})
    with pytest.raises(StoreError, match=rf"could not read {s3_url}/a: .*credentials; check the credentials"):
        open_files(s3_url).read("a")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_limit_that_is_none_is_refused(s3_url: str, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("COLDPRESS_REMOTE_TIMEOUT_SECONDS", text)
    with pytest.raises(StoreError, match=f"COLDPRESS_REMOTE_TIMEOUT_SECONDS is '{text}'; write a number of seconds"):
        open_files(s3_url)


# Large objects


@pytest.mark.usefixtures("small_parts")
def test_a_large_object_goes_in_parts_and_comes_back_whole(files: FsspecFiles, proxy: FlakyProxy) -> None:
    assert files.create("large", LARGE)
    assert proxy.count("PUT", "partNumber") == 4
    assert content(files, "large") == b"".join(LARGE)
    files.replace("large", LARGE[::-1])
    assert content(files, "large") == b"".join(LARGE[::-1])


@pytest.mark.usefixtures("small_parts")
def test_a_large_object_is_created_once(files: FsspecFiles, proxy: FlakyProxy) -> None:
    files.create("large", LARGE)
    assert not files.create("large", LARGE[::-1])
    assert content(files, "large") == b"".join(LARGE)
    assert proxy.count("DELETE", "uploadId") == 1


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [PART - 1, PART, PART + 1, 2 * PART])
def test_objects_about_as_large_as_a_part_are_whole(files: FsspecFiles, size: int) -> None:
    data = bytes(number % 251 for number in range(size))
    assert files.create("b", [data])
    assert content(files, "b") == data


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("way", ["503", "dropped", "lost", "hang"])
def test_a_part_that_fails_is_sent_again_alone(files: FsspecFiles, proxy: FlakyProxy, way: str) -> None:
    proxy.fail_next("PUT", way, path="partNumber=2")
    assert files.create("large", LARGE)
    assert proxy.count("PUT", "partNumber") == 5
    assert content(files, "large") == b"".join(LARGE)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("absent", [True, False])
def test_an_upload_whose_last_answer_was_lost_is_found_to_be_done(
    files: FsspecFiles, proxy: FlakyProxy, absent: bool
) -> None:
    proxy.fail_next("POST", "lost", path="large?uploadId")
    assert (files.create if absent else files.replace)("large", LARGE) is not False
    assert content(files, "large") == b"".join(LARGE)
    assert proxy.count("PUT", "partNumber") == 4


# Listings


def test_a_listing_of_many_pages_is_whole_though_one_fails(
    files: FsspecFiles, proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    for number in range(35):
        files.replace(f"many/{number}", [b"x" * number])
    proxy.fail_next("GET", "503", path="continuation-token")
    assert dict(files.list("many")) == {f"many/{number}": number for number in range(35)}
    assert proxy.count("GET", "list-type") == 5


def test_what_is_kept_counts_as_new(files: FsspecFiles) -> None:
    time.sleep(1.1)  # S3 counts in seconds
    files.replace("b", [b"new"])
    ages = files.ages("")
    assert ages["a"] >= ages["b"] + 1
    files.keep("a")
    assert files.ages("")["a"] <= files.ages("")["b"]
    assert content(files, "a") == b"abc"


# Conditions


def no_conditions(proxy: FlakyProxy) -> None:
    proxy.conditional = False


def refused_conditions(proxy: FlakyProxy) -> None:
    proxy.fate = lambda method, path: "501" if method == "PUT" and "/tmp/" in path else "pass"


@pytest.mark.parametrize("without", [no_conditions, refused_conditions])
def test_a_server_without_conditional_writes_is_looked_at_before_writing(
    files: FsspecFiles, proxy: FlakyProxy, without: Callable[[FlakyProxy], None], caplog: pytest.LogCaptureFixture
) -> None:
    without(proxy)
    files = open_files(files.url)  # type: ignore[assignment]
    assert files.create("b", [b"first"])
    assert not files.create("b", [b"second"])
    assert content(files, "b") == b"first"
    assert not files.atomic_create
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "has no conditional writes" in caplog.text
    assert dict(files.list("tmp")) == {}


def test_whether_a_server_has_conditions_is_asked_once(files: FsspecFiles, proxy: FlakyProxy) -> None:
    before = proxy.count("PUT", "/tmp/")
    assert before == 2
    files.create("b", [b"abc"])
    files.create("c", [b"abc"])
    assert proxy.count("PUT", "/tmp/") == before


# The store


def test_a_hit_is_proven_without_reading_a_blob(files: FsspecFiles, proxy: FlakyProxy) -> None:
    store = Store(files.url)
    recorded = store.record(action(publish(store)))
    before = proxy.count("GET", "/blobs/")
    assert Store(files.url).lookup(recorded.stage, recorded.key) == recorded
    assert proxy.count("GET", "/blobs/") == before
