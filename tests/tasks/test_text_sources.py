"""Texts in: how they are dealt into splits, and what is refused in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coldpress.tasks.sources import texts
from coldpress.tasks.sources.locate import Located, SourceError
from coldpress.tasks.sources.texts import PYTHON_DOCS, check_text, documents, text_content


def read(source: str, split: str = "all", field: str = "text") -> list[str]:
    return list(documents(source, split, field, None, None))


@pytest.fixture
def jsonl_file(tmp_path: Path) -> str:
    """Ten records."""
    path = tmp_path / "records.jsonl"
    lines = [json.dumps({"text": f"record {number}", "other": number}) for number in range(10)]
    path.write_text("\n".join(lines[:5]) + "\n\n" + "\n".join(lines[5:]) + "\n")
    return str(path)


@pytest.fixture(params=["text", "jsonl", PYTHON_DOCS])
def any_source(request: pytest.FixtureRequest, text_file: str, jsonl_file: str) -> str:
    return {"text": text_file, "jsonl": jsonl_file}.get(request.param, PYTHON_DOCS)


def test_train_and_test_are_disjoint_and_together_everything(any_source: str) -> None:
    train, test = read(any_source, "train"), read(any_source, "test")
    assert train
    assert test
    assert not set(train) & set(test)
    if any_source.endswith(".txt"):
        assert sum(map(len, train + test)) + 2 * (len(train + test) - 1) == len(Path(any_source).read_text())
    else:
        assert sorted(train + test) == sorted(read(any_source, "all"))


def test_every_fourth_piece_is_for_testing(any_source: str) -> None:
    train, test = len(read(any_source, "train")), len(read(any_source, "test"))
    assert test == (train + test) // 4


def test_a_text_is_dealt_at_blank_lines_in_its_own_order(text_file: str) -> None:
    text = Path(text_file).read_text()
    position = 0
    for piece in read(text_file, "train"):
        position = text.index(piece, position)
        assert position == 0 or text[position - 2 : position] == "\n\n"
        position += len(piece)
        assert text[position : position + 2] in ("\n\n", "")


def test_all_of_a_text_is_the_text(text_file: str) -> None:
    assert read(text_file) == [Path(text_file).read_text()]


def test_records_are_read_in_order_and_blank_lines_skipped(jsonl_file: str) -> None:
    assert read(jsonl_file) == [f"record {number}" for number in range(10)]
    assert read(jsonl_file, "test") == ["record 3", "record 7"]


def test_another_field_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "text": "no"}))
    assert read(str(path), field="prompt") == ["Why?"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "cut', "line 2 is not JSON"),
        ('{"body": "a", "title": "b"}', r"line 2 has no text field 'text' \(it has: body, title\); set `field:`"),
        ('{"text": 3}', "line 2 has no text field 'text'"),
        ('["text"]', r"line 2 has no text field 'text' \(it has: list\)"),
    ],
)
def test_a_bad_record_is_named_by_its_line(line: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(SourceError, match=sentence):
        read(str(path))


def test_the_python_documentation_is_large_enough_to_calibrate_and_test_with() -> None:
    assert sum(map(len, read(PYTHON_DOCS, "train"))) > 250_000
    assert sum(map(len, read(PYTHON_DOCS, "test"))) > 80_000
    assert read(PYTHON_DOCS, "test") == read(PYTHON_DOCS, "test")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Straße".encode("latin-1"))
    with pytest.raises(SourceError, match="is not UTF-8 text"):
        read(str(path))


def test_jsonl_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "Straße"}\n'.encode("latin-1"))
    with pytest.raises(SourceError, match="UTF-8"):
        read(str(path))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a folder; name a text or jsonl file, a Hub data set, or python-docs"):
        read(str(tmp_path))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "text.gz"])
def test_other_kinds_of_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match="is not plain text or jsonl; convert it, or name a Hub data set"):
        check_text(str(tmp_path / name), "train")


def test_a_split_that_a_text_is_not_dealt_into_is_refused(any_source: str) -> None:
    with pytest.raises(SourceError, match="split 'validation' is none of train, test, all"):
        check_text(any_source, "validation")
    with pytest.raises(SourceError, match="split 'validation' is none of train, test, all"):
        read(any_source, "validation")


def test_the_content_id_is_of_the_bytes_not_of_the_place(text_file: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_file).read_bytes())
    before = text_content(text_file, None, None)
    assert text_content(str(copy), None, None) == before
    copy.write_bytes(copy.read_bytes() + b".")
    assert text_content(str(copy), None, None) != before


def test_the_same_bytes_read_as_text_and_as_records_have_different_content_ids(jsonl_file: str, tmp_path: Path) -> None:
    as_text = tmp_path / "records.txt"
    as_text.write_bytes(Path(jsonl_file).read_bytes())
    assert read(str(as_text)) != read(jsonl_file)
    assert text_content(str(as_text), None, None) != text_content(jsonl_file, None, None)


# Hub data sets, with a local folder in place of the Hub


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of two splits that the `datasets` library loads as it would one from the Hub."""
    folder = tmp_path / "data_set"
    folder.mkdir()
    for split, words in (("train", ["one", "two", "three"]), ("test", ["four"])):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": word, "id": word}) for word in words))
    monkeypatch.setattr(texts, "locate", lambda source: Located("hub", source))
    monkeypatch.setattr(texts, "hub_commit", lambda source, revision, kind: f"commit of {revision or 'main'}")
    return str(folder)


def test_a_data_set_is_read_in_its_own_splits(data_set: str) -> None:
    assert read(data_set, "train") == ["one", "two", "three"]
    assert read(data_set, "test") == ["four"]


def test_a_split_that_a_data_set_has_not_is_refused(data_set: str) -> None:
    with pytest.raises(SourceError, match="could not load split 'validation' of data set"):
        read(data_set, "validation")


def test_a_field_that_a_data_set_has_not_is_refused_with_those_it_has(data_set: str) -> None:
    with pytest.raises(SourceError, match=r"has no text field 'content' \(it has: text, id\); set `field:`"):
        read(data_set, "train", field="content")


def test_a_data_set_that_is_not_there_is_refused(data_set: str) -> None:
    with pytest.raises(SourceError, match="could not load split 'train' of data set"):
        read(f"{data_set}/nothing", "train")


def test_the_content_id_of_a_data_set_is_its_name_configuration_and_commit(data_set: str) -> None:
    expected = {"dataset": data_set, "name": "raw", "commit": "commit of v2"}
    assert text_content(data_set, "v2", "raw") == expected


def test_any_split_may_be_asked_of_a_data_set_before_it_is_loaded(data_set: str) -> None:
    check_text(data_set, "validation")


def test_a_missing_text_file_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        read(str(tmp_path / "missing.txt"))
