"""The files of a model folder beside its weights, so that others load it as they load its source.

config.json has the names of transformers 4 and 5. generation_config.json and the tokenizer's files
are the source's own wherever nothing has changed.
"""

import copy
import dataclasses
import json
import pathlib
import shutil
import tempfile

from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.models import families

DTYPES = ("float32", "bfloat16", "float16")  # that weights are stored in
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# transformers 5 names its own base class; transformers 4 knows the same thing by another name.
NEW_CLASS = "TokenizersBackend"
FAST_CLASS = "PreTrainedTokenizerFast"
# What transformers 5 notes down about how a tokenizer was loaded.
NOTES = ("backend", "is_local", "local_files_only")


@dataclasses.dataclass(frozen=True)
class Source:
    """What a model came from, as far as its export keeps it."""

    folder: pathlib.Path | None = None  # holds generation_config.json, if the model has one
    tokenizer_folder: pathlib.Path | None = None  # None: the tokenizer was made in code
    dtype: str = "float32"  # of the stored weights, one of DTYPES

    def eos_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a completion by the source's generation config."""
        return _as_ids(read_generation_config(self.folder).get("eos_token_id"))


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of an export."""

    dtype: str = "float32"  # of the stored weights, one of DTYPES
    card: str = ""  # the text of README.md; "": none
    max_shard_bytes: int = 5 * 10**9


def config_fields(hf_config, head: str, dtype: str) -> dict:
    """Return the fields of config.json, for transformers 4 and 5 alike."""
    # The caller's own config stays as it is.
    hf_config = copy.deepcopy(hf_config)
    hf_config.architectures = [families.family(hf_config.model_type).architecture_with(head)]
    if head == "reward":
        # transformers makes a classifier of two labels unless it is told.
        hf_config.num_labels = 1
    hf_config.dtype = dtype
    # Not save_pretrained, which refuses some configs that are found on the hub.
    fields = hf_config.to_diff_dict()
    # The name before transformers 4.56.
    fields["torch_dtype"] = dtype
    if hf_config.model_type == "qwen3_moe":
        # What transformers 4 calls num_local_experts.
        fields["num_experts"] = hf_config.num_experts
    return fields | _rope_of_transformers_4(hf_config)


def _rope_of_transformers_4(hf_config) -> dict:
    """Return the fields that transformers 4 reads instead of rope_parameters.

    Without them it would take its defaults, such as a base of 10,000, and say nothing.
    """
    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    if not rope:
        return {}
    # One rope for each type of layer (Gemma 3, OLMo 3).
    of_windows = rope.get("sliding_attention")
    rope = dict(rope.get("full_attention", rope))
    theta = rope.pop("rope_theta")
    share = rope.pop("partial_rotary_factor", 1.0)
    scaling = None if rope["rope_type"] == "default" else rope
    fields = dict(rope_theta=theta, rope_scaling=scaling)
    if rope["rope_type"] == "longrope":
        # Beside rope_scaling, not in it.
        fields |= dict(original_max_position_embeddings=rope["original_max_position_embeddings"])
    if hf_config.model_type == "phi3":
        fields |= dict(partial_rotary_factor=share, rope_scaling=_as_phi3(scaling))
    if hf_config.model_type == "gpt_neox":
        # This family has names of its own.
        fields |= dict(rotary_emb_base=theta, rotary_pct=share)
    if of_windows is not None and hf_config.model_type.startswith("gemma3"):
        fields |= dict(rope_local_base_freq=of_windows["rope_theta"])
    return fields


def _as_phi3(scaling: dict | None) -> dict | None:
    """Return rope_scaling as transformers 4 takes it of Phi-3, which refuses other fields."""
    if scaling is None:
        return None
    elsewhere = ("rope_type", "original_max_position_embeddings")
    kept = {name: value for name, value in scaling.items() if name not in elsewhere}
    return kept | dict(type=scaling["rope_type"])


def read_fields(file: pathlib.Path) -> dict:
    """Return the fields of a file beside a model; ValueError where it is not a JSON object."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch or write it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is not a JSON object; fetch or write it again.")
    return fields


def read_generation_config(folder: pathlib.Path | None) -> dict:
    """Return the fields of a folder's generation_config.json, {} where there is none.

    Raises ValueError where it is not JSON, or eos_token_id is neither an id nor a list of ids.
    """
    file = folder / GENERATION if folder else None
    if file is None or not file.exists():
        return {}
    fields = read_fields(file)
    found = fields.get("eos_token_id")
    # Not isinstance, by which true would be 1.
    if not all(type(value) is int for value in _as_ids(found)):
        raise ValueError(
            f"eos_token_id in {file} is {json.dumps(found)}; expected the id of a token, such as "
            "2, or a list of ids, such as [2, 7]. Write it as a number, without quotes."
        )
    return fields


def write_generation_config(folder: pathlib.Path, source: Source, hf_config, tokenizer) -> None:
    """Write generation_config.json, by which `generate` stops where the source stops.

    The source's own file is copied. The tokenizer's EOS, which ends the completions that a model is
    trained on, is added where the source stops at other tokens only.
    """
    fields = read_generation_config(source.folder)
    stops = _as_ids(fields.get("eos_token_id", getattr(hf_config, "eos_token_id", None)))
    eos = tokenizer.eos_token_id if tokenizer is not None else None
    if eos is None or eos in stops:
        if fields:
            shutil.copyfile(source.folder / GENERATION, folder / GENERATION)
        return
    for name in ("bos_token_id", "pad_token_id"):
        value = getattr(hf_config, name, None)
        if value is not None:
            fields.setdefault(name, value)
    fields["eos_token_id"] = [*stops, eos]
    # By this mark `generate` would go back to what config.json says.
    fields.pop("_from_model_config", None)
    write_fields(folder / GENERATION, fields)


def _as_ids(value) -> tuple[int, ...]:
    """Return the ids in a field that holds one, several or none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def write_tokenizer(folder: pathlib.Path, source: Source, tokenizer) -> None:
    """Write the tokenizer's files, of a class that transformers 4 knows.

    They are copied from the source byte for byte, unless the tokenizer has been changed since it
    was loaded, or was made in code.
    """
    origin = source.tokenizer_folder
    if origin is None or not _is_as_in(tokenizer, origin) or _depends_on_model(source):
        _save_tokenizer(folder, tokenizer)
        return
    for pattern in TOKENIZER_FILES:
        for file in origin.glob(pattern):
            copy_to = folder / file.relative_to(origin)
            copy_to.parent.mkdir(exist_ok=True)
            # Not shutil.copy, which would copy the mode too.
            shutil.copyfile(file, copy_to)
    config = folder / TOKENIZER_CONFIG
    if config.exists():
        fields = json.loads(config.read_text(encoding="utf-8"))
        mended = _for_transformers_4(fields)
        if mended != fields:
            write_fields(config, mended)


def _is_as_in(tokenizer, folder: pathlib.Path) -> bool:
    """Return whether a tokenizer is still what a folder holds."""
    return _saved(tokenizer) == _saved(tokenizers.load(folder))


def _saved(tokenizer) -> dict[str, bytes]:
    """Return the files that save_pretrained writes, by name."""
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        files = sorted(path for path in pathlib.Path(place).rglob("*") if path.is_file())
        return {str(path.relative_to(place)): path.read_bytes() for path in files}


def _depends_on_model(source: Source) -> bool:
    """Return whether another model's config.json would make another tokenizer of the files.

    A folder that names no tokenizer class gets the one of its own model_type.
    """
    if source.tokenizer_folder == source.folder:
        return False
    config = source.tokenizer_folder / TOKENIZER_CONFIG
    return not config.exists() or "tokenizer_class" not in json.loads(
        config.read_text(encoding="utf-8")
    )


def _save_tokenizer(folder: pathlib.Path, tokenizer) -> None:
    """Write a tokenizer by save_pretrained, and mend what transformers 4 cannot read."""
    tokenizer.save_pretrained(folder)
    config = folder / TOKENIZER_CONFIG
    fields = _for_transformers_4(json.loads(config.read_text(encoding="utf-8")))
    # tokenizer.json says everything. The classes of single models, which differ between the two
    # versions, would put their own BOS over it.
    if (folder / "tokenizer.json").exists():
        fields["tokenizer_class"] = FAST_CLASS
    write_fields(config, fields)


def _for_transformers_4(fields: dict) -> dict:
    """Return the fields of tokenizer_config.json with names that transformers 4 knows."""
    fields = dict(fields)
    if fields.get("tokenizer_class") == NEW_CLASS:
        fields["tokenizer_class"] = FAST_CLASS
        for name in NOTES:
            fields.pop(name, None)
    extra = fields.get("extra_special_tokens")
    # transformers 4 expects a dict under this name, and lists under the other.
    if isinstance(extra, list):
        del fields["extra_special_tokens"]
        fields.setdefault("additional_special_tokens", extra)
    return fields


def write_fields(file: pathlib.Path, fields: dict) -> None:
    """Write a JSON file as transformers does."""
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
