"""Instruction data: records to padded windows, and which of their tokens training learns from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from coldpress.storage.artifacts import Artifact
from coldpress.storage.store import Store
from coldpress.tasks.catalogue import stage_named
from coldpress.tasks.sources.locate import SourceError
from coldpress.tasks.sources.records import Pair, pair_of, token_ids
from coldpress.tasks.sources.tokens import TokensParameters
from coldpress.tasks.stage import StageError
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoTokenizer

BOS, EOS = 0, 1
FIELDS = {"prompt": "prompt", "response": "response", "split": "all", "samples": None, "length": 32}


@pytest.fixture
def base(import_model: Callable[..., Artifact]) -> Artifact:
    return import_model("llama")


@pytest.fixture
def tokenizer(tiny_model_folder: Callable[..., str]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder("llama"))


@pytest.fixture
def records_file(tmp_path: Path) -> Callable[..., str]:
    """`records_file(records)`: a jsonl file of them, of one prompt and one response unless told."""

    def write(records: list[Mapping[str, Any]] | None = None) -> str:
        path = tmp_path / "records.jsonl"
        given = records or [{"prompt": "What is it? ", "response": "A cat."}]
        path.write_text("\n".join(json.dumps(record) for record in given))
        return str(path)

    return write


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_a_record_is_a_window_that_ends_with_its_response(
    loss_on: str,
    base: Artifact,
    records_file: Callable[..., str],
    make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
    tokenizer: Any,
) -> None:
    tensors = read_tensors(make_tokens(base, source=records_file(), **FIELDS, loss_on=loss_on))
    (window,), (counted,) = tensors["input_ids"].tolist(), tensors["counted"].tolist()
    whole = [*tokenizer("What is it? A cat.")["input_ids"], EOS]
    assert window == [*whole, *[EOS] * (32 - len(whole))]
    learned = [token for token, counts in zip(window[1:], counted, strict=True) if counts]
    assert learned == (whole[1:] if loss_on == "all" else [*tokenizer("A cat.")["input_ids"][1:], EOS])
    assert (tensors["input_ids"].dtype, tensors["counted"].dtype) == (torch.int32, torch.uint8)
    assert tensors["counted"].shape == (1, 31)


def test_a_token_of_prompt_and_response_is_the_responses(tokenizer: Any) -> None:
    ((ids, first),) = token_ids(tokenizer, [Pair("xt", "he")])  # "the" is one token
    assert [tokenizer.decode([token]) for token in ids] == ["<s>", "x", "the", "</s>"]
    assert first == 2


def test_an_empty_response_is_its_end(tokenizer: Any) -> None:
    ((ids, first),) = token_ids(tokenizer, [Pair("cat", "")])
    assert ids[first:] == [EOS]


def test_batches_of_records_make_no_difference(tokenizer: Any) -> None:
    pairs = [Pair("a" * number, "b" * (7 - number)) for number in range(7)]
    assert list(token_ids(tokenizer, pairs, at_once=2)) == list(token_ids(tokenizer, pairs))


def test_alpacas_prompts_have_an_input_only_where_the_record_has() -> None:
    with_input = pair_of({"instruction": "Add.", "input": "1 {x} 2", "output": "3"}, None, None)
    without = pair_of({"instruction": "Sing.", "input": " ", "output": "La"}, None, None)
    assert with_input.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert with_input.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 {x} 2\n\n### Response:\n")
    assert without.prompt.startswith("Below is an instruction that describes a task. Write a response")
    assert without.prompt.endswith("### Instruction:\nSing.\n\n### Response:\n")
    assert (with_input.response, without.response) == ("3", "La")


def test_alpacas_records_are_read_with_and_without_the_field_input(
    base: Artifact, records_file: Callable[..., str], make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]], tokenizer: Any,
) -> None:  # fmt: skip
    source = records_file([{"instruction": "Sing.", "output": "La"}, {"instruction": "A", "input": "B", "output": "C"}])
    tensors = read_tensors(make_tokens(base, source=source, template="alpaca", split="all", samples=None, length=256))
    texts = [tokenizer.decode(window).partition("</s>")[0] for window in tensors["input_ids"]]
    assert texts[0].endswith("### Response:\nLa")
    assert texts[1].endswith("### Input:\nB\n\n### Response:\nC")


def test_long_records_are_cut_and_those_without_room_for_a_response_left_out(
    base: Artifact, records_file: Callable[..., str], make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]], store: Store,
) -> None:  # fmt: skip
    source = records_file([
        {"prompt": "x" * 5, "response": "y" * 50},
        {"prompt": "x" * 31, "response": "y"},  # with <s> as long as a window
        {"prompt": "x" * 30, "response": "y"},
        {"prompt": "x", "response": "y"},
    ])  # fmt: skip
    tokens = make_tokens(base, source=source, **FIELDS)
    tensors = read_tensors(tokens)
    assert tensors["counted"].sum(1).tolist() == [26, 1, 2]
    assert bool((tensors["input_ids"][0] != EOS).all())
    facts = json.loads(store.read_file(tokens, "tokens.json"))
    assert facts == {"windows": 3, "length": 32, "windows_available": 3, "records": 4, "records_cut": 2}
    whole = read_tensors(make_tokens(base, source=source, **FIELDS, loss_on="all"))
    assert whole["counted"].sum(1).tolist() == [31, 31, 31, 3]


def test_records_are_drawn_by_the_seed_in_their_order_and_dealt_into_splits(
    base: Artifact, records_file: Callable[..., str], make_tokens: Callable[..., Artifact],
    read_tensors: Callable[..., dict[str, Tensor]],
) -> None:  # fmt: skip
    letters = "abcdefghijklmnopqrst"
    source = records_file([{"prompt": "It is ", "response": letter * 3} for letter in letters])

    def drawn(**settings: Any) -> list[tuple[int, ...]]:
        found = read_tensors(make_tokens(base, source=source, **{**FIELDS, **settings}))
        return [tuple(window) for window in found["input_ids"].tolist()]

    every = drawn()
    assert len(set(every)) == 20
    one, other = drawn(samples=6, seed=1), drawn(samples=6, seed=2)
    assert one != other
    assert [every.index(window) for window in one] == sorted(every.index(window) for window in one)
    assert drawn(split="test") == every[3::4]
    assert sorted(drawn(split="train") + drawn(split="test")) == sorted(every)
    assert drawn(documents=5) == every[:5]


def test_running_text_has_the_keys_it_had() -> None:
    plain = TokensParameters(source="python-docs", samples=4, length=64)
    assert plain.for_key() == {"samples": 4, "length": 64}
    asked = TokensParameters(source="x.jsonl", prompt="q", response="a", loss_on="response")
    assert asked.for_key() == {"prompt": "q", "response": "a"}


def test_a_model_learns_to_answer(
    base: Artifact, records_file: Callable[..., str], make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact], block_loop_logits: Callable[..., Tensor], tokenizer: Any,
) -> None:  # fmt: skip
    source = records_file([{"prompt": f"{letter}? ", "response": f"it is {letter}."} for letter in "abcdefgh"])
    data = make_tokens(base, source=source, **FIELDS)
    settings = {"steps": 60, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-2, "dtype": "float32"}
    taught = run_stage("adapt/full", {"model": base, "data": data}, **settings)
    ids = torch.tensor([[*tokenizer("c? it is ")["input_ids"]]])
    assert tokenizer.decode(block_loop_logits(taught, ids)[0, -1].argmax()) == "c"
    packed = run_stage("prune/magnitude", {"model": base}, sparsity=0.3)
    run_stage("distill/kl", {"model": packed, "teacher": taught, "data": data}, **{**settings, "steps": 2}, rank=4)


def test_padding_and_prompts_make_no_difference_to_what_is_learned(
    base: Artifact, records_file: Callable[..., str], make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact], read_tensors: Callable[..., dict[str, Tensor]],
) -> None:  # fmt: skip
    source = records_file([{"prompt": f"{letter}? ", "response": "yes and no"} for letter in "abcd"])
    settings = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "dtype": "float32"}
    found = [
        read_tensors(
            run_stage(
                "adapt/full",
                {"model": base, "data": make_tokens(base, source=source, **{**FIELDS, "length": length})},
                **settings,
            )
        )
        for length in (24, 100)
    ]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_calibration_takes_no_padded_windows_and_perplexity_counts_responses_alone(
    base: Artifact, records_file: Callable[..., str], make_tokens: Callable[..., Artifact],
    run_stage: Callable[..., Artifact], whole_model: Callable[..., Any], read_tensors: Callable[..., dict[str, Tensor]],
    read_metrics: Callable[[Artifact], dict[str, Any]],
) -> None:  # fmt: skip
    data = make_tokens(base, source=records_file(), **FIELDS)
    with pytest.raises(StageError, match="only training and evaluation can use; give running text"):
        run_stage("prune/wanda", {"model": base, "calibration": data}, sparsity=0.5)
    found = read_metrics(run_stage("evaluate/perplexity", {"model": base, "data": data}))
    tensors = read_tensors(data)
    ids, counted = tensors["input_ids"].long(), tensors["counted"][0].bool()
    losses = torch.nn.functional.cross_entropy(whole_model("llama")(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert found["window_tokens"] == [int(counted.sum())]
    assert found["loss_nats"] == pytest.approx(float(losses[counted].mean()), rel=1e-5)


def test_bad_records_are_told_in_a_sentence(
    base: Artifact, records_file: Callable[..., str], make_tokens: Callable[..., Artifact], text_file: str
) -> None:
    source = records_file([{"prompt": "x" * 40, "response": "y"}, {"prompt": "x", "response": "y"}])
    with pytest.raises(
        SourceError, match=r"line 1 has no text field 'question' \(it has: prompt, response\); set `pro"
    ):
        make_tokens(base, source=source, **{**FIELDS, "prompt": "question"})
    with pytest.raises(SourceError, match=r"no text field 'instruction' \(it has: prompt, response\)"):
        make_tokens(base, source=source, template="alpaca", split="all", samples=None)
    with pytest.raises(
        StageError, match="has 2 records, 1 of them with a prompt that leaves no room in 32 tokens, but"
    ):
        make_tokens(base, source=source, **{**FIELDS, "samples": 2})
    with pytest.raises(
        StageError, match=r"has 1 records, 1 of them .* but 1 are asked for; lower samples, raise length"
    ):
        make_tokens(base, source=source, **{**FIELDS, "documents": 1})
    for running in (text_file, "python-docs"):
        with pytest.raises(SourceError, match="is running text without prompts and responses"):
            make_tokens(base, source=running, **FIELDS)


@pytest.mark.parametrize("settings", [{}, {"template": "alpaca"}, {"prompt": "a", "response": "b", "loss_on": "all"}])
def test_settings_can_be_written_out_with_their_defaults(settings: dict[str, str]) -> None:
    parameters = TokensParameters.model_validate({"source": "x.jsonl", **settings})
    assert TokensParameters.model_validate(parameters.model_dump(mode="json")) == parameters


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prompt": "a"}, "both 'prompt' and 'response'"),
        ({"response": "a"}, "both 'prompt' and 'response'"),
        ({"prompt": "a", "response": "b", "template": "alpaca"}, "makes the prompts itself"),
        ({"template": "alpaca", "field": "body"}, "'field' is of running text"),
        ({"loss_on": "all"}, "'loss_on' is of records"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        stage_named("source/tokens").parameters(source="x.jsonl", **settings)


def test_a_tokenizer_without_an_end_is_refused(
    run_stage: Callable[..., Artifact],
    tiny_model_folder: Callable[..., str],
    copied: Callable[[str], Path],
    records_file: Callable[..., str],
    make_tokens: Callable[..., Artifact],
) -> None:
    folder = copied(tiny_model_folder("llama"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = run_stage("source/model", {}, source=str(folder))
    with pytest.raises(StageError, match="no end-of-sequence token"):
        make_tokens(model, source=records_file(), **FIELDS)
