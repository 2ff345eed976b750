"""All that differs between model families, in one place. Nothing here needs torch.

A family says where its blocks are, what each linear layer in them is for and which of them read the same input, and
how checkpoint files name things. `family_of(config)` refuses what is not listed in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..storage.errors import ColdpressError


class UnsupportedModel(ColdpressError):
    """A model whose architecture coldpress doesn't know."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    name: relative to the block. reads: what its input is; layers with the same word read the very same tensor, so
    they share one statistic. inputs, outputs: its dimensions, as words that `dimension` turns into numbers.
    compared: whether its outputs go into attention scores, where queries are compared with keys.
    """

    name: str
    reads: str
    inputs: str
    outputs: str
    compared: bool = False


@dataclass(frozen=True)
class Fold:
    """Where a scale of features can go without changing the model: whoever reads the features is multiplied by it, what
    makes them divided.

    reads: the features, as in `Linear`. into: the module that makes them, relative to the block: a norm, or a linear
    layer with nothing in between but what passes a positive factor on. only_if: (config entry, the value that it must
    have; an entry that isn't there has it).
    """

    reads: str
    into: str
    only_if: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Family:
    """How one family of decoders is laid out.

    blocks: prefix of the blocks' parameters, without the number. linears: in the order in which a forward pass
    meets them. width: the config's name for the FFN width. renamed: parameter name -> name in checkpoint files.
    not_weights: endings of entries in old checkpoint files that are no parameters.
    bias_keys: (module within a block, the config's switch that gives all its linear layers a bias).
    any_head_count: whether the stock config takes numbers of heads that do not divide the hidden size.
    always_biased: whether all linear layers have biases, unless `enable_bias` is off.
    folds: features whose scale can go elsewhere. norm_offset: what norms add to their weight before they use it.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    linears: tuple[Linear, ...]
    width: str = "intermediate_size"
    renamed: tuple[tuple[str, str], ...] = ()
    not_weights: tuple[str, ...] = ("rotary_emb.inv_freq",)
    bias_keys: tuple[tuple[str, str], ...] = ()
    any_head_count: bool = False
    always_biased: bool = False
    folds: tuple[Fold, ...] = ()
    norm_offset: float = 0.0

    def block_prefix(self, index: int) -> str:
        """ "model.layers.3." """
        return f"{self.blocks}.{index}."

    def block_of(self, name: str) -> int | None:
        """The number of the block that a tensor belongs to, None for those outside the blocks."""
        prefix = self.blocks + "."
        if not name.startswith(prefix):
            return None
        return int(name[len(prefix) :].split(".", 1)[0])

    def file_name(self, parameter: str) -> str:
        """The name in checkpoint files of a parameter of the `transformers` model."""
        return dict(self.renamed).get(parameter, parameter)

    def linear_weights(self, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """{weight name relative to the block: (out_features, in_features)}."""
        return {
            f"{linear.name}.weight": (dimension(config, linear.outputs, self), dimension(config, linear.inputs, self))
            for linear in self.linears
        }


# q, k, v, o and a gated FFN: what Llama and most of its relatives have in a block.
GATED = (
    Linear("self_attn.q_proj", "attention input", "hidden", "query", compared=True),
    Linear("self_attn.k_proj", "attention input", "hidden", "key", compared=True),
    Linear("self_attn.v_proj", "attention input", "hidden", "key"),
    Linear("self_attn.o_proj", "attention output", "query", "hidden"),
    Linear("mlp.gate_proj", "mlp input", "hidden", "width"),
    Linear("mlp.up_proj", "mlp input", "hidden", "width"),
    Linear("mlp.down_proj", "mlp activation", "width", "hidden"),
)
# Values are averaged and the FFN's two halves multiplied, so both pass factors on.
INNER_FOLDS = (Fold("attention output", "self_attn.v_proj"), Fold("mlp activation", "mlp.up_proj"))
GATED_FOLDS = (
    Fold("attention input", "input_layernorm"),
    Fold("mlp input", "post_attention_layernorm"),
    *INNER_FOLDS,
)
_OPT_NORMS = (("do_layer_norm_before", True), ("layer_norm_elementwise_affine", True))

FAMILIES = (
    Family(
        "Llama",
        ("llama",),
        "model.layers",
        GATED,
        bias_keys=(("self_attn", "attention_bias"), ("mlp", "mlp_bias")),
        folds=GATED_FOLDS,
    ),
    Family("Mistral", ("mistral",), "model.layers", GATED, any_head_count=True, folds=GATED_FOLDS),
    Family("Qwen 2", ("qwen2",), "model.layers", GATED, any_head_count=True, folds=GATED_FOLDS),
    Family(
        "Qwen 3",
        ("qwen3",),
        "model.layers",
        GATED,
        bias_keys=(("self_attn", "attention_bias"),),
        any_head_count=True,
        folds=GATED_FOLDS,
    ),
    Family(
        "Gemma",
        ("gemma",),
        "model.layers",
        GATED,
        bias_keys=(("self_attn", "attention_bias"),),
        any_head_count=True,
        folds=GATED_FOLDS,
        norm_offset=1.0,
    ),
    Family(
        "Gemma 2 and 3",
        ("gemma2", "gemma3_text"),
        "model.layers",
        GATED,
        bias_keys=(("self_attn", "attention_bias"),),
        folds=(
            Fold("attention input", "input_layernorm"),
            Fold("mlp input", "pre_feedforward_layernorm"),
            *INNER_FOLDS,
        ),
        norm_offset=1.0,
    ),
    Family(
        "OPT",
        ("opt",),
        "model.decoder.layers",
        (
            Linear("self_attn.q_proj", "attention input", "hidden", "hidden", compared=True),
            Linear("self_attn.k_proj", "attention input", "hidden", "hidden", compared=True),
            Linear("self_attn.v_proj", "attention input", "hidden", "hidden"),
            Linear("self_attn.out_proj", "attention output", "hidden", "hidden"),
            Linear("fc1", "mlp input", "hidden", "width"),
            Linear("fc2", "mlp activation", "width", "hidden"),
        ),
        width="ffn_dim",
        always_biased=True,
        folds=(
            Fold("attention input", "self_attn_layer_norm", _OPT_NORMS),
            Fold("attention output", "self_attn.v_proj"),
            Fold("mlp input", "final_layer_norm", _OPT_NORMS),
            Fold("mlp activation", "fc1", (("activation_function", "relu"),)),
        ),
    ),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        "gpt_neox.layers",
        (
            Linear("attention.query_key_value", "attention input", "hidden", "three hidden", compared=True),
            Linear("attention.dense", "attention output", "hidden", "hidden"),
            Linear("mlp.dense_h_to_4h", "mlp input", "hidden", "width"),
            Linear("mlp.dense_4h_to_h", "mlp activation", "width", "hidden"),
        ),
        renamed=(("lm_head.weight", "embed_out.weight"),),
        not_weights=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
        always_biased=True,
        folds=(
            Fold("attention input", "input_layernorm"),
            Fold("attention output", "attention.query_key_value"),
            Fold("mlp input", "post_attention_layernorm"),
        ),
    ),
)


def known_model_types() -> list[str]:
    """All `model_type`s that coldpress can take apart."""
    return sorted(model_type for family in FAMILIES for model_type in family.model_types)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model by its config.json. Raises UnsupportedModel."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    experts = next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)), None)
    what = f"a mixture of experts ({experts}: {config[experts]})" if experts else f"model_type {model_type!r}"
    raise UnsupportedModel(f"{what} is not supported; coldpress knows {', '.join(known_model_types())}")


def dimension(config: Mapping[str, Any], word: str, family: Family) -> int:
    """The number behind a dimension's word, from config.json."""
    hidden = int(config["hidden_size"])
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // heads)
    match word:
        case "hidden":
            return hidden
        case "three hidden":
            return 3 * hidden
        case "query":
            return heads * head
        case "key":
            return int(config.get("num_key_value_heads") or heads) * head
        case "width":
            return int(config[family.width])
    raise AssertionError(word)


def folds_of(config: Mapping[str, Any]) -> dict[str, Fold]:
    """{features: where a scale of them can go} in this model; features that are missing have no such place."""
    folds = family_of(config).folds
    return {fold.reads: fold for fold in folds if all(config.get(key, value) == value for key, value in fold.only_if)}


def feeding_rows(config: Mapping[str, Any], fold: Fold) -> list[int]:
    """For each of the features that a fold is about, which output of `fold.into` it comes from."""
    family = family_of(config)
    reader = next(linear for linear in family.linears if linear.reads == fold.reads)
    features = dimension(config, reader.inputs, family)
    into = next((linear for linear in family.linears if linear.name == fold.into), None)
    if into is None or into.outputs == reader.inputs:
        return list(range(features))
    heads = int(config["num_attention_heads"])
    head = features // heads
    if into.outputs == "three hidden":  # query, key and value of one head after the other
        return [3 * head * number + 2 * head + place for number in range(heads) for place in range(head)]
    sharing = heads // int(config.get("num_key_value_heads") or heads)
    return [number // sharing * head + place for number in range(heads) for place in range(head)]


@dataclass(frozen=True)
class Widths:
    """What width pruning can make smaller in a block.

    groups: key-value heads, each with the `heads_per_group` query heads that read it, all of `head` features; 0 where
    the family's attention cannot lose heads. channels: the FFN's width. group_weights, channel_weights: how many
    weights of the block's linear layers go with one of them; weights: how many there are in all.
    """

    groups: int
    heads_per_group: int
    head: int
    channels: int
    group_weights: int
    channel_weights: int
    weights: int


def widths(config: Mapping[str, Any]) -> Widths:
    """How wide the blocks of a model are."""
    family = family_of(config)
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    groups = int(config.get("num_key_value_heads") or heads)
    shared = {"query": heads * head // groups, "key": head}
    group_weights = channel_weights = weights = 0
    for linear in family.linears:
        rows, columns = (dimension(config, word, family) for word in (linear.outputs, linear.inputs))
        weights += rows * columns
        group_weights += shared.get(linear.outputs, 0) * columns + shared.get(linear.inputs, 0) * rows
        channel_weights += (linear.outputs == "width") * columns + (linear.inputs == "width") * rows
    return Widths(
        groups=groups if group_weights else 0,
        heads_per_group=heads // groups,
        head=head,
        channels=dimension(config, "width", family),
        group_weights=group_weights,
        channel_weights=channel_weights,
        weights=weights,
    )


def narrowed_config(
    config: Mapping[str, Any], groups: int, channels: int, biased: Iterable[str] = ()
) -> dict[str, Any]:
    """The config.json of a model whose blocks have so many key-value groups and FFN channels.

    biased: modules within the blocks ("self_attn", "mlp") whose linear layers are to have biases. A Llama whose number
    of heads `transformers` refuses, since it does not divide the hidden size, becomes a Mistral, which computes the
    same. Raises UnsupportedModel where no stock config says what is asked.
    """
    family, before = family_of(config), widths(config)
    narrowed = {**config, family.width: channels}
    switches = dict(family.bias_keys)
    for module in biased:
        if module not in switches:
            raise UnsupportedModel(f"{family.name} models have no place for biases in {module}; set bias to false")
        narrowed[switches[module]] = True
    if groups == before.groups:
        return narrowed
    heads = groups * before.heads_per_group
    narrowed.update(num_attention_heads=heads, num_key_value_heads=groups, head_dim=before.head)
    if int(config["hidden_size"]) % heads and not family.any_head_count:
        if family.name != "Llama":
            raise UnsupportedModel(
                f"{family.name} models in transformers need a number of heads that divides the hidden size of "
                f"{config['hidden_size']}, which {heads} does not; choose another sparsity, or set parts to ffn"
            )
        if any(narrowed.get(key) for key in switches.values()):
            raise UnsupportedModel(
                f"{heads} heads don't divide the hidden size of {config['hidden_size']}: such a Llama is written as a "
                "Mistral, which has no place for biases; set parts to ffn, or bias to false (flap)"
            )
        for key in (*switches.values(), "pretraining_tp"):
            narrowed.pop(key, None)
        narrowed.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    return narrowed


def has_biases(config: Mapping[str, Any]) -> bool:
    """Whether the layers that write to the residual stream have biases in every model of this config's kind."""
    return family_of(config).always_biased and bool(config.get("enable_bias", True))


def arranged_config(
    config: Mapping[str, Any], order: Sequence[int], layer_types: Sequence[str] | None = None
) -> dict[str, Any]:
    """The config.json of a model whose blocks are those of `config` in the given order.

    layer_types: the kind of attention of each present block, where the family tells kinds apart.
    """
    arranged = {**config, "num_hidden_layers": len(order)}
    types = layer_types or config.get("layer_types")
    if types:
        arranged["layer_types"] = [types[index] for index in order]
    return arranged


def block_count(config: Mapping[str, Any]) -> int:
    """How many decoder blocks the model has."""
    return int(config["num_hidden_layers"])


def is_tied(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether the head is the embedding: it has no weight of its own among the checkpoint's tensors."""
    family = family_of(config)
    return family.file_name("lm_head.weight") not in set(names)


def linear_parameters(config: Mapping[str, Any]) -> int:
    """Number of weights in the block linears, which is what sparsity and bits per weight are about."""
    per_block = sum(rows * columns for rows, columns in family_of(config).linear_weights(config).values())
    return per_block * block_count(config)
