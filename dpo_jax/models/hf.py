"""Models in Hugging Face format, in and out: fetch, read_config, make_config, load, save.

No pickle is read and no code of a checkpoint is run. Weights are streamed: a process holds its own
part of them and one stored tensor, whatever the size of the model.
"""

import collections
import fnmatch
import functools
import hashlib
import pathlib
import re
import shutil

import jax
import numpy as np
import transformers
from flax import traverse_util
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from jax.experimental import multihost_utils
from transformers import CONFIG_MAPPING, AutoConfig

from dpo_jax.console import say_once, warn
from dpo_jax.contents import file_hashes
from dpo_jax.models import export, families, safetensors_io, transformer
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.storage import shadow
from dpo_jax.storage.addresses import is_address, repository_of

# What a layer adds to the residual stream comes through these last.
ENDS_OF_BRANCHES = {"layers/attention/out/kernel", "layers/mlp/down/kernel"}
WEIGHT_FILES = ["model.safetensors", "model-*.safetensors", "adapter_model.safetensors"]
OTHER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
HUB_TIMEOUT = 10  # seconds
# Fields that transformers reads from a config whose class does not declare them.
UNDECLARED = {"qwen3_moe": ("head_dim",)}


def fetch(path, *, weights: bool = True) -> pathlib.Path:
    """Return a local folder as it is, or that of a model on the hub, downloaded or cached.

    An address, such as gs://BUCKET/MODEL, is copied here. A name may end in @REVISION: a branch, a
    commit, or a pull request's refs/pr/N. weights=False leaves out weights, for a tokenizer. Raises
    FileNotFoundError, within seconds, when there is neither a folder nor such a model.
    """
    if is_address(path):
        path = repository_of(path) or path
    if is_address(path):
        return shadow.fetch(path, functools.partial(_is_wanted, weights=weights))
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise NotADirectoryError(
            f"the model {path} is a file; expected a folder in Hugging Face format, which holds "
            f"config.json, model.safetensors and the tokenizer's files. Is {folder.parent} meant?"
        )
    name, _, revision = str(path).partition("@")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise FileNotFoundError(
            f"the model folder {path} does not exist. Pass a folder in Hugging Face "
            "format, or the name of a model on the hub such as openai-community/gpt2."
        )
    try:
        # snapshot_download alone would wait forever on a network that does not answer.
        HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT)
        refusal = None
    except Exception as error:  # noqa: BLE001 - whatever it was, a copy in the cache will do
        refusal = error
    try:
        snapshot = snapshot_download(
            name,
            revision=revision or None,
            local_files_only=refusal is not None,
            allow_patterns=WEIGHT_FILES * weights + OTHER_FILES,
        )
    except LocalEntryNotFoundError as error:
        reason = str(refusal or error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"the model {path} is not a local folder, and could not be fetched from the hub "
            f"({reason}). Pass a local folder in Hugging Face format, or check the spelling, the "
            "network, that you have access to the model (HF_TOKEN), and that HF_HUB_OFFLINE is "
            "not 1."
        ) from (refusal or error)
    return pathlib.Path(snapshot)


def _is_wanted(name: str, _names, *, weights: bool) -> bool:
    """Return whether a file of a model's folder is fetched."""
    patterns = WEIGHT_FILES * weights + OTHER_FILES
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def read_config(path):
    """Read the Hugging Face config of a local folder, or a config.json by itself.

    Raises FileNotFoundError when there is none and ValueError when transformers cannot read it.
    """
    file = pathlib.Path(path)
    file = file if file.is_file() else file / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file.resolve()} does not exist. A model folder in Hugging Face format holds "
            "config.json, model.safetensors and the tokenizer's files."
        )
    model_type = export.read_fields(file).get("model_type")
    # A type that transformers does not know may have code of its own, which is never run.
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{file}: model_type is {model_type!r}, which transformers {transformers.__version__} "
            "does not know. See that it is the config.json of a model in Hugging Face format, and "
            "fetch it again; for a newer type, install a newer transformers."
        )
    try:
        config = AutoConfig.from_pretrained(file, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever a wrong field makes transformers raise
        raise ValueError(
            f"{file}: transformers cannot read it ({type(error).__name__}: {error}). Correct the "
            "field, or fetch the file again."
        ) from error
    if model_type not in families.WITH_IMAGES:
        return config
    say_once(
        f"{file}: a model of text and images; its text part alone is read, trained and exported"
    )
    return config.text_config


def make_config(fields):
    """Return the Hugging Face config of a new model.

    fields: its `model_type`, and fields of that type's config class. Raises ValueError for an
    unsupported type or a field that its class does not have.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    families.family(model_type)
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class()
    known = UNDECLARED.get(model_type, ())
    unknown = [field for field in fields if not hasattr(defaults, field) and field not in known]
    if unknown:
        raise ValueError(f"transformers.{config_class.__name__} has no field {', '.join(unknown)}.")
    return config_class(**fields)


def fingerprint(path) -> str:
    """Return the sha256 of a folder's weight files, in the order of their names."""
    files = sorted(pathlib.Path(path).glob("*.safetensors"))
    digests = [bytes.fromhex(sha256) for sha256 in file_hashes(files)]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def gathered(param: jax.Array) -> np.ndarray:
    """Return all of an array on the host, float32. Every process must call it."""
    # Split over processes: no host has all of it yet.
    if not param.is_fully_addressable:
        param = multihost_utils.process_allgather(param, tiled=True)
    return np.asarray(param, np.float32)


def load(
    path,
    config: TransformerConfig,
    shardings,
    adapters=(),
    rounded_to: str = "",
    dtype: str = "float32",
):
    """Load the weights in a local folder as arrays placed by a tree of NamedShardings.

    They are float32, but for kernels and embeddings, which are read into `dtype`. adapters:
    peft.Adapters to merge into them, the first one first. rounded_to: the type whose precision the
    numbers keep, as if they had been exported in it. Raises FileNotFoundError when files are
    missing, and ValueError with the name of every tensor that is unknown, missing, set twice,
    wrongly shaped or not a float.
    """
    path = pathlib.Path(path)
    hf_config = read_config(path)
    model_type = hf_config.model_type
    tied = hf_config.tie_word_embeddings
    for adapter in adapters:
        adapter.check(model_type, config)
    replaced = {name for adapter in adapters for name in adapter.replaced}
    stored = _match(path, model_type, config, replaced, tied=tied)
    family = families.family(model_type)
    head, embedding = family.name_of("head/kernel"), family.name_of("embed/tokens")
    if tied and embedding in stored and head not in stored:
        # Read only where an adapter parts the two: a tied config has no tensor for the head.
        stored[head] = stored[embedding]
    shapes = _flat(transformer.abstract(config, dtype))
    shardings = _flat(shardings)
    params = {}
    for tensor in families.tensors(model_type, config):
        # A stored tensor may hold several parameters, as GPT-2's holds q, k and v.
        pieces = [Pieces(shapes[param], shardings[param]) for param in tensor.paths]
        zeros = []
        for name, place in tensor.names(config):
            values = stored[name].read() if name in stored else None
            if values is not None and safetensors_io.is_zero(values):
                zeros.append(stored[name])
            for adapter in adapters:
                values = adapter.merge(tensor, name, values)
            if rounded_to:
                values = _rounded(name, values, rounded_to)
            values = tensor.unpack(config, values)
            for piece, value in zip(pieces, values, strict=True):
                piece.fill(value, place)
        _check_zeros(tensor, zeros, config)
        params |= {param: piece.array() for param, piece in zip(tensor.paths, pieces, strict=True)}
    return traverse_util.unflatten_dict(params, sep="/")


def _check_zeros(tensor: families.Tensor, zeros: list, config: TransformerConfig) -> None:
    """Refuse weights that no training leaves at zero: a file that was not written to its end.

    zeros: the stored tensors, of those of a table's row, that are all zeros.
    """
    # Such scales are what is added to 1, and begin at zero.
    begins_at_zero = ("/bias", "/scale") if config.norm_scale_from_one else ("/bias",)
    if not zeros or all(path.endswith(begins_at_zero) for path in tensor.paths):
        return
    names = [f"{stored.name} in {stored.file}" for stored in zeros]
    shown = names[0] + f" (and {len(names) - 1} more)" * (len(names) > 1)
    # Layers that were added to a model begin so: they change nothing until they are trained.
    if set(tensor.paths) <= ENDS_OF_BRANCHES and len(zeros) < config.layers:
        warn(f"all weights of {shown} are zero, so this part of the layer does nothing.")
        return
    raise ValueError(
        f"all weights of {shown} are zero: the file was not written to its end, or is damaged. "
        "Fetch or write it again."
    )


class Pieces:
    """This process's pieces of an array, filled on the host; equal pieces share a buffer."""

    def __init__(self, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding):
        """Make room for an array of a leaf's shape and dtype."""
        self.shape = shape = leaf.shape
        self.sharding = sharding
        self.spans = {}  # device -> (start, end) of its piece along each axis
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            # Slices as numbers, so that equal pieces of several devices are found to be equal.
            spans = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
            self.spans[device] = tuple(spans)
        self.buffers = {}  # spans -> the piece
        for spans in set(self.spans.values()):
            self.buffers[spans] = np.empty([end - start for start, end in spans], leaf.dtype)

    def fill(self, value: np.ndarray, place: tuple[int, ...]):
        """Copy this process's part of what the array has at a place, an index of its first axes."""
        for spans, buffer in self.buffers.items():
            outer, spans = spans[: len(place)], spans[len(place) :]
            if not all(
                first <= index < end for index, (first, end) in zip(place, outer, strict=True)
            ):
                continue
            buffer = buffer[
                tuple(index - first for index, (first, _) in zip(place, outer, strict=True))
            ]
            # Converts on the way, whatever is stored.
            buffer[...] = value[tuple(slice(*span) for span in spans)]

    def array(self) -> jax.Array:
        """Return the array, once all of it is filled."""
        placed = [
            jax.device_put(self.buffers[spans], device) for device, spans in self.spans.items()
        ]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, placed)


def save(
    path,
    config: TransformerConfig,
    hf_config,
    params,
    tokenizer=None,
    source: export.Source | None = None,
    options: export.Options | None = None,
):
    """Write a folder in Hugging Face format: config, safetensors, tokenizer, generation config.

    source: where the model came from, whose files are kept where they still hold. Every process
    must call it; the first one writes. The folder appears, or takes the place of the model that
    was there, only once it is complete. Raises ValueError when the parameters are not those of the
    config, and FileExistsError when the folder holds something else than a model.
    """
    source = source or export.Source()
    options = options or export.Options()
    path = pathlib.Path(path)
    params = _flat(params)
    tensors = families.tensors(hf_config.model_type, config)
    _check_names(params, {param for tensor in tensors for param in tensor.paths})
    _check_replaceable(path)

    # One tensor at a time, gathered as it is asked for: the host never holds the whole model.
    def export_all():
        for tensor in tensors:
            held = [params[param] for param in tensor.paths]
            for name, place in tensor.names(config):
                yield name, _rounded(name, _export(tensor, held, place), options.dtype)

    exported = export_all()
    if jax.process_index() == 0:
        shapes = {}
        for tensor in tensors:
            for name, _ in tensor.names(config):
                shapes[name] = tensor.shape(config)
        # Written beside its place, and renamed once complete: nobody finds half a model.
        partial = _sibling(path, "partial")
        partial.mkdir(parents=True)
        safetensors_io.write(
            partial,
            shapes,
            exported,
            itemsize=jax.numpy.dtype(options.dtype).itemsize,
            max_shard_bytes=options.max_shard_bytes,
        )
        fields = export.config_fields(hf_config, config.head, options.dtype)
        export.write_fields(partial / "config.json", fields)
        # A reward model generates nothing.
        if config.head != "reward":
            export.write_generation_config(partial, source, hf_config, tokenizer)
        if tokenizer is not None:
            export.write_tokenizer(partial, source, tokenizer)
        if options.card:
            (partial / "README.md").write_text(options.card, encoding="utf-8")
        _publish(partial, path)
    else:
        # The other processes take part in the gathering, and throw away what they get.
        collections.deque(exported, maxlen=0)
    multihost_utils.sync_global_devices("hf.save")


def _match(
    folder: pathlib.Path,
    model_type: str,
    config: TransformerConfig,
    replaced: set[str],
    *,
    tied: bool,
) -> dict:
    """Return the stored slice of each tensor of the config; ValueError with all that is wrong.

    replaced: names of tensors that adapters bring with them, which the folder need not have. tied:
    whether the folder's head is its embedding; the config's is not where an adapter parts them.
    """
    family = families.family(model_type)
    shapes = {}
    for tensor in families.tensors(model_type, config):
        for name, _ in tensor.names(config):
            shapes[name] = list(tensor.shape(config))
    head, embedding = family.name_of("head/kernel"), family.name_of("embed/tokens")
    optional = list(replaced)
    if tied:  # some checkpoints store the tied head too
        shapes[head] = shapes[embedding]
        optional.append(head)
    elif config.head == "reward" and replaced:
        # The base under a reward model's adapter is a language model, whose head is not read.
        shapes[head] = [config.vocab, config.width]
        optional.append(head)
    model = f"{model_type} model"
    found = safetensors_io.match(
        folder,
        model,
        shapes,
        base=family.base,
        text_part=families.TEXT_PART,
        ignored=families.IGNORED,
        optional=optional,
    )
    # A fine-tuned head that is not the embedding would be lost without a word.
    if tied and head in found and safetensors_io.differ(found[head], found[embedding]):
        problem = f"{head} differs from {embedding}, though config.json says they are tied"
        raise safetensors_io.mismatch(folder, model, [f"{problem} (tie_word_embeddings = true)"])
    return found


def _check_names(params, expected: set[str]):
    """Refuse to write half a model, or to leave out what transformers has no place for."""
    missing = expected - params.keys()
    if missing:
        raise ValueError(f"parameters to export are missing: {', '.join(sorted(missing))}.")
    unknown = params.keys() - expected
    if unknown:
        raise ValueError(
            "parameters with no place in a Hugging Face checkpoint: "
            f"{', '.join(sorted(unknown))}. Merge or remove them before exporting."
        )


def _check_replaceable(path: pathlib.Path):
    """Refuse to put a model in the place of something else."""
    if path.exists() and not (path / "config.json").exists():
        raise FileExistsError(
            f"{path} exists and is not a model folder; remove it or export elsewhere."
        )


def _export(tensor: families.Tensor, params: list[jax.Array], place: tuple[int, ...]) -> np.ndarray:
    """Return a checkpoint's tensor, gathered to the host from what parameters have at a place."""
    if place:
        params = [param[place] for param in params]
    return np.ascontiguousarray(tensor.pack([gathered(param) for param in params]))


def _rounded(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 values in the type that is stored; ValueError where they do not fit."""
    with np.errstate(over="ignore"):
        rounded = values.astype(jax.numpy.dtype(dtype), copy=False)
    # float16 ends at 65,504.
    if dtype == "float16" and np.isinf(rounded).any():
        raise ValueError(
            f"{name} has numbers up to {np.abs(values).max():.3g}, which float16 cannot hold. "
            "Export in another type: --config.export.dtype=float32 or bfloat16."
        )
    return rounded


def _publish(partial: pathlib.Path, path: pathlib.Path):
    """Rename a finished folder into its place, moving the one before out of the way first."""
    # A folder cannot be replaced by a rename, as a file can.
    former = _sibling(path, "former")
    if path.exists():
        path.rename(former)
    partial.rename(path)
    shutil.rmtree(former, ignore_errors=True)


def _sibling(path: pathlib.Path, suffix: str) -> pathlib.Path:
    """Return a temporary folder beside `path`, cleared of what an earlier attempt left there."""
    sibling = path.with_name(f"{path.name}.{suffix}")
    shutil.rmtree(sibling, ignore_errors=True)
    return sibling


def _flat(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")
