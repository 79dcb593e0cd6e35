"""Hostile model folders: damage of every kind at each of their files, and values of no model."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import safetensors.numpy

from dpo_jax.models import loading, safetensors_io
from dpo_jax.parallel import sharding
from tests.helpers.paths import STORIES
from tests.hostile.judging import EITHER, REFUSED, TAKEN, Verdict, judge

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = safetensors.numpy.load_file(STORIES / "model.safetensors")
# New layers are written with zeros there: a warning says so, and they are taken.
ENDS = ("o_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's folder with something wrong.

    damage: is called with the folder of a usual model, and returns the folder to open if it is
    another. expected: what becomes of it. words: the refusal must have one of them; MODEL stands
    for the folder's path.
    """

    kind: str
    name: str
    damage: Callable[[pathlib.Path], pathlib.Path | None]
    expected: str = REFUSED
    words: tuple[str, ...] = ("MODEL",)


def open_and_load(folder: pathlib.Path):
    """Open a model and load its weights, as every command does."""
    checkpoint = loading.open_checkpoint(str(folder))
    return checkpoint.load(sharding.make_mesh())


def write(folder: pathlib.Path) -> pathlib.Path:
    """Write a usual model, which may then be damaged."""
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(STORIES / name, folder / name)
    return folder


def judge_case(case: Case, folder: pathlib.Path) -> Verdict:
    """Damage a model in an empty folder, open it, and judge what comes of it."""
    model = write(folder / "model")
    opened = case.damage(model) or model
    words = [text.replace("MODEL", str(model)) for text in case.words]
    return judge(lambda: open_and_load(opened), case.expected, words)


def verdicts(folder: pathlib.Path) -> Iterator[tuple[Case, Verdict]]:
    """Yield each case with its verdict."""
    for number, case in enumerate(cases()):
        here = folder / str(number)
        yield case, judge_case(case, here)
        shutil.rmtree(here)


def cases() -> Iterator[Case]:
    """Yield every damaged model."""
    yield from _damaged_files()
    yield from _wrong_fields()
    yield from _wrong_weights()
    yield from _wrong_indexes()
    yield from _wrong_adapters()
    yield Case("model tokenizers", "EOS outside of the vocabulary", set_strange_eos)


# ---- files


def _halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    for position in range(0, min(len(content), 64), 7):
        content[position] ^= 0x40
    path.write_bytes(content)


def _make_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": _halve,
    "flipped": _flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a list": lambda path: path.write_text("[]"),
    "an empty object": lambda path: path.write_text("{}"),
    "a number": lambda path: path.write_text("3"),
    "null": lambda path: path.write_text("null"),
    "other bytes": lambda path: path.write_bytes(b"\xff\xfe" * 100),
    "brackets": lambda path: path.write_text("[" * 100_000),
    "a folder": _make_a_folder,
}


def _damaged_files() -> Iterator[Case]:
    for file in FILES:
        for name, damage in DAMAGES.items():

            def apply(model, file=file, damage=damage):
                damage(model / file)

            # The tokenizer says all in tokenizer.json: without the other file it is the same, but
            # for EOS.
            expected = EITHER if file == "tokenizer_config.json" else REFUSED
            yield Case("model files", f"{file} {name}", apply, expected)


# ---- config.json

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
FIELDS = [  # of config.json, and values that no model has
    *(
        (field, value)
        for field in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "intermediate_size", "max_position_embeddings"),
        )
        for value in (0, -1, 10**12, 1.5, math.nan, "64", [], None, True)
    ),
    *(
        (field, value)
        for field in ("rms_norm_eps", "rope_theta")
        for value in (0, -1.0, math.nan, math.inf, "x", [], 1e308)
    ),
    *(("rope_scaling", value) for value in (3, "llama3", {"rope_type": "llama3"})),
    *(("rope_scaling", {"rope_type": "linear", "factor": value}) for value in (0, None, "4", [])),
    *(("rope_scaling", YARN | {name: []}) for name in (*YARN, "attention_factor", "truncate")),
    *(("rope_scaling", LONGROPE | {name: 3}) for name in ("short_factor", "long_factor")),
    ("rope_scaling", LONGROPE | {"short_factor": [1.0]}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
    ("rope_parameters", []),
    ("rope_parameters", "default"),
    *(("head_dim", value) for value in (0, -8, 3, "8")),
    *(("hidden_act", value) for value in ("", "swish2", 3, [])),
    *(("model_type", value) for value in (None, 3, [], {}, "novel", "bert")),
    *(("tie_word_embeddings", value) for value in (False, "yes", 3)),
    ("quantization_config", {"quant_method": "awq"}),
]


def _wrong_fields() -> Iterator[Case]:
    for field, value in FIELDS:
        apply = functools.partial(_set_field, file="config.json", field=field, value=value)
        words = ("config.json", "MODEL")
        yield Case("model configs", f"{field} = {value!r}", apply, words=words)
    name = "decoder_sparse_step = 0"
    yield Case("model configs", name, _make_sparse_at_no_step, words=(name,))


def _make_sparse_at_no_step(model):
    _set_field(model, "config.json", "model_type", "qwen3_moe")
    _set_field(model, "config.json", "decoder_sparse_step", 0)


def _set_field(model, file, field, value):
    fields = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(fields | {field: value}))


def set_strange_eos(model):
    _set_field(model, "tokenizer_config.json", "eos_token", "<|new|>")


# ---- weights


def rewrite(model, **tensors):
    """Write the weights of a model anew, some of them others."""
    safetensors.numpy.save_file(WEIGHTS | tensors, model / "model.safetensors", {"format": "pt"})


def _wrong_weights() -> Iterator[Case]:
    kind = "model weights"
    for name in sorted(WEIGHTS)[::6]:
        for number in (math.nan, math.inf, -math.inf):
            values = WEIGHTS[name].copy()
            values.flat[-1] = number
            apply = functools.partial(rewrite, **{name: values})
            words = f"model.safetensors: the tensor {name} has numbers that are not finite"
            yield Case(kind, f"{number} in {name}", apply, words=(words,))
    for name in WEIGHTS:
        if re.search(r"\.[0134]\.", name):
            continue  # layers like the one that is tried
        apply = functools.partial(rewrite, **{name: np.zeros_like(WEIGHTS[name])})
        is_end = any(end in name for end in ENDS)
        words = f"all weights of {name} in MODEL/model.safetensors are zero"
        yield Case(kind, f"zeros in {name}", apply, TAKEN if is_end else REFUSED, (words,))
    zeros = {name: np.zeros_like(values) for name, values in WEIGHTS.items()}
    words = "all weights of model.embed_tokens.weight"
    yield Case(kind, "zeros alone", functools.partial(rewrite, **zeros), words=(words,))
    for end in ENDS:
        of_all_layers = {name: values for name, values in zeros.items() if end in name}
        apply = functools.partial(rewrite, **of_all_layers)
        yield Case(kind, f"zeros in every {end}", apply, words=("(and 4 more)",))


# ---- indexes of shards


def shard(model) -> dict:
    """Put the weights of a model into two shards; return their index."""
    (model / "model.safetensors").unlink()
    names = sorted(WEIGHTS)
    parts = {"model-00001-of-00002.safetensors": names[:20]}
    parts["model-00002-of-00002.safetensors"] = names[20:]
    weight_map = {}
    for file, held in parts.items():
        tensors = {name: WEIGHTS[name] for name in held}
        safetensors.numpy.save_file(tensors, model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / safetensors_io.INDEX).write_text(json.dumps(index))
    return index


INDEXES = {
    "empty": "",
    "an empty object": "{}",
    "a list": "[]",
    "null": "null",
    "cut": '{"weight_map": {"a": ',
    "brackets": "[" * 100_000,
    "an empty map": '{"weight_map": {}}',
    "a list for a map": '{"weight_map": ["a"]}',
    "numbers for files": '{"weight_map": {"model.norm.weight": 3}}',
    "no file": '{"weight_map": {"model.norm.weight": null}}',
}
PATHS = (
    *("../evil.safetensors", "/tmp/evil.safetensors", "sub/evil.safetensors", "..", "."),
    *("", "~/evil.safetensors", "..\\evil.safetensors", "evil.bin", "a\x00.safetensors"),
    *("missing.safetensors", "http://evil/x.safetensors"),
)


def _wrong_indexes() -> Iterator[Case]:
    kind = "model indexes"
    yield Case(kind, "a usual one", lambda model: shard(model) and None, TAKEN)
    for name, text in INDEXES.items():
        apply = functools.partial(_write_index, text=text)
        yield Case(kind, name, apply, words=(f"MODEL/{safetensors_io.INDEX}",))
    for path in PATHS:
        apply = functools.partial(lead_out, path=path)
        yield Case(kind, f"leads to {path!r}", apply)


def _write_index(model, text):
    shard(model)
    (model / safetensors_io.INDEX).write_text(text)


def lead_out(model, path):
    """Let the index name a file that is not one of the folder's shards, but is there."""
    index = shard(model)
    evil = model.parent / "evil.safetensors"
    shutil.copy(model / "model-00002-of-00002.safetensors", evil)
    (model / "sub").mkdir()
    shutil.copy(evil, model / "sub" / "evil.safetensors")
    index["weight_map"]["model.norm.weight"] = path
    (model / safetensors_io.INDEX).write_text(json.dumps(index))


# ---- adapters

GOOD_ADAPTER = '{"peft_type": "LORA", "r": 2, "lora_alpha": 2.0, "base_model_name_or_path": "BASE"}'
ADAPTERS = {
    "a list": "[]",
    "empty": "",
    "no base": "{}",
    "a number for a base": '{"base_model_name_or_path": 3}',
    "no rank": '{"peft_type": "LORA", "base_model_name_or_path": "BASE"}',
    "alpha nan": '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN, '
    '"base_model_name_or_path": "BASE"}',
    "alpha text": '{"peft_type": "LORA", "r": 2, "lora_alpha": "x", '
    '"base_model_name_or_path": "BASE"}',
    "its own base": '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, '
    '"base_model_name_or_path": "SELF"}',
}


def write_adapter(model, text, **tensors):
    """Write an adapter of a model beside it; BASE and SELF in the text stand for the folders."""
    folder = model.parent / "adapter"
    folder.mkdir()
    text = text.replace("BASE", str(model)).replace("SELF", str(folder))
    (folder / "adapter_config.json").write_text(text)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    found = {
        f"{name}A.weight": np.ones((2, 64), np.float32),
        f"{name}B.weight": np.zeros((64, 2), np.float32),  # as a fresh one
    }
    safetensors.numpy.save_file(found | tensors, folder / "adapter_model.safetensors")
    return folder


def _wrong_adapters() -> Iterator[Case]:
    kind = "model adapters"
    usual = functools.partial(write_adapter, text=GOOD_ADAPTER)
    yield Case(kind, "a usual one", usual, TAKEN)
    for name, text in ADAPTERS.items():
        yield Case(kind, name, functools.partial(write_adapter, text=text), words=("adapter",))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    damaged = {name: np.full((64, 2), np.nan, np.float32)}
    apply = functools.partial(write_adapter, text=GOOD_ADAPTER, **damaged)
    words = f"adapter_model.safetensors: the tensor {name} has numbers"
    yield Case(kind, "numbers that are not finite", apply, words=(words,))
