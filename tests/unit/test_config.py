"""The config tree: what is refused, and what a stage depends on."""

import importlib
import re

import pytest

from configs import imdb, imdb_small, imdb_smollm2, toy
from dpo_jax import config as configs
from dpo_jax import config_checks, config_files, loss_table
from dpo_jax.loss_table import LOSSES
from dpo_jax.stage_table import STAGES
from tests.helpers.paths import ROOT


def valid():
    config = configs.default(("sft", "dpo"))
    config.model.path, config.data.path = "gpt2", "pairs.jsonl"
    return config


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("stages", (), "at least one of sft"),
        ("stages", ("sft", "sft"), "each stage once"),
        ("stages", ("dpo", "sft"), "in the order sft"),
        ("stages", ("rlhf",), "one of sft"),
        ("stages", ("pairs",), "a block for"),
        ("stages", ("sft", "dpo", "evaluate"), "a block for"),
        ("run", "dpo", "other than a stage's"),
        ("run", "reference", "other than a stage's"),
        ("run", "a/b", "a folder's name"),
        ("run", "..", "a folder's name"),
        ("model.path", "", "a hub name or a folder"),
        ("model.dtype", "float16", "one of float32, bfloat16"),
        ("model.attention", "flash", "one of auto, xla, splash, cudnn"),
        ("model.remat", "some", "one of none, full, dots"),
        ("model.unroll", -1, "at least 0"),
        ("model.lora.rank", -1, "at least 0"),
        ("model.lora.alpha", 0.0, "more than 0"),
        ("model.lora.init", "zero", "one of b_zero, a_zero"),
        ("mesh.context", 0, "at least 1"),
        ("data.source", "hf", "one of local, hh"),
        ("data.path", "", "a hub name, a folder or a file"),
        ("data.truncate", "middle", "one of auto"),
        ("data.on_bad_row", "ignore", "one of error, drop"),
        ("data.max_prompt_length", 512, "between 1 and"),
        ("data.eval_fraction", 1.0, "from 0 (hold out none) to below 1"),
        ("data.mix", "other.jsonl=10", "empty, as data.path is set"),
        ("data.max_dropped", 5.0, "between 0 and 1"),
        ("data.max_rows", -1, "at least 0"),
        ("sft.loss", "mean", "one of sum, token_mean"),
        ("sft.optimizer", "adam", "one of rmsprop"),
        ("sft.weight_decay", 0.1, "0, as rmsprop has no weight decay"),
        ("sft.schedule", "step", "one of constant"),
        ("sft.patience", 3, "0, as sft.keep_best is empty: name the evaluation metric"),
        ("dpo.loss", "kto", "one of sigmoid"),
        ("dpo.loss", "sigmoid=1,rpo=2", "'rpo' is not a loss"),
        ("dpo.loss", "sigmoid=1,", "a loss before and after each comma"),
        ("dpo.loss", "sigmoid=1;nll=0.2", "commas between the losses of a mixture, not semicolons"),
        ("dpo.loss", "nll=1,sigmoid,nll", "each loss once in a mixture; nll is there twice"),
        ("dpo.loss", "sigmoid=1,nll=", "the weight of nll is ''"),
        ("dpo.loss", "nll=1e-13", "weights that are 0, or between 1e-12 and 1,000,000, as in"),
        ("dpo.loss", "sigmoid=-1,nll=1", "the weight of sigmoid is '-1'"),
        ("dpo.loss", "sigmoid=inf", "the weight of sigmoid is 'inf'"),
        ("dpo.loss", "sigmoid=nan,nll", "the weight of sigmoid is 'nan'"),
        ("dpo.loss", "sigmoid=1e39,nll", "the weight of sigmoid is '1e39'"),
        ("dpo.loss", "sigmoid=1e-50", "the weight of sigmoid is '1e-50'"),
        ("dpo.loss", "sigmoid=0,nll=0.0", "some weight is more than 0"),
        ("dpo.beta", 0.0, "more than 0"),
        ("dpo.label_smoothing", 0.5, "below 0.5"),
        ("dpo.reference", "", "'init', 'first', 'none' or"),
        ("dpo.microbatch_size", 7, "a divisor of dpo.batch_size = 64"),
        ("dpo.lr", 0.0, "more than 0"),
        ("dpo.epochs", 0.0, "more than 0, as dpo.steps is 0"),
        ("dpo.eval_every", 0, "at least 1"),
        ("dpo.keep", 0, "at least 1"),
        ("dpo.max_grad_norm", -1.0, "at least 0"),
    ],
)
def test_validate_names_wrong_field(field, value, expected):
    config = valid()
    config.model.lora.rank = 4
    config_checks.validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=re.escape(f"config.{field} = ")) as error:
        config_checks.validate(config)
    assert expected in str(error.value)


def test_validate_refuses_unused_adapters():
    config = valid()
    config.model.lora.alpha = 32.0
    with pytest.raises(
        ValueError, match="config.model.lora.rank = 0: expected 1 or more, as another field"
    ):
        config_checks.validate(config)
    config.model.lora.rank = 4
    config.model.update(path="", scratch=dict(model_type="gpt2"))
    with pytest.raises(
        ValueError, match="config.model.lora.rank = 4: expected 0, as there is no model.path"
    ):
        config_checks.validate(config)
    assert {"model.lora.rank", "model.lora.targets"} <= configs.dependencies(config, "sft").keys()


def test_validate_refuses_a_kernel_that_context_cannot_have():
    config = valid()
    config.model.attention = "cudnn"
    config_checks.validate(config)
    config.mesh.context = 2
    with pytest.raises(
        ValueError, match="attention = 'cudnn': expected auto, as .* config.mesh.context = 2"
    ):
        config_checks.validate(config)


@pytest.mark.parametrize("loss", LOSSES)
def test_validate_refuses_numbers_that_the_loss_does_not_take(loss):
    for number in loss_table.numbers():
        config = valid()
        smoothing = 0.01 if loss == "exo" else 0.0
        config.dpo.update(loss=loss, label_smoothing=smoothing)
        config_checks.validate(config)
        config.dpo[number] = 0.1 if number != "beta" else 0.2
        if number in LOSSES[loss].numbers or config.dpo[number] == configs.DPO[number].default:
            config_checks.validate(config)
            continue
        wrong = re.escape(f"config.dpo.{number} = {config.dpo[number]}: expected ")
        with pytest.raises(ValueError, match=f"{wrong}.*does not take it") as error:
            config_checks.validate(config)
        for taker in loss_table.takers(number):
            assert taker in str(error.value)


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(loss="exo"), "label_smoothing = 0.0: expected more than 0"),
        (dict(loss="nca", divergence="alpha"), "divergence = 'alpha': expected 'reverse_kl', as"),
        (dict(divergence="forward_kl", reference="none"), "as dpo.reference is 'none'"),
        (dict(divergence="chi"), "expected one of reverse_kl, forward_kl"),
        (
            dict(divergence="forward_kl", divergence_alpha=0.3),
            "divergence_alpha = 0.3: expected 0.5, its default, as the divergence forward_kl does",
        ),
        (dict(loss="simpo", reference="some/model"), "expected 'none', as the simpo loss needs no"),
        (dict(loss="orpo", cache_reference=True), "expected False, as the orpo loss needs no"),
        (dict(loss="simpo=1,nll=1", cache_reference=True), "the simpo=1,nll=1 loss needs no"),
        (dict(loss="sigmoid=1,nll=1", simpo_gamma=0.5), "the sigmoid=1,nll=1 loss does not take"),
        (dict(weighting="dpo"), "expected one of none, wpo"),
        (dict(ld_alpha=1.5), "expected between 0 and 1"),
        (dict(loss="simpo", ld_alpha=0.5), "expected 1, as dpo.ld_alpha shortens log-ratios and"),
        (dict(ld_alpha=0.5, cache_reference=True), "expected False, as dpo.ld_alpha is 0.5"),
        (dict(loss="sigmoid=1,exo=1"), "label_smoothing = 0.0: expected more than 0"),
        (
            dict(loss="sigmoid=1,nca=1,nll=1", divergence="forward_kl"),
            "expected 'reverse_kl', as the nca loss has no other divergence",
        ),
        (dict(loss="nll=1", divergence="forward_kl"), "as the nll=1 loss has no other divergence"),
        (
            dict(reference_mix=0.5),
            "reference_mix = 0.5: expected 1, its default, as dpo.reference_e",
        ),
        (dict(reference_every=9, reference="none"), "expected 0, as dpo.reference is 'none'"),
        (dict(reference_every=9, loss="simpo"), "expected 0, as the simpo loss needs no reference"),
        (dict(reference_every=9, cache_reference=True), "expected 0, as dpo.cache_reference keeps"),
        (dict(reference_every=9, keep_best="loss/eval"), "keep_best = 'loss/eval': expected a met"),
        (dict(reference_every=9, reference_mix=1.5), "reference_mix = 1.5: expected between"),
    ],
)
def test_validate_refuses_what_the_loss_has_no_use_for(fields, expected):
    config = valid()
    config.dpo.update(fields)
    with pytest.raises(ValueError, match=re.escape(expected)):
        config_checks.validate(config)


def test_validate_takes_a_divergence_and_its_number():
    config = valid()
    config.dpo.update(divergence="alpha", divergence_alpha=0.3)
    config_checks.validate(config)


def test_validate_takes_mixtures_with_all_that_their_losses_take():
    config = valid()
    config.dpo.update(loss="sigmoid=1, nll = 0.2", label_smoothing=0.1, divergence="forward_kl")
    config_checks.validate(config)
    # No divergence changes the loss of one that has no log-ratios.
    config.dpo.update(loss="hinge=1,simpo=1", label_smoothing=0.0, simpo_gamma=0.5)
    config.dpo.cache_reference = True
    config_checks.validate(config)
    config.dpo.update(cache_reference=False, ld_alpha=0.5, weighting="wpo")
    config_checks.validate(config)


def test_defaults_are_the_papers():
    dpo = configs.default(("dpo",)).dpo
    assert (
        dpo.beta,
        dpo.batch_size,
        dpo.lr,
        dpo.warmup_steps,
        dpo.optimizer,
        dpo.max_grad_norm,
    ) == (0.1, 64, 1e-6, 150, "rmsprop", 10.0)
    data = configs.default(("dpo",)).data
    assert (data.max_length, data.max_prompt_length) == (512, 256)


def test_reference_moves_under_adapters():
    config = valid()
    config.model.lora.rank = 4
    config.dpo.reference_every = 9
    config_checks.validate(config)
    config.dpo.reference_mix = 0.5
    with pytest.raises(ValueError, match="reference_mix = 0.5: expected 1 under adapters"):
        config_checks.validate(config)
    config.dpo.update(reference_mix=1.0, reference="another/model")
    with pytest.raises(ValueError, match="reference_every = 9: expected 0, as under adapters"):
        config_checks.validate(config)
    # In the only round the first policy is the base of the adapters.
    config.dpo.reference = "first"
    config_checks.validate(config)


def test_override_of_missing_stage_is_refused():
    with pytest.raises(ValueError, match="this config runs no stage sft"):
        config_files.override(config_files.load("dpo"), {"sft.lr": "1e-3"})


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "configs").glob("*.py"))])
def test_config_files_are_valid(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    if name in ("dpo", "kto", "ppo", "rm", "sft"):
        config.model.path, config.data.path = "gpt2", "pairs.jsonl"
    config_checks.validate(config)
    assert f"--config=configs/{name}.py" in module.__doc__


def test_configs_rm_and_ppo_share_a_reward_model():
    """So a WORKDIR that has one serves the other; with a model at hand there is no stage rm."""
    alone, with_ppo = config_files.load("rm"), config_files.load("ppo")
    for config in (alone, with_ppo):
        config.model.path, config.data.path = "gpt2", "pairs.jsonl"
    assert configs.dependencies(alone, "rm") == configs.dependencies(with_ppo, "rm")
    of_others = config_files.load("ppo:model")
    of_others.model.path, of_others.data.path = "gpt2", "pairs.jsonl"
    with pytest.raises(ValueError, match="config.reward.path = '': expected a hub name, a folder"):
        config_checks.validate(of_others)
    of_others.reward.path = "siebert/x"
    config_checks.validate(of_others)


@pytest.mark.parametrize("module", [imdb, imdb_small, imdb_smollm2, toy])
def test_trl_ppo_differs_from_ppo_gt_by_trls_settings(module):
    """In its own block alone; what the paper does not have of TRL stays the run's."""
    ours, trls = module.get_config("ppo_gt"), module.get_config("ppo_gt_trl")
    assert not trls.ppo.normalize_rewards and trls.ppo.reward == ours.ppo.reward == "true"
    assert (trls.ppo.batch_size, trls.ppo.minibatch_size, trls.ppo.inner_epochs) == (256, 16, 4)
    assert trls.ppo.steps * trls.ppo.batch_size == ours.ppo.steps * ours.ppo.batch_size
    assert trls.ppo.epochs == ours.ppo.epochs
    own = dict(kl_horizon=1000) if module is imdb_smollm2 else {}
    if module in (imdb, imdb_smollm2):
        assert (configs.TRL_PPO | own).items() <= trls.ppo.to_dict().items()
    trls.ppo = ours.ppo
    assert trls.to_dict() == ours.to_dict()


@pytest.mark.parametrize("module", [imdb, imdb_small, imdb_smollm2])
def test_enough_prompts_are_left_to_judge_where_some_are_dropped(module):
    """About 1.6 % of IMDb's test reviews are trained on, too."""
    for method in configs.METHODS:
        config = module.get_config(method)
        for stage in ("evaluate", "best_of_n"):
            if stage in config.stages:
                assert config.data.on_leak == "drop"
                assert config.data.max_eval_rows >= 1.1 * config[stage].prompts


def test_field_docs_explain_every_field():
    docs = configs.field_docs()
    assert len(docs) > 140
    for field, _, meaning in docs:
        assert len(meaning) > 10 and not meaning.endswith("."), field


def test_field_docs_equal_defaults():
    """Every default of the whole tree is in field_docs, and nothing else is."""
    tree = configs.default(tuple(STAGES)).to_dict()
    tree["model"]["scratch"] = None  # its own fields are Hugging Face's
    tree["data"]["template"] = None  # and these the chat template's
    docs = {field: default for field, default, _ in configs.field_docs()}
    docs |= {"model.scratch": None, "data.template": None, "stages": tuple(STAGES)}
    assert configs.flat_fields("", tree) == docs


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("batch_size", 1, "at least 2: its KL is of each prompt"),
        ("reference", "none", "KTO compares the policy with a reference"),
        ("desirable_weight", 0.0, "more than 0"),
        ("undesirable_weight", float("inf"), "a finite number"),
    ],
)
def test_kto_refuses_wrong_values(field, value, expected):
    config = configs.default(("kto",))
    config.model.path, config.data.path = "gpt2", "rows.jsonl"
    config_checks.validate(config)
    config.kto[field] = value
    with pytest.raises(ValueError, match=rf"config.kto.{field} = .*{expected}"):
        config_checks.validate(config)


def test_dependencies_of_stage():
    config = valid()
    fields = configs.dependencies(config, "sft")
    assert "sft.lr" in fields and "model.path" in fields and "seed" in fields
    assert not any(name.startswith(("dpo.", "mesh.", "log.")) for name in fields)
    assert not {"sft.log_every", "sft.save_every", "sft.keep", "data.show", "run"} & fields.keys()
    assert configs.dependencies(config, "dpo").keys() > fields.keys()


def test_frozen_dtype_counts_where_weights_are_frozen():
    """Plain SFT, on which many runs may build, has none; adapters have, and so has a reference."""
    config = configs.default(("sft", "dpo"))
    config.model.path, config.data.path = "gpt2", "rows.jsonl"
    config.model.frozen_dtype = "bfloat16"

    def stages_that_depend():
        stages = config.stages
        return [s for s in stages if "model.frozen_dtype" in configs.dependencies(config, s)]

    assert stages_that_depend() == ["dpo"]
    config.dpo.reference_every = 4
    assert stages_that_depend() == []
    expected = "expected float32, as no stage trains beside weights that it does not train"
    with pytest.raises(ValueError, match=f"config.model.frozen_dtype = 'bfloat16': {expected}"):
        config_checks.validate(config)
    config.dpo.reference_every = 0
    config_checks.validate(config)
    config.model.lora.rank = 2
    assert stages_that_depend() == ["sft", "dpo"]


@pytest.mark.parametrize(
    "stages, first",
    [
        (("sft", *configs.METHODS["dpo"]), "dpo"),
        (("sft", *configs.METHODS["preferred_ft"]), "preferred_ft"),
        (("sft", *configs.METHODS["unlikelihood"]), "unlikelihood"),
        (("sft", *configs.METHODS["ppo"]), "rm"),
        (("sft", *configs.METHODS["best_of_n"]), "rm"),
        (("sft", *configs.METHODS["ppo_gt"]), None),
        (("sft", "best_of_n"), None),
        # The completions of a file are not in sets.
        (("preferred_ft",), None),
    ],
)
def test_grouping_counts_from_first_stage_that_reads_it(stages, first):
    config = configs.default(stages)
    counts = [stage for stage in stages if "data.order" in configs.dependencies(config, stage)]
    assert counts == list(stages[stages.index(first) :] if first else ())
    for stage in stages:
        fields = configs.dependencies(config, stage).keys()
        assert ("data.group_pairs" in fields) == (stage in counts)
        assert "data.shuffle" in fields


@pytest.mark.parametrize(
    "stages, fields, expected",
    [
        (("sft", "dpo"), dict(data__weight="w", data__margin="m"), ""),
        (("rm", "ppo"), dict(data__weight="w", data__margin="m"), ""),
        (("preferred_ft",), dict(data__weight="w"), ""),
        (("unlikelihood",), dict(data__weight="w"), ""),
        (("sft",), dict(data__weight="w"), "empty, as no stage trains on pairs of the data"),
        (("ppo",), dict(data__margin="w"), "empty, as no stage trains on pairs of the data"),
        (("sft", "pairs", "dpo"), dict(data__weight="w"), "the stage pairs"),
        (("unlikelihood",), dict(data__margin="m"), "the stage unlikelihood takes no margin"),
        (("preferred_ft",), dict(data__margin="m"), "the stage preferred_ft takes no margin"),
        (("dpo",), dict(data__margin="m", dpo__loss="nca"), "the nca loss takes no margin (rm do"),
        (("rm", "dpo"), dict(data__margin="m", dpo__loss="nca"), "the nca loss takes no margin"),
        (("dpo",), dict(data__weight="w", data__margin="m", dpo__loss="hinge=1,nll=0.2"), ""),
        (("dpo",), dict(data__margin="m", dpo__loss="hinge=1,nca=1"), "takes no margin"),
        (("dpo",), dict(data__margin="m", dpo__loss="nll=1"), "takes no margin"),
        (("kto",), dict(data__weight="w"), "the stage kto takes rows one by one, without weights"),
        (("rm", "kto"), dict(data__weight="w"), "kto takes rows one by one, without weights"),
        (("rm", "kto"), dict(data__margin="m"), "kto takes rows one by one, without margins"),
    ],
)
def test_columns_of_numbers_are_used(stages, fields, expected):
    config = sampled(*stages)
    for name, value in fields.items():
        block, _, field = name.partition("__")
        config[block][field] = value
    if not expected:
        config_checks.validate(config)
        # They count from the first stage that reads them: sft reads texts alone.
        for stage in stages:
            is_used = "data.weight" in configs.dependencies(config, stage)
            assert is_used == (stage != "sft")
        return
    with pytest.raises(ValueError, match=r"config.data.(weight|margin) = ") as error:
        config_checks.validate(config)
    assert expected in str(error.value)


def test_folder_names():
    config = configs.default(("sft", "pairs", "dpo", "evaluate"))
    assert configs.folder_names(config) == {name: name for name in config.stages}
    config.run = "beta05"
    assert configs.folder_names(config) == {
        "sft": "sft",
        "pairs": "pairs",
        "dpo": "beta05",
        "evaluate": "evaluate-beta05",
    }
    # Whether it makes pairs of its own or not.
    without_pairs = configs.default(("sft", "ppo", "evaluate"))
    without_pairs.run = "high"
    names = configs.folder_names(without_pairs)
    assert names == {"sft": "sft", "ppo": "high", "evaluate": "evaluate-high"}


def sampled(*stages):
    config = configs.default(stages)
    config.model.path, config.data.path = "gpt2", "rows.jsonl"
    return config


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("pairs.labels", "votes", "one of bradley_terry"),
        ("pairs.choose", "best", "one of all, best_worst, best_random"),
        ("pairs.completions", 1, "at least 2"),
        ("unlikelihood.alpha", -1.0, "at least 0"),
        ("preferred_ft.loss", "mean", "one of sum"),
        ("ppo.minibatch_size", 100, "a divisor of ppo.batch_size = 1024"),
        ("ppo.kl_horizon", 204, "at least 205, as ppo.batch_size is 1,024"),
        ("ppo.microbatch_size", 100, "a divisor of ppo.minibatch_size = 256"),
        ("ppo.inner_epochs", 0, "at least 1"),
        ("ppo.target_kl", 0.0, "more than 0"),
        ("ppo.gae_lambda", 1.5, "between 0 and 1"),
        ("ppo.reward", "best", "one of rm, true"),
        ("best_of_n.n", (), "1 or more"),
        ("best_of_n.reward", "best", "one of rm, true"),
        ("evaluate.prompts", 1, "at least 2"),
        ("reward.kind", "oracle", "one of classifier"),
        ("reward.kind", "toy", "'toy' or 'toy_saturating' with data.source='toy'"),
        ("reward.path", "", "a hub name"),
        ("reward.batch_size", 0, "at least 1"),
        ("sampling.max_new_tokens", 0, "at least 1"),
        ("sampling.min_prefix", 9, "from 0 to sampling.max_prefix = 0"),
    ],
)
def test_validate_names_wrong_sampling_field(field, value, expected):
    block, _, name = field.rpartition(".")
    trained = block if block in STAGES and STAGES[block].is_policy else "ppo"
    stages = sorted({"pairs", "rm", trained, "best_of_n", "evaluate"}, key=list(STAGES).index)
    config = sampled(*stages)
    config_checks.validate(config)
    config[block][name] = value
    with pytest.raises(ValueError, match=re.escape(f"config.{field} = ")) as error:
        config_checks.validate(config)
    assert expected in str(error.value)


def test_validate_stages_that_need_others():
    with pytest.raises(ValueError, match="a stage to evaluate"):
        config_checks.validate(sampled("sft", "evaluate"))
    with pytest.raises(ValueError, match="a run of its own"):
        config_checks.validate(sampled("dpo", "ppo"))
    with pytest.raises(ValueError, match="rm before ppo in config.stages"):
        config_checks.validate(sampled("ppo"))


@pytest.mark.parametrize(
    "stages, path, field, expected",
    [
        (("rm", "ppo"), "", "", ""),
        (("rm", "best_of_n"), "", "", ""),
        (("rm", "ppo"), "siebert/x", "reward.path", "empty: the reward is the rm stage's model"),
        (("dpo", "evaluate"), "", "reward.kind", "or the stage rm in config.stages"),
        (
            ("pairs", "rm", "ppo"),
            "",
            "reward.kind",
            "rm is trained on the pairs, so it cannot label them",
        ),
    ],
)
def test_validate_rm_as_reward(stages, path, field, expected):
    config = sampled(*stages)
    config.reward.update(kind="rm", path=path)
    if not field:
        config_checks.validate(config)
        return
    with pytest.raises(ValueError, match=re.escape(f"config.{field} = ")) as error:
        config_checks.validate(config)
    assert expected in str(error.value)


def test_validate_mixture():
    config = configs.default(("dpo",))
    config.model.path = "gpt2"
    config.data.mix = "a.jsonl=10, hh@b.jsonl=5%"
    config_checks.validate(config)
    config.data.max_rows = 7
    with pytest.raises(ValueError, match="config.data.max_rows = 7: expected 0, as data.mix"):
        config_checks.validate(config)
    config.data.update(max_rows=0, mix="a.jsonl=0")
    with pytest.raises(ValueError, match="data.mix: 'a.jsonl=0': 0 rows are none"):
        config_checks.validate(config)


def test_validate_toy_without_posts():
    config = configs.default(("sft",))
    config.model.scratch = dict(model_type="gpt2")
    config.data.update(source="toy", sft_path="posts")
    with pytest.raises(ValueError, match="config.data.sft_path = 'posts': expected empty: the toy"):
        config_checks.validate(config)


def test_dependencies_of_sampling_stage():
    assert not any(
        name.startswith(("reward.", "sampling."))
        for name in configs.dependencies(sampled("dpo"), "dpo")
    )
    # It is measured while it is trained.
    fields = configs.dependencies(sampled("dpo", "evaluate"), "dpo")
    assert {"reward.kind", "sampling.max_new_tokens", "evaluate.prompts"} <= fields.keys()
    assert "reward.kind" not in configs.dependencies(sampled("sft", "pairs", "dpo"), "sft")


def test_what_only_judging_depends_on():
    """A policy that is trained can be judged with other draws, and other prompts left out."""
    config = sampled("dpo", "best_of_n", "evaluate")
    fields = {stage: configs.dependencies(config, stage) for stage in config.stages}
    assert not {"data.on_leak", "evaluate.seed"} & fields["dpo"].keys()
    assert "data.on_leak" in fields["best_of_n"]
    assert {"data.on_leak", "evaluate.seed"} <= fields["evaluate"].keys()
    config.data.on_leak, config.evaluate.seed = "drop", 3
    for stage in ("dpo", "best_of_n", "evaluate"):
        assert (configs.dependencies(config, stage) == fields[stage]) == (stage == "dpo")


@pytest.mark.parametrize("stages", [("sft",), ("sft", "pairs"), ("dpo",)])
def test_stages_may_be_taken_out_of_a_config(stages):
    """Their blocks stay, and are not read."""
    config = config_files.load("imdb")
    config.stages = stages
    config_checks.validate(config)
    config.dpo.betta = 0.1
    with pytest.raises(ValueError, match="dpo.betta"):
        config_checks.validate(config)


def test_longest_sequence_is_read_or_sampled():
    """Only where a stage samples; prompts are a data set's own, or prefixes after a BOS."""
    config = configs.default(("sft", "pairs", "dpo"))
    config.data.update(max_length=100, max_prompt_length=60)
    config.sampling.max_new_tokens = 30
    assert configs.longest_sequence(config) == 100
    config.sampling.max_new_tokens = 50
    assert configs.longest_sequence(config) == 110
    config.sampling.max_prefix = 70
    assert configs.longest_sequence(config) == 121
    config.stages = ("sft",)
    assert configs.longest_sequence(config) == 100
