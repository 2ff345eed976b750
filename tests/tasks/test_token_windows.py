"""Text to windows of token ids: what is cut, what is drawn, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.sources.locate import SourceError
from coldpress.tasks.sources.texts import documents
from coldpress.tasks.sources.tokens import choose_windows
from coldpress.tasks.stage import StageError
from torch import Tensor
from transformers import AutoTokenizer

Windows = Callable[[Artifact], Tensor]


@pytest.fixture
def base(import_model: Callable[..., Artifact]) -> Artifact:
    return import_model("llama")


@pytest.fixture
def plain_ids(tiny_model_folder: Callable[..., str], text_file: str) -> Callable[[str], list[int]]:
    """`plain_ids(split)`: token ids of a whole split of the text file, by the model's own tokenizer."""

    def tokenize(split: str) -> list[int]:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder("llama"), model_max_length=10**9)
        ids = tokenizer("\n\n".join(documents(text_file, split, "text", None, None)))["input_ids"]
        return [int(number) for number in ids]

    return tokenize


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_windows_lie_one_after_the_other_and_only_the_tail_is_dropped(
    split: str,
    base: Artifact,
    make_tokens: Callable[..., Artifact],
    windows: Windows,
    plain_ids: Callable[[str], list[int]],
) -> None:
    found = windows(make_tokens(base, split=split, samples=None, length=50))
    ids = plain_ids(split)
    assert len(found) == len(ids) // 50
    assert found.flatten().tolist() == ids[: found.numel()]


def test_a_beginning_of_text_token_stands_in_the_first_window_only(
    base: Artifact, make_tokens: Callable[..., Artifact], windows: Windows
) -> None:
    found = windows(make_tokens(base, samples=None))
    assert found[0, 0] == 0
    assert (found == 0).sum() == 1


def test_drawn_windows_are_different_ones_of_them_in_the_order_of_the_text(
    base: Artifact, make_tokens: Callable[..., Artifact], windows: Windows
) -> None:
    every = [tuple(window) for window in windows(make_tokens(base, samples=None)).tolist()]
    drawn = [tuple(window) for window in windows(make_tokens(base, samples=20, seed=3)).tolist()]
    positions = [every.index(window) for window in drawn]
    assert len(set(positions)) == 20
    assert positions == sorted(positions)


def test_seeds_draw_differently_and_the_same_seed_draws_the_same(
    base: Artifact, make_tokens: Callable[..., Artifact], new_store: Callable[[], Store], run_stage: Callable[..., Any],
    import_model: Callable[..., Artifact],
) -> None:  # fmt: skip
    artifacts = [make_tokens(base, seed=seed) for seed in (0, 1, 2)]
    assert len(set(artifacts)) == 3
    elsewhere = new_store()
    assert make_tokens(import_model("llama", elsewhere), elsewhere, seed=1) == artifacts[1]


def test_no_seed_draws_a_calibration_window_that_is_held_out(
    base: Artifact, make_tokens: Callable[..., Artifact], windows: Windows
) -> None:
    held_out = {tuple(window) for window in windows(make_tokens(base, split="test", samples=None)).tolist()}
    for seed in range(8):
        drawn = {tuple(window) for window in windows(make_tokens(base, samples=100, seed=seed)).tolist()}
        assert len(drawn) == 100
        assert not drawn & held_out


def test_no_text_of_the_test_split_is_in_the_training_tokens(
    base: Artifact, make_tokens: Callable[..., Artifact], windows: Windows, tiny_model_folder: Callable[..., str],
    text_file: str,
) -> None:  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder("llama"))
    train = tokenizer.decode(windows(make_tokens(base, samples=None, length=16)).flatten())
    for document in documents(text_file, "test", "text", None, None):
        for paragraph in document.split("\n\n"):
            assert len(paragraph) < 100 or paragraph not in train


def test_windows_are_stored_as_int32_with_what_there_was_to_choose_from(
    store: Store, base: Artifact, make_tokens: Callable[..., Artifact], read_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    tokens = make_tokens(base, samples=5, length=40)
    (name, stored), *others = read_tensors(tokens).items()
    assert (name, stored.dtype, tuple(stored.shape), others) == ("input_ids", torch.int32, (5, 40), [])
    facts = json.loads(store.read_file(tokens, "tokens.json"))
    assert (facts["windows"], facts["length"]) == (5, 40)
    assert facts["windows_available"] > 300


def test_only_so_many_documents_are_read(
    base: Artifact, tmp_path: Path, make_tokens: Callable[..., Artifact], windows: Windows
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps({"text": letter * 20}) for letter in "abcdefgh"))
    asked = {"source": str(path), "split": "all", "samples": None, "length": 2}
    few = windows(make_tokens(base, documents=2, **asked))
    every = windows(make_tokens(base, **asked))
    assert torch.equal(few, every[: len(few)])
    assert few.numel() == 1 + 20 + 2 + 20 - 1  # <s>, two documents, a blank line; an odd token at the end


def test_the_same_text_elsewhere_gives_the_same_artifact_without_reading_it_again(
    store: Store, base: Artifact, tmp_path: Path, text_file: str, make_tokens: Callable[..., Artifact]
) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_file).read_bytes())
    assert make_tokens(base, source=str(copy)) == make_tokens(base)
    assert len(list(store.actions("source/tokens"))) == 1


def test_records_and_text_of_the_same_bytes_are_not_taken_for_each_other(
    base: Artifact, tmp_path: Path, make_tokens: Callable[..., Artifact]
) -> None:
    content = "\n".join(json.dumps({"text": f"{letter} and the other " * 30}) for letter in "abcdefgh")
    found = []
    for name in ("same.txt", "same.jsonl"):
        (tmp_path / name).write_text(content)
        found.append(make_tokens(base, source=str(tmp_path / name), split="all"))
    assert found[0] != found[1]


def test_the_python_documentation_gives_windows(
    base: Artifact, make_tokens: Callable[..., Artifact], windows: Windows
) -> None:
    found = windows(make_tokens(base, source="python-docs", samples=4, length=64))
    assert found.shape == (4, 64)
    assert len(found.unique()) > 20


def test_a_text_that_is_too_short_is_refused_with_what_there_is(
    base: Artifact, tmp_path: Path, make_tokens: Callable[..., Artifact]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("0123456789" * 10)
    with pytest.raises(StageError, match=r"has 101 tokens, enough for 3 windows of 32, but 6 are asked for; lower"):
        make_tokens(base, source=str(path), split="all")
    with pytest.raises(StageError, match="enough for 0 windows of 128, but 1 are asked for"):
        make_tokens(base, source=str(path), split="all", samples=None, length=128)


def test_a_text_too_short_to_have_a_test_split_is_refused(
    base: Artifact, tmp_path: Path, make_tokens: Callable[..., Artifact]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("words " * 100)
    with pytest.raises(StageError, match=r"\(split test\) has . tokens, enough for 0 windows"):
        make_tokens(base, source=str(path), split="test")


def test_a_split_that_there_is_not_is_refused(base: Artifact, make_tokens: Callable[..., Artifact]) -> None:
    with pytest.raises(SourceError, match="split 'validation' is none of train, test, all"):
        make_tokens(base, split="validation")


def test_a_model_without_tokenizer_is_refused(
    run_stage: Callable[..., Artifact],
    tiny_model_folder: Callable[..., str],
    copied: Callable[[str], Path],
    make_tokens: Callable[..., Artifact],
) -> None:
    folder = copied(tiny_model_folder("llama"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    model = run_stage("source/model", {}, source=str(folder))
    with pytest.raises(StageError, match="tokenizer can't be loaded from its files"):
        make_tokens(model)


@pytest.mark.parametrize("samples", [1, 7, 50])
def test_a_draw_takes_as_many_different_windows_as_asked(samples: int) -> None:
    chosen = choose_windows(50, samples, 0)
    assert len(set(chosen)) == samples
    assert set(chosen) <= set(range(50))


def test_every_window_has_its_chance() -> None:
    assert {window for seed in range(200) for window in choose_windows(20, 2, seed)} == set(range(20))


@pytest.mark.parametrize(("joined_by", "between"), [("blank line", "\n\n"), ("line", "\n"), ("space", " ")])
def test_documents_are_joined_as_a_protocol_asks_and_the_first_windows_taken(
    joined_by: str,
    between: str,
    tmp_path: Path,
    base: Artifact,
    make_tokens: Callable[..., Artifact],
    windows: Windows,
    tiny_model_folder: Callable[..., str],
) -> None:
    path = tmp_path / "documents.jsonl"
    texts = [f"{letter} and the other" for letter in "abcdefgh"]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    ids = AutoTokenizer.from_pretrained(tiny_model_folder("llama"))(between.join(texts))["input_ids"]
    settings = {"source": str(path), "split": "all", "length": 8, "joined_by": joined_by}
    found = windows(make_tokens(base, samples=3, draw="first", **settings))
    assert found.flatten().tolist() == ids[:24]


def test_lines_that_are_too_few_are_told(tmp_path: Path, base: Artifact, make_tokens: Callable[..., Artifact]) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("one line\n\n \nanother line\n")
    with pytest.raises(StageError, match="has 2 lines of two tokens or more, but 5 are asked for"):
        make_tokens(base, source=str(path), split="all", samples=5, length=8, unit="lines")
