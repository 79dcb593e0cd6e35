"""Sentiment classifiers of Hugging Face: the encoders RoBERTa and DistilBERT with their head.

Nothing is trained here, so weights lie whole on every device, and texts are split over the mesh.
Layers are stacked and scanned.

Letters: B texts, T tokens of a text, U tokens it attends to, D width, F feed-forward width,
H heads, C width of a head, L layers, K classes.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.packing import pad_right
from dpo_jax.models import hf, safetensors_io
from dpo_jax.models.inference import map_batches
from dpo_jax.parallel import agreement, sharding
from dpo_jax.parallel.sharding import constrain

# Texts are padded to a power of 2 times this many tokens, so that few programs are compiled.
LENGTHS = 32
POSITIVE = re.compile("positive|pos", re.IGNORECASE)
# Tensors that some checkpoints store and no classifier reads.
UNUSED = re.compile(r"position_ids$|^pooler\.")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The architecture of a classifier."""

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    classes: int
    token_types: int  # rows of the embeddings that are the same for every token
    norm_eps: float
    max_tokens: int
    first_position: int  # RoBERTa's positions begin after its padding token's
    positive: int  # which class is the positive one
    pad: int


@dataclasses.dataclass(frozen=True)
class Family:
    """The names of a family's tensors, without `base`, which checkpoints may leave out.

    {} stands for the layer. Each name but those of embeddings is a pair's: .weight and .bias.
    """

    base: str
    embeddings: tuple[str, str]  # tokens, positions
    embedding_norm: str
    layer: str
    parts: dict[str, str]  # ours -> theirs, in each layer
    head: tuple[str, str]  # dense, out
    head_activation: Callable
    first_position: Callable  # pad id -> the first position
    norm_eps: Callable  # config -> eps
    constants: tuple[str, ...] = ()  # embeddings that are the same for every token


FAMILIES = {
    "roberta": Family(
        base="roberta.",
        embeddings=("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"),
        embedding_norm="embeddings.LayerNorm",
        layer="encoder.layer.{}.",
        parts=dict(
            q="attention.self.query",
            k="attention.self.key",
            v="attention.self.value",
            out="attention.output.dense",
            norm_attention="attention.output.LayerNorm",
            up="intermediate.dense",
            down="output.dense",
            norm_mlp="output.LayerNorm",
        ),
        head=("classifier.dense", "classifier.out_proj"),
        head_activation=jnp.tanh,
        first_position=lambda pad: pad + 1,
        norm_eps=lambda config: config.layer_norm_eps,
        constants=("embeddings.token_type_embeddings.weight",),
    ),
    "distilbert": Family(
        base="distilbert.",
        embeddings=("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"),
        embedding_norm="embeddings.LayerNorm",
        layer="transformer.layer.{}.",
        parts=dict(
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            out="attention.out_lin",
            norm_attention="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            norm_mlp="output_layer_norm",
        ),
        head=("pre_classifier", "classifier"),
        head_activation=jax.nn.relu,
        first_position=lambda pad: 0,
        norm_eps=lambda config: 1e-12,
    ),
}


def read_config(folder) -> EncoderConfig:
    """Read the config of a classifier from its config.json.

    Raises ValueError where the model is none of FAMILIES or has no positive class.
    """
    found = hf.read_config(folder)
    if found.model_type not in FAMILIES:
        raise ValueError(
            f"{folder} is a {found.model_type!r} model; a sentiment classifier here is one of "
            f"{', '.join(FAMILIES)}."
        )
    activation = getattr(found, "hidden_act", None) or found.activation
    if activation != "gelu":
        raise ValueError(f"{folder}: activation {activation!r} is not supported; only 'gelu' is.")
    first = FAMILIES[found.model_type].first_position(found.pad_token_id)
    return EncoderConfig(
        family=found.model_type,
        vocab=found.vocab_size,
        width=found.hidden_size,
        layers=found.num_hidden_layers,
        heads=found.num_attention_heads,
        mlp_width=getattr(found, "intermediate_size", None) or found.hidden_dim,
        classes=len(found.id2label),
        token_types=getattr(found, "type_vocab_size", 0),
        norm_eps=FAMILIES[found.model_type].norm_eps(found),
        max_tokens=found.max_position_embeddings - first,
        first_position=first,
        positive=_positive(folder, found),
        pad=found.pad_token_id,
    )


def _positive(folder, config) -> int:
    """Return the class that stands for positive: by its name, or the second of two unnamed."""
    named = [int(index) for index, name in config.id2label.items() if POSITIVE.fullmatch(name)]
    if len(named) == 1:
        return named[0]
    if {name.lower() for name in config.id2label.values()} == {"label_0", "label_1"}:
        return 1
    raise ValueError(
        f"{folder}: the classes are {config.id2label}; expected one named POSITIVE, or two unnamed "
        "ones."
    )


def load(folder, config: EncoderConfig):
    """Load the weights as float32 arrays on the host.

    Raises ValueError with the name of every tensor that is unknown, missing, set twice, wrongly
    shaped or not a float.
    """
    family = FAMILIES[config.family]
    stored = safetensors_io.match(
        pathlib.Path(folder),
        f"{config.family} classifier",
        _shapes(config),
        base=family.base,
        ignored=UNUSED,
    )

    def read(name):
        return np.asarray(stored[name].read(), np.float32)

    def pair(name):
        return dict(weight=read(f"{name}.weight").T, bias=read(f"{name}.bias"))

    tokens, positions = (read(name) for name in family.embeddings)
    layers = []
    for layer in range(config.layers):
        prefix = family.layer.format(layer)
        layers.append({part: pair(prefix + name) for part, name in family.parts.items()})
    return dict(
        tokens=tokens + sum(read(name)[0] for name in family.constants),
        positions=positions,
        norm=pair(family.embedding_norm),
        head=pair(family.head[0]),
        out=pair(family.head[1]),
        layers=jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
    )


def _shapes(config: EncoderConfig) -> dict[str, list[int]]:
    """Return the shape of each tensor of a checkpoint, by its name without the base."""
    family = FAMILIES[config.family]
    D = config.width
    F = config.mlp_width
    of_part = dict(norm_attention=[D], norm_mlp=[D], up=[F, D], down=[D, F])  # others are [D, D]
    weights = {
        family.embedding_norm: [D],
        family.head[0]: [D, D],
        family.head[1]: [config.classes, D],
    }
    for layer in range(config.layers):
        for part, name in family.parts.items():
            weights[family.layer.format(layer) + name] = of_part.get(part, [D, D])
    tokens, positions = family.embeddings
    shapes = {tokens: [config.vocab, D], positions: [config.max_tokens + config.first_position, D]}
    for name in family.constants:
        shapes[name] = [config.token_types, D]
    for name, shape in weights.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def logits(config: EncoderConfig, params, tokens_BT, lengths_B) -> jax.Array:
    """Return class logits, float32 [B, K], of texts padded on the right."""
    family = FAMILIES[config.family]
    real_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    positions_TD = params["positions"][config.first_position :][: tokens_BT.shape[1]]
    x_BTD = _norm(config, params["norm"], params["tokens"][tokens_BT] + positions_TD)

    def block(x_BTD, layer):
        def heads(name):
            return _linear(layer[name], x_BTD).reshape(*x_BTD.shape[:2], config.heads, -1)

        q_BTHC, k_BTHC, v_BTHC = heads("q"), heads("k"), heads("v")
        scores_BHTU = jnp.einsum("BTHC,BUHC->BHTU", q_BTHC, k_BTHC) * q_BTHC.shape[-1] ** -0.5
        scores_BHTU = jnp.where(real_BT[:, None, None], scores_BHTU, jnp.finfo(jnp.float32).min)
        out_BTHC = jnp.einsum("BHTU,BUHC->BTHC", jax.nn.softmax(scores_BHTU), v_BTHC)
        attended_BTD = _linear(layer["out"], out_BTHC.reshape(x_BTD.shape))
        x_BTD = _norm(config, layer["norm_attention"], x_BTD + attended_BTD)
        x_BTF = jax.nn.gelu(_linear(layer["up"], x_BTD), approximate=False)
        return _norm(config, layer["norm_mlp"], x_BTD + _linear(layer["down"], x_BTF)), None

    x_BTD, _ = jax.lax.scan(block, x_BTD, params["layers"])
    pooled_BD = family.head_activation(_linear(params["head"], x_BTD[:, 0]))
    return _linear(params["out"], pooled_BD)


def _linear(weights, x_BTD):
    return jnp.einsum("...D,DF->...F", x_BTD, weights["weight"]) + weights["bias"]


def _norm(config, weights, x_BTD):
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    x_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD * x_BTD, -1, keepdims=True) + config.norm_eps)
    return x_BTD * weights["weight"] + weights["bias"]


@functools.partial(jax.jit, static_argnums=0)
def _positive_probability(config, params, batch):
    found_BK = logits(config, params, batch["tokens"], batch["lengths"])
    return constrain(jax.nn.softmax(found_BK)[:, config.positive])


def classifier(folder, batch_size: int, mesh) -> Callable:
    """Return a function from texts to the probability that each is positive, float64 [n].

    A text with more tokens than the model has positions is cut. batch_size: texts at a time, over
    all devices.
    """
    config = read_config(folder)
    files = [*safetensors_io.files(folder), *folder.glob("*.json"), *folder.glob("*.txt")]
    agreement.check_same_files({f"config.reward.path: {file.name}": file for file in files})
    params = jax.device_put(load(folder, config), sharding.replicated(mesh))
    tokenizer = tokenizers.load(folder)
    batch_size = sharding.whole_shards(batch_size, mesh)
    function = functools.partial(_positive_probability, config, params)

    def predict(texts: list[str]) -> np.ndarray:
        found = np.zeros(len(texts))
        if not texts:
            return found
        ids = tokenizer(texts, truncation=True, max_length=config.max_tokens).input_ids
        # Texts of like length share a batch: less padding.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        batches = [order[start : start + batch_size] for start in range(0, len(ids), batch_size)]

        def load_batch(step):
            return _padded([ids[index] for index in batches[step]], batch_size, config)

        for step, values_B in map_batches(function, load_batch, len(batches), mesh):
            indices = batches[step]
            found[indices] = values_B[: len(indices)]
        return found

    return predict


def _padded(ids: list[list[int]], batch_size: int, config: EncoderConfig) -> dict:
    """Return texts [B, T] padded on the right, and their lengths.

    Rows that only fill up the batch have one token.
    """
    filled = ids + [[config.pad]] * (batch_size - len(ids))
    longest = max(map(len, ids))
    width = min(LENGTHS << max((longest - 1) // LENGTHS, 0).bit_length(), config.max_tokens)
    lengths = [len(row) for row in filled]
    return dict(tokens=pad_right(filled, width, config.pad), lengths=np.array(lengths, np.int32))
