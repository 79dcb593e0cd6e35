"""One decoder for all families of models; `families.py` lists them.

It is used functionally: `hidden(config, params, ...)` runs the trunk over nested dicts of arrays,
`unembed` the head, and `step` the trunk with a cache of keys and values, to sample from. Layers are
stacked on a leading axis and scanned; layers of several kinds have a branch for each. Trained
weights are float32, the trunk computes in `config.dtype`, and norms, rotary angles, softmax and
logits are float32. Only this room uses flax.linen.

Letters in array names and einsums:

    S  shards of a batch (any leading batch axis)    N  tokens of a shard
    R  attention rows of a shard                     T  queries of a row
    U  keys of a row, slots of the cache             M  positions of a shard that predict
    Q  responses of a shard                          L  layers
    D  width                                         F  feed-forward width
    V  vocabulary                                    H  query heads
    K  key/value heads                               G  query heads per key/value head
    C  width of a head                               r  rank of an adapter
    E  experts                                       k  experts of a token
"""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.attention import attend, attend_cached
from dpo_jax.models.experts import Experts, Routing
from dpo_jax.models.linear import Linear, over_tokens, softcapped, wide_product
from dpo_jax.models.rope import LongRopeScaling, Rope, rotary_angles, rotate
from dpo_jax.parallel.sharding import BATCH, SPLIT, constrain, device, path_name

HEADS = ("lm", "reward", "lm_value")
# A scan copies what each layer keeps for the backward pass into one array, and out again; unrolled
# layers keep it where it is. On 2 CPU cores deeper models took longer to compile, and no less to
# run. On an H200 GPT-2's 12 layers took a fifth less time and hardly longer to compile; deeper ones
# were not measured. Nor was a TPU, where the scan stays.
MOST_UNROLLED = {"cpu": 6, "gpu": 12}
ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_fast": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}
# What the forward pass keeps of a layer beyond its input; the rest is computed again when the
# backward pass needs it. full: nothing, the least memory for about a third more work. dots: the
# outputs of matrix products with weights, so that mostly cheap elementwise work is repeated.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Paths of kernels and embeddings: nearly all of the weights, and those that the forward pass rounds
# to the compute dtype. What else there is (norms, biases, routers, scalar heads) acts in float32.
KERNELS_AND_EMBEDDINGS = re.compile(r"(?<!/router)/kernel$|^embed/")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of a model; their weights have the same shapes."""

    window: int | None = None  # how many of the latest tokens attention sees; None: all
    rope: Rope | None = None  # None: nothing is turned


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The architecture of a decoder; `models/families.py` reads it from a Hugging Face config."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    max_positions: int  # longest sequence the model was made for
    # The kinds of its layers, from the first one on, and again from the start after the last.
    pattern: tuple[LayerKind, ...] = (LayerKind(),)
    norm: str = "rms"  # "rms" or "layer"
    norm_eps: float = 1e-5
    norm_scale_from_one: bool = False  # its weights are what is added to a scale of 1 (Gemma)
    norm_before: bool = True  # attention and MLP read normed input
    norm_after: bool = False  # what they add to the residual stream is normed (Gemma, OLMo 2)
    activation: str = "silu"  # a key of ACTIVATIONS
    gated: bool = True  # down(act(gate(x)) * up(x)) rather than down(act(up(x)))
    parallel: bool = False  # attention and MLP read the same residual (GPT-J, most GPT-NeoX)
    shared_norm: bool = False  # the parallel MLP reads attention's norm too (GPT-J)
    learned_positions: bool = False  # GPT-2
    embed_scale: float = 1.0  # of the token embeddings, where the trunk reads them (Gemma)
    # RMS norm of queries and keys: "head", each head by itself (Qwen3, Gemma 3); "width", all heads
    # together (OLMo 2); "": none
    qk_norm: str = ""
    attention_scale: float | None = None  # of queries; None: 1 / root of head_width
    attention_softcap: float | None = None  # scores stay within it, by a tanh (Gemma 2)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    # MLPs of a layer, of mlp_width each, of which a router chooses some for each token; 0: one MLP
    # and no router
    experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = True  # the weights of a token's experts add up to 1
    head_bias: bool = False  # GPT-J
    tied: bool = False  # the head is the token embedding
    logits_softcap: float | None = None  # logits stay within it, by a tanh (Gemma 2)
    # "lm"; "reward": a scalar instead of logits (reward models); "lm_value": both (PPO)
    head: str = "lm"
    scalar_bias: bool = False  # of the scalar: some reward models have one
    dtype: str = "float32"  # compute dtype of the trunk
    attention: str = "auto"  # or a key of attention.KERNELS
    remat: str = "none"  # "none", or a key of REMAT_POLICIES
    # Layers that are compiled one after the other in each step of the scan; 0: by device and depth,
    # as `unrolled_layers` chooses.
    unroll: int = 0

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}: expected one of {', '.join(HEADS)}.")

    @property
    def narrowest_window(self) -> int | None:
        """The shortest window of any layer; None where all see everything."""
        return min((kind.window for kind in self.pattern if kind.window), default=None)

    @property
    def limit(self) -> str:
        """How many positions no sequence may pass, as a message says it; "": none."""
        if self.learned_positions:
            return f"{self.max_positions} positions"
        if any(isinstance(rope.scaling, LongRopeScaling) for rope in self.ropes):
            return (
                f"{self.max_positions} positions (longrope's factors were chosen for no more: "
                "raise max_length)"
            )
        return ""

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary embeddings of its layers, each once."""
        return tuple(dict.fromkeys(kind.rope for kind in self.pattern if kind.rope is not None))

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of its layers, each once."""
        return tuple(dict.fromkeys(self.pattern))

    def kind(self, layer: int) -> LayerKind:
        """Return the kind of a layer, counted from 0."""
        return self.pattern[layer % len(self.pattern)]


def hidden(config: TransformerConfig, params, tokens_SN, positions_SN, layout=None) -> jax.Array:
    """Return the trunk's last hidden state of every token, [S, N, D] in the compute dtype.

    layout: `attention.Layout`; without it each shard is one sequence.
    """
    # The second result is for a cache, of which there is none.
    return Transformer(config).apply({"params": params}, tokens_SN, positions_SN, layout)[0]


def hidden_and_routing(
    config: TransformerConfig, params, tokens_SN, positions_SN, layout
) -> tuple[jax.Array, Routing]:
    """Return `hidden`, and how the routers of all layers spread the tokens.

    layout: with `token_counts`.
    """
    x_SND, kept = Transformer(config).apply({"params": params}, tokens_SN, positions_SN, layout)
    return x_SND, jax.tree.map(lambda x_L: x_L.sum(0), kept["routing"])


def empty_cache(config: TransformerConfig, rows: int, slots: int) -> dict:
    """Return room for the keys and values of `rows` sequences: dict k, v [L, S, K, U, C].

    A token's slot is its position.
    """
    shape = (config.layers, rows, config.kv_heads, slots, config.head_width)
    return {name: _split(jnp.zeros(shape, config.dtype)) for name in ("k", "v")}


def step(
    config: TransformerConfig, params, tokens_SN, positions_SN, cache: dict
) -> tuple[jax.Array, dict]:
    """Run the trunk over each row's next tokens; return hidden states [S, N, D] and the new cache.

    Either N = 1, a token at any position; or N > 1 and the cache is empty: prompts, padded on the
    right. What padding leaves in the cache is never seen: each slot is written over before a later
    token looks there.
    """
    x_SND, new = Transformer(config).apply({"params": params}, tokens_SN, positions_SN, cache=cache)
    return x_SND, {name: _split(_write(cache[name], new[name], positions_SN)) for name in cache}


def _write(cache_LSKUC, new_LSNKC, positions_SN):
    """Return the cache with the new tokens in their slots.

    Inside a jit that does not use the old cache again, XLA writes in place.
    """
    shards, length = positions_SN.shape
    if length > 1:
        return cache_LSKUC.at[..., :length, :].set(new_LSNKC.transpose(0, 1, 3, 2, 4))
    # Each row is at a position of its own. Indexing by two arrays with a slice between puts the
    # rows first, as numpy does.
    new_SLKC = new_LSNKC[:, :, 0].transpose(1, 0, 2, 3)
    return cache_LSKUC.at[:, jnp.arange(shards), :, positions_SN[:, 0]].set(new_SLKC)


def _split(cache_LSKUC):
    return constrain(cache_LSKUC, None, BATCH, "tensor")


def unembed(config: TransformerConfig, params, x_D) -> jax.Array:
    """Return float32 logits [..., V] of hidden states [..., D]."""
    # Both operands in the compute dtype, where accelerators are fast, but a float32 sum: rounded
    # logits would show in the log-probs.
    dtype = jnp.dtype(config.dtype)
    if config.tied:
        equation, kernel = "...D,VD->...V", params["embed"]["tokens"]
    else:
        equation, kernel = "...D,DV->...V", params["head"]["kernel"]
    logits = wide_product(equation, x_D.astype(dtype), kernel.astype(dtype))
    if config.head_bias:
        logits += params["head"]["bias"]
    return softcapped(logits, config.logits_softcap)


def scalar(params, x_D) -> jax.Array:
    """Return float32 scalars [...] of hidden states [..., D]: rewards, or values for PPO."""
    # In float32: it is one product a token, and rewards are compared by small differences.
    scalars = jnp.einsum("...D,D->...", x_D.astype(jnp.float32), params["head"]["scalar"])
    bias = params["head"].get("scalar_bias")
    return scalars if bias is None else scalars + bias


def logits(config: TransformerConfig, params, tokens_BT) -> jax.Array:
    """Return float32 logits [B, T, V] of whole sequences, for tests and small models."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return unembed(config, params, hidden(config, params, tokens_BT, positions_BT))


def init(config: TransformerConfig, key: jax.Array):
    """Return random float32 weights, normal with deviation 0.02.

    Weights that write to the residual stream are scaled down by depth (GPT-2).
    """
    tokens_SN = jnp.zeros((1, 1), jnp.int32)
    # Weights may be made where there is no device that could run the config's kernel. The forward
    # pass is thrown away, so that there is nothing to gain from unrolling it.
    config = dataclasses.replace(config, attention="xla", unroll=1)
    return Transformer(config).init(key, tokens_SN, tokens_SN)["params"]


@functools.cache
def abstract(config: TransformerConfig, dtype: str = "float32"):
    """Return the shapes and dtypes of the weights, without making them.

    dtype: of kernels and embeddings, as `held` has them.
    """
    return jax.eval_shape(lambda: held(init(config, jax.random.key(0)), dtype))


def held(params, dtype: str):
    """Return weights with their kernels and embeddings in a dtype, and all others as they are."""

    def hold(path, x):
        return x.astype(dtype) if KERNELS_AND_EMBEDDINGS.search(path_name(path)) else x

    return jax.tree_util.tree_map_with_path(hold, params)


class Transformer(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens_SN, positions_SN, layout=None, cache=None):
        config = self.config
        x_SND = Embed(config, name="embed")(tokens_SN, positions_SN)
        # The angles are the same in all layers with one rope, so they are computed once.
        rotations = [rotary_angles(rope, positions_SN) for rope in config.ropes]
        inputs = (positions_SN, rotations, layout)
        if self.is_initializing():
            # Makes the weights layer by layer, which are alike in all kinds.
            stack = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=config.layers,
            )
            x_SND, new = stack(config, name="layers")(x_SND, inputs, cache)
        else:
            layers = self.variables["params"]["layers"]
            x_SND, new = run_layers(config, layers, x_SND, inputs, cache)
        Head(config, name="head")()  # makes the head's weights, and computes nothing
        return Norm(config, name="norm_final")(x_SND), new


def run_layers(config: TransformerConfig, params_L, x_SND, inputs, cache_L):
    """Return the last layer's output, and the keys and values of all layers for a cache, if any.

    params_L, cache_L: of all layers, stacked. inputs: what every layer reads besides: positions,
    angles of each of config.ropes, layout.
    """

    def run_layer(x_SND, of_layer):
        params, cache, kind = of_layer
        return Block(config).apply({"params": params}, x_SND, inputs, cache, kind)

    if config.remat != "none":
        # A scan keeps the forward and backward passes apart: CSE cannot merge what it remakes.
        policy = REMAT_POLICIES[config.remat]
        run_layer = jax.checkpoint(run_layer, policy=policy, prevent_cse=False)
    # One layer is compiled, whatever their number, with the attention of each kind as a branch.
    # Groups of layers, each of which holds the pattern once, would need no branches. But each turn
    # of the scan would copy the weights and the cache of its group.
    kinds_L = None
    if len(config.kinds) > 1:
        kinds_L = jnp.array([config.kinds.index(config.kind(i)) for i in range(config.layers)])
    layers = (params_L, cache_L, kinds_L)
    return jax.lax.scan(run_layer, x_SND, layers, unroll=unrolled_layers(config))


class Embed(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens_SN, positions_SN):
        config = self.config
        normal = nn.initializers.normal(0.02)
        table_VD = self.param("tokens", normal, (config.vocab, config.width))
        x_SND = _look_up(config, table_VD, tokens_SN)
        if config.embed_scale != 1:
            # Rounded to the compute dtype, as the embeddings are.
            x_SND *= jnp.asarray(config.embed_scale, x_SND.dtype)
        if config.learned_positions:
            table_UD = self.param("positions", normal, (config.max_positions, config.width))
            x_SND += _look_up(config, table_UD, positions_SN)
        return constrain(x_SND, BATCH, "context")


def _look_up(config, table_VD, ids_SN):
    """Return the table's rows of ids, [S, N, D] in the compute dtype."""
    # Each device takes its part of the width for all tokens along fsdp and context: the rows
    # travel, and not the table.
    rows_SND = table_VD[constrain(ids_SN, ("data", "expert"))]
    # Narrowed after the gather: the gradient of an id that comes often adds up in float32.
    rows_SND = constrain(rows_SND.astype(config.dtype), ("data", "expert"), None, SPLIT)
    # From the width to the tokens along one axis after the other: XLA cannot do both at once.
    return constrain(rows_SND, ("data", "expert"), "context", "fsdp")


class Head(nn.Module):
    """The heads' weights; `unembed` and `scalar` apply them where they are wanted."""

    config: TransformerConfig

    @nn.compact
    def __call__(self):
        config = self.config
        # A reward model has no use for logits, so it has no such weights.
        if config.head != "reward" and not config.tied:
            self.param("kernel", nn.initializers.normal(0.02), (config.width, config.vocab))
        if config.head != "reward" and config.head_bias:
            self.param("bias", nn.initializers.zeros, (config.vocab,))
        if config.head != "lm":
            self.param("scalar", nn.initializers.zeros, (config.width,))
        if config.scalar_bias:
            self.param("scalar_bias", nn.initializers.zeros, (1,))


class Block(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x_SND, inputs, cache, kind=None):
        config = self.config

        def normed(name, y_SND, *, wanted):
            return Norm(config, name=name)(y_SND) if wanted else y_SND

        attention_input_SND = normed("norm_attention", x_SND, wanted=config.norm_before)
        attended_SND, new = Attention(config, name="attention")(
            attention_input_SND, inputs, cache, kind
        )
        attended_SND = normed("norm_after_attention", attended_SND, wanted=config.norm_after)
        if config.shared_norm:
            mlp_input_SND = attention_input_SND
        else:
            # A parallel MLP does not see what attention adds: both read the same input.
            residual_SND = x_SND if config.parallel else x_SND + attended_SND
            mlp_input_SND = normed("norm_mlp", residual_SND, wanted=config.norm_before)
        # The residual passes both by.
        x_SND = x_SND + attended_SND
        if config.experts:
            _, _, layout = inputs
            counts_SN = None if layout is None else layout.token_counts
            activation = ACTIVATIONS[config.activation]
            experts = Experts(config, activation, residual_scale(config), name="mlp")
            widened_SND, routing = experts(mlp_input_SND, counts_SN)
            if routing is not None:
                new = {"routing": routing}
        else:
            widened_SND = Mlp(config, name="mlp")(mlp_input_SND)
        x_SND = x_SND + normed("norm_after_mlp", widened_SND, wanted=config.norm_after)
        # Whole along the width again: `tensor` splits only what is inside attention and the MLP.
        return constrain(x_SND, BATCH, "context"), new


class Attention(nn.Module):
    """Self-attention; with a cache it returns the tokens' keys and values for it too.

    These are a dict k, v [S, N, K, C]. kind: the layer's place in config.kinds, a traced number;
    None where there is one kind.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_SND, inputs, cache, kind=None):
        config = self.config
        D, H, K, C = config.width, config.heads, config.kv_heads, config.head_width

        def project(name, heads):
            return Linear((D, heads, C), config.qkv_bias, config.dtype, name=name)(x_SND)

        q_SNHC, k_SNKC, v_SNKC = project("q", H), project("k", K), project("v", K)
        # Before the rotation, which leaves lengths as they are.
        if config.qk_norm:
            axes = 2 if config.qk_norm == "width" else 1
            q_SNHC = Norm(config, axes, name="q_norm")(q_SNHC)
            k_SNKC = Norm(config, axes, name="k_norm")(k_SNKC)
        of_kinds = [functools.partial(attend_in_kind, config, one, inputs) for one in config.kinds]
        if kind is None:
            out_SNHC, k_SNKC = of_kinds[0](q_SNHC, k_SNKC, v_SNKC, cache)
        else:
            out_SNHC, k_SNKC = jax.lax.switch(kind, of_kinds, q_SNHC, k_SNKC, v_SNKC, cache)
        scale = residual_scale(config)
        out = Linear((H, C, D), config.out_bias, config.dtype, scale, name="out")
        return out(out_SNHC), None if cache is None else dict(k=k_SNKC, v=v_SNKC)


def attend_in_kind(
    config: TransformerConfig, kind: LayerKind, inputs, q_SNHC, k_SNKC, v_SNKC, cache
) -> tuple[jax.Array, jax.Array]:
    """Return attention by layers of a kind, [S, N, H, C], and the keys as their rope turns them.

    inputs: as of `run_layers`. cache: the layer's.
    """
    positions_SN, rotations, layout = inputs
    if kind.rope is not None:
        rotation = rotations[config.ropes.index(kind.rope)]
        q_SNHC = rotate(kind.rope, q_SNHC, rotation)
        k_SNKC = rotate(kind.rope, k_SNKC, rotation)
    # Heads are split, so that attention needs nothing from another device.
    q_SNHC = constrain(q_SNHC, BATCH, "context", "tensor")
    k_SNKC = constrain(k_SNKC, BATCH, "context", "tensor")
    v_SNKC = constrain(v_SNKC, BATCH, "context", "tensor")
    scoring = dict(
        window=kind.window, scale=config.attention_scale, softcap=config.attention_softcap
    )
    # One new token reads the cache. A prompt starts from an empty one, so it is plain attention
    # over itself.
    if cache is not None and q_SNHC.shape[1] == 1:
        out_SNHC = attend_cached(q_SNHC, k_SNKC, v_SNKC, cache, positions_SN, **scoring)
    else:
        out_SNHC = attend(q_SNHC, k_SNKC, v_SNKC, layout, kernel=config.attention, **scoring)
    return out_SNHC, k_SNKC


class Mlp(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x_SND):
        config = self.config
        D, F = config.width, config.mlp_width
        # Recomputed in the backward pass: else half a dozen arrays [N, F] are kept of it.
        activation = jax.checkpoint(ACTIVATIONS[config.activation])

        def widen(name):
            return Linear((D, F), config.mlp_bias, config.dtype, name=name)(x_SND)

        if config.gated:
            x_SNF = activation(widen("gate")) * widen("up")
        else:
            x_SNF = activation(widen("up"))
        x_SNF = constrain(x_SNF, BATCH, "context", "tensor")
        scale = residual_scale(config)
        return Linear((F, D), config.mlp_bias, config.dtype, scale, name="down")(x_SNF)


class Norm(nn.Module):
    """RMS norm, or layer norm with a bias, over the last axis, or axes, in float32."""

    config: TransformerConfig
    axes: int = 1

    @nn.compact
    def __call__(self, x):
        config = self.config
        axes = tuple(range(-self.axes, 0))
        shape = x.shape[-self.axes :]

        def weight(name, start):
            return over_tokens(self.param(name, start, shape), x.shape, jnp.float32)

        y = x.astype(jnp.float32)
        if config.norm == "layer":
            y -= y.mean(axes, keepdims=True)
        # In a layer norm the mean is off by now, so this is the variance. An RMS norm keeps it in.
        y *= jax.lax.rsqrt(jnp.mean(y * y, axes, keepdims=True) + config.norm_eps)
        if config.norm_scale_from_one:
            y *= 1 + weight("scale", nn.initializers.zeros)
        else:
            y *= weight("scale", nn.initializers.ones)
        if config.norm == "layer":
            y += weight("bias", nn.initializers.zeros)
        return y.astype(x.dtype)


def unrolled_layers(config: TransformerConfig) -> int:
    """Return how many layers a step of the scan over layers runs: config.unroll, or by device.

    Asked while a program is traced, for the device that it will run on.
    """
    if config.unroll:
        return config.unroll
    is_shallow = config.layers <= MOST_UNROLLED.get(device().platform, 0)
    return config.layers if is_shallow else 1


def residual_scale(config: TransformerConfig) -> float:
    """Return the scale of initial weights that write to the residual stream (GPT-2)."""
    return 1 / math.sqrt(2 * config.layers)
