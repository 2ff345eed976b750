"""The seam under the store, in a folder and behind fsspec."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coldpress.storage.errors import StoreError
from coldpress.storage.files import Files, LocalFiles, open_files
from coldpress.storage.objects import FsspecFiles
from sabotage import FailingOs

DISK_FULL = [("write", errno.ENOSPC), ("write", errno.EDQUOT), ("fsync", errno.ENOSPC)]


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns as often as they can, so that races are lost within a test's time."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """The results of work(0) … work(count - 1), all begun at the same moment in threads of their own."""
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count

    def run(number: int) -> None:
        barrier.wait()
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def content(files: Files, path: str) -> bytes:
    return bytes(files.read(path))


def listing(files: Files, folder: str) -> dict[str, int]:
    return dict(files.list(folder))


def leftovers(folder: str) -> list[str]:
    return os.listdir(os.path.join(folder, "tmp")) if os.path.isdir(os.path.join(folder, "tmp")) else []


# Both kinds


def test_what_is_created_is_read_back_in_one_piece(files: Files) -> None:
    assert files.create("a/b", [b"cold", bytearray(b"pre"), memoryview(b"ss")])
    assert content(files, "a/b") == b"coldpress"
    assert files.size("a/b") == 9


def test_buffers_of_other_items_than_bytes_are_written_whole(files: Files) -> None:
    numbers = memoryview(bytes(range(64))).cast("H")
    files.create("a", [numbers])
    files.replace("b", [numbers])
    assert content(files, "a") == content(files, "b") == bytes(range(64))


def test_an_empty_file_is_a_file(files: Files) -> None:
    assert files.create("a", [])
    assert files.size("a") == 0
    assert content(files, "a") == b""


def test_what_is_read_may_be_written_to_without_changing_the_file(files: Files) -> None:
    files.create("a", [b"abc"])
    files.read("a")[0] = 0
    assert content(files, "a") == b"abc"


def test_a_second_create_is_refused_and_the_first_content_stays(files: Files) -> None:
    files.create("a/b", [b"first"])
    assert not files.create("a/b", [b"second"])
    assert content(files, "a/b") == b"first"


def test_replace_writes_over_what_is_there_or_anew(files: Files) -> None:
    files.replace("a/b", [b"first"])
    files.replace("a/b", [b"second"])
    assert content(files, "a/b") == b"second"


def test_a_moved_file_is_in_its_new_place_only(files: Files) -> None:
    files.create("a/b", [b"abc"])
    files.move("a/b", "elsewhere/c")
    assert files.size("a/b") is None
    assert content(files, "elsewhere/c") == b"abc"


def test_a_deleted_file_is_gone_and_can_be_created_again(files: Files) -> None:
    files.create("a/b", [b"first"])
    files.delete("a/b")
    assert files.size("a/b") is None
    assert files.create("a/b", [b"second"])


def test_a_file_that_is_not_there_has_no_size(files: Files) -> None:
    assert files.size("a/b") is None


@pytest.mark.parametrize("call", [lambda files: files.read("a/b"), lambda files: files.move("a/b", "c")])
def test_a_file_that_is_not_there_cannot_be_used(files: Files, call: Callable[[Files], object]) -> None:
    with pytest.raises(FileNotFoundError):
        call(files)


def test_deleting_a_file_that_is_not_there_does_nothing_or_says_so(files: Files) -> None:
    with contextlib.suppress(FileNotFoundError):
        files.delete("a/b")
    assert listing(files, "") == {}


def test_a_listing_goes_down_into_folders_and_gives_sizes(files: Files) -> None:
    for path, data in {"x/1": b"a", "x/y/2": b"ab", "x/y/z/3": b"abc", "xx/4": b"abcd"}.items():
        files.create(path, [data])
    assert listing(files, "x") == {"x/1": 1, "x/y/2": 2, "x/y/z/3": 3}


def test_the_listing_of_a_folder_that_is_not_there_is_empty(files: Files) -> None:
    assert listing(files, "nowhere") == {}


def test_what_another_client_wrote_is_seen_at_once(files: Files, url: str) -> None:
    other = open_files(url)
    assert listing(files, "x") == listing(other, "x") == {}
    other.create("x/1", [b"abc"])
    assert listing(files, "x") == {"x/1": 3}
    assert files.size("x/1") == 3


@pytest.mark.usefixtures("eager_threads")
def test_one_of_many_threads_creates_a_file(files: Files) -> None:
    assert files.atomic_create
    for number in range(10 if files.remote else 100):
        path = f"leases/{number}"
        won = at_once(8, functools.partial(create_by, files, path))
        assert won.count(True) == 1
        assert content(files, path) == str(won.index(True)).encode()


def create_by(files: Files, path: str, who: int) -> bool:
    return files.create(path, [str(who).encode()])


def test_files_are_whole_while_threads_replace_them(files: Files) -> None:
    versions = [str(who).encode() * 50_000 for who in range(4)]
    files.replace("a", [versions[0]])
    seen: set[bytes] = set()

    def work(who: int) -> None:
        for _ in range(10):
            files.replace("a", [versions[who]])
            seen.add(content(files, "a"))

    at_once(4, work)
    assert seen <= set(versions)


# In a folder


@pytest.mark.parametrize("place", ["folder", "s3_url"])
def test_one_of_eight_processes_creates_a_file(place: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(place)
    count = 40 if place == "folder" else 10
    script = str(Path(__file__).with_name("racing_creator.py"))
    racers = [
        subprocess.Popen(
            [sys.executable, script, url, f"racer {who}", str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in range(8)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {f"racer {who}": racer.communicate()[0].split() for who, racer in enumerate(racers)}

    winners = sorted((int(number), name) for name, numbers in won.items() for number in numbers)
    files = open_files(url)
    assert winners == [(number, content(files, f"leases/{number}").decode()) for number in range(count)]
    assert listing(files, "tmp") == {}


def test_a_write_that_the_system_takes_in_small_pieces_is_completed(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StingyOs:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, descriptor: int, data: memoryview) -> int:
            return os.write(descriptor, data[:7])

    monkeypatch.setattr("coldpress.storage.files.os", StingyOs())
    files = LocalFiles(folder)
    files.create("a", [bytes(range(256)), b"end"])
    assert content(files, "a") == bytes(range(256)) + b"end"


@pytest.mark.parametrize(("call", "number"), DISK_FULL)
@pytest.mark.parametrize("method", ["create", "replace"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing_behind(
    folder: str, monkeypatch: pytest.MonkeyPatch, method: str, call: str, number: int
) -> None:
    files = LocalFiles(folder)
    with monkeypatch.context() as patch:
        patch.setattr("coldpress.storage.files.os", FailingOs(call, 1, number))
        with pytest.raises(StoreError, match=r"the disk is full: could not write .*/a/b; free some space"):
            getattr(files, method)("a/b", [b"coldpress"])
    assert listing(files, "") == {}
    assert getattr(files, method)("a/b", [b"coldpress"]) is not False


@pytest.mark.parametrize(("method", "call"), [("create", "link"), ("replace", "replace")])
def test_a_disk_that_is_full_at_the_last_step_leaves_nothing_behind(
    folder: str, monkeypatch: pytest.MonkeyPatch, method: str, call: str
) -> None:
    files = LocalFiles(folder)
    monkeypatch.setattr("coldpress.storage.files.os", FailingOs(call, 1, errno.ENOSPC))
    with pytest.raises(StoreError, match="the disk is full"):
        getattr(files, method)("a/b", [b"coldpress"])
    assert listing(files, "") == {}


def test_a_replace_that_fails_leaves_the_old_content(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LocalFiles(folder)
    files.replace("a", [b"old"])
    monkeypatch.setattr("coldpress.storage.files.os", FailingOs("write", 1, errno.ENOSPC))
    with pytest.raises(StoreError):
        files.replace("a", [b"new"])
    assert content(files, "a") == b"old"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_named_as_the_reason(
    folder: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("coldpress.storage.files.os", FailingOs("link", 1, number))
    with pytest.raises(StoreError, match=r"no hard links.* put the store on another one"):
        LocalFiles(folder).create("a", [b"abc"])


def test_another_failure_to_write_gives_the_systems_reason(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.storage.files.os", FailingOs("write", 1, errno.EIO))
    with pytest.raises(StoreError, match=r"could not write .*/a: Input/output error"):
        LocalFiles(folder).create("a", [b"abc"])


def test_a_folder_that_cannot_be_synced_is_a_sentence(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LocalFiles(folder)
    files.create("a", [b"abc"])
    monkeypatch.setattr("coldpress.storage.files.os", FailingOs("fsync folder", 1, errno.ENOSPC))
    with pytest.raises(StoreError, match="the disk is full"):
        files.sync()


def test_a_sync_that_failed_is_made_up_for_by_the_next(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LocalFiles(folder)
    files.create("a", [b"abc"])
    files.sync()
    files.create("b", [b"abc"])
    with monkeypatch.context() as patch:
        patch.setattr("coldpress.storage.files.os", FailingOs("fsync folder", 1, errno.EIO))
        with pytest.raises((StoreError, OSError)):
            files.sync()
    again = FailingOs("fsync folder", 1, errno.EIO)
    monkeypatch.setattr("coldpress.storage.files.os", again)
    with pytest.raises((StoreError, OSError)):
        files.sync()
    assert again.happened


def test_a_sync_returns_only_when_the_sync_of_another_thread_is_done(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LocalFiles(folder)
    files.create("a", [b"abc"])
    files.sync()
    files.create("b", [b"abc"])
    events: list[str] = []
    reached, go_on = threading.Event(), threading.Event()

    class SlowOs:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def fsync(self, descriptor: int) -> None:
            reached.set()
            go_on.wait(30)
            os.fsync(descriptor)
            events.append("synced")

    def second_sync() -> None:
        files.sync()
        events.append("second returned")

    monkeypatch.setattr("coldpress.storage.files.os", SlowOs())
    first, second = threading.Thread(target=files.sync), threading.Thread(target=second_sync)
    first.start()
    assert reached.wait(30)
    second.start()
    second.join(0.2)  # a sync that does not wait is back by now
    go_on.set()
    first.join()
    second.join()
    assert events.index("synced") < events.index("second returned")


def test_a_folder_that_does_not_exist_yet_has_room(folder: str) -> None:
    room = LocalFiles(os.path.join(folder, "deeper")).free_bytes()
    assert room is not None
    assert room > 0
    assert not os.path.exists(folder)


# Which kind


def test_a_path_or_a_file_url_is_a_folder(folder: str) -> None:
    LocalFiles(folder).create("a", [b"abc"])
    assert content(open_files(folder), "a") == content(open_files(f"file://{folder}"), "a") == b"abc"


def test_a_folder_stays_the_same_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = open_files("store")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    files.create("a", [b"abc"])
    assert (tmp_path / "store" / "a").read_bytes() == b"abc"


def test_any_other_url_goes_through_fsspec() -> None:
    assert isinstance(open_files("memory://somewhere"), FsspecFiles)


def test_a_slash_at_the_end_of_a_url_changes_nothing(url: str) -> None:
    open_files(url).create("a", [b"abc"])
    assert listing(open_files(f"{url}/"), "") == {"a": 3}


def test_a_protocol_without_a_driver_is_named() -> None:
    with pytest.raises(StoreError, match=r"the store nosuch://bucket needs a driver that is not installed"):
        open_files("nosuch://bucket")


@pytest.mark.parametrize("method", ["create", "replace"])
def test_a_remote_store_that_takes_no_more_is_a_sentence(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", full)
    with pytest.raises(StoreError, match=r"could not write .*a/b"):
        getattr(open_files("memory://full"), method)("a/b", [b"abc"])


def test_a_folder_that_another_empties_and_removes_is_made_again(folder: str, eager_threads: None) -> None:
    def write_and_delete(number: int) -> int:
        mine = LocalFiles(folder)
        for _ in range(150):
            assert mine.create(f"leases/key/{number}", [b"x"])
            mine.replace(f"leases/key/{number}", [b"y"])
            mine.sync()
            mine.delete(f"leases/key/{number}")
        return number

    assert at_once(4, write_and_delete) == [0, 1, 2, 3]
    assert os.listdir(os.path.join(folder, "leases")) == []
