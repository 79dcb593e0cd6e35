"""Model families: how each reads a Hugging Face config, and one table of its tensors both ways.

To add a family, write the function that reads its config and the table of its tensors, or take a
relative's, and enter them in FAMILIES.

Letters in the tables' patterns, with those of `transformer.py`: T positions, p parameters that
are stored as one tensor.
"""

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import einops
import numpy as np
from flax import traverse_util

from dpo_jax.models import transformer
from dpo_jax.models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
    longrope_attention_factor,
    yarn_attention_factor,
)
from dpo_jax.models.transformer import LayerKind, TransformerConfig

# Tensors that are not read: constants that old versions of transformers stored beside the weights,
# and the parts of a model of text and images that see images.
IGNORED = re.compile(
    r"\b(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$"
    r"|\b(vision_tower|multi_modal_projector)\."
)
# The model_type of models of text and images whose text part is a family. Its tensors have the
# family's names, with TEXT_PART before them or after "model.".
WITH_IMAGES = ("gemma3",)
TEXT_PART = "language_model."


# Sizes that every Hugging Face config gives, and what no model comes near.
SIZES = {
    "vocab_size": 10**7,
    "hidden_size": 10**6,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "max_position_embeddings": 10**9,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, or one in every layer, and the parameters that it holds.

    name: in the checkpoint; {} stands for the layer, a second {} for the expert. pattern: einops,
    from its axes to the parameter's; a leading p on the right is one slice for each path. Where the
    slices differ in shape, each has a pattern, and the patterns stand in the order of the slices
    along the first axis, with | between them.
    """

    name: str
    pattern: str
    paths: tuple[str, ...]

    def names(self, config: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield its name in each layer, and of each expert, with its place in the parameters.

        The place is an index of their first axes: (), (layer,) or (layer, expert).
        """
        sizes = (config.layers, config.experts)[: self.name.count("{}")]
        for place in np.ndindex(sizes):
            yield self.name.format(*place), place

    def shape(self, config: TransformerConfig) -> tuple[int, ...]:
        """Return its shape in the checkpoint."""
        if self._parts:
            shapes = [part.shape(config) for part in self._parts]
            return (sum(first for first, *_ in shapes), *shapes[0][1:])
        left, _ = self.pattern.split(" -> ")
        # A classifier's head is stored as [1, D]: einops writes that axis as 1.
        sizes = self._sizes(config) | {"1": 1}
        groups = [group.strip("()").split() for group in re.findall(r"\(.+?\)|\w", left)]
        return tuple(math.prod(sizes[axis] for axis in group) for group in groups)

    def unpack(self, config: TransformerConfig, stored: np.ndarray) -> list[np.ndarray]:
        """Return the parameters that it holds, in the order of its paths."""
        if self._parts:
            ends = np.cumsum([part.shape(config)[0] for part in self._parts])
            pieces = zip(self._parts, np.split(stored, ends[:-1]), strict=True)
            return [part.unpack(config, piece)[0] for part, piece in pieces]
        params = einops.rearrange(stored, self.pattern, **self._sizes(config))
        return list(params) if len(self.paths) > 1 else [params]

    def pack(self, params: list[np.ndarray]) -> np.ndarray:
        """Return the tensor that holds these parameters: the inverse of `unpack`."""
        if self._parts:
            pieces = zip(self._parts, params, strict=True)
            return np.concatenate([part.pack([param]) for part, param in pieces])
        left, right = self.pattern.split(" -> ")
        stacked = np.stack(params) if len(params) > 1 else params[0]
        # Read from right to left, the pattern is its own inverse.
        return einops.rearrange(stacked, f"{right} -> {left}")

    @functools.cached_property
    def _parts(self) -> tuple["Tensor", ...]:
        """Its slices, each as a tensor, where they differ in shape."""
        patterns = self.pattern.split(" | ")
        if len(patterns) == 1:
            return ()
        return tuple(
            Tensor(self.name, pattern, (path,))
            for pattern, path in zip(patterns, self.paths, strict=True)
        )

    def _sizes(self, config):
        sizes = {
            "D": config.width,
            "F": config.mlp_width,
            "V": config.vocab,
            "T": config.max_positions,
            "H": config.heads,
            "K": config.kv_heads,
            "C": config.head_width,
            "E": config.experts,
            "p": len(self.paths),
        }
        return {axis: size for axis, size in sizes.items() if axis in self.pattern}


@dataclasses.dataclass(frozen=True)
class Family:
    architecture: str  # the class that transformers loads it as
    base: str  # prefix of the names, which checkpoints of the model without its head leave out
    # (its Hugging Face config, a config with what all families share) -> the config
    configure: Callable
    tensors: tuple[Tensor, ...]
    classifier: str = ""  # its class with a head for rewards, if it is not named like the other

    def architecture_with(self, head: str) -> str:
        """Return the class that transformers loads it as, with a head of this kind."""
        if head == "lm":
            return self.architecture
        if self.classifier:
            return self.classifier
        return re.sub("LMHeadModel|ForCausalLM", "ForSequenceClassification", self.architecture)

    def name_of(self, path: str) -> str:
        """Return the name of the tensor that holds one parameter and nothing else."""
        return next(tensor.name for tensor in self.tensors if tensor.paths == (path,))


def from_hf(hf_config, **options) -> TransformerConfig:
    """Return the TransformerConfig of a model from its Hugging Face config.

    options: fields that config.json does not say: head, scalar_bias, dtype, attention, remat,
    unroll. Raises ValueError for a family or a setting whose maths this decoder does not have.
    """
    configure = family(hf_config.model_type).configure
    # Quantised weights are stored as integers and scales, which only their own kernels read.
    _only(hf_config, quantization_config=None)
    for field, most in SIZES.items():
        _check_size(hf_config, field, getattr(hf_config, field, None), most)
    width = hf_config.hidden_size
    heads = hf_config.num_attention_heads
    # What most families say under the same names, or leave to a default; `configure` replaces the
    # rest.
    shared = TransformerConfig(
        vocab=hf_config.vocab_size,
        width=width,
        layers=hf_config.num_hidden_layers,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=4 * width,
        max_positions=_max_positions(hf_config),
        tied=hf_config.tie_word_embeddings,
        **options,
    )
    # The family's own fields come last, and are checked as a whole.
    config = configure(hf_config, shared)
    _check(hf_config, config)
    return config


def at_length(hf_config, max_length: int):
    """Return the Hugging Face config of a model for sequences of up to so many tokens.

    transformers takes longrope's short or long factors anew for every batch, by its longest
    sequence, so that a row's numbers depend on the other rows, and a completion's on its end. Here
    they are chosen once: a model for more than its original length has the long ones under both
    names. So it is the same in transformers, too. Every other config is returned as it is.
    """
    rope = getattr(hf_config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") != "longrope":
        return hf_config
    if max_length <= _rope_number(hf_config, rope, "original_max_position_embeddings"):
        return hf_config
    if rope.get("short_factor") == rope.get("long_factor"):
        return hf_config
    hf_config = copy.deepcopy(hf_config)
    hf_config.rope_parameters["short_factor"] = rope.get("long_factor")
    return hf_config


def _max_positions(hf) -> int:
    """Return how many positions a model was made for, with the factors that it takes."""
    rope = getattr(hf, "rope_parameters", None) or {}
    is_short = rope.get("short_factor") != rope.get("long_factor")
    if rope.get("rope_type") == "longrope" and is_short:
        original = _rope_number(hf, rope, "original_max_position_embeddings")
        return min(original, hf.max_position_embeddings)
    return hf.max_position_embeddings


def family(model_type: str) -> Family:
    """Return the family of a Hugging Face `model_type`; ValueError when there is none."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}. To add a family, see docs/add_a_family.md."
        )
    return FAMILIES[model_type]


@functools.cache
def tensors(model_type: str, config: TransformerConfig) -> tuple[Tensor, ...]:
    """Return the tensors of this config's checkpoints: those of the family that the model has."""
    # A table lists all that its family may have. A model lacks some: the head if it is tied, or
    # biases.
    paths = traverse_util.flatten_dict(transformer.abstract(config), sep="/")
    return tuple(
        tensor for tensor in family(model_type).tensors if paths.keys() >= set(tensor.paths)
    )


# A field of the config may change the maths and no shape: the weights would load, and the numbers
# be wrong. Such a field is either used below, or refused where it has a value that the decoder does
# not compute.


def _gpt2(hf, config):
    _only(
        hf,
        # Scores are always divided by the root of the head's width.
        scale_attn_weights=True,
        # They are not divided by the layer's number as well.
        scale_attn_by_inverse_layer_idx=False,
        # There is no encoder to attend to.
        add_cross_attention=False,
    )
    return replace(
        config,
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        learned_positions=True,
        activation=hf.activation_function,
        gated=False,
        # None stands for four times the width.
        mlp_width=hf.n_inner or config.mlp_width,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _gptj(hf, config):
    # GPT-J alone rotates neighbouring channels, has a bias in the head, and gives attention and MLP
    # one and the same norm. Its attention has no biases.
    return replace(
        config,
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        parallel=True,
        shared_norm=True,
        activation=hf.activation_function,
        gated=False,
        mlp_width=hf.n_inner or config.mlp_width,
        pattern=(LayerKind(rope=Rope(hf.rotary_dim, interleaved=True)),),
        mlp_bias=True,
        head_bias=True,
    )


def _gpt_neox(hf, config):
    # Pythia rotates the first quarter of each head. int() rounds down, as transformers does.
    rope_width = int(config.head_width * hf.rope_parameters.get("partial_rotary_factor", 1.0))
    return replace(
        config,
        pattern=(LayerKind(rope=_rope(hf, hf.rope_parameters, rope_width)),),
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        # Unlike GPT-J's, its MLP has a norm of its own.
        parallel=hf.use_parallel_residual,
        activation=hf.hidden_act,
        gated=False,
        mlp_width=hf.intermediate_size,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=True,
    )


# The relatives of Llama differ in biases, in norms, and in what each layer's attention sees.


def _llama(hf, config):
    return replace(
        _gated(hf, config, ["full_attention"]),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )


def _mistral(hf, config):
    return _gated(hf, config, _type_of_all(hf))


def _qwen2(hf, config):
    # Biases of q, k and v alone, which no field says: they are part of the architecture.
    return replace(_gated(hf, config, hf.layer_types), qkv_bias=True)


def _qwen3(hf, config):
    return replace(
        _gated(hf, config, hf.layer_types),
        qk_norm="head",
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
    )


def _smollm3(hf, config):
    config = _gated(hf, config, hf.layer_types)
    entries = hf.no_rope_layers[: config.layers]
    if len(entries) < config.layers or any(entry not in (0, 1) for entry in entries):
        raise _unsupported(
            hf, f"no_rope_layers = {hf.no_rope_layers}", f"{config.layers} entries of 0 or 1 are"
        )
    kinds = []
    for layer, has_rope in zip(range(config.layers), entries, strict=True):
        kind = config.kind(layer)
        kinds.append(kind if has_rope else replace(kind, rope=None))
    return replace(
        config,
        pattern=_pattern(kinds),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )


def _olmo(hf, config):
    # transformers 4 has one base for all layers: an export with two would be another model there.
    thetas = [
        hf.rope_parameters.get(layer_type, hf.rope_parameters)["rope_theta"]
        for layer_type in ("full_attention", "sliding_attention")
    ]
    if thetas[0] != thetas[1]:
        raise _unsupported(
            hf,
            f"rope_theta = {thetas[0]} with full attention and {thetas[1]} with a window",
            "one of all layers is: give rope_parameters for both types",
        )
    # OLMo 2 sees everything in every layer; OLMo 3 has a window in most.
    layer_types = getattr(hf, "layer_types", None) or ["full_attention"]
    return replace(
        _gated(hf, config, layer_types),
        norm_before=False,
        norm_after=True,
        qk_norm="width",
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
    )


def _gemma2(hf, config):
    return replace(_gemma(hf, config), attention_softcap=hf.attn_logit_softcapping)


def _gemma3(hf, config):
    # transformers has the field, and does not use it.
    _only(hf, attn_logit_softcapping=None)
    return replace(_gemma(hf, config), qk_norm="head")


def _gemma(hf, config):
    """Set what Gemma 2 and Gemma 3 share."""
    if getattr(hf, "use_bidirectional_attention", None):
        raise _unsupported(hf, "use_bidirectional_attention = True", "only causal attention is")
    _check_number(hf, "query_pre_attn_scalar", hf.query_pre_attn_scalar)
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(hf, field) is not None:
            _check_number(hf, field, getattr(hf, field))
    return replace(
        _gated(hf, config, hf.layer_types, activation=hf.hidden_activation),
        norm_scale_from_one=True,
        norm_after=True,
        embed_scale=config.width**0.5,
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        logits_softcap=hf.final_logit_softcapping,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
    )


def _phi3(hf, config):
    # Phi-4-mini rotates three quarters of each head.
    return _gated(hf, config, _type_of_all(hf), partial=True)


def _qwen3_moe(hf, config):
    _check_size(hf, "decoder_sparse_step", hf.decoder_sparse_step, SIZES["num_hidden_layers"])
    dense = set(hf.mlp_only_layers)
    dense |= {layer for layer in range(config.layers) if (layer + 1) % hf.decoder_sparse_step}
    if dense:
        raise _unsupported(
            hf, f"an MLP without experts in layer {min(dense)}", "all layers must have them"
        )
    return _with_experts(
        hf,
        replace(
            _gated(hf, config, _type_of_all(hf)),
            qk_norm="head",
            qkv_bias=hf.attention_bias,
            out_bias=hf.attention_bias,
            mlp_width=hf.moe_intermediate_size,
            norm_topk_prob=hf.norm_topk_prob,
        ),
    )


def _mixtral(hf, config):
    # Noise on the router's input, in training alone.
    _only(hf, router_jitter_noise=0.0)
    return _with_experts(hf, _gated(hf, config, _type_of_all(hf)))


def _with_experts(hf, config):
    _check_size(hf, "num_experts", hf.num_experts, 10**5)
    _check_size(hf, "num_experts_per_tok", hf.num_experts_per_tok, hf.num_experts)
    return replace(config, experts=hf.num_experts, experts_per_token=hf.num_experts_per_tok)


def _gated(hf, config, layer_types, *, activation=None, partial=False):
    """Set what Llama and its relatives share.

    layer_types: of each layer, or the one type that there is: full_attention, sliding_attention.
    activation: where the family has a name of its own for hidden_act. partial: whether it may
    rotate a part of each head.
    """
    # Some models have heads whose widths do not add up to the model's (Qwen3).
    head_width = getattr(hf, "head_dim", None)
    if head_width is None:
        head_width = config.head_width
    kinds = [_layer_kind(hf, layer_type, head_width, partial) for layer_type in layer_types]
    return replace(
        config,
        pattern=_pattern(kinds),
        norm="rms",
        norm_eps=hf.rms_norm_eps,
        head_width=head_width,
        kv_heads=hf.num_key_value_heads,
        activation=activation or hf.hidden_act,
        gated=True,
        mlp_width=hf.intermediate_size,
    )


def _type_of_all(hf) -> list[str]:
    """Return the one type of all layers: with a window where the config has one."""
    return ["full_attention" if hf.sliding_window is None else "sliding_attention"]


def _layer_kind(hf, layer_type: str, head_width: int, partial: bool) -> LayerKind:
    """Return the kind of a layer by the name that `layer_types` has for it.

    partial: whether it may rotate a part of each head.
    """
    if layer_type == "full_attention":
        window = None
    elif layer_type == "sliding_attention":
        _check_size(hf, "sliding_window", hf.sliding_window, 10**9)
        window = hf.sliding_window
    else:
        raise _unsupported(
            hf, f"a layer of type {layer_type!r}", "full_attention and sliding_attention are"
        )
    # Where the types have ropes of their own, each stands under its type's name (Gemma 3, OLMo 3).
    rope = hf.rope_parameters.get(layer_type, hf.rope_parameters)
    share = rope.get("partial_rotary_factor", 1.0)
    # Weights for a part of each head would load all the same, and be rotated wrongly.
    if share != 1 and not partial:
        raise _unsupported(hf, f"rope_parameters.partial_rotary_factor = {share}", "only 1.0 is")
    # int() rounds down, as transformers does.
    return LayerKind(window, _rope(hf, rope, int(head_width * share)))


def _rope(hf, rope: dict, width: int) -> Rope:
    """Return the rotary embedding of `rope_parameters`, scaled or not, over channels of a head."""
    return Rope(width, rope["rope_theta"], scaling=_scaling(hf, rope, width))


def _scaling(hf, rope: dict, width: int) -> Scaling | None:
    """Return how a rotary embedding is stretched by its `rope_parameters`; None: not at all."""
    kind = rope.get("rope_type")
    number = functools.partial(_rope_number, hf, rope)
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(number("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            number("factor"),
            number("low_freq_factor"),
            number("high_freq_factor"),
            number("original_max_position_embeddings"),
        )
    if kind not in ("yarn", "longrope"):
        kinds = "'default', 'linear', 'llama3', 'yarn' and 'longrope'"
        raise _unsupported(hf, f"rope_parameters.rope_type = {kind!r}", f"{kinds} are")

    # Both take the logarithms of these.
    number("rope_theta", above=1)
    original = number("original_max_position_embeddings", above=1)
    factor = number("factor", default=hf.max_position_embeddings / original)
    is_nested = rope is not hf.rope_parameters
    if kind == "longrope":
        if is_nested:
            raise _unsupported(hf, "longrope for one type of layer", "it must be that of all")
        return LongRopeScaling(
            # For another length than this one, `at_length` has put the others in their place.
            _rope_factors(hf, rope, "short_factor", width),
            number("attention_factor", default=longrope_attention_factor(factor, original)),
        )
    attention_factor = yarn_attention_factor(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        above = yarn_attention_factor(factor, number("mscale"))
        attention_factor = above / yarn_attention_factor(factor, number("mscale_all_dim"))
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise _unsupported(hf, f"rope_parameters.truncate = {truncate!r}", "true and false are")
    # transformers looks for it beside the layers' types, not in them.
    if is_nested and not truncate:
        raise _unsupported(
            hf, "rope_parameters.truncate = False for one type of layer", "only True is"
        )
    return YarnScaling(
        factor,
        original,
        number("attention_factor", default=attention_factor),
        number("beta_fast", default=32),
        number("beta_slow", default=1),
        truncate,
    )


def _rope_number(hf, rope: dict, name: str, *, default=None, above=0):
    """Return a number of `rope_parameters`; the default where it is not given."""
    value = default if rope.get(name) is None else rope[name]
    _check_number(hf, f"rope_parameters.{name}", value, above)
    return value


def _rope_factors(hf, rope: dict, name: str, width: int) -> tuple[float, ...]:
    """Return the numbers that `rope_parameters` have for each frequency of a rotary width."""
    values = rope.get(name)
    if not isinstance(values, list) or len(values) != width // 2:
        found = f"{len(values)} numbers" if isinstance(values, list) else repr(values)
        raise _unsupported(
            hf, f"rope_parameters.{name} = {found}", f"a list of {width // 2} numbers is"
        )
    for value in values:
        _check_number(hf, f"a number in rope_parameters.{name}", value)
    return tuple(values)


def _pattern(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    """Return the shortest pattern that gives the kinds of all layers when it is repeated."""
    for period in range(1, len(kinds)):
        if all(kind == kinds[layer % period] for layer, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    return tuple(kinds)


def _only(hf, **supported):
    """Refuse a field with another value than the one supported."""
    for field, value in supported.items():
        found = getattr(hf, field, value)
        if found != value:
            raise _unsupported(hf, f"{field} = {found!r}", f"only {value!r} is")


def _check(hf, config: TransformerConfig):
    """Refuse what no family supports."""
    _check_size(hf, "num_key_value_heads", config.kv_heads, 10**7)
    _check_size(hf, "head_dim", config.head_width, 10**7)
    _check_size(hf, "intermediate_size", config.mlp_width, 10**7)
    numbers = {"the norms' epsilon": config.norm_eps}
    for kind in config.pattern:
        if kind.rope is not None:
            numbers["rope_theta"] = kind.rope.theta
    for name, value in numbers.items():
        _check_number(hf, name, value)
    if config.activation not in transformer.ACTIVATIONS:
        known = ", ".join(transformer.ACTIVATIONS)
        raise _unsupported(hf, f"activation {config.activation!r}", f"{known} are")
    # Where head_dim is given, the heads need not divide the width.
    if config.width % config.heads and getattr(hf, "head_dim", None) is None:
        raise _unsupported(
            hf, f"a width of {config.width} in {config.heads} heads", "it must be a multiple"
        )
    # Each key head serves the same number of query heads.
    if config.heads % config.kv_heads:
        raise _unsupported(
            hf,
            f"num_key_value_heads = {config.kv_heads}",
            f"it must divide num_attention_heads = {config.heads}",
        )
    for kind in config.pattern:
        # Channels are rotated in pairs.
        width = kind.rope.width if kind.rope else 0
        if width % 2 or width > config.head_width:
            raise _unsupported(
                hf,
                f"a rotary width of {width} in heads of {config.head_width}",
                "it must be even and no wider than the head",
            )


def _check_size(hf, field: str, value, most: int):
    """Refuse a size that is no whole number of 1 or more, or beyond reason."""
    if type(value) is not int or not 1 <= value <= most:
        raise _unsupported(
            hf, f"{field} = {value!r}", f"it must be a whole number from 1 to {most:,}"
        )


def _check_number(hf, name: str, value, above=0):
    """Refuse what is no number above 0, or another one, or beyond reason."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not above < value < 1e30:  # not for nan either
        raise _unsupported(hf, f"{name} = {value!r}", f"it must be a number above {above}")


def _unsupported(hf, found: str, supported: str) -> ValueError:
    return ValueError(
        f"config.json of this {hf.model_type} model: {found} is not supported; {supported}."
    )


def _table(*rows) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, pattern, tuple(paths)) for name, pattern, *paths in rows)


# GPT-2 stores kernels [inputs, outputs]; all others store them [outputs, inputs].
GPT2_TENSORS = _table(
    ("transformer.wte.weight", "V D -> V D", "embed/tokens"),
    ("transformer.wpe.weight", "T D -> T D", "embed/positions"),
    ("transformer.h.{}.ln_1.weight", "D -> D", "layers/norm_attention/scale"),
    ("transformer.h.{}.ln_1.bias", "D -> D", "layers/norm_attention/bias"),
    (
        "transformer.h.{}.attn.c_attn.weight",
        "D (p H C) -> p D H C",
        "layers/attention/q/kernel",
        "layers/attention/k/kernel",
        "layers/attention/v/kernel",
    ),
    (
        "transformer.h.{}.attn.c_attn.bias",
        "(p H C) -> p H C",
        "layers/attention/q/bias",
        "layers/attention/k/bias",
        "layers/attention/v/bias",
    ),
    ("transformer.h.{}.attn.c_proj.weight", "(H C) D -> H C D", "layers/attention/out/kernel"),
    ("transformer.h.{}.attn.c_proj.bias", "D -> D", "layers/attention/out/bias"),
    ("transformer.h.{}.ln_2.weight", "D -> D", "layers/norm_mlp/scale"),
    ("transformer.h.{}.ln_2.bias", "D -> D", "layers/norm_mlp/bias"),
    ("transformer.h.{}.mlp.c_fc.weight", "D F -> D F", "layers/mlp/up/kernel"),
    ("transformer.h.{}.mlp.c_fc.bias", "F -> F", "layers/mlp/up/bias"),
    ("transformer.h.{}.mlp.c_proj.weight", "F D -> F D", "layers/mlp/down/kernel"),
    ("transformer.h.{}.mlp.c_proj.bias", "D -> D", "layers/mlp/down/bias"),
    ("transformer.ln_f.weight", "D -> D", "norm_final/scale"),
    ("transformer.ln_f.bias", "D -> D", "norm_final/bias"),
    ("lm_head.weight", "V D -> D V", "head/kernel"),
    ("score.weight", "1 D -> D", "head/scalar"),
    ("score.bias", "1 -> 1", "head/scalar_bias"),
)

GPTJ_TENSORS = _table(
    ("transformer.wte.weight", "V D -> V D", "embed/tokens"),
    ("transformer.h.{}.ln_1.weight", "D -> D", "layers/norm_attention/scale"),
    ("transformer.h.{}.ln_1.bias", "D -> D", "layers/norm_attention/bias"),
    ("transformer.h.{}.attn.q_proj.weight", "(H C) D -> D H C", "layers/attention/q/kernel"),
    ("transformer.h.{}.attn.k_proj.weight", "(H C) D -> D H C", "layers/attention/k/kernel"),
    ("transformer.h.{}.attn.v_proj.weight", "(H C) D -> D H C", "layers/attention/v/kernel"),
    ("transformer.h.{}.attn.out_proj.weight", "D (H C) -> H C D", "layers/attention/out/kernel"),
    ("transformer.h.{}.mlp.fc_in.weight", "F D -> D F", "layers/mlp/up/kernel"),
    ("transformer.h.{}.mlp.fc_in.bias", "F -> F", "layers/mlp/up/bias"),
    ("transformer.h.{}.mlp.fc_out.weight", "D F -> F D", "layers/mlp/down/kernel"),
    ("transformer.h.{}.mlp.fc_out.bias", "D -> D", "layers/mlp/down/bias"),
    ("transformer.ln_f.weight", "D -> D", "norm_final/scale"),
    ("transformer.ln_f.bias", "D -> D", "norm_final/bias"),
    ("lm_head.weight", "V D -> D V", "head/kernel"),
    ("score.weight", "1 D -> D", "head/scalar"),
    ("score.bias", "1 -> 1", "head/scalar_bias"),
    ("lm_head.bias", "V -> V", "head/bias"),
)

# Its q, k and v are one tensor, and alternate head by head: (H p C). GPT-2's are one after another:
# (p H C).
GPT_NEOX_TENSORS = _table(
    ("gpt_neox.embed_in.weight", "V D -> V D", "embed/tokens"),
    ("gpt_neox.layers.{}.input_layernorm.weight", "D -> D", "layers/norm_attention/scale"),
    ("gpt_neox.layers.{}.input_layernorm.bias", "D -> D", "layers/norm_attention/bias"),
    (
        "gpt_neox.layers.{}.attention.query_key_value.weight",
        "(H p C) D -> p D H C",
        "layers/attention/q/kernel",
        "layers/attention/k/kernel",
        "layers/attention/v/kernel",
    ),
    (
        "gpt_neox.layers.{}.attention.query_key_value.bias",
        "(H p C) -> p H C",
        "layers/attention/q/bias",
        "layers/attention/k/bias",
        "layers/attention/v/bias",
    ),
    (
        "gpt_neox.layers.{}.attention.dense.weight",
        "D (H C) -> H C D",
        "layers/attention/out/kernel",
    ),
    ("gpt_neox.layers.{}.attention.dense.bias", "D -> D", "layers/attention/out/bias"),
    ("gpt_neox.layers.{}.post_attention_layernorm.weight", "D -> D", "layers/norm_mlp/scale"),
    ("gpt_neox.layers.{}.post_attention_layernorm.bias", "D -> D", "layers/norm_mlp/bias"),
    ("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "F D -> D F", "layers/mlp/up/kernel"),
    ("gpt_neox.layers.{}.mlp.dense_h_to_4h.bias", "F -> F", "layers/mlp/up/bias"),
    ("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", "D F -> F D", "layers/mlp/down/kernel"),
    ("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", "D -> D", "layers/mlp/down/bias"),
    ("gpt_neox.final_layer_norm.weight", "D -> D", "norm_final/scale"),
    ("gpt_neox.final_layer_norm.bias", "D -> D", "norm_final/bias"),
    ("embed_out.weight", "V D -> D V", "head/kernel"),
    ("score.weight", "1 D -> D", "head/scalar"),
    ("score.bias", "1 -> 1", "head/scalar_bias"),
)

# Mistral's, Qwen's and SmolLM3's too. Rows for what a model lacks are left out by `tensors`.
LLAMA_TENSORS = _table(
    ("model.embed_tokens.weight", "V D -> V D", "embed/tokens"),
    ("model.layers.{}.input_layernorm.weight", "D -> D", "layers/norm_attention/scale"),
    ("model.layers.{}.self_attn.q_proj.weight", "(H C) D -> D H C", "layers/attention/q/kernel"),
    ("model.layers.{}.self_attn.q_proj.bias", "(H C) -> H C", "layers/attention/q/bias"),
    ("model.layers.{}.self_attn.k_proj.weight", "(K C) D -> D K C", "layers/attention/k/kernel"),
    ("model.layers.{}.self_attn.k_proj.bias", "(K C) -> K C", "layers/attention/k/bias"),
    ("model.layers.{}.self_attn.v_proj.weight", "(K C) D -> D K C", "layers/attention/v/kernel"),
    ("model.layers.{}.self_attn.v_proj.bias", "(K C) -> K C", "layers/attention/v/bias"),
    ("model.layers.{}.self_attn.q_norm.weight", "C -> C", "layers/attention/q_norm/scale"),
    ("model.layers.{}.self_attn.k_norm.weight", "C -> C", "layers/attention/k_norm/scale"),
    ("model.layers.{}.self_attn.o_proj.weight", "D (H C) -> H C D", "layers/attention/out/kernel"),
    ("model.layers.{}.self_attn.o_proj.bias", "D -> D", "layers/attention/out/bias"),
    ("model.layers.{}.post_attention_layernorm.weight", "D -> D", "layers/norm_mlp/scale"),
    ("model.layers.{}.mlp.gate_proj.weight", "F D -> D F", "layers/mlp/gate/kernel"),
    ("model.layers.{}.mlp.gate_proj.bias", "F -> F", "layers/mlp/gate/bias"),
    ("model.layers.{}.mlp.up_proj.weight", "F D -> D F", "layers/mlp/up/kernel"),
    ("model.layers.{}.mlp.up_proj.bias", "F -> F", "layers/mlp/up/bias"),
    ("model.layers.{}.mlp.down_proj.weight", "D F -> F D", "layers/mlp/down/kernel"),
    ("model.layers.{}.mlp.down_proj.bias", "D -> D", "layers/mlp/down/bias"),
    ("model.norm.weight", "D -> D", "norm_final/scale"),
    ("lm_head.weight", "V D -> D V", "head/kernel"),
    ("score.weight", "1 D -> D", "head/scalar"),
    ("score.bias", "1 -> 1", "head/scalar_bias"),
)


def _instead(table: tuple[Tensor, ...], *rows) -> tuple[Tensor, ...]:
    """Return a table with other rows for the parameters of these."""
    rows = _table(*rows)
    replaced = {path for tensor in rows for path in tensor.paths}
    return (*[tensor for tensor in table if replaced.isdisjoint(tensor.paths)], *rows)


# Gemma has norms before and after; Llama's name for the one before the MLP is that of another here.
GEMMA_TENSORS = _instead(
    LLAMA_TENSORS,
    (
        "model.layers.{}.post_attention_layernorm.weight",
        "D -> D",
        "layers/norm_after_attention/scale",
    ),
    ("model.layers.{}.pre_feedforward_layernorm.weight", "D -> D", "layers/norm_mlp/scale"),
    ("model.layers.{}.post_feedforward_layernorm.weight", "D -> D", "layers/norm_after_mlp/scale"),
)

# Norms after alone, and those of queries and keys over all heads.
OLMO_TENSORS = _instead(
    GEMMA_TENSORS,
    ("model.layers.{}.self_attn.q_norm.weight", "(H C) -> H C", "layers/attention/q_norm/scale"),
    ("model.layers.{}.self_attn.k_norm.weight", "(K C) -> K C", "layers/attention/k_norm/scale"),
)

# Llama's, with q, k and v as one tensor, whose parts are of unequal sizes, and gate and up as
# another.
PHI3_TENSORS = _instead(
    LLAMA_TENSORS,
    (
        "model.layers.{}.self_attn.qkv_proj.weight",
        "(H C) D -> D H C | (K C) D -> D K C | (K C) D -> D K C",
        "layers/attention/q/kernel",
        "layers/attention/k/kernel",
        "layers/attention/v/kernel",
    ),
    (
        "model.layers.{}.mlp.gate_up_proj.weight",
        "(p F) D -> p D F",
        "layers/mlp/gate/kernel",
        "layers/mlp/up/kernel",
    ),
)

QWEN3_MOE_TENSORS = LLAMA_TENSORS + _table(
    ("model.layers.{}.mlp.gate.weight", "E D -> D E", "layers/mlp/router/kernel"),
    (
        "model.layers.{}.mlp.experts.{}.gate_proj.weight",
        "F D -> D F",
        "layers/mlp/experts/gate/kernel",
    ),
    ("model.layers.{}.mlp.experts.{}.up_proj.weight", "F D -> D F", "layers/mlp/experts/up/kernel"),
    (
        "model.layers.{}.mlp.experts.{}.down_proj.weight",
        "D F -> F D",
        "layers/mlp/experts/down/kernel",
    ),
)

MIXTRAL_TENSORS = LLAMA_TENSORS + _table(
    ("model.layers.{}.block_sparse_moe.gate.weight", "E D -> D E", "layers/mlp/router/kernel"),
    (
        "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
        "F D -> D F",
        "layers/mlp/experts/gate/kernel",
    ),
    (
        "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
        "F D -> D F",
        "layers/mlp/experts/up/kernel",
    ),
    (
        "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
        "D F -> F D",
        "layers/mlp/experts/down/kernel",
    ),
)

FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", "transformer.", _gpt2, GPT2_TENSORS),
    "gptj": Family("GPTJForCausalLM", "transformer.", _gptj, GPTJ_TENSORS),
    "gpt_neox": Family("GPTNeoXForCausalLM", "gpt_neox.", _gpt_neox, GPT_NEOX_TENSORS),
    "llama": Family("LlamaForCausalLM", "model.", _llama, LLAMA_TENSORS),
    "mistral": Family("MistralForCausalLM", "model.", _mistral, LLAMA_TENSORS),
    "qwen2": Family("Qwen2ForCausalLM", "model.", _qwen2, LLAMA_TENSORS),
    "qwen3": Family("Qwen3ForCausalLM", "model.", _qwen3, LLAMA_TENSORS),
    "smollm3": Family("SmolLM3ForCausalLM", "model.", _smollm3, LLAMA_TENSORS),
    "olmo2": Family("Olmo2ForCausalLM", "model.", _olmo, OLMO_TENSORS),
    "olmo3": Family("Olmo3ForCausalLM", "model.", _olmo, OLMO_TENSORS),
    "gemma2": Family("Gemma2ForCausalLM", "model.", _gemma2, GEMMA_TENSORS),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "model.",
        _gemma3,
        GEMMA_TENSORS,
        # Gemma3ForSequenceClassification is the model with images.
        classifier="Gemma3TextForSequenceClassification",
    ),
    "phi3": Family("Phi3ForCausalLM", "model.", _phi3, PHI3_TENSORS),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "model.", _qwen3_moe, QWEN3_MOE_TENSORS),
    "mixtral": Family("MixtralForCausalLM", "model.", _mixtral, MIXTRAL_TENSORS),
}
