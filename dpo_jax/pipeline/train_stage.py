"""A stage that trains: model, reference and data in, a trained and exported model out."""

import dataclasses
import functools
import json
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import config as configs
from dpo_jax import stage_table
from dpo_jax.console import say
from dpo_jax.data import dataset, mismatched
from dpo_jax.data.batches import microbatch_size_of
from dpo_jax.evaluation import reward_kl, toy_report
from dpo_jax.models import attention, export, hf, loading, peft, transformer
from dpo_jax.models import lora as adapters
from dpo_jax.models.loading import Checkpoint
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import processes, sharding
from dpo_jax.pipeline import exports
from dpo_jax.pipeline.model_card import ModelCard
from dpo_jax.pipeline.run import Run
from dpo_jax.planning import fit
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.stage_table import STAGES
from dpo_jax.training import objectives
from dpo_jax.training.data_feed import DataFeed
from dpo_jax.training.loop import Feed, Job, train
from dpo_jax.training.ppo import RolloutFeed
from dpo_jax.training.reference_cache import ReferenceCache
from dpo_jax.workdir import EARLY_STOP, EXPORT


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of a training stage, and how their weights come onto the run's mesh."""

    run: Run
    stage: str
    initial: Checkpoint  # what training starts from
    first: Checkpoint  # what it starts from in round 1: the initial one itself, or another
    config: TransformerConfig  # of the model that is trained: the initial one, with another head
    reference: Checkpoint | None  # the initial one itself, another, or none
    lora: Lora | None

    @property
    def frozen_dtype(self) -> str:
        """The dtype of kernels and embeddings that are only read."""
        return self.run.config.model.frozen_dtype

    @property
    def reference_dtype(self) -> str:
        """The dtype of the reference's kernels and embeddings, where the policy's are float32.

        Under adapters the policy's own weights are frozen ones, too. A reference that moves becomes
        the policy, so it is held as the policy is.
        """
        moves = stage_table.moves_reference(self.run.config[self.stage])
        return "float32" if self.lora or moves else self.frozen_dtype

    @functools.cached_property
    def initial_params(self) -> dict:
        """The initial weights, one copy for all that only read them.

        What is trained is a copy of its own, as a training step deletes the weights before it.
        """
        return self.load_initial(self.frozen_dtype)

    @functools.cached_property
    def first_params(self) -> dict:
        """The weights that round 1 starts from, one copy for all that only read them."""
        if self.first is self.initial:
            return self.initial_params
        return self.first.load_params(self.run.mesh, self.frozen_dtype)

    def load_initial(self, dtype: str = "float32") -> dict:
        """Load the initial weights, with the stage's own head, which starts from zero.

        dtype: of kernels and embeddings.
        """
        params = self.initial.load_params(self.run.mesh, dtype)
        if self.config.head == "lm":
            return params
        placed = sharding.param_shardings(self.run.mesh, transformer.abstract(self.config))
        zeros = np.zeros(self.config.width, np.float32)
        head = {"scalar": jax.device_put(zeros, placed["head"]["scalar"])}
        if self.config.head == "lm_value":
            head |= params.get("head", {})  # the language model's, if it is not tied
        return params | {"head": head}

    def load_trained(self) -> dict:
        """Load what is trained: the initial weights, or adapters, the same on any mesh."""
        if not self.lora:
            return self.load_initial()
        values = adapters.init(self.config, self.lora, self.run.seed(self.stage, "adapters"))
        return sharding.shard_params(self.run.mesh, values)

    def load_reference(self) -> dict | None:
        """Load the weights of the reference, or its adapters; others may read them too."""
        if self.reference is None:
            return None
        if self.reference is not self.initial:
            if self.reference is self.first:
                return self.first_params
            return self.reference.load_params(self.run.mesh, self.frozen_dtype)
        if self.lora:
            # Adapters that have no effect yet: the base through the policy's own program.
            return self.load_trained()
        return self.initial_params

    def load_moving_reference(self) -> dict:
        """Load what the reference is before it moves, in arrays of its own.

        Raises ValueError where it has another shape than the policy, and so cannot become it.
        """
        if self.lora:
            return self.load_trained()
        other, policy = (
            jax.tree.map(lambda leaf: leaf.shape, checkpoint.shapes)
            for checkpoint in (self.reference, self.initial)
        )
        if other != policy:
            raise ValueError(
                f"config.dpo.reference: {self.reference.path} has weights of other shapes than "
                f"{self.initial.path}, so it cannot move to the policy. Set dpo.reference_every to "
                "0, or give a reference of the policy's shape."
            )
        return self.reference.load_params(self.run.mesh)

    def load_base(self) -> dict | None:
        """Load the frozen weights under the adapters."""
        return self.initial_params if self.lora else None


def train_stage(run: Run, stage: str) -> dict:
    """Train a model and export it to hf/, and its adapters also to adapter/."""
    block = run.config[stage]
    table = STAGES[stage]
    initial = run.initial(stage)
    is_later_round = run.config.rounds > 1 and stage_table.repeats(run.config, stage)
    first = run.first(stage) if is_later_round else initial
    models = Models(
        run,
        stage,
        initial,
        first,
        config=dataclasses.replace(initial.config, head=table.head),
        reference=_reference(run, stage, initial, first),
        lora=run.lora(),
    )
    # Of later stages too: their models come from this one's.
    for other in run.config.stages:
        objectives.check_balance(other, run.config[other], models.config)
    attention.check_softcap(models.config.attention, models.config.attention_softcap)
    fit.check(run.config, stage, models.config)
    # First, as no prompt may be judged that is trained on.
    if table.samples:
        prompts = run.training_prompts(stage, initial.tokenizer)
    else:
        data = run.load_data(stage, initial.tokenizer)
    probe = _probe(run, stage, models)
    run.record_weights(
        stage,
        policy=initial if is_later_round else None,
        base=initial if models.lora else None,
        reference=models.reference,
        start=first if probe else None,
        reward=run.reward_model(block.reward) if table.samples else None,
    )
    if models.lora:
        _say_what_is_trained(stage, models)
    cache = None
    if stage_table.keeps_reference(run.config, stage):
        batch_size = microbatch_size_of(block)
        cache = ReferenceCache(
            run.workdir, models.reference, run.mesh, batch_size, models.frozen_dtype
        )

    # With kept log-probs the reference itself is not needed.
    load_reference = (lambda: None) if cache else models.load_reference
    if stage_table.moves_reference(block):
        load_reference = models.load_moving_reference
    job = Job(
        name=stage,
        folder=run.folder(stage),
        block=block,
        model=models.config,
        mesh=run.mesh,
        load_init=models.load_trained,
        load_reference=load_reference,
        log=run.config.log,
        config=json.loads(run.config.to_json()),
        probe=probe,
        lora=models.lora,
        load_base=models.load_base,
        loss=run.loss if table.has_preference_loss else None,
    )
    if table.samples:
        feed = _rollout_feed(run, job, initial, prompts)
    else:
        feed = _data_feed(run, job, models, data, cache)
    trained = train(job, feed)
    _export(job, models, trained.params, trained.evaluation)
    record = exports.record(run.config, run.is_last(stage), initial.source.dtype)
    result = {"evaluation": trained.evaluation, EXPORT: record}
    if trained.early_stop:
        result[EARLY_STOP] = trained.early_stop
    return result


def _rollout_feed(run: Run, job: Job, initial: Checkpoint, prompts: Prompts) -> Feed:
    """Return the feed of a stage that learns from the policy's own completions."""
    return RolloutFeed(
        job,
        prompts,
        run.reward(job.block.reward),
        tokenizer=initial.tokenizer,
        eos_id=run.eos_id(initial.tokenizer),
        other_eos_ids=initial.other_eos_ids,
        sampling=run.sampling(run.seed(job.name, "sampling")),
    )


def _data_feed(
    run: Run, job: Job, models: Models, data: dataset.Dataset, cache: ReferenceCache | None
) -> Feed:
    """Return the feed of a stage that learns from examples of data."""
    initial = models.initial
    initial.check(data.train)
    initial.check(data.eval)

    seed = None
    if run.config.data.shuffle:
        seed = run.seed(job.name, "data order")
    # Sampled responses may end by their length, without EOS.
    sampled = stage_table.trains_on_samples(run.config, job.name)
    longest_mismatched = mismatched.longest(
        data.train, run.config.data.max_length, initial.config.max_positions
    )
    feed = DataFeed(
        job,
        data,
        seed=seed,
        shuffled=run.config.data.order,
        group_pairs=run.config.data.group_pairs,
        eos_id=None if sampled else run.eos_id(initial.tokenizer),
        reference_is_init=models.reference is initial,
        reference_dtype=models.reference_dtype,
        reference_log_probs=cache.log_probs if cache else None,
        longest_mismatched=longest_mismatched,
        show_example=lambda index: dataset.show(data.train, initial.tokenizer, [index]),
    )
    run.record_reading(job.name, feed.reading)
    return feed


def _export(job: Job, models: Models, params: dict, evaluation: dict[str, float]) -> None:
    """Write what was trained: adapters as such, and the whole model in Hugging Face format."""
    initial = models.initial
    config = models.config
    run_config = models.run.config
    dtype = exports.dtype_of(run_config, models.run.is_last(job.name), initial.source.dtype)
    card = ModelCard(
        run_config,
        job.name,
        job.folder,
        initial.fingerprint(),
        evaluation,
        dtype,
        start=initial.path,
    )
    if models.lora:
        peft.save(
            job.folder / "adapter",
            config,
            initial.hf_config,
            models.lora,
            params,
            base=initial.path,
            card=processes.from_first(card.adapter_text),
        )
        params = adapters.merge_by_layer(models.initial_params, params, models.lora)
    if config.head == "lm_value":
        # The policy alone is exported, in the initial model's own shape.
        config = initial.config
        params = _without_value_head(config, params)
    hf.save(
        job.folder / "hf",
        config,
        initial.hf_config,
        params,
        initial.tokenizer,
        initial.source,
        # From what process 0 has written, which the others may not see yet.
        export.Options(dtype, processes.from_first(card.text)),
    )
    say(f"{job.name}: exported to {job.folder / 'hf'}, weights in {dtype}")


def _without_value_head(config: TransformerConfig, params: dict) -> dict:
    """Return a policy's weights without PPO's value head."""
    shapes = transformer.abstract(config)
    policy = {name: params[name] for name in shapes if name != "head"}
    if "head" in shapes:
        policy["head"] = {part: params["head"][part] for part in shapes["head"]}
    return policy


def _reference(run: Run, stage: str, initial: Checkpoint, first: Checkpoint) -> Checkpoint | None:
    """Return the reference of a stage's loss, or None.

    It is what training starts from, what it starts from in round 1, or another model.
    """
    name = stage_table.reference_of(run.config, stage)
    if name == "none":
        return None
    if name == "init":
        return initial
    if name == "first":
        return first
    other = loading.open_checkpoint(
        name,
        tokenizer=initial.tokenizer,
        max_length=run.config.data.max_length,
        **configs.model_options(run.config),
    )
    if other.config.vocab != initial.config.vocab:
        raise ValueError(
            f"config.{stage}.reference = {name!r} has a vocabulary of {other.config.vocab}, the "
            f"policy one of {initial.config.vocab}: they cannot be compared. Give a reference with "
            "the policy's vocabulary."
        )
    return other


def _say_what_is_trained(stage: str, models: Models) -> None:
    initial = models.initial
    shapes = adapters.abstract(models.config, models.lora)
    trained = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    whole = sum(leaf.size for leaf in jax.tree.leaves(initial.shapes))
    say(
        f"{stage}: LoRA trains {trained:,} numbers over the {whole:,} of {initial.path} "
        f"(sha256 {initial.fingerprint()[:16]})"
    )


def _probe(run: Run, stage: str, models: Models) -> Callable | None:
    """Return what measures a policy at each evaluation: see `Job.probe`.

    The completions to show are the first that the measure samples anyway; those of the toy, which
    is measured exactly, are not sampled. The KL is to what round 1 starts from, in all rounds. None
    where no `evaluate` stage will measure the policy, either.
    """
    if "evaluate" not in run.config.stages or not STAGES[stage].is_policy:
        return None
    first = models.first
    if run.is_measured_exactly():
        with jax.set_mesh(run.mesh):
            reference = first.model(models.first_params, run.mesh)
            measure_exactly = toy_report.probe(reference, run.config.reward.kind)

        def exact_probe(params) -> tuple[dict[str, float], list[dict]]:
            return measure_exactly(params), []

        return exact_probe
    wanted = run.config.evaluate.prompts
    held_out = run.validation_prompts(wanted, first.tokenizer)
    # Without evaluate.seed, so that it measures a trained policy with other draws.
    measure = policy_measure(run, first, held_out, run.sampling(run.config.seed))
    shown = run.config.evaluate.show

    def probe(params) -> tuple[dict[str, float], list[dict]]:
        values, rows = measure(params, models.first_params)
        return values, rows[:shown]

    return probe


def policy_measure(
    run: Run, initial: Checkpoint, held_out: Prompts, sampling: Sampling
) -> Callable:
    """Return (policy's weights, reference's) -> (values, rows), on held-out prompts."""
    reward = run.reward("true")

    def measure(params, reference):
        model = initial.model(params, run.mesh, append_eos=run.config.data.append_eos)
        return reward_kl.evaluate(model, reference, held_out, reward, sampling)

    return measure
