"""A checkpoint as the stock `transformers` model that its exported folder would load as, and its tokenizer.

For evaluations that run the whole model. Packed weights are dequantized, an adapter's terms are added to them: what is
computed are the dense weights that the stored bytes stand for.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from ...storage.artifacts import Artifact
from ..adaptation.layers import Frozen
from ..adaptation.network import Network
from ..blocks import StoredModel
from ..sources.tokens import load_tokenizer
from ..stage import Run, StageError


def whole_model(run: Run, stored: StoredModel, dtype: torch.dtype) -> Any:
    """The model in evaluation mode on the run's device, all weights in `dtype`; with its generation defaults."""
    from transformers import GenerationConfig

    model = Network(run, stored, dtype, _linear).model
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise StageError(f"the checkpoint lacks {missing[0]}, which its architecture needs")
    if "generation_config.json" in stored.manifest.files:
        settings = json.loads(stored.reader.file("generation_config.json"))
        model.generation_config = GenerationConfig.from_dict(settings)
    return model


def tokenizer_of(run: Run, model: Artifact) -> Any:
    """The tokenizer of a checkpoint, or of the checkpoint that an adapter belongs to."""
    base = run.store.manifest(model).base
    return load_tokenizer(run, model if base is None else Artifact("checkpoint", base))


def _linear(name: str, frozen: Frozen, shape: tuple[int, int], mask: Tensor | None) -> nn.Module:
    """The layer as `transformers` has it."""
    rows, columns = shape
    with torch.device("meta"):
        layer = nn.Linear(columns, rows, bias=frozen.bias_value is not None)
    layer.weight = nn.Parameter(frozen.weight_of(), requires_grad=False)
    if frozen.bias_value is not None:
        layer.bias = nn.Parameter(frozen.bias_value, requires_grad=False)
    return layer
