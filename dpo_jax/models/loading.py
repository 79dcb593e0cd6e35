"""Checkpoints and loaded models.

`Checkpoint` is a model that is known by its config and tokenizer alone; `Model` is the same model
with its weights on a mesh. Checkpoints come from folders and hub names in Hugging Face format, or
are made at random.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax.console import say_once, warn
from dpo_jax.data import packing, toy
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.models import experts, export, families, hf, peft, safetensors_io, transformer
from dpo_jax.models.export import Source
from dpo_jax.models.peft import Adapter
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import agreement, processes, sharding

# How safetensors calls the types that an export can have. Others are read, and exported as float32.
STORED_DTYPES = {"BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: everything that is needed to run it."""

    config: TransformerConfig
    params: dict
    tokenizer: object
    mesh: jax.sharding.Mesh
    eos_id: int | None = None  # the token that ends a completion; None: only its length does
    other_eos_ids: tuple[int, ...] = ()  # more tokens that end one, where eos_id does

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion; (): only its length does."""
        return () if self.eos_id is None else (self.eos_id, *self.other_eos_ids)

    def with_params(self, params: dict) -> "Model":
        """Return the same model with other weights."""
        return dataclasses.replace(self, params=params)


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint whose weights are not loaded yet."""

    config: TransformerConfig
    hf_config: object  # the Hugging Face config, which an export writes back
    tokenizer: object
    path: str  # a hub name or a folder; "" for random weights
    # (mesh, dtype="float32") -> the weights, placed on it. dtype: of kernels and embeddings; all
    # others are float32.
    load_params: Callable
    fingerprint: Callable  # () -> a string that only these weights have
    source: Source = Source()  # what an export keeps of where the model came from

    @property
    def shapes(self):
        """The shapes and dtypes of the weights, as a tree of ShapeDtypeStructs."""
        return transformer.abstract(self.config)

    @property
    def other_eos_ids(self) -> tuple[int, ...]:
        """The tokens beside the tokenizer's EOS at which the source's `generate` stops."""
        eos_id = self.tokenizer.eos_token_id
        return tuple(token for token in self.source.eos_ids() if token != eos_id)

    def load(
        self, mesh: jax.sharding.Mesh, *, append_eos: bool = True, dtype: str = "float32"
    ) -> Model:
        """Load the weights onto a mesh.

        append_eos: whether completions end with the tokenizer's EOS, as config.data.append_eos.
        dtype: as in `load_params`.
        """
        return self.model(self.load_params(mesh, dtype), mesh, append_eos=append_eos)

    def model(self, params: dict, mesh: jax.sharding.Mesh, *, append_eos: bool = True) -> Model:
        """Return this model with weights that were made elsewhere, such as trained ones."""
        if append_eos:
            self._check_eos()
        eos_id = self.tokenizer.eos_token_id if append_eos else None
        return Model(self.config, params, self.tokenizer, mesh, eos_id, self.other_eos_ids)

    def _check_eos(self) -> None:
        """Raise ValueError where the tokenizer's EOS is no token of the model.

        It was added to the tokenizer alone, so it is the tokenizer that is wrong, and no row.
        """
        eos_id = self.tokenizer.eos_token_id
        if eos_id is not None and eos_id >= self.config.vocab:
            folder = self.source.tokenizer_folder or "the tokenizer"
            raise ValueError(
                f"{folder}: its EOS {self.tokenizer.eos_token!r} is token {eos_id}, but the "
                f"model's vocabulary ends at {self.config.vocab - 1}. Give eos_token in "
                "tokenizer_config.json as the model's own, or the model with the embedding of the "
                "new token."
            )

    def check(self, examples) -> None:
        """Check that the model can read every example.

        Raises ValueError for a token outside of the vocabulary, and for an example with more tokens
        than a model with a limit can read. Other rotary models only get a warning.
        """
        if not len(examples):
            return
        self._check_eos()
        sizes = packing.sizes_of(examples)
        length_P = sizes.prompt + sizes.response.max(axis=1)
        largest_P = np.array([_largest_id(example) for example in examples])
        if largest_P.max() >= self.config.vocab:
            first = int(np.argmax(largest_P >= self.config.vocab))
            raise ValueError(
                f"{examples.where[first]} has token {largest_P[first]}, but the model's vocabulary "
                f"ends at {self.config.vocab - 1}: this tokenizer is another model's."
            )
        if length_P.max() <= self.config.max_positions:
            return
        if self.config.limit:
            first = int(np.argmax(length_P > self.config.max_positions))
            raise ValueError(
                f"{examples.where[first]} has {length_P[first]} tokens, but the model has "
                f"{self.config.limit}: lower config.data.max_length (--max_length)."
            )
        warn(
            f"rows of up to {length_P.max()} tokens, but the model was made for "
            f"{self.config.max_positions}; config.data.max_length cuts them."
        )


def _largest_id(example) -> int:
    return max(int(ids.max(initial=0)) for ids in (example.prompt, *example.responses))


def open_checkpoint(
    path: str,
    *,
    tokenizer_path: str = "",
    tokenizer=None,
    rounded_to: str = "",
    max_length: int = 0,
    **options,
) -> Checkpoint:
    """Open a model in Hugging Face format by hub name or folder.

    A folder with a LoRA adapter stands for its base with the adapter merged into it.
    tokenizer_path: where the tokenizer is, if not with the model. tokenizer: an open one to use
    instead. rounded_to: one of export.DTYPES, to load the weights as if they had been exported in
    it. max_length: the longest sequence that it will read, for which longrope's factors are chosen;
    0: those for short ones. options: those of `families.from_hf`; head is "reward" for a reward
    model.
    """
    folder, adapters = find(path)
    hf_config = _at_length(path, hf.read_config(folder), max_length)
    # A reward model has no language model's head that could be tied.
    has_tied_head = hf_config.tie_word_embeddings and options.get("head") != "reward"
    if has_tied_head and any(adapter.unties(hf_config.model_type) for adapter in adapters):
        hf_config.tie_word_embeddings = False
    if options.get("head") == "reward":
        options["scalar_bias"] = "score.bias" in stored_names(folder, adapters)
    config = families.from_hf(hf_config, **options)
    tokenizer_folder = None
    if tokenizer is None:
        tokenizer_folder = folder_of_tokenizer(folder, adapters)
        if tokenizer_path:
            tokenizer_folder = hf.fetch(tokenizer_path, weights=False)
        tokenizer = tokenizers.load(tokenizer_folder)

    def load_params(mesh, dtype="float32"):
        # Before it takes hours: each host reads its own copy.
        agreement.check_same_files(_files(path, folder, adapters))
        placed = _placed(mesh, config, dtype)
        return hf.load(folder, config, placed, adapters, rounded_to, dtype)

    @functools.cache  # it reads all of the weights
    def fingerprint():
        return processes.from_first(lambda: _fingerprint(folder, adapters))

    source = Source(folder, tokenizer_folder, _stored_dtype(folder))
    if config.head != "reward":
        # Read here so that a wrong file is refused before training, not by the export.
        source.eos_ids()
    return Checkpoint(config, hf_config, tokenizer, path, load_params, fingerprint, source)


def _at_length(path: str, hf_config, max_length: int):
    """Return a config with longrope's factors for sequences of this length; say where it is so."""
    chosen = families.at_length(hf_config, max_length)
    if chosen is not hf_config:
        say_once(
            f"{path}: longrope's long factors, as max_length = {max_length}, for shorter sequences "
            "too; so config.json of an export has them as short_factor as well"
        )
    return chosen


def _placed(mesh, config: TransformerConfig, dtype: str) -> dict:
    """Return where weights lie on a mesh, and say once which axes of it do not split them."""
    experts.check_mesh(config, mesh)
    shapes = transformer.abstract(config, dtype)
    for line in sharding.unsplit(mesh, shapes):
        say_once(line)
    return sharding.param_shardings(mesh, shapes)


def find(path: str, *, weights: bool = True) -> tuple[pathlib.Path, tuple[Adapter, ...]]:
    """Return the local folder of a model, and the adapters to merge into it, the first one first.

    weights=False fetches and opens no weights. Raises FileNotFoundError where there is no such
    model, and ValueError where an adapter cannot be merged.
    """
    folder = hf.fetch(path, weights=weights)
    name = str(path)
    adapters = []
    # An adapter may have been trained over another one.
    while peft.is_adapter(folder):
        if folder in [adapter.folder for adapter in adapters]:
            raise ValueError(f"the adapter {folder} is its own base (base_model_name_or_path).")
        peft.check_base(folder, name)
        adapter = peft.read(folder, weights=weights)
        adapters.insert(0, adapter)
        name = adapter.base
        try:
            folder = hf.fetch(name, weights=weights)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the base of the adapter {adapter.folder}: {error}") from error
        # The adapter lies in the folder of its base, as transformers allows.
        is_beside_base = folder.resolve() == adapter.folder.resolve()
        if is_beside_base and (folder / "config.json").exists():
            break
    return folder, tuple(adapters)


def is_own(folder: pathlib.Path, adapters: tuple[Adapter, ...]) -> bool:
    """Return whether dpo_jax exported a model, or the adapter over it.

    transformers writes the type of the weights under one name, and our export under the names of
    versions 4 and 5; PEFT writes a field that ours has no use for.
    """
    if adapters:
        return "auto_mapping" not in adapters[-1].config
    return {"dtype", "torch_dtype"} <= export.read_fields(folder / "config.json").keys()


def stored_names(folder: pathlib.Path, adapters: tuple[Adapter, ...]) -> dict[str, list[int]]:
    """Return the shape of each stored tensor by its name, with those that adapters bring along."""
    shapes = {tensor.name: tensor.shape for tensor in safetensors_io.read(folder)}
    for adapter in adapters:
        for name in adapter.replaced:
            shapes[name] = adapter.stored[name].shape
    return shapes


def folder_of_tokenizer(folder: pathlib.Path, adapters: tuple[Adapter, ...]) -> pathlib.Path:
    """Return the last adapter's folder that has a tokenizer, or else the model's."""
    for adapter in reversed(adapters):
        if (adapter.folder / export.TOKENIZER_CONFIG).exists():
            return adapter.folder
    return folder


def _fingerprint(folder: pathlib.Path, adapters: tuple[Adapter, ...]) -> str:
    """Return the sha256 of a folder's weights; with adapters, that of all together."""
    weights = hf.fingerprint(folder)
    if not adapters:
        return weights
    parts = [weights, *(adapter.fingerprint for adapter in adapters)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _files(
    path: str, folder: pathlib.Path, adapters: tuple[Adapter, ...]
) -> dict[str, pathlib.Path]:
    """Return the files that say what a model computes and where its completions end, by name."""
    files = [*safetensors_io.files(folder), folder / "config.json"]
    files += folder.glob("generation_config.json")
    named = {f"{path}: {file.name}": file for file in files}
    for number, adapter in enumerate(adapters, 1):
        for name in (peft.CONFIG, peft.WEIGHTS):
            named[f"{path}: {name} of adapter {number}"] = adapter.folder / name
    return named


def _stored_dtype(folder: pathlib.Path) -> str:
    """Return the type that most of a folder's weights are stored in, one of export.DTYPES."""
    return STORED_DTYPES.get(safetensors_io.stored_dtype(folder), "float32")


def from_scratch(
    fields: dict, seed: int, *, tokenizer_path: str = "", max_length: int = 0, **options
) -> Checkpoint:
    """Make a random model of the family and sizes that fields of a Hugging Face config give.

    Without tokenizer_path its tokenizer is the toy's. The ids of BOS and EOS in its config are the
    tokenizer's, unless the fields give others. max_length: as for `open_checkpoint`.
    """
    tokenizer_folder = hf.fetch(tokenizer_path, weights=False) if tokenizer_path else None
    tokenizer = tokenizers.load(tokenizer_folder) if tokenizer_folder else toy.tokenizer()
    # Those of the config's class are another tokenizer's: `generate` would stop at some word.
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    hf_config = _at_length("model.scratch", hf.make_config(special | dict(fields)), max_length)
    config = families.from_hf(hf_config, **options)

    def load_params(mesh, dtype="float32"):
        placed = _placed(mesh, config, dtype)

        def init(key):
            return transformer.held(transformer.init(config, key), dtype)

        # Each device makes its own part: a large model is never whole anywhere.
        return jax.jit(init, out_shardings=placed)(jax.random.key(seed))

    def fingerprint():
        # The same seed and sizes give the same weights, so nothing needs to be read.
        return f"seed {seed} of {sorted(fields.items())}"

    source = Source(tokenizer_folder=tokenizer_folder)
    return Checkpoint(config, hf_config, tokenizer, "", load_params, fingerprint, source)
