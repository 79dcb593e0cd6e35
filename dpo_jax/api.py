"""dpo_jax from Python: the pieces of the commands behind a few names.

    model = dpo_jax.load("PATH_OR_HUB_NAME")
    pairs = model.encode([{"prompt": "...", "chosen": "...", "rejected": "..."}])
    chosen, rejected = model.log_probs(pairs)
    trainer = dpo_jax.Trainer(model, "dpo", beta=0.1, lr=1e-6)
    metrics = trainer.step(pairs)
    texts = trainer.model.generate(["..."], max_new_tokens=20, temperature=0.0)
    trainer.model.save("OUT")

Numbers are those of the commands, bit for bit for the same batches on the same devices: products
are float32 on every device while a call runs, whatever the caller has set, and tokenisation, layout
and programs are the same. Nothing is printed without `verbose=True`.
"""

import contextlib
import dataclasses
import datetime
import functools
import inspect
import math
import numbers
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import config_checks, config_files, console, loss_table, report, stage_table
from dpo_jax.data import dataset, mismatched, sources, splits
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.batches import (
    FILLER,
    Batches,
    evaluation_order,
    microbatch_size_of,
    prefetch,
    steps_of,
    training_order,
    unpaired,
    unpaired_evaluation,
)
from dpo_jax.data.examples import Example, Examples
from dpo_jax.data.ledger import Filtered, Malformed, Unusable
from dpo_jax.data.readers import fields_of
from dpo_jax.data.rows import TextExample, shown
from dpo_jax.models import export, hf, inference, loading, peft
from dpo_jax.models import lora as adapters
from dpo_jax.models.loading import Checkpoint
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import processes, sharding
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.sampling import generation
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.stage_table import STAGES
from dpo_jax.storage import shadow
from dpo_jax.training import data_feed, losses, objectives
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.training.loop import stage_programs
from dpo_jax.training.reference_cache import ReferenceCache
from dpo_jax.training.step import Frozen, copy_params

# Settings of a stage's config block that say how a run is made; here they are arguments of
# `Trainer.fit` and `Trainer.evaluate`, or have no meaning.
RUN_SETTINGS = (
    "batch_size",
    "epochs",
    "eval_every",
    "save_every",
    "log_every",
    "keep",
    "keep_best",
    "patience",
    "reference",
    "cache_reference",
    "distinct",
    "seed",
)
ENCODING = (
    *("source", "max_length", "max_prompt_length", "truncate", "append_eos"),
    *("columns", "turns", "template", "ignore", "weight", "margin"),
)
# generate's defaults
SAMPLING = dict(max_new_tokens=128, temperature=1.0, top_k=0, top_p=1.0, beams=0)
# The stages that train on given examples; ppo samples what it learns from.
OBJECTIVES = [name for name, stage in STAGES.items() if stage.trains and not stage.samples]

# The type of an argument's default, what may stand for it, and its name in messages. In this order,
# as True is an int too.
TYPES = (
    (bool, bool, "True or False"),
    (int, numbers.Integral, "a whole number"),
    (float, numbers.Real, "a number"),
    (str, str, "text"),
    (tuple, (tuple, list), "a list"),
    (ConfigDict, Mapping, "a dict"),
)


def load(
    path: str | os.PathLike,
    *,
    mesh: jax.sharding.Mesh | dict | None = None,
    dtype: str = "float32",
    tokenizer: str = "",
    max_length: int = 0,
    **options,
) -> "Model":
    """Load a model in Hugging Face format, from a folder or by its name on the hub.

    mesh: a mesh, whose axes are some of those in config.mesh, or their sizes, such as dict(fsdp=2).
    Sizes that are not given are as in the commands: every other device holds a copy of the weights
    and takes its part of each batch. dtype: of products, "float32" or "bfloat16"; weights and
    log-probs are float32. tokenizer: where it is, if not with the model. max_length: the longest
    sequence that it will read, which matters to models with longrope alone (Phi-3): beyond their
    original length they take other factors; 0: the original length. options: head="reward" for a
    reward model, and attention, remat and unroll as in config.model.

    Compiled programs are kept in a folder between runs, as the commands do, unless jax has been
    told where to keep them. Raises FileNotFoundError, TypeError or ValueError that says what is
    wrong.
    """
    known = configs.model_options(configs.default(()))
    _check_names("load", options, [name for name in ("head", *known) if name != "dtype"])
    _check_choice("load", "head", options.get("head", "lm"), ("lm", "reward"))
    _check_fields("load", "model", options | dict(dtype=dtype), known)
    _check_number("load", "max_length", max_length, least=0)
    if isinstance(mesh, dict):
        _check_names("load(mesh=dict(...))", mesh, [*configs.default(()).mesh, "devices"])
        for axis, size in mesh.items():
            if axis != "devices":
                _check_type("load", f"mesh.{axis}", size, 1)
    elif mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(
            f"load: mesh={shown(mesh)}: expected a jax mesh, or sizes of its axes such as "
            "dict(fsdp=2)."
        )
    elif mesh is not None:
        try:
            mesh = sharding.with_all_axes(mesh)
        except ValueError as error:
            raise ValueError(
                f"load: {error} Give the sizes instead, such as dict(fsdp=2)."
            ) from None
    processes.keep_compiled_programs()
    with jax.default_matmul_precision("float32"), console.quiet():
        if mesh is None or isinstance(mesh, dict):
            mesh = sharding.make_mesh(**mesh or {})
        checkpoint = loading.open_checkpoint(
            str(path), tokenizer_path=tokenizer, max_length=max_length, dtype=dtype, **options
        )
        return Model(checkpoint, checkpoint.config, checkpoint.load_params(mesh), mesh)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A model with its weights on a mesh, and its tokenizer. `load` makes one."""

    checkpoint: Checkpoint  # what it was loaded from
    config: TransformerConfig
    params: dict
    mesh: jax.sharding.Mesh
    trained: bool = False  # whether the weights are no longer the checkpoint's

    @property
    def tokenizer(self):
        """The tokenizer, of transformers."""
        return self.checkpoint.tokenizer

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1)
        return f"Model({self.checkpoint.path!r}, {size:,} weights{', ' + axes if axes else ''})"

    def encode(
        self,
        rows: Iterable[dict],
        *,
        kind: str = "",
        on_bad_row: str = "error",
        date: datetime.date | None = None,
        **settings,
    ) -> Examples:
        """Tokenise rows of prompt, chosen and rejected, or of prompt and completion.

        Rows are in any shape that the commands read, as text or chat messages, with `tools` and
        `system`. kind: "pairs", "sft", "unpaired" (completions with a label), or "" for pairs where
        the first row is one, else "sft"; "sft" takes the chosen response of a pair, and "unpaired"
        both, one desirable and one not. on_bad_row: "drop" leaves out rows that cannot be used;
        `where` of the result names those that stay, once for each example of a row that gives
        several. date: what chat templates take for today; None: today. settings: source,
        max_length, max_prompt_length, truncate, append_eos, columns, turns, ignore, template,
        weight and margin, as in config.data, such as template=dict(enable_thinking=False).
        weight="votes" takes each row's weight from its field "votes".

        Raises ValueError that names the row, as rows[2] for the third.
        """
        data = configs.default(()).data
        _check_names("encode", settings, ENCODING)
        _check_choice("encode", "source", settings.get("source", "local"), tuple(sources.SOURCES))
        _check_fields("encode", "data", settings, data)
        _check_choice("encode", "kind", kind, ("", "pairs", "sft", "unpaired"))
        _check_choice("encode", "on_bad_row", on_bad_row, ("error", "drop"))
        if isinstance(rows, str | os.PathLike | dict):
            raise TypeError(
                f"encode takes a list of rows such as {sources.SOURCES['local'].example}; found "
                f"{shown(rows)}. To read a file: [json.loads(line) for line in open(FILE)]."
            )
        data.update(on_bad_row=on_bad_row, **_as_typed(settings, data))
        found = _parse_rows(rows, data, kind)
        truncate = dataset.truncation(data)
        examples, counts = tokenizers.encode(found, self.tokenizer, data, truncate, date=date)
        if counts.dropped and on_bad_row == "error":
            raise ValueError(
                "some rows cannot be used:\n  "
                + "\n  ".join(counts.drops())
                + "\nFix these rows, or leave them out with on_bad_row='drop'."
            )
        if not len(examples):
            raise ValueError("there is no row to encode.")
        examples.max_length = data.max_length
        with console.quiet():
            for warning in counts.warnings:
                # Fields of a config are settings of this call.
                console.warn(warning.replace("--config.data.", ""))
            self.checkpoint.check(examples)
        return examples

    def log_probs(
        self,
        examples: Examples,
        *,
        batch_size: int = 16,
        keep_in: str | os.PathLike = "",
        verbose: bool = False,
    ) -> "LogProbs":
        """Return the summed log-probs of the responses given their prompts, nats, float32.

        The result unpacks as `chosen, rejected` for pairs and as `completion,` for single
        completions, an array [examples] each. batch_size: examples at a time, over all devices.
        keep_in: a folder, such as a run's WORKDIR, that they are read from where they are there,
        and kept in otherwise, as with config.dpo.cache_reference.
        """
        _check_examples("log_probs", examples)
        _check_number("log_probs", "batch_size", batch_size, least=1)
        self._check_usable("lm")
        with _as_commands(self.mesh, verbose):
            if keep_in:
                cache = ReferenceCache(keep_in, self._as_loaded(), self.mesh, batch_size)
                every = np.arange(len(examples))
                return LogProbs(examples, cache.log_probs("train", examples, every))
            values = inference.log_probs("log-probs", self._loaded(), examples, batch_size)
        return LogProbs(examples, values)

    def generate(
        self,
        prompts: Sequence[str | list],
        *,
        n: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        max_prompt_length: int = 0,
        truncate: str = "keep_end",
        tools: list[dict] | None = None,
        template: dict | None = None,
        ignore: Sequence[str] = (),
        date: datetime.date | None = None,
        verbose: bool = False,
        **sampling,
    ) -> list:
        """Sample completions of prompts, each text or chat messages; return their texts.

        n: completions of each prompt; above 1 the result is a list of lists. max_prompt_length:
        tokens that a prompt is cut to; 0 cuts only what the model has no positions for. truncate:
        which part of it stays. tools: definitions of those that the model may call, for all
        prompts. template, ignore: as in config.data. date: what chat templates take for today;
        None: today. sampling: max_new_tokens (128), temperature (1.0; 0 takes the likeliest token),
        top_k and top_p; or beams, above 0 for beam search, which draws nothing. As the command
        `sample`: a completion depends on its prompt, its index and the seed alone.
        """
        self._check_usable("lm")
        if isinstance(prompts, str):
            raise TypeError(f"generate takes a list of prompts; found the text {prompts!r}.")
        _check_names("generate", sampling, list(SAMPLING))
        for name, value in sampling.items():
            _check_type("generate", name, value, SAMPLING[name])
        for name, value in dict(n=n, batch_size=batch_size).items():
            _check_number("generate", name, value, least=1)
        _check_type("generate", "seed", seed, 0)
        data = configs.default(()).data
        encoding = dict(
            max_prompt_length=max_prompt_length,
            truncate=truncate,
            template=template or {},
            ignore=ignore,
        )
        _check_fields("generate", "data", encoding, data)
        encoding = _as_typed(encoding, data)
        if not prompts:
            return []
        asked = []
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str | list):
                raise TypeError(
                    f"generate: prompts[{number}]={shown(prompt)}: expected text or a list of chat "
                    "messages."
                )
            asked.append(TextExample(prompt, (), f"prompts[{number}]", tools))
        settings = Sampling(**SAMPLING | sampling, n=n, seed=seed, batch_size=batch_size)
        texts = []
        with _as_commands(self.mesh, verbose):
            encoded = generation.encode(
                asked, self.tokenizer, self.config, settings, encoding, date
            )
            progress = console.Progress("generate", 0, len(prompts), unit="prompt")
            with contextlib.closing(progress):
                for batch in generation.generate(self._loaded(), encoded, settings):
                    texts += [[made.text for made in completions] for completions in batch]
                    progress.update(len(texts), {})
        return texts if n > 1 else [text for (text,) in texts]

    def save(self, path: str | os.PathLike, *, dtype: str = "source") -> None:
        """Write a folder in Hugging Face format, which keeps what the model's source had.

        dtype: of the stored weights: "float32", "bfloat16", or "source", the type in which those
        that were loaded are stored.
        """
        self._check_usable(self.config.head)
        _check_choice("save", "dtype", dtype, configs.EXPORT_DTYPES)
        source = self.checkpoint.source
        options = export.Options(source.dtype if dtype == "source" else dtype)
        hf_config = self.checkpoint.hf_config
        with console.quiet():
            hf.save(path, self.config, hf_config, self.params, self.tokenizer, source, options)

    def _loaded(self) -> loading.Model:
        """Return the model as sampling and inference take it."""
        model = self.checkpoint.model(self.params, self.mesh)
        # A head may have been put on it since it was loaded.
        return dataclasses.replace(model, config=self.config)

    def _as_loaded(self) -> Checkpoint:
        """Return the checkpoint with these weights for loaded; ValueError where they are others."""
        if self.trained:
            raise ValueError(
                "the weights of a trained model are in no file that log-probs could be kept for: "
                "save it, and load it again."
            )
        return dataclasses.replace(self.checkpoint, load_params=lambda *_: self.params)

    def _check_usable(self, head: str) -> None:
        """Raise where an update has deleted the weights, or the head is another one."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.params)):
            raise RuntimeError(
                "these weights are gone: Trainer.step replaced them. Use trainer.model, which is "
                "the model after the last step; or build the Trainer without donate=True to keep "
                "the model that it starts from."
            )
        if self.config.head != head:
            raise ValueError(
                f"this model has the head {self.config.head!r}; the call needs {head!r}."
            )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LogProbs:
    """Summed log-probs of examples under a model, nats; unpacks as `chosen, rejected`."""

    examples: Examples
    values: np.ndarray  # float32 [examples, responses]

    def __repr__(self) -> str:
        return f"LogProbs({self.examples!r})"

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.values.T)

    def of(self, examples: Examples) -> np.ndarray:
        """Return the values of these examples, in their order, found by their tokens.

        Raises ValueError that names one that is not there.
        """
        if examples is self.examples:
            return self.values
        missing = [i for i, key in enumerate(map(_key, examples)) if key not in self._by_tokens]
        if missing:
            raise ValueError(
                f"{examples.where[missing[0]]} is not among the examples that the reference's "
                "log-probs were computed for: compute them for all examples that are trained on."
            )
        return self.values[[self._by_tokens[_key(example)] for example in examples]]

    @functools.cached_property
    def _by_tokens(self) -> dict[tuple, int]:
        return {_key(example): i for i, example in enumerate(self.examples)}


def _key(example: Example) -> tuple:
    parts = (example.prompt, *example.responses, *(example.completion_masks or ()))
    return tuple(part.tobytes() for part in parts)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BatchPlan(Sequence):
    """The batches of a run of steps, laid out when a trainer takes them. `batches` makes one."""

    examples: Examples
    order: np.ndarray  # [steps, batch size], indices of examples

    def __repr__(self) -> str:
        steps, batch_size = self.order.shape
        return f"BatchPlan({steps} batches of {batch_size} from {self.examples!r})"

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> "PlannedBatch":
        return PlannedBatch(self, range(len(self))[step])


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedBatch:
    """One batch of a plan, for `Trainer.step`."""

    plan: BatchPlan
    step: int


def batches(
    examples: Examples,
    *,
    batch_size: int = 64,
    steps: int = 0,
    epochs: float = 1.0,
    seed: int | None = 0,
    order: str = "prompts",
    group_pairs: int = 32,
) -> BatchPlan:
    """Return the batches that a training command takes, for `Trainer.step`, in its order.

    steps: how many; 0: as many as `epochs` passes make. seed: as config.seed; None keeps the order
    of the examples, as config.data.shuffle=False. order, group_pairs: as config.data.order and
    config.data.group_pairs. A batch's examples do not depend on `steps`.

    The shapes of all batches are chosen together, so that few programs are compiled.
    """
    _check_examples("batches", examples)
    _check_number("batches", "batch_size", batch_size, least=1)
    _check_number("batches", "steps", steps, least=0)
    _check_type("batches", "epochs", epochs, 1.0)
    if seed is not None:
        _check_type("batches", "seed", seed, 0)
    _check_choice("batches", "order", order, ("prompts", "pairs"))
    _check_number("batches", "group_pairs", group_pairs, least=1)
    steps = steps_of(len(examples), batch_size, steps=steps, epochs=epochs)
    if steps < 1:  # of too few examples, or of epochs below 0
        raise ValueError(
            f"{len(examples)} examples make no batch of batch_size={batch_size} in epochs={epochs}:"
            " lower batch_size, or give steps."
        )
    groups = examples.groups(group_pairs) if order == "prompts" else None
    return BatchPlan(examples, training_order(len(examples), batch_size, steps, seed, groups))


class Trainer:
    """Trains a model by one objective, a batch at a time.

    The model that it starts from stays as it is and can be used on, as the reference is: the
    trainer copies its weights once. `trainer.model` is the trained model.
    """

    def __init__(
        self,
        model: Model,
        objective: str | Callable = "dpo",
        *,
        reference: "Model | str" = "init",
        reference_log_probs: LogProbs | None = None,
        lora: dict | None = None,
        donate: bool = False,
        seed: int = 0,
        **settings,
    ):
        """Set up an objective on a model; nothing is compiled before the first step.

        objective: "dpo", "kto", "sft", "preferred_ft", "unlikelihood", "rm", or a loss of your own,
        a function (chosen_log_ratio, rejected_log_ratio, beta) -> loss of each pair, in place of
        DPO's. settings: the fields of that stage's config block, with its defaults: lr, beta, loss,
        label_smoothing, alpha, reference_every, reference_mix, optimizer, weight_decay, schedule,
        warmup_steps (150), max_grad_norm, microbatch_size, and steps, over which a linear or cosine
        schedule runs (`fit` sets it).

        reference: of dpo and kto: "init", the model that training starts from; another model; or,
        of dpo, "none". reference_log_probs: of dpo, what the reference's `log_probs` returned for
        all examples that are trained or evaluated on; no reference is then run. lora: fields of
        config.model.lora, such as dict(rank=16): adapters are trained, drawn by `seed`, and `model`
        is left as it is. donate: take over the arrays of `model` in place of a copy of them, which
        saves its memory; `model` cannot be used after the first step.

        Raises ValueError or TypeError that names the setting that is wrong.
        """
        if not isinstance(model, Model):
            hint = f"; dpo_jax.load({model!r}) loads one" if isinstance(model, str) else ""
            raise TypeError(f"Trainer takes a model of dpo_jax.load; found {shown(model)}{hint}.")
        if reference_log_probs is not None and not isinstance(reference_log_probs, LogProbs):
            raise TypeError(
                "Trainer: reference_log_probs takes what model.log_probs(examples) returns; found "
                f"{shown(reference_log_probs)}."
            )
        _check_type("Trainer", "seed", seed, 0)
        model._check_usable("lm")
        loss = None
        if callable(objective):
            objective, loss = "dpo", _loss_of_pairs(objective)
            if "loss" in settings:
                raise ValueError("give the loss as a function or by its name, not both.")
        self._initial = model
        self._objective = objective
        self._block, self._lora = _settings(objective, settings, lora)
        self._config = dataclasses.replace(model.config, head=STAGES[self._objective].head)
        self._reference_log_probs = reference_log_probs
        self._has_own_loss = loss is not None
        self._steps_done = 0
        self._schedule_steps = self._block.steps  # 0: not known yet
        self._laid_out: tuple = (None, None)  # the last plan and its Batches
        processes.keep_compiled_programs()
        with _as_commands(model.mesh):
            self._programs = stage_programs(
                self._objective,
                self._block,
                self._config,
                model.mesh,
                lora=self._lora,
                loss=loss,
            )
            self._base = model.params if self._lora else None
            self._reference = self._choose_reference(reference, seed)
            moved = None
            if stage_table.moves_reference(self._block):
                moved, self._reference = self._moving_reference(reference), None
            params = self._initial_params(seed, donate)
            self._state = self._programs.init_state(params, reference=moved)

    def __repr__(self) -> str:
        adapters_shown = f", lora rank {self._lora.rank}" if self._lora else ""
        return (
            f"Trainer({self._initial!r}, {self._objective!r}{adapters_shown}, "
            f"{self._steps_done} steps done)"
        )

    @property
    def model(self) -> Model:
        """The trained model after the last step, with adapters merged into its weights.

        Without adapters these are the trainer's own arrays, which the next step replaces: ask for
        `trainer.model` again after it.
        """
        params = self._state.params
        if self._lora:
            with _as_commands(self._initial.mesh):
                params = adapters.merge(self._base, params, self._lora)
        return dataclasses.replace(self._initial, config=self._config, params=params, trained=True)

    @property
    def steps_done(self) -> int:
        """Return the number of updates made so far."""
        return self._steps_done

    def step(self, examples: Examples | PlannedBatch) -> dict[str, float]:
        """Make one update on examples, or on a batch of `batches`; return its metrics.

        Metrics are those of metrics.jsonl, measured before the update: {"loss/train": ...}.
        Examples of new lengths may need a program of their own; the batches of one call of
        `batches` share a few. Raises FloatingPointError where loss or gradient is not finite.
        """
        batch = examples if isinstance(examples, PlannedBatch) else _one_batch(examples)
        with _as_commands(self._initial.mesh):
            return self._finish(batch, self._update(self._placed(batch)))

    def fit(
        self,
        examples: Examples,
        *,
        batch_size: int = 64,
        steps: int = 0,
        epochs: float = 1.0,
        seed: int | None = 0,
        verbose: bool = False,
    ) -> list[dict[str, float]]:
        """Make all steps of `batches(examples, ...)`; return the metrics of each.

        The next batch is prepared while the device is at work on the one before.
        """
        plan = batches(examples, batch_size=batch_size, steps=steps, epochs=epochs, seed=seed)
        if not self._block.steps:
            self._schedule_steps = self._steps_done + len(plan)
        found = []
        pending = None
        with _as_commands(self._initial.mesh, verbose):
            progress = console.Progress(self._objective, 0, len(plan))
            ahead = prefetch(lambda step: self._placed(plan[step]), range(len(plan)))
            # A loss that is not finite ends the loop early: the bar and the thread end with it.
            with contextlib.closing(progress), contextlib.closing(ahead):
                for step, placed in ahead:
                    metrics = self._update(placed)
                    if pending is not None:
                        found.append(self._finish(*pending))
                        progress.update(len(found), found[-1])
                    pending = (plan[step], metrics)
                found.append(self._finish(*pending))
                progress.update(len(found), found[-1])
        return found

    def evaluate(
        self, examples: Examples, *, batch_size: int = 64, verbose: bool = False
    ) -> dict[str, float]:
        """Return metrics of the model as it is now, over all examples: {"loss/eval": ...}."""
        self._check_kind(examples)
        if self._is_unpaired:
            self._check_rows(len(examples))
        _check_number("evaluate", "batch_size", batch_size, least=1)
        mesh = self._initial.mesh
        size = sharding.whole_shards(batch_size, mesh)
        layout = self._layout()
        if self._is_unpaired:
            laid_out = unpaired_evaluation(examples, size, self._longest(examples), **layout)
        else:
            prompt_ids, _ = examples.identities()
            order = evaluation_order(len(examples), size, prompt_ids)
            kept = self._kept_log_probs(examples)
            laid_out = Batches(examples, order, **layout, reference_log_probs=kept)
        with _as_commands(mesh, verbose):
            return data_feed.evaluate(
                self._programs, mesh, self._state.params, self._frozen(), laid_out
            )

    def save_adapter(self, path: str | os.PathLike) -> None:
        """Write the trained adapters as a folder in PEFT's format."""
        if not self._lora:
            raise ValueError("this trainer has no adapters: give Trainer lora=dict(rank=...).")
        base = self._initial.checkpoint
        peft.save(
            pathlib.Path(path),
            self._config,
            base.hf_config,
            self._lora,
            self._state.params,
            base=base.path,
        )

    def _initial_params(self, seed: int, donate: bool) -> dict:
        """Return what is trained, in arrays that updates may delete."""
        mesh = self._initial.mesh
        if self._lora:
            return sharding.shard_params(mesh, adapters.init(self._config, self._lora, seed))
        params = self._initial.params
        if donate:
            if params is self._reference:
                raise ValueError(
                    "donate=True deletes the weights of the model at the first step, but it is the "
                    "reference too. Give reference_log_probs=model.log_probs(...), or another "
                    "reference, or leave donate out."
                )
        else:
            params = copy_params(params)
        if self._config.head == "reward":
            head = {"scalar": np.zeros(self._config.width, np.float32)}
            return params | sharding.shard_params(mesh, {"head": head})
        return params

    def _choose_reference(self, reference, seed: int) -> dict | None:
        """Return the reference's weights, or its adapters where it is the base itself."""
        if self._reference_log_probs is not None and reference != "init":
            raise ValueError("give reference or reference_log_probs, not both.")
        if not isinstance(reference, str | Model):
            raise TypeError(
                f"Trainer: reference={shown(reference)}: expected 'init', 'none' or a model."
            )
        if isinstance(reference, str) and reference not in ("init", "none"):
            raise ValueError(
                f"reference={reference!r}: expected 'init', 'none' or a model; "
                f"dpo_jax.load({reference!r}) loads one."
            )
        if STAGES[self._objective].reference == "none":
            if reference != "init" or self._reference_log_probs is not None:
                raise ValueError(f"{self._objective} has no reference; dpo has.")
            return None
        if self._is_unpaired and reference == "none":
            raise ValueError(
                f"{self._objective} compares the policy with a reference: give 'init' or a model "
                "in place of reference='none'."
            )
        if self._is_unpaired and self._reference_log_probs is not None:
            raise ValueError(
                f"{self._objective} needs the reference itself: it also reads each prompt with "
                "another row's completion, and which one depends on the batch."
            )
        loss = self._block.get("loss", "")
        if not loss_table.properties(loss).needs_reference:
            if isinstance(reference, Model) or self._reference_log_probs is not None:
                raise ValueError(f"the {loss} loss needs no reference: leave it out.")
            return None
        ld_alpha = self._block.get("ld_alpha", 1.0)
        if self._reference_log_probs is not None and ld_alpha != 1:
            raise ValueError(
                f"ld_alpha={ld_alpha:g} needs the reference's log-probs of parts of responses, and "
                "reference_log_probs are those of whole ones: give reference in their place."
            )
        divergence = self._block.get("divergence", "reverse_kl")
        if reference == "none" and divergence != "reverse_kl":
            raise ValueError(f"divergence={divergence!r} needs a reference, and it is 'none'.")
        if self._reference_log_probs is not None or reference == "none":
            return None
        if reference == "init":
            # Under adapters it runs through the policy's own program, on adapters without effect.
            if self._lora:
                return sharding.shard_params(
                    self._initial.mesh, adapters.init(self._config, self._lora, seed)
                )
            return self._initial.params
        reference._check_usable("lm")
        if reference.config.vocab != self._config.vocab:
            raise ValueError(
                f"the reference has a vocabulary of {reference.config.vocab}, the model one of "
                f"{self._config.vocab}: they cannot be compared."
            )
        return reference.params

    def _moving_reference(self, reference) -> dict:
        """Return the weights of the chosen reference in arrays of their own, which moves delete."""
        given = f"reference_every={self._block.reference_every}"
        if self._reference is None:
            raise ValueError(
                f"{given} moves a reference, and there is none to move: leave it out, or give "
                "neither reference='none' nor reference_log_probs."
            )
        if self._lora and isinstance(reference, Model):
            raise ValueError(
                f"{given} moves the reference to the policy, and under adapters another model "
                "cannot become it: leave reference or reference_every out."
            )
        return copy_params(self._reference)

    def _frozen(self) -> Frozen:
        """Return what an update reads and never changes."""
        if self._block.schedule != "constant" and not self._schedule_steps:
            raise ValueError(
                f"schedule={self._block.schedule!r} runs over steps: give Trainer steps=..., or "
                "train with fit."
            )
        hyper = objectives.numbers(self._block, self._schedule_steps)
        if self._lora:
            hyper["lora_scale"] = np.float32(self._lora.scale)
        hyper = jax.device_put(hyper, sharding.replicated(self._initial.mesh))
        return Frozen(hyper, self._reference, self._base).beside(self._state)

    def _update(self, placed) -> dict:
        """Make an update, and return its metrics as they are on the device."""
        self._state, metrics = self._programs.update(self._state, self._frozen(), placed)
        self._steps_done += 1
        block = self._block
        if stage_table.moves_reference(block) and self._steps_done % block.reference_every == 0:
            self._state = self._programs.move_reference(self._state, block.reference_mix)
        return metrics

    def _finish(self, batch: PlannedBatch, metrics: dict) -> dict[str, float]:
        """Fetch the metrics of an update; FloatingPointError where they are not finite."""
        values = metrics_lib.named(metrics, "train")
        for name in ("loss/train", "grad_norm", "param_norm"):
            if not math.isfinite(values[name]):
                order = batch.plan.order[batch.step]
                where = ", ".join(batch.plan.examples.where[i] for i in order if i != FILLER)
                raise FloatingPointError(
                    f"{name} is {values[name]} on the batch of {where}: the weights are lost. "
                    "Start again with a lower lr or max_grad_norm, or leave out a bad row."
                )
        return values

    def _placed(self, batch: PlannedBatch):
        """Return a batch on the mesh."""
        plan, laid_out = self._laid_out
        if plan is not batch.plan:
            laid_out = self._lay_out(batch.plan)
            self._laid_out = (batch.plan, laid_out)
        return sharding.shard_batch(self._initial.mesh, laid_out[batch.step], axis=1)

    def _lay_out(self, plan: BatchPlan) -> Batches:
        """Lay out a plan's batches, as the command does."""
        self._check_kind(plan.examples)
        batch_size = plan.order.shape[1]
        if self._is_unpaired:
            self._check_rows(min(batch_size, len(plan.examples)))
        size = min(self._block.microbatch_size or batch_size, batch_size)
        layout = self._layout() | dict(microbatches=-(-batch_size // size))
        examples, order = plan.examples, plan.order
        if self._is_unpaired:
            return unpaired(examples, order, self._longest(examples), **layout)
        kept = self._kept_log_probs(examples)
        return Batches(examples, order, **layout, reference_log_probs=kept)

    def _layout(self) -> dict:
        """Return what `Batches` takes of the mesh and the model."""
        mesh = self._initial.mesh
        return dict(
            shards=sharding.batch_shards(mesh),
            limits=inference.limits_of(self._config, mesh),
        )

    @property
    def _is_unpaired(self) -> bool:
        return STAGES[self._objective].kind == "unpaired"

    def _longest(self, examples: Examples) -> int:
        """Return how long a prompt and another row's completion may be together, in tokens."""
        return mismatched.longest(examples, examples.max_length, self._config.max_positions)

    def _check_rows(self, count: int) -> None:
        """Raise ValueError where too few rows stand together to be mismatched."""
        if count < 2:
            raise ValueError(
                f"{self._objective} takes at least 2 rows together, as its KL is of each prompt "
                f"with the completion of another row; found {count}."
            )

    def _kept_log_probs(self, examples: Examples) -> np.ndarray | None:
        if self._reference_log_probs is None:
            return None
        return self._reference_log_probs.of(examples)

    def _check_kind(self, examples: Examples) -> None:
        """Raise where the examples have another number of responses than the objective takes."""
        if not isinstance(examples, Examples):
            raise TypeError(
                f"expected examples of model.encode, or a batch of dpo_jax.batches; found "
                f"{shown(examples)}."
            )
        if not len(examples):
            raise ValueError("there are no examples.")
        if examples.target_margins is not None:
            self._check_takes_margins()
        if examples.weights is not None and self._is_unpaired:
            raise ValueError(
                f"{self._objective} takes no weights, which are of pairs. Encode the rows without "
                "weight=."
            )
        found = len(examples.responses[0])
        wanted = STAGES[self._objective].responses
        is_labelled = found == 1 and examples.labels is not None
        if found == wanted and is_labelled != self._is_unpaired:
            takes = "completions with labels" if self._is_unpaired else "rows without labels"
            raise ValueError(
                f"{self._objective} takes {takes}: encode the rows with "
                f"kind={STAGES[self._objective].kind!r}."
            )
        if found != wanted and self._is_unpaired:
            raise ValueError(
                f"{self._objective} takes one completion with a label at a time, and these are "
                "pairs: model.encode(rows, kind='unpaired') takes both responses of each."
            )
        if found != wanted and wanted == 1:
            raise ValueError(
                f"{self._objective} takes one completion for each prompt, and these are pairs: "
                "model.encode(rows, kind='sft') takes the chosen responses."
            )
        if found != wanted:
            raise ValueError(
                f"{self._objective} takes pairs, and these are single completions: encode rows "
                "with chosen and rejected."
            )

    def _check_takes_margins(self) -> None:
        """Raise ValueError where the objective has no place for a pair's margin."""
        if self._objective == "rm":
            return
        loss = self._block.get("loss", "")
        takes = bool(loss) and loss_table.properties(loss).takes_margin
        if self._has_own_loss:
            loss = "a loss of your own"
        if self._has_own_loss or not takes:
            owner = f"{self._objective} with {loss}" if loss else self._objective
            raise ValueError(
                f"the examples have target margins, and {owner} takes none (rm does, and dpo with "
                f"{', '.join(loss_table.takers_of_margin())}). Encode them without margin=."
            )


def load_config(name: str) -> ConfigDict:
    """Return a config by the name of one that comes with the package, or by its file.

    As with --config: "toy", "imdb:ppo" or "my_config.py". Its fields can be changed before `run`.
    """
    return config_files.load(name)


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    reward: Callable | None = None,
    loss: Callable | None = None,
    verbose: bool = False,
) -> dict[str, pathlib.Path]:
    """Run the stages of a config, as the command `train` does; return the folder of each.

    With config.rounds, the folders are those of the last round. Finished stages are reused; an
    interrupted one resumes. reward: a function (prompts, completions) -> numbers, lists of n texts
    and n numbers, in place of config.reward: pairs are labelled by it, ppo maximises it, evaluate
    and best_of_n report it. loss: a loss of your own for dpo, as in `Trainer`. Stages know both
    functions by their names: give another function another name, or the run another config.run or
    workdir.
    """
    if not isinstance(config, ConfigDict):
        raise TypeError(f"run takes a config of dpo_jax.load_config; found {shown(config)}.")
    for name, function in dict(reward=reward, loss=loss).items():
        if function is not None and not callable(function):
            raise TypeError(f"run: {name}={shown(function)}: expected a function.")
    processes.keep_compiled_programs()
    with (
        jax.default_matmul_precision("float32"),
        console.quiet(not verbose),
        report.at_end(workdir),
    ):
        run_stages(config, str(workdir), reward=reward, loss=_loss_of_pairs(loss) if loss else None)
    names = configs.folder_names(config)
    return {stage: shadow.place(workdir) / names[stage] for stage in config.stages}


@contextlib.contextmanager
def _as_commands(mesh: jax.sharding.Mesh, verbose: bool = False):
    """Compute as the commands do, whatever the caller's settings are; say nothing unless asked."""
    with (
        jax.default_matmul_precision("float32"),
        jax.set_mesh(mesh),
        console.quiet(not verbose),
    ):
        yield


@functools.cache  # so that trainers with one loss share its programs
def _loss_of_pairs(function: Callable) -> Callable:
    """Return a function of log-ratios and beta as a loss of `losses.Pairs`.

    Raises TypeError where it does not take three arguments.
    """
    name = losses.name_of(function)
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions have none
        signature = None
    if signature is not None:
        try:
            signature.bind("chosen_log_ratio", "rejected_log_ratio", "beta")
        except TypeError:
            raise TypeError(
                f"the loss function {name} takes {signature}; expected (chosen_log_ratio, "
                "rejected_log_ratio, beta)."
            ) from None

    def loss(pairs, beta, _label_smoothing):
        return function(pairs.chosen_log_ratios, pairs.rejected_log_ratios, beta)

    loss.__qualname__ = name
    return loss


def _settings(objective: str, settings: dict, lora: dict | None) -> tuple[ConfigDict, Lora | None]:
    """Return the config block of an objective with these settings, and the adapters.

    Raises TypeError for a setting that there is not, ValueError for a wrong value.
    """
    if objective == "ppo":
        raise ValueError(
            "ppo samples what it learns from: run its config with dpo_jax.run(config, workdir)."
        )
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}.")
    config = configs.default((objective,))
    block = config[objective]
    allowed = [name for name in block if name not in RUN_SETTINGS]
    call = f"Trainer(model, {objective!r})"
    _check_names(call, settings, allowed)
    _check_fields(call, objective, settings, block)
    block.update(_as_typed(settings, block))
    # Batches are as large as `step` is given them, so any size of microbatches divides them.
    block.batch_size = max(microbatch_size_of(block), 2)
    if lora is not None:
        if not isinstance(lora, dict):
            raise TypeError(f"lora={shown(lora)}: expected a dict such as dict(rank=16).")
        _check_names("lora", lora, list(config.model.lora))
        _check_fields(f"{call}, lora", "model.lora", lora, config.model.lora)
        if lora.get("rank", 0) < 1:
            raise ValueError(f"lora={lora!r}: expected a rank of 1 or more.")
        config.model.lora.update(_as_typed(lora, config.model.lora))
    # The checks are those of a run, which names where its model and data are.
    config.model.path = config.data.path = "given"
    config_checks.validate(config)
    return block, Lora(**config.model.lora.to_dict()) if lora else None


def _check_names(place: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise TypeError at the first name that is not known."""
    for name in given:
        if name not in known:
            near = config_files.nearest(name, known)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}."
            raise TypeError(f"{place} has no setting {name!r}; {hint}")


def _check_fields(call: str, block: str, given: dict, defaults: Mapping) -> None:
    """Check arguments that are fields of a config block as a run's config is checked.

    Raises TypeError where a value is not of the type of its default, and ValueError where the field
    does not take it.
    """
    for name, value in given.items():
        if name not in defaults:
            continue
        _check_type(call, name, value, defaults[name])
        expected = config_checks.expected_instead(f"{block}.{name}", value)
        if expected:
            raise ValueError(f"{call}: {name}={value!r}: expected {expected}.")


def _check_number(call: str, name: str, value, *, least: int) -> None:
    """Raise TypeError where an argument is no whole number, ValueError where it is too low."""
    _check_type(call, name, value, least)
    if value < least:
        raise ValueError(f"{call}: {name}={value!r}: expected at least {least}.")


def _check_choice(call: str, name: str, value, choices: tuple[str, ...]) -> None:
    """Raise ValueError where an argument is none of its choices; "" is one that is not told."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices if choice)
        raise ValueError(f"{call}: {name}={value!r}: expected one of {allowed}.")


def _check_type(call: str, name: str, value, default) -> None:
    """Raise TypeError where an argument cannot stand in the place of its default."""
    for kind, accepted, expected in TYPES:
        if isinstance(default, kind):
            is_truth = isinstance(value, bool) and kind is not bool  # which Python has as a number
            if not isinstance(value, accepted) or is_truth:
                raise TypeError(f"{call}: {name}={shown(value)}: expected {expected}.")
            return


def _as_typed(given: dict, defaults: Mapping) -> dict:
    """Return numbers of numpy as Python's own, and lists as tuples, as a config has them."""
    found = {}
    for name, value in given.items():
        default = defaults[name]
        is_number = isinstance(default, int | float)
        found[name] = type(default)(value) if is_number or isinstance(default, tuple) else value
    return found


def _check_examples(call: str, examples) -> None:
    if not isinstance(examples, Examples):
        raise TypeError(f"{call} takes examples of model.encode; found {shown(examples)}.")


def _parse_rows(rows: Iterable[dict], data: ConfigDict, kind: str) -> list[TextExample]:
    """Return the rows as prompts and responses; ValueError names the first that is wrong."""
    source, parse = sources.SOURCES[data.source], sources.parser(data)
    found = []
    for number, record in enumerate(rows):
        try:
            # A copy: chat messages that a field holds as text are parsed in place.
            row = parse(fields_of(dict(record) if isinstance(record, dict) else record))
            kind = kind or ("pairs" if row.pairs else "sft")
            found += splits.examples_of(row, kind, data.turns, f"rows[{number}]")
        except (Filtered, Malformed, Unusable) as error:
            if data.on_bad_row == "drop":
                continue
            fields = ", ".join(map(str, record)) if isinstance(record, dict) else shown(record)
            example = source.example
            if isinstance(error, Malformed) and error.example:
                example = error.example
            raise ValueError(
                f"rows[{number}]: {error}.\n  fields found: {fields or 'none'}\n"
                f"  a right row: {example}"
            ) from None
    return found


def _one_batch(examples: Examples) -> PlannedBatch:
    if not isinstance(examples, Examples) or not len(examples):
        raise TypeError(
            f"step takes examples of model.encode, or a batch of dpo_jax.batches; found "
            f"{shown(examples)}."
        )
    return BatchPlan(examples, np.arange(len(examples))[None])[0]
