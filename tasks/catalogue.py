"""The list of all stages. A new module with stages is named here and nowhere else."""

from __future__ import annotations

import difflib

from .adaptation import compensation as _compensation
from .adaptation import distill_stage as _distill
from .adaptation import lora_stage as _lora
from .adaptation import loraprune_stage as _loraprune
from .adaptation import losa_stage as _losa
from .adaptation import merging as _merging
from .adaptation import rank_stage as _rank
from .evaluation import divergence as _divergence
from .evaluation import efficiency_stage as _efficiency
from .evaluation import generations as _generations
from .evaluation import lm_eval_stage as _lm_eval
from .evaluation import perplexity as _perplexity
from .evaluation import size as _size
from .pruning import depth as _depth
from .pruning import gradients as _gradients
from .pruning import slice_stage as _slice
from .pruning import stage as _pruning
from .pruning import statistics as _statistics
from .pruning import wanda_sp_stage as _wanda_sp
from .pruning import width_stage as _width
from .quantization import awq_stage as _awq
from .quantization import joint_stage as _joint
from .quantization import sensitivity as _sensitivity
from .quantization import stage as _quantization
from .sources import models as _models
from .sources import tokens as _tokens
from .stage import CATALOGUE, Stage

MODULES = (
    _models, _tokens, _statistics, _gradients, _pruning, _width, _wanda_sp, _slice, _depth, _sensitivity, _quantization,
    _awq, _joint, _compensation, _lora, _losa, _loraprune, _rank, _distill, _merging, _perplexity, _divergence, _size,
    _efficiency, _lm_eval, _generations,
)  # fmt: skip


def stage_named(name: str) -> Stage:
    """The stage "prune/wanda". Raises KeyError."""
    return CATALOGUE[name]


def uses() -> list[str]:
    """What `use:` may say in a recipe: not sources and evaluations, which have their own places, nor statistics, which
    stages ask for themselves.
    """
    return sorted({entry.use for entry in CATALOGUE.values()} - {"source", "evaluate", "statistics"})


def methods(use: str) -> list[str]:
    """What `method:` may say for a `use:`."""
    return [entry.method for entry in CATALOGUE.values() if entry.use == use]


def did_you_mean(word: str, known: list[str]) -> str:
    """ "; did you mean 'wanda'?" or the list of what there is."""
    close = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"there is {', '.join(known)}"
