"""Fixtures that all tests share: a store, tiny models with real tokenizers, texts, and one way to run a stage.

Torch and transformers are imported inside fixtures only, so that tests of `storage` start without them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from coldpress.storage.artifacts import Artifact, ArtifactReader
from coldpress.storage.store import Store

if TYPE_CHECKING:
    from tests.faults.flaky_proxy import FlakyProxy

# Before torch is loaded anywhere, and for child processes too. Tiny models run twice as fast on one thread as on two.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its thread pool fails on small machines otherwise
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"

# The tiny models know these characters, and a few merges so that tokens have several lengths.
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"()[]{}<>=+-*/_|&%#@$~^`\\\n"
SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")
MERGES = ("t h", "th e", "i n", "a n", "an d", "e r", "o n", ". \n")
VOCABULARY = 128
WORDS = (
    "press", "block", "weight", "column", "the", "and", "norm", "of", "one", "row", "error", "into", "scale", "group",
    "code", "model", "token", "zero", "mask", "in",
)  # fmt: skip

_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
_FULL_HEADS = {"num_key_value_heads": None, "head_dim": None}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"head_dim": None},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "final_logit_softcapping": 3.0, **_WINDOWED},
    "gemma3_text": {"tie_word_embeddings": True, **_WINDOWED},
    "opt": {
        **_FULL_HEADS, "intermediate_size": None, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.2,
        "initializer_range": None, "tie_word_embeddings": True,
    },
    "gpt_neox": {**_FULL_HEADS, "rotary_pct": 0.5},
}  # fmt: skip


_caches = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Remembered digests, Hub caches and device locks go to a folder of the tests' own."""
    config.stash[_caches] = folder = tempfile.mkdtemp(prefix="coldpress-tests-")
    os.environ["XDG_CACHE_HOME"] = folder
    os.environ["COLDPRESS_LOCKS"] = folder  # measurements of one test process needn't wait for the others
    os.environ["HF_HOME"] = os.path.join(folder, "huggingface")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_caches], ignore_errors=True)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server with a bucket; this process and those it starts find it through their environment."""
    from tests.s3_server import ENVIRONMENT, s3_server

    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        yield endpoint


@pytest.fixture
def s3_url(s3_endpoint: str) -> str:
    """Where on that server a store can be made; nothing is there yet."""
    from tests.s3_server import BUCKET

    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FlakyProxy]:
    """A proxy before the S3 server, used by this test only and told what is to fail."""
    from tests.faults.flaky_proxy import flaky_proxy

    with flaky_proxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store in a folder."""
    return Store(str(tmp_path / "store"))


@pytest.fixture
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Store]:
    """Makes further empty stores."""
    return lambda: Store(str(tmp_path_factory.mktemp("store")))


# Models


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`tiny_model_folder(family, **changes)`: a folder with a random model of that family in float32 and a tokenizer.

    `changes` go into the config; a value of None takes the entry out. Equal calls share one folder, which tests
    must not change.
    """
    made: dict[str, str] = {}

    def make(family: str, **changes: Any) -> str:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            save_tiny_model(folder, family, changes)
            made[key] = str(folder)
        return made[key]

    return make


def save_tiny_model(folder: Path, family: str, changes: Mapping[str, Any]) -> None:
    """Write the folder; every parameter is random, norms and biases too, so that none can be left out unseen."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**_TINY, **TINY_CONFIGS[family], **changes}
    config = AutoConfig.for_model(family, **{key: value for key, value in values.items() if value is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)


def save_tiny_tokenizer(folder: Path) -> None:
    """A BPE tokenizer over `CHARACTERS` that puts one <s> before a text, as tokenizer.json and its config."""
    from tokenizers import Tokenizer, decoders, models, processors

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    words = dict.fromkeys([*SPECIAL_TOKENS, *CHARACTERS, *(left + right for left, right in pairs)])
    vocabulary = {word: number for number, word in enumerate(words)}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": 256,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """`copied(folder)`: a copy of a model folder that a test may damage."""

    def copy(folder: str) -> Path:
        target = tmp_path / "copied"
        shutil.copytree(folder, target)
        return target

    return copy


# Texts


def random_text(seed: int, characters: int) -> str:
    """Paragraphs of random words, at least so long."""
    draw = random.Random(seed)
    paragraphs: list[str] = []
    size = 0
    while size < characters:
        sentences = (" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(draw.randint(1, 6)))
        paragraphs.append(". ".join(sentences) + ".")
        size += len(paragraphs[-1]) + 2
    return "\n\n".join(paragraphs)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of some 50,000 characters in paragraphs."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(random_text(0, 50_000))
    return str(path)


# Running


@pytest.fixture
def run_stage(store: Store) -> Callable[..., Artifact]:
    """`run_stage("prune/wanda", {"model": base, …}, sparsity=0.5)`: runs a stage of the catalogue on `store`.

    Before it runs what it derives, as recipes do.

    Checks what holds for every stage: nothing is cached before, the result is of the promised kind and whole, and
    afterwards the same call finds it.
    """
    from coldpress.tasks.catalogue import stage_named
    from coldpress.tasks.stage import Run, compute, lookup

    def run(name: str, inputs: Mapping[str, Artifact], on: Store | None = None, **parameters: Any) -> Artifact:
        target = on or store
        entry = stage_named(name)
        values = entry.parameters(**parameters)
        derived = {
            role: run(asked, {taken: inputs[taken] for taken in stage_named(asked).inputs}, on, **further)
            for role, (asked, further) in entry.derived(values).items()
            if role not in inputs
        }
        inputs = {role: one for role, one in {**inputs, **derived}.items() if role not in entry.passed_on}
        found = lookup(target, entry, values, inputs, "cpu")
        if found is None:
            artifact = compute(Run(target), entry, values, inputs).artifact
            assert artifact.kind == entry.output
            found = lookup(target, entry, values, inputs, "cpu")
            assert found is not None
            assert found.artifact == artifact
        return found.artifact

    return run


@pytest.fixture
def import_model(run_stage: Callable[..., Artifact], tiny_model_folder: Callable[..., str]) -> Callable[..., Artifact]:
    """`import_model("llama", **changes)`: a tiny model as a checkpoint in `store`, in float32."""

    def run(family: str, on: Store | None = None, **changes: Any) -> Artifact:
        return run_stage("source/model", {}, on, source=tiny_model_folder(family, **changes))

    return run


@pytest.fixture
def make_tokens(run_stage: Callable[..., Artifact], text_file: str) -> Callable[..., Artifact]:
    """`make_tokens(model, **parameters)`: windows of the text file, six of 32 tokens unless told."""

    def run(model: Artifact, on: Store | None = None, **parameters: Any) -> Artifact:
        return run_stage(
            "source/tokens", {"model": model}, on, **{"source": text_file, "samples": 6, "length": 32, **parameters}
        )

    return run


@pytest.fixture
def read_metrics(store: Store) -> Callable[[Artifact], dict[str, Any]]:
    """The values of a metrics artifact."""
    return lambda artifact: json.loads(store.read_file(artifact, "metrics.json"))


@pytest.fixture
def read_tensors(store: Store) -> Callable[..., dict[str, Any]]:
    """`read_tensors(artifact)`: all tensors of an artifact, as stored."""

    def read(artifact: Artifact, on: Store | None = None) -> dict[str, Any]:
        with ArtifactReader(on or store, artifact) as reader:
            return reader.tensors(reader.manifest.tensors)

    return read


@pytest.fixture
def export_folder(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`export_folder(artifact)`: the artifact as a Hugging Face folder; `format="compressed-tensors"` converts it."""
    from coldpress.storage.export import export

    def write(artifact: Artifact, on: Store | None = None, format: str | None = None) -> str:
        folder = str(tmp_path_factory.mktemp("exported") / "model")
        contents = None
        if format is not None:
            from coldpress.tasks.quantization import compressed_tensors_format

            assert format == compressed_tensors_format.NAME
            contents = compressed_tensors_format.contents(on or store, artifact)
        assert list(export(on or store, artifact, folder, contents))
        return folder

    return write
