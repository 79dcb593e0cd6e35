"""Adapters in PEFT's format, out and in: adapter_config.json and adapter_model.safetensors.

`save` writes what was trained here; `read` opens any LoRA adapter, to be merged into its base.
Where a family stores q, k and v as one tensor, PEFT has one adapter for it. Ours become one of the
summed rank: the A's under each other, and the B's in blocks, each in the rows of its own outputs
and the columns of its own A.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re

import einops
import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from dpo_jax.models import families, safetensors_io, transformer
from dpo_jax.models.export import read_fields
from dpo_jax.models.families import Tensor
from dpo_jax.models.hf import gathered
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import TransformerConfig

# head -> PEFT's task; PPO's value head is left out
TASKS = {"lm": "CAUSAL_LM", "lm_value": "CAUSAL_LM", "reward": "SEQ_CLS"}
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in WEIGHTS
# Fields of CONFIG by which an adapter is more than W + scale * B A where they are set.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)
# Ends of the names of tensors that change a tensor of the base, rather than replace it.
UPDATES = re.compile(r"\.(lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.weight)$")
# Ways of starting that change the base's own weights too.
CHANGING_INITS = ("pissa", "olora", "loftq", "corda")


def save(
    folder, config: TransformerConfig, hf_config, lora: Lora, params: dict, *, base: str, card=""
) -> None:
    """Write the two files, float32. Every process must call it; the first one writes.

    params: what was trained. base: the model that they were trained over, a hub name or a folder.
    card: the text of README.md; "": none.
    """
    params = {
        path: gathered(value) for path, value in traverse_util.flatten_dict(params, sep="/").items()
    }
    stored = {}
    ranks = {}
    fan_in_fan_out = False
    for tensor in families.tensors(hf_config.model_type, config):
        # Which of the tensor's parameters have an adapter: q and v of q, k, v, perhaps.
        pieces = {
            number: path.removesuffix("kernel")
            for number, path in enumerate(tensor.paths)
            if path.removesuffix("kernel") + "lora_a" in params
        }
        if not pieces:
            continue
        # PEFT has one adapter here, of the summed rank.
        ranks[_module(tensor)] = len(pieces) * lora.rank
        fan_in_fan_out = _inputs_first(tensor)  # of all alike
        for name, place in tensor.names(config):
            a = {number: params[path + "lora_a"][place] for number, path in pieces.items()}
            b = {number: params[path + "lora_b"][place] for number, path in pieces.items()}
            of_inputs, of_outputs = pack(config, tensor, a, b)
            prefix = "base_model.model." + name.removesuffix(".weight")
            stored[f"{prefix}.lora_A.weight"] = of_inputs
            stored[f"{prefix}.lora_B.weight"] = of_outputs
    if config.head == "reward":
        head = families.family(hf_config.model_type).name_of("head/scalar")
        stored[f"base_model.model.{head}"] = params["head/scalar"][None]
    if jax.process_index() == 0:
        folder = pathlib.Path(folder)
        folder.mkdir(exist_ok=True)
        safetensors_io.save_file(stored, folder / WEIGHTS)
        fields = _config(config, lora, ranks, base) | dict(fan_in_fan_out=fan_in_fan_out)
        (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
    multihost_utils.sync_global_devices("peft.save")


def pack(
    config: TransformerConfig, tensor: Tensor, a: dict[int, np.ndarray], b: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return PEFT's lora_A [rank, inputs] and lora_B [outputs, rank] of a tensor in one layer.

    a, b: the factors of those of the tensor's parameters that have an adapter, by their place among
    its paths.
    """
    # Input axes of the parameter: all of A's but the rank, which is its last.
    count = next(iter(a.values())).ndim - 1
    inputs = " ".join(_axes(tensor)[:count])
    # All A's under each other, [n * rank, inputs].
    of_inputs = einops.rearrange(list(a.values()), f"n {inputs} r -> (n r) ({inputs})")
    # Each B only in the columns of its own A. Parameters without an adapter have rows of zeros.
    weights = traverse_util.flatten_dict(transformer.abstract(config), sep="/")
    columns = []
    for number, factor in b.items():
        # Packed as kernels are, of `rank` inputs.
        kernels = []
        for path in tensor.paths:
            outputs = weights[path].shape[1 + count :]
            kernels.append(np.zeros((len(factor), *[1] * (count - 1), *outputs), np.float32))
        kernels[number] = factor.reshape(kernels[number].shape)
        column = tensor.pack(kernels)
        columns.append(column.T if _inputs_first(tensor) else column)
    of_outputs = np.concatenate(columns, axis=1)
    return np.ascontiguousarray(of_inputs), np.ascontiguousarray(of_outputs)


def _axes(tensor: Tensor) -> list[str]:
    """Return the letters of a parameter's axes, which differ in the outputs alone."""
    first, *_ = tensor.pattern.split(" | ")
    _, right = first.split(" -> ")
    return right.removeprefix("p ").split()


def _module(tensor: Tensor) -> str:
    """Return the end of its module's name, which is its own in the layer: attn.c_proj."""
    return ".".join(tensor.name.removesuffix(".weight").split("{}.")[1:])


def _inputs_first(tensor: Tensor) -> bool:
    """Return whether it is stored [inputs, outputs], as GPT-2's are."""
    left, _ = tensor.pattern.split(" -> ", 1)
    first, *_, last = _axes(tensor)
    return left.index(first) < left.index(last)


def _config(config: TransformerConfig, lora: Lora, ranks: dict[str, int], base: str) -> dict:
    """Return the fields of adapter_config.json; ranks: module -> rank of its adapter."""
    folder = pathlib.Path(base).expanduser()
    # PEFT scales by alpha / rank, so a module of another rank needs an alpha of its own for the
    # same scale.
    fused = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    return dict(
        peft_type="LORA",
        task_type=TASKS[config.head],
        inference_mode=True,
        base_model_name_or_path=str(folder.absolute() if folder.is_dir() else base),
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(ranks),
        rank_pattern=fused,
        alpha_pattern={module: rank * lora.scale for module, rank in fused.items()},
        modules_to_save=["score"] if config.head == "reward" else None,
    )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a folder, whose tensors are read as they are merged."""

    folder: pathlib.Path
    base: str  # the model that it changes, a hub name or an absolute path
    config: dict  # the fields of adapter_config.json
    stored: dict  # name without PREFIX -> safetensors_io.Stored

    @property
    def replaced(self) -> set[str]:
        """The names of the tensors that it holds whole, such as a reward model's head."""
        return {name for name in self.stored if not UPDATES.search(name)}

    @property
    def fingerprint(self) -> str:
        """The sha256 of its two files."""
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        with (self.folder / WEIGHTS).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def check(self, model_type: str, config: TransformerConfig) -> None:
        """Raise ValueError that names every tensor with no place in the model."""
        known = set()
        for tensor in families.tensors(model_type, config):
            for name, _ in tensor.names(config):
                module = name.removesuffix(".weight")
                known |= {name, f"{module}.base_layer.weight"}
                known |= {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
                if tensor.paths[0].startswith("embed/"):
                    known |= {f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"}
        if config.tied and config.head != "reward" and not self.unties(model_type):
            # Then it is a copy of the embedding.
            known.add(families.family(model_type).name_of("head/kernel"))
        unknown = sorted(self.stored.keys() - known)
        if unknown:
            raise self.refusal(
                f"it changes {', '.join(unknown[:3])}{' ...' * (len(unknown) > 3)}, which dpo_jax "
                f"cannot merge into this {model_type} model"
            )

    def unties(self, model_type: str) -> bool:
        """Return whether the head and the input embedding of a tied base differ with the adapter.

        peft changes the one of the two that the adapter names, and leaves the other as it was.
        """
        family = families.family(model_type)
        embedding, head = family.name_of("embed/tokens"), family.name_of("head/kernel")
        if head in self.stored:
            # With ensure_weight_tying both are stored, and equal.
            both = embedding in self.stored
            return not both or safetensors_io.differ(self.stored[head], self.stored[embedding])
        modules = [name.removesuffix(".weight") for name in (embedding, head)]
        if any(f"{module}.lora_A.weight" in self.stored for module in modules):
            return True
        if any(f"{module}.lora_embedding_A" in self.stored for module in modules):
            return True
        # A whole embedding that modules_to_save does not name is loaded into both.
        saved = self.config.get("modules_to_save") or ()
        named = any(f".{modules[0]}".endswith(f".{name}") for name in saved)
        return named and embedding in self.stored

    def merge(self, tensor: Tensor, name: str, values: np.ndarray | None) -> np.ndarray:
        """Return one tensor of the base with the adapter in it, float32.

        values: the tensor as the base stores it; None where the base has none. Raises ValueError
        where the shapes do not fit.
        """
        if name in self.stored:
            found = np.asarray(self.stored[name].read(), np.float32)
            self._check_shape(name, found.shape, found.shape if values is None else values.shape)
            return found
        module = name.removesuffix(".weight")
        if f"{module}.base_layer.weight" in self.stored:
            values = self._base_layer(module, values)
        if f"{module}.lora_embedding_A" in self.stored:
            first, second, transposed = "lora_embedding_A", "lora_embedding_B", True
        elif f"{module}.lora_A.weight" in self.stored:
            first, second, transposed = "lora_A.weight", "lora_B.weight", _inputs_first(tensor)
        else:
            return values
        a = np.asarray(self.stored[f"{module}.{first}"].read(), np.float32)  # [rank, inputs]
        b = np.asarray(self.stored[f"{module}.{second}"].read(), np.float32)  # [outputs, rank]
        update = b @ a
        if transposed:
            update = update.T
        self._check_shape(name, update.shape, values.shape)
        return np.asarray(values, np.float32) + self._scale(module, len(a)) * update

    def refusal(self, reason: str) -> ValueError:
        """Return an error that says why it cannot be merged here, and the command that can."""
        problem = f"the adapter {self.folder} cannot be merged over {self.base}: {reason}."
        if self.folder.resolve() == pathlib.Path(self.base).resolve():
            # transformers, by which peft loads the base, would load the adapter with it.
            return ValueError(
                f"{problem} Move its two files, {CONFIG} and {WEIGHTS}, to a folder of their own, "
                "and give that folder instead."
            )
        is_classifier = self.config.get("task_type") == "SEQ_CLS"
        model_class = "SequenceClassification" if is_classifier else "CausalLM"
        labels = ", num_labels=1" if is_classifier else ""
        # peft writes no tokenizer: it is the adapter's own, or else the base's.
        tokenizer = f"'{self.base}'"
        if (self.folder / "tokenizer_config.json").exists():
            tokenizer = f"'{self.folder}'"
        elif not pathlib.Path(self.base).is_dir():
            name, _, revision = self.base.partition("@")
            tokenizer = f"'{name}'" + (f", revision='{revision}'" if revision else "")
        return ValueError(
            f"{problem} Merge it with peft, and give the folder MERGED that these lines write "
            "instead:\n"
            f'    python -c "from peft import AutoPeftModelFor{model_class} as M; '
            f"M.from_pretrained('{self.folder}'{labels})"
            ".merge_and_unload().save_pretrained('MERGED')\"\n"
            '    python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained({tokenizer}).save_pretrained('MERGED')\""
        )

    def _scale(self, module: str, rank: int) -> np.float32:
        """Return the factor of B A: alpha / rank, or alpha / sqrt(rank) with use_rslora."""
        alpha = self.config["lora_alpha"]
        # A pattern is a regular expression for the end of a module's name.
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return np.float32(alpha / divisor)

    def _base_layer(self, module: str, values: np.ndarray) -> np.ndarray:
        """Return the base's matrix as the adapter stores it, beside its LoRA of head or embedding.

        values: the matrix of the base. Raises ValueError where they differ by more than rounding.
        """
        name = f"{module}.base_layer.weight"
        found = np.asarray(self.stored[name].read(), np.float32)
        self._check_shape(name, found.shape, values.shape)
        if not np.allclose(found, np.asarray(values, np.float32), rtol=0.01, atol=1e-6):
            raise self.refusal(f"its {name} differs from {module}.weight of the base")
        return found

    def _check_shape(self, name: str, found: tuple, expected: tuple) -> None:
        if tuple(found) != tuple(expected):
            raise self.refusal(
                f"its {name} has the shape {list(found)}, and the base's has {list(expected)}"
            )


def is_adapter(folder: pathlib.Path) -> bool:
    """Return whether a folder holds an adapter, perhaps beside a whole model."""
    return (folder / CONFIG).exists()


def check_base(folder: pathlib.Path, name: str) -> None:
    """Raise ValueError where a folder holds a whole model beside an adapter of another one.

    name: that by which the folder was found, a path or a name on the hub.
    """
    has_weights = (folder / safetensors_io.SINGLE).exists()
    has_shards = (folder / safetensors_io.INDEX).exists()
    is_model = (folder / "config.json").exists() and (has_weights or has_shards)
    fields = _read_config(folder)
    base = fields.get("base_model_name_or_path") or ""
    own_path = pathlib.Path(base).expanduser()
    is_own_path = own_path.is_absolute() and own_path.resolve() == folder.resolve()
    is_own = is_own_path or base == name.partition("@")[0]
    if is_model and not is_own:
        raise ValueError(
            f"{folder} holds a whole model and an adapter ({CONFIG}) of {base or 'no named base'}: "
            f"it is not clear which is meant. For the model alone, move {CONFIG} and {WEIGHTS} "
            "out of the folder. For the adapter over its base, move the two to a folder of their "
            "own, and give that. For the adapter over the model beside it, set "
            f"base_model_name_or_path in {CONFIG} to {folder.absolute()}"
        )


def read(folder: pathlib.Path, *, weights: bool = True) -> Adapter:
    """Open an adapter's folder; only the headers of its tensors are read.

    weights=False leaves them out. Raises ValueError where the adapter is of a kind that cannot be
    merged, or its base is not named in a way that holds from everywhere.
    """
    fields = _read_config(folder)
    adapter = Adapter(folder, _base(folder, fields), fields, _stored(folder) if weights else {})
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise adapter.refusal(f"peft_type is {kind!r}, and only 'LORA' is known")
    patterns = fields.get("alpha_pattern") or {}
    for alpha in (fields.get("lora_alpha"), *patterns.values()):
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not math.isfinite(alpha):
            raise adapter.refusal(f"lora_alpha (or alpha_pattern) is {alpha!r}, expected a number")
    bias = fields.get("bias") or "none"
    if bias != "none":
        raise adapter.refusal(f"it was trained with bias = {bias!r}")
    for name in UNSUPPORTED:
        if fields.get(name):
            raise adapter.refusal(f"it was trained with {name} = {fields[name]!r}")
    init = str(fields.get("init_lora_weights", True)).lower()
    if init.startswith(CHANGING_INITS):
        raise adapter.refusal(f"it was begun with init_lora_weights = {init!r}")
    return adapter


def _read_config(folder: pathlib.Path) -> dict:
    """Return the fields of adapter_config.json.

    Raises ValueError where the file is no JSON object, or a field of no type that peft writes.
    """
    file = folder / CONFIG
    fields = read_fields(file)
    types = {"base_model_name_or_path": str, "revision": str, "alpha_pattern": dict}
    for name, kind in types.items():
        found = fields.get(name)
        if found is not None and not isinstance(found, kind):
            expected = {str: "text", dict: "an object"}[kind]
            raise ValueError(f"{file}: {name} is {found!r}; expected {expected}.")
    return fields


def _stored(folder: pathlib.Path) -> dict:
    """Return an adapter's tensors, by name without PREFIX."""
    file = folder / WEIGHTS
    if (folder / "adapter_model.bin").exists() and not file.exists():
        raise FileNotFoundError(
            f"{folder} has {CONFIG} but no {WEIGHTS}. Loading adapter_model.bin would run code "
            "from a pickle: load it with peft once, and save it with safe_serialization=True."
        )
    if not file.exists():
        raise FileNotFoundError(f"{folder} has {CONFIG} but no {WEIGHTS}; fetch or write it again.")
    stored = safetensors_io.open_file(file)
    return {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}


def _base(folder: pathlib.Path, fields: dict) -> str:
    """Return the model that an adapter changes: a hub name, or the path of a folder that is there.

    Raises ValueError with the line to type where it is not given, gone, or a relative path, which
    means something else in every folder.
    """
    name = fields.get("base_model_name_or_path") or ""
    base = pathlib.Path(name).expanduser()
    beside = folder / name  # where a relative path may lead as well
    if name and base.is_absolute() and base.is_dir():
        return str(base)

    to_type = "/PATH/TO/BASE"
    if not name:
        problem = "not given"
    elif base.is_absolute():
        problem = f"the folder {name}, which does not exist"
    elif base.is_dir() or beside.is_dir():
        problem = f"the relative path {name}"
        to_type = str((base if base.is_dir() else beside).resolve())
    elif re.fullmatch(r"[\w-][\w.-]*(/\w[\w.-]*)?", name):
        # A name on the hub.
        revision = fields.get("revision")
        return f"{name}@{revision}" if revision else name
    else:
        problem = f"the relative path {name}"
    key = '"base_model_name_or_path"'
    raise ValueError(
        f"the base of the adapter {folder} (base_model_name_or_path) is {problem}. Give its "
        "absolute path or its name on the hub with this line, and run the command again:\n"
        f"    sed -i 's|{key}: [^,]*|{key}: \"{to_type}\"|' {folder / CONFIG}"
    )
