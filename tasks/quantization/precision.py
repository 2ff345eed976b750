"""Mixed precision: how many bits, in groups of which size, each linear layer gets.

A recipe says it with `overrides`, or gives a `budget` that is spent by measured losses (bit_allocation.py). Either way
it ends in the settings of GPTQ's format, whose field `dynamic` names the layers that differ from all others:
`precision_of` reads it, for whatever packs and unpacks. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, floor, gcd
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from ..architectures import Family, block_count, family_of, linear_parameters
from ..stage import ModelFacts, Parameters

PACKABLE_BITS = (2, 3, 4, 8)
# Not 2: what so many layers lose together is more than the sum of what each loses alone.
USUAL_CHOICES = (3, 4, 8)
UNQUANTIZED = 16
# What vLLM and SGLang call layers that they merge; they look it up in `dynamic` instead of the layers' own names.
_MERGED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


class Precision(NamedTuple):
    """Bits of a weight, and how many inputs share a scale, -1 for a whole row."""

    bits: int
    group_size: int


class Override(Parameters):
    """Some layers' own bits or group size."""

    modules: tuple[str, ...] | None = Field(None, min_length=1, description="names, like down_proj; all if left out")
    layers: tuple[int, ...] | None = Field(None, min_length=1, description="numbers of blocks; all if left out")
    bits: Literal[2, 3, 4, 8, 16] | None = Field(None, description="16 leaves the layers as they are")
    group_size: int | None = Field(None, description="inputs that share a scale")

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if self.bits is None and self.group_size is None:
            raise ValueError("says neither bits nor group_size; give one of them, or drop the entry")
        if self.bits == UNQUANTIZED and self.group_size is not None:
            raise ValueError("layers with 16 bits are left as they are, without groups; drop group_size")
        return self


class Choice(Parameters):
    """Bits and group size that a layer may get."""

    bits: Literal[2, 3, 4, 8] = Field(description="bits of a weight")
    group_size: int | None = Field(default=None, description="inputs that share a scale; that of the stage if left out")


class Budget(Parameters):
    """How large the linear layers of all blocks may be as they are stored: codes, scales, zeros and group indices."""

    bits_per_weight: float | None = Field(None, gt=0, allow_inf_nan=False, description="as the report counts them")
    megabytes: float | None = Field(None, gt=0, allow_inf_nan=False, description="of a million bytes")

    @model_validator(mode="after")
    def _one_of_both(self) -> Budget:
        if (self.bits_per_weight is None) == (self.megabytes is None):
            raise ValueError("write either 'budget: {bits_per_weight: 3.5}' or 'budget: {megabytes: 50}'")
        return self

    def bytes(self, weights: int) -> int:
        """For so many weights."""
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight * weights / 8)
        assert self.megabytes is not None
        return int(self.megabytes * 1e6)

    def range(self, least: int, most: int, weights: int) -> str:
        """Numbers of bytes in the budget's own unit, rounded to what lies between them."""
        unit = 1e6 if self.megabytes is not None else weights / 8
        return f"{ceil(least / unit * 1000 + 1e-6) / 1000:.3f} to {floor(most / unit * 1000) / 1000:.3f}"


class GroupParameters(Parameters):
    """Parameters of all that is stored in GPTQ's format."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a weight")
    group_size: int = Field(128, description="inputs that share a scale; -1 for a whole row")
    symmetric: bool = Field(True, description="the zero point stands in the middle of the codes")
    overrides: tuple[Override, ...] = Field(
        (),
        description="layers with other bits or group sizes, later entries win: "
        "[{modules: [down_proj], layers: [0, 1], bits: 8, group_size: 32}]; 16 bits leave a layer as it is",
    )
    budget: Budget | None = Field(
        None,
        description="instead of bits: what the linear layers may take as they are stored, {bits_per_weight: 3.5} or "
        "{megabytes: 50}, spent where quantizing costs most",
    )
    choices: tuple[Choice, ...] | None = Field(
        None,
        min_length=1,
        description="for budget: what a layer may get, [{bits: 3, group_size: 32}]; 3, 4 or 8 bits if left out",
    )

    @model_validator(mode="after")
    def _one_way(self) -> GroupParameters:
        if self.budget is None:
            if self.choices is not None:
                raise ValueError("choices are for 'budget', which is not there; for layers of your own use overrides")
            return self
        if self.overrides:
            raise ValueError("a budget is spent on all layers, overrides decide on some; drop one of them")
        if self.bits != type(self).model_fields["bits"].default:
            raise ValueError("a budget decides on the bits of each layer; drop bits, or use overrides")
        precisions = self.candidates()
        if len(set(precisions)) < len(precisions):
            raise ValueError("choices has an entry twice; drop one")
        return self

    @property
    def most_bits(self) -> int:
        """The most that any layer can get."""
        if self.budget is not None:
            return max(candidate.bits for candidate in self.candidates())
        return max([self.bits, *(override.bits or self.bits for override in self.overrides)])

    def candidates(self) -> list[Precision]:
        """What a budget chooses from."""
        usual = self.group_size
        if self.choices is None:
            return [Precision(bits, usual) for bits in USUAL_CHOICES]
        given = [Precision(one.bits, usual if one.group_size is None else one.group_size) for one in self.choices]
        return sorted(given)  # in whichever order they are written, what is measured for them is the same

    def sensitivity(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """The input that a budget asks for."""
        if self.budget is None:
            return {}
        dtype = getattr(self, "dtype", "auto")
        settings = {
            "choices": self.candidates(),
            "symmetric": self.symmetric,
            "dtype": "auto" if dtype == "float16" else dtype,
        }
        return {"sensitivity": ("statistics/sensitivity", settings)}

    def precisions(self, config: Mapping[str, Any]) -> dict[str, Precision]:
        """{module: its precision} for the linear layers of all blocks, by overrides."""
        family = family_of(config)
        found = {}
        for index in range(block_count(config)):
            for linear in family.linears:
                bits: int = self.bits
                size = self.group_size
                for override in self.overrides:
                    here = override.layers is None or index in override.layers
                    if here and (
                        override.modules is None or any(_names(word, linear.name) for word in override.modules)
                    ):
                        bits = bits if override.bits is None else override.bits
                        size = size if override.group_size is None else override.group_size
                found[f"{family.block_prefix(index)}{linear.name}"] = Precision(bits, size)
        return found


def _names(word: str, name: str) -> bool:
    """Whether a recipe's word means a linear layer: its name within the block, or the end of it."""
    return name == word or name.endswith(f".{word}")


def check_groups(parameters: GroupParameters, facts: ModelFacts) -> Iterator[str]:
    """Layers must be there, groups fill their rows, and codes int32 words both ways; a budget must be one to meet."""
    wrong = list(_unknown_layers(parameters, facts.config))
    yield from wrong
    if wrong:
        return
    if parameters.budget is not None:
        used = dict.fromkeys(parameters.candidates())
        asked = dict.fromkeys(family_of(facts.config).linear_weights(facts.config), used)
    else:
        asked = {}
        for module, precision in parameters.precisions(facts.config).items():
            asked.setdefault(_in_block(family_of(facts.config), module) + ".weight", {})[precision] = None
        if all(precision.bits == UNQUANTIZED for used in asked.values() for precision in used):
            yield "overrides give all layers 16 bits, which leaves nothing to quantize"
            return
    for name, used in asked.items():
        for precision in used:
            if problem := _misfit(precision, name, facts.config):
                yield problem
                return
    if parameters.budget is not None:
        yield from _check_budget(parameters, parameters.budget, facts.config)


def _in_block(family: Family, module: str) -> str:
    """A module's name relative to its block."""
    return module[len(family.blocks) + 1 :].split(".", 1)[1]


def _unknown_layers(parameters: GroupParameters, config: Mapping[str, Any]) -> Iterator[str]:
    known, blocks = [linear.name for linear in family_of(config).linears], block_count(config)
    for number, override in enumerate(parameters.overrides):
        for word in override.modules or ():
            if not any(_names(word, name) for name in known):
                yield f"overrides[{number}]: a block has no module '{word}'; it has {', '.join(known)}"
        for index in override.layers or ():
            if not 0 <= index < blocks:
                yield f"overrides[{number}]: there is no layer {index}; the model has {blocks}, 0 to {blocks - 1}"


def _misfit(precision: Precision, name: str, config: Mapping[str, Any]) -> str | None:
    """Why a layer's weight [rows, columns] can't be stored so."""
    bits, size = precision
    if bits == UNQUANTIZED:
        return None
    if size != -1 and size < 1:
        return f"group_size {size} is neither positive nor -1 (a whole row)"
    count = 32 // gcd(bits, 32)
    words = bits * count // 32
    weights = family_of(config).linear_weights(config)
    rows, columns = weights[name]
    if size != -1 and columns % size:
        fitting = [n for n in (32, 64, 128, 256) if all(c % n == 0 for _, c in weights.values())]
        advice = f"{' or '.join(map(str, fitting))} would" if fitting else "-1 (a whole row) would"
        return f"group_size {size} does not divide the {columns} inputs of {name}; {advice}"
    if columns % count or rows % count:
        to_what = "a word" if words == 1 else f"{words} words"
        return (
            f"{name} is {rows} x {columns}, and {bits}-bit codes are packed {count} to {to_what}, "
            f"which needs both to be multiples of {count}"
        )
    return None


def stored_bytes(rows: int, columns: int, precision: Precision) -> int:
    """Bytes of a layer as it is packed: codes, zero points, scales (float16) and group indices (int32)."""
    bits, size = precision
    groups = 1 if size == -1 else columns // size
    return rows * columns * bits // 8 + groups * rows * 2 + groups * rows * bits // 8 + columns * 4


def layer_bytes(config: Mapping[str, Any], candidates: Sequence[Precision]) -> dict[str, list[int]]:
    """{module: its size in bytes as each of the candidates}, for the linear layers of all blocks."""
    family = family_of(config)
    sizes = {
        name.removesuffix(".weight"): [stored_bytes(*shape, precision) for precision in candidates]
        for name, shape in family.linear_weights(config).items()
    }
    return {
        family.block_prefix(index) + name: list(of_one)
        for index in range(block_count(config))
        for name, of_one in sizes.items()
    }


def _check_budget(parameters: GroupParameters, budget: Budget, config: Mapping[str, Any]) -> Iterator[str]:
    sizes = layer_bytes(config, parameters.candidates()).values()
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    weights = linear_parameters(config)
    asked = budget.bytes(weights)
    if least <= asked <= most:
        return
    unit, given = (
        ("megabytes", budget.megabytes)
        if budget.bits_per_weight is None
        else ("bits_per_weight", budget.bits_per_weight)
    )
    where = "less than the smallest choices take" if asked < least else "more than the largest choices take"
    yield (
        f"a budget of {unit} {given:g} is {where} with their scales, zeros and group indices; "
        f"write {budget.range(least, most, weights)}, or give other choices"
    )


def bits_of_block(plan: Mapping[str, Precision], config: Mapping[str, Any]) -> dict[str, float]:
    """{block: mean bits of its linear weights' codes}."""
    family = family_of(config)
    sizes = {
        name.removesuffix(".weight"): rows * columns for name, (rows, columns) in family.linear_weights(config).items()
    }
    return {
        str(index): sum(plan[family.block_prefix(index) + name].bits * size for name, size in sizes.items())
        / sum(sizes.values())
        for index in range(block_count(config))
    }


def dynamic_of(plan: Mapping[str, Precision], usual: Precision, config: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The field `dynamic` of quantize_config.json: pattern of module names -> what differs from `usual`.

    Patterns are regular expressions; a leading "-:" leaves modules unquantized. Layers that inference engines merge are
    matched under their merged name too, where they agree.
    """
    family = family_of(config)
    layers: dict[tuple[Precision, tuple[str, ...]], list[str]] = {}
    by_input: dict[str, list[str]] = {}
    for linear in family.linears:
        by_input.setdefault(linear.reads, []).append(linear.name)
    for index in range(block_count(config)):
        for reading in by_input.values():
            alike: dict[Precision, list[str]] = {}
            for name in reading:
                alike.setdefault(plan[f"{family.block_prefix(index)}{name}"], []).append(name)
            for precision, members in alike.items():
                if precision != usual:
                    layers.setdefault((precision, tuple(members)), []).append(str(index))
    found: dict[str, dict[str, int]] = {}
    for (precision, together), indices in layers.items():
        parent, dot, _ = together[0].rpartition(".")
        words = [name.rpartition(".")[2] for name in together]
        merged = _MERGED.get(tuple(words))
        module = re.escape(f"{parent}{dot}") + _any_of([*words, *([merged] if merged else [])])
        pattern = rf"^{re.escape(family.blocks)}\.{_any_of(indices)}\.{module}$"
        if precision.bits == UNQUANTIZED:
            found[f"-:{pattern}"] = {}
        else:
            found[pattern] = dict(precision._asdict())
    return found


def _any_of(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def precision_of(quantization: Mapping[str, Any], module: str) -> Precision | None:
    """Bits and group size of a module by a checkpoint's settings; None for one that is not quantized.

    As GPTQModel reads `dynamic`: of its patterns the first that matches the name from its beginning decides.
    """
    usual = Precision(int(quantization["bits"]), int(quantization.get("group_size", -1)))
    for pattern, values in (quantization.get("dynamic") or {}).items():
        if re.match(pattern[2:] if pattern.startswith(("-:", "+:")) else pattern, module):
            if pattern.startswith("-:"):
                return None
            return Precision(int(values.get("bits", usual.bits)), int(values.get("group_size", usual.group_size)))
    return usual
