"""The Python interface: what its calls return, refuse and leave alone."""

import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import dpo_jax
from dpo_jax.parallel import sharding
from tests.helpers.paths import ROOT
from tests.helpers.rows import assistant, user

ROWS = [
    {"prompt": "w1 w2", "chosen": "w30 w31", "rejected": "w3"},
    {"prompt": "w4", "chosen": "w20", "rejected": "w5 w6 w7"},
    {"prompt": "w8 w9 w3", "chosen": "w35", "rejected": "w1 w2"},
    {"prompt": "w2", "chosen": "w33 w34 w36", "rejected": "w9 w9"},
]


@pytest.fixture(scope="module")
def loaded(model):
    """The tiny model on one device."""
    return dpo_jax.load(model, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def pairs(loaded):
    return loaded.encode(ROWS)


def trainer_of(loaded, objective="dpo", **settings):
    return dpo_jax.Trainer(loaded, objective, **dict(lr=1e-3, warmup_steps=0) | settings)


def tokens_of(example):
    return len(example.prompt) + len(example.responses[0])


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout


def test_import_does_not_import_jax():
    code = """
import sys
import dpo_jax
assert set(dpo_jax.__all__) == set(dir(dpo_jax))
print({"jax", "numpy", "transformers"} & sys.modules.keys())
"""
    assert run_python(code) == "set()\n"


def test_public_names():
    for name in dpo_jax.__all__:
        assert getattr(dpo_jax, name)
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = dpo_jax.Trainr


def test_jax_settings_are_left_alone(loaded, pairs):
    before = jax.config.jax_default_matmul_precision
    trainer_of(loaded).step(pairs)
    assert jax.config.jax_default_matmul_precision == before


def test_products_are_float32(loaded, pairs):
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(lambda x: x @ x).lower(np.ones((2, 2))).as_text()
        assert "precision = [DEFAULT" in text or "DEFAULT" in text
        rough = loaded.log_probs(pairs).values
    np.testing.assert_array_equal(rough, loaded.log_probs(pairs).values)


def test_nothing_is_printed(loaded, pairs, capfd):
    trainer = trainer_of(loaded)
    trainer.step(pairs)
    trainer.fit(pairs, batch_size=2, steps=2)
    trainer.evaluate(pairs)
    loaded.log_probs(pairs)
    trainer.model.generate(["w1"], max_new_tokens=2)
    assert capfd.readouterr() == ("", "")


def test_progress_is_printed_if_asked(loaded, pairs, capsys):
    trainer_of(loaded).fit(pairs, batch_size=2, steps=2, verbose=True)
    assert "dpo 2/2  loss" in capsys.readouterr().out


def test_encode_pairs(loaded, pairs):
    prompt, (chosen, rejected) = pairs[0].prompt, pairs[0].responses
    words = loaded.tokenizer
    assert words.decode(prompt) == "<s> w1 w2"
    assert words.decode(chosen) == "w30 w31 </s>"
    assert words.decode(rejected) == "w3 </s>"
    assert pairs.where == [f"rows[{i}]" for i in range(4)]


def test_numbers_that_an_objective_does_not_take(loaded):
    rows = [row | dict(votes=2, gap=1) for row in ROWS]
    margins = loaded.encode(rows, margin="gap")
    assert margins.target_margins.tolist() == [1] * 4
    for objective, settings in (
        ("dpo", dict(loss="nca")),
        ("dpo", dict(loss="sigmoid=1,apo_zero=1")),
        ("unlikelihood", {}),
        (lambda chosen, rejected, beta: rejected - chosen, {}),
    ):
        with pytest.raises(ValueError, match="the examples have target margins, and .* takes none"):
            dpo_jax.Trainer(loaded, objective, **settings).step(margins)
    weights = loaded.encode(rows, kind="unpaired", weight="votes")
    with pytest.raises(ValueError, match="kto takes no weights, which are of pairs"):
        dpo_jax.Trainer(loaded, "kto").step(weights)
    with pytest.raises(ValueError, match=r"rows\[0\]: data.weight names a column 'vote', which is"):
        loaded.encode(rows, weight="vote")


@pytest.mark.parametrize("max_length", [6, 40])
def test_mismatched_rows_are_cut_as_in_a_run(loaded, max_length):
    """By what `encode` was told, whichever rows are in a call."""
    long = dict(prompt="w1 " * 4, completion="w7", label=True)
    answer = dict(prompt="w2", completion="w8 " * (max_length - 3), label=False)
    settings = dict(kind="unpaired", max_length=max_length, max_prompt_length=5)
    rows = loaded.encode([long, answer, long], **settings)
    trainer = trainer_of(loaded, "kto")
    for some in (rows, rows[:2]):
        plan = dpo_jax.batches(some, batch_size=len(some), steps=1, seed=None)
        found = max(map(tokens_of, trainer._lay_out(plan).mismatched.examples))
        assert found == max_length


def test_kto_takes_two_rows_or_more_and_a_reference(loaded, pairs):
    rows = loaded.encode(ROWS, kind="unpaired")
    trainer = trainer_of(loaded, "kto")
    for use in (
        lambda: trainer.step(rows[:1]),
        lambda: trainer.fit(rows, batch_size=1),
        lambda: trainer.fit(rows[:1], batch_size=4, steps=1),
        lambda: trainer.evaluate(rows[:1]),
    ):
        with pytest.raises(ValueError, match="kto takes at least 2 rows together, .*; found 1"):
            use()
    with pytest.raises(ValueError, match="kto compares the policy with a reference"):
        trainer_of(loaded, "kto", reference="none")
    with pytest.raises(ValueError, match="kto needs the reference itself"):
        trainer_of(loaded, "kto", reference_log_probs=loaded.log_probs(pairs))


def test_encode_any_iterable_and_source(loaded):
    transcript = "\n\nHuman: w1\n\nAssistant:"
    rows = ({"chosen": transcript + end, "rejected": transcript + " w9"} for end in (" w2", " w3"))
    assert len(loaded.encode(rows, source="hh")) == 2


def test_encode_chosen_as_completion(loaded, pairs):
    completions = loaded.encode(ROWS, kind="sft")
    assert [len(example.responses) for example in completions] == [1] * 4
    np.testing.assert_array_equal(completions[1].responses[0], pairs[1].responses[0])


def test_encode_refuses_chat_without_template(loaded):
    row = {"prompt": [user("w1")], "chosen": [assistant("w2")], "rejected": [assistant("w3")]}
    with pytest.raises(ValueError, match=r"rows\[0\] holds chat messages"):
        loaded.encode([row])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {"prompt": "w1", "chosen": "w2"}], r"rows\[4\]: a pair needs two responses"),
        ([*ROWS, {"prompt": "w1", "chosen": "w2", "rejected": 3}], r"rows\[4\]: .*'rejected'"),
        ([{"text": 5}], r"rows\[0\]: .*'text'"),
        (["w1"], r"rows\[0\]: .*"),
        ([*ROWS, {"prompt": "w1", "chosen": "w2", "rejected": "w2"}], r"rows\[4\]: .*equal"),
        ([{"prompt": "w1", "chosen": "</s>", "rejected": "w2"}], r"without tokens.*rows\[0\]"),
        ([], "no row"),
    ],
)
def test_encode_names_wrong_rows(loaded, rows, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        loaded.encode(rows)


@pytest.mark.parametrize("rows", ["pairs.jsonl", ROWS[0]])
def test_encode_refuses_file_or_single_row(loaded, rows):
    with pytest.raises(TypeError, match="takes a list of rows"):
        loaded.encode(rows)


def test_encode_drops_bad_rows(loaded):
    rows = [ROWS[0], {"prompt": "w1"}, ROWS[1], {"prompt": "w1", "chosen": "w", "rejected": "w"}]
    kept = loaded.encode(rows, on_bad_row="drop")
    assert kept.where == ["rows[0]", "rows[2]"]


def test_encode_all_pairs_of_a_row(loaded):
    answers = [{"answer": f"w{number}", "rank": number} for number in (2, 1, 3)]
    rows = [ROWS[0], {"prompt": "w1", "answers": answers}, ROWS[1]]
    pairs = loaded.encode(rows)
    assert pairs.where == ["rows[0]", *["rows[1]"] * 3, "rows[2]"]
    said = [[loaded.tokenizer.decode(ids) for ids in pairs[i].responses] for i in (1, 2, 3)]
    assert said == [["w1 </s>", "w2 </s>"], ["w1 </s>", "w3 </s>"], ["w2 </s>", "w3 </s>"]]


def test_encode_leaves_the_rows_as_they_are(loaded):
    """Chat messages that a field holds as JSON text are parsed in a copy."""
    row = {"prompt": "w1", "chosen": '[{"role": "assistant", "content": "w2"}]', "rejected": "w3"}
    given = dict(row)
    with pytest.raises(ValueError, match="no chat template"):
        loaded.encode([row])
    assert row == given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(template="loud=True"), "template='loud=True' .*expected a dict"),
        (dict(ignore="name"), "ignore='name' .*expected a list"),
        (dict(columns=["prompt"]), "columns=.*expected text"),
        (dict(turns=3), "turns=3 .*expected text"),
    ],
)
def test_encode_refuses_other_types(loaded, settings, message):
    with pytest.raises(TypeError, match=f"encode: {message}"):
        loaded.encode(ROWS, **settings)


def test_encode_refuses_unknown_turns(loaded):
    with pytest.raises(ValueError, match="turns='first': expected one of all, last"):
        loaded.encode(ROWS, turns="first")


def test_encode_renames_columns(loaded, pairs):
    rows = [dict(question=row["prompt"]) | row for row in ROWS]
    for row in rows:
        del row["prompt"]
    assert loaded.encode(rows, columns="prompt=question").fingerprint == pairs.fingerprint


def test_generate_names_a_wrong_prompt(loaded):
    with pytest.raises(TypeError, match=r"prompts\[1\]=.*: expected text or a list of chat"):
        loaded.generate(["w1", dict(role="user")])


def test_log_probs_equal_each_row_alone(loaded, pairs):
    chosen, rejected = loaded.log_probs(pairs)
    assert chosen.dtype == rejected.dtype == np.float32
    for i, row in enumerate(ROWS):
        alone = loaded.log_probs(loaded.encode([row]))
        np.testing.assert_allclose(alone.values[0], (chosen[i], rejected[i]), rtol=1e-5)


def test_log_probs_of_single_completions(loaded, pairs):
    (completion,) = loaded.log_probs(loaded.encode(ROWS, kind="sft"))
    chosen, _ = loaded.log_probs(pairs)
    np.testing.assert_allclose(completion, chosen, rtol=1e-5)


def test_step_starts_at_log_2_and_learns(loaded, pairs):
    trainer = trainer_of(loaded)
    losses = [trainer.step(pairs)["loss/train"] for _ in range(5)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses == sorted(losses, reverse=True)
    assert trainer.steps_done == 5


def test_trainer_takes_a_loss_and_its_numbers(loaded, pairs):
    """At lambda 0 ORPO is the likelihood of the chosen responses, per token."""
    found = []
    for orpo_lambda in (0.0, 0.5):
        trainer = trainer_of(loaded, loss="orpo", orpo_lambda=orpo_lambda)
        found.append(trainer.step(pairs)["loss/train"])
    chosen, _ = loaded.log_probs(pairs)
    lengths = [example.completion_lengths()[0] for example in pairs]
    assert found[0] == pytest.approx(np.mean(-np.asarray(chosen) / lengths), rel=1e-5)
    assert found[0] < found[1]


def test_trainer_leaves_initial_model(loaded, pairs):
    before = loaded.log_probs(pairs).values
    trainer = trainer_of(loaded)
    trainer.step(pairs)
    np.testing.assert_array_equal(loaded.log_probs(pairs).values, before)
    assert (trainer.model.log_probs(pairs).values != before).all()


def test_replaced_weights_are_refused(loaded, pairs, tmp_path):
    trainer = trainer_of(loaded)
    old = trainer.model
    trainer.step(pairs)
    for use in (
        lambda: old.log_probs(pairs),
        lambda: old.generate(["w1"], max_new_tokens=1),
        lambda: old.save(tmp_path / "out"),
        lambda: dpo_jax.Trainer(old, "sft"),
    ):
        with pytest.raises(RuntimeError, match="Use trainer.model"):
            use()


def test_donated_model_is_refused(model, pairs):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    given = dpo_jax.load(model, mesh=mesh)
    kept = given.log_probs(pairs)
    trainer = trainer_of(given, reference_log_probs=kept, donate=True)
    assert trainer.model.params is given.params
    assert trainer.step(pairs)["loss/train"] == pytest.approx(np.log(2), abs=1e-5)
    with pytest.raises(RuntimeError, match="donate=True"):
        given.log_probs(pairs)


def test_mesh_of_some_axes_is_taken(model):
    given = jax.make_mesh((2, 4), ("tensor", "data"))
    mesh = dpo_jax.load(model, mesh=given).mesh
    assert dict(mesh.shape) == dict(data=4, fsdp=1, context=1, expert=1, tensor=2)
    expected = given.devices.T.reshape(4, 1, 1, 1, 2)
    assert (mesh.devices == expected).all()
    # Every axis in its place: the same mesh.
    assert sharding.with_all_axes(mesh) == mesh


def test_reference_cannot_be_donated(loaded):
    with pytest.raises(ValueError, match="it is the reference too"):
        trainer_of(loaded, donate=True)


def test_kept_log_probs_equal_live_reference(loaded, pairs):
    live = trainer_of(loaded)
    kept = trainer_of(loaded, reference_log_probs=loaded.log_probs(pairs))
    for _ in range(3):
        mine, its = kept.step(pairs), live.step(pairs)
        assert mine["loss/train"] == pytest.approx(its["loss/train"], abs=1e-5)
    assert kept.evaluate(pairs)["rewards_eval/margins"] == pytest.approx(
        live.evaluate(pairs)["rewards_eval/margins"], abs=1e-4
    )


def test_pairs_slices_and_lists(loaded, pairs):
    all_of_them = loaded.log_probs(pairs).values
    for some, indices in ((pairs[1:], [1, 2, 3]), (pairs[[2, 0]], [2, 0]), (pairs[:-3], [0])):
        assert some.where == [f"rows[{i}]" for i in indices]
        np.testing.assert_allclose(loaded.log_probs(some).values, all_of_them[indices], rtol=1e-5)
    trainer = trainer_of(loaded)
    trainer.step(pairs[:2])
    assert trainer.evaluate(pairs[2:])["lengths_eval/chosen"] == 3  # of 2 and 4 tokens


def test_kept_log_probs_found_by_tokens(loaded, pairs):
    some = pairs[[2, 0]]
    kept = loaded.log_probs(pairs)
    np.testing.assert_array_equal(kept.of(some), kept.values[[2, 0]])
    other = loaded.encode([ROWS[0], {"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    with pytest.raises(ValueError, match=r"rows\[1\] is not among the examples"):
        trainer_of(loaded, reference_log_probs=kept).step(other)


def test_kept_log_probs_on_disk(loaded, pairs, tmp_path, monkeypatch):
    kept = loaded.log_probs(pairs, keep_in=tmp_path)
    np.testing.assert_array_equal(kept.values, loaded.log_probs(pairs).values)
    (file,) = tmp_path.glob("reference/*/train.npy")
    monkeypatch.setattr("dpo_jax.models.inference.response_log_probs", None)  # is not run again
    again = loaded.log_probs(pairs, keep_in=tmp_path)
    np.testing.assert_array_equal(again.values, kept.values)
    assert np.load(file).tolist() == kept.values.tolist()


def test_trained_log_probs_not_kept_on_disk(loaded, pairs, tmp_path):
    with pytest.raises(ValueError, match="save it, and load it again"):
        trainer_of(loaded).model.log_probs(pairs, keep_in=tmp_path)


def test_trainer_with_another_reference(loaded, pairs):
    trained = trainer_of(loaded)
    trained.step(pairs)
    trainer = trainer_of(loaded, reference=trained.model)
    reference_chosen, _ = trained.model.log_probs(pairs)
    chosen, _ = loaded.log_probs(pairs)
    metrics = trainer.step(pairs)
    expected = 0.1 * (chosen - reference_chosen).mean()
    assert metrics["rewards_train/chosen"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("objective", ["sft", "preferred_ft", "unlikelihood", "rm", "dpo"])
def test_trainer_of_every_objective(loaded, objective):
    examples = loaded.encode(ROWS, kind="sft" if objective in ("sft", "preferred_ft") else "")
    trainer = trainer_of(loaded, objective)
    first, *_, last = trainer.fit(examples, batch_size=4, steps=6)
    assert last["loss/train"] < first["loss/train"]
    assert trainer.evaluate(examples)["loss/eval"] < first["loss/train"]


# Each compiles a program, and test_losses.py has the formulas of all.
@pytest.mark.parametrize(
    "loss",
    [
        "sigmoid_norm",
        "robust",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "ipo_sum", "hinge")),
    ],
)
def test_trainer_of_every_loss(loaded, pairs, loss):
    trainer = trainer_of(loaded, loss=loss)
    assert np.isfinite(trainer.step(pairs)["loss/train"])


def test_reward_model_has_no_log_probs(loaded, pairs):
    trainer = trainer_of(loaded, "rm")
    with pytest.raises(ValueError, match="head"):
        trainer.model.log_probs(pairs)


def test_trainer_with_custom_loss(loaded, pairs):
    """The built-in one as a function: the same numbers, and no program for each trainer."""
    compiled = []

    def sigmoid(chosen_log_ratio, rejected_log_ratio, beta):
        compiled.append(beta)
        return -jax.nn.log_sigmoid(beta * (chosen_log_ratio - rejected_log_ratio))

    for beta in (0.1, 0.7):
        mine, its = trainer_of(loaded, sigmoid, beta=beta), trainer_of(loaded, "dpo", beta=beta)
        for _ in range(3):
            assert mine.step(pairs)["loss/train"] == pytest.approx(
                its.step(pairs)["loss/train"], rel=1e-6
            )
    assert len(compiled) == 1
    with pytest.raises(ValueError, match="not both"):
        trainer_of(loaded, sigmoid, loss="hinge")


def test_custom_loss_of_another_shape_is_refused(loaded, pairs):
    def mean_hinge(chosen_log_ratio, rejected_log_ratio, beta):
        return jax.nn.relu(1 - beta * (chosen_log_ratio - rejected_log_ratio)).mean()

    message = r"mean_hinge returned shape \(\), expected one value per pair, \(1, 4\)"
    with pytest.raises(ValueError, match=message):
        trainer_of(loaded, mean_hinge).step(pairs)


def test_custom_loss_of_other_arguments_is_refused(loaded, tmp_path):
    def of_margin(margin, beta):
        return -beta * margin

    message = r"of_margin takes \(margin, beta\); expected \(chosen_log_ratio, "
    with pytest.raises(TypeError, match=message):
        trainer_of(loaded, of_margin)
    with pytest.raises(TypeError, match=message):
        dpo_jax.run(dpo_jax.load_config("toy"), tmp_path, loss=of_margin)


def test_trainer_with_lora(loaded, pairs, tmp_path):
    before = loaded.log_probs(pairs).values
    trainer = trainer_of(loaded, lora=dict(rank=2))
    assert trainer.step(pairs)["loss/train"] == pytest.approx(np.log(2), abs=1e-6)
    trainer.step(pairs)
    np.testing.assert_array_equal(loaded.log_probs(pairs).values, before)
    merged = trainer.model.log_probs(pairs).values
    measured = trainer.evaluate(pairs)
    assert merged[:, 0].mean() == pytest.approx(measured["logps_eval/chosen"], rel=1e-4)
    trainer.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_trainer_is_equal_on_mesh(model, loaded, pairs):
    on_four = dpo_jax.load(model, mesh=dict(fsdp=2, tensor=2, devices=jax.devices()[:4]))
    np.testing.assert_allclose(
        on_four.log_probs(pairs).values, loaded.log_probs(pairs).values, rtol=1e-4
    )
    mine, its = trainer_of(on_four), trainer_of(loaded)
    for _ in range(3):
        assert mine.step(pairs)["loss/train"] == pytest.approx(
            its.step(pairs)["loss/train"], rel=1e-4
        )


def test_step_fills_up_batch_for_mesh(model, loaded, pairs):
    on_eight = dpo_jax.load(model)
    three = loaded.encode(ROWS[:3])
    mine, its = trainer_of(on_eight).step(three), trainer_of(loaded).step(three)
    assert mine["logps_train/chosen"] == pytest.approx(its["logps_train/chosen"], rel=1e-5)
    assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-4)


def test_step_in_microbatches(loaded, pairs):
    whole = trainer_of(loaded).step(pairs)
    split = trainer_of(loaded, microbatch_size=2).step(pairs)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_batches_are_an_epoch_by_default(pairs):
    epoch = dpo_jax.batches(pairs, batch_size=2)
    assert len(epoch) == 2
    assert sorted(epoch.order.ravel()) == [0, 1, 2, 3]
    longer = dpo_jax.batches(pairs, batch_size=2, steps=7)
    np.testing.assert_array_equal(longer.order[:2], epoch.order)
    in_order = dpo_jax.batches(pairs, batch_size=2, seed=None)
    np.testing.assert_array_equal(in_order.order, [[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="make no batch"):
        dpo_jax.batches(pairs, batch_size=64)


def test_fit_equals_steps_of_batches(loaded, pairs):
    plan = dpo_jax.batches(pairs, batch_size=2, steps=3)
    one = trainer_of(loaded)
    by_hand = [one.step(batch) for batch in plan]
    assert trainer_of(loaded).fit(pairs, batch_size=2, steps=3) == by_hand


def test_schedule_needs_steps(loaded, pairs):
    with pytest.raises(ValueError, match="runs over steps"):
        trainer_of(loaded, schedule="linear").step(pairs)
    found = trainer_of(loaded, schedule="linear").fit(pairs, batch_size=2, steps=4)
    assert [row["lr"] for row in found] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_generate_texts(loaded):
    texts = loaded.generate(["w1 w2", "w3"], max_new_tokens=3, temperature=0.0)
    assert len(texts) == 2
    assert all(len(text.split()) <= 3 for text in texts)
    several = loaded.generate(["w1 w2"], n=3, max_new_tokens=3, seed=1)
    assert [len(of_prompt) for of_prompt in several] == [3]
    assert several == loaded.generate(["w1 w2"], n=3, max_new_tokens=3, seed=1)


def test_save_and_load(loaded, pairs, tmp_path):
    trainer = trainer_of(loaded)
    trainer.step(pairs)
    trainer.model.save(tmp_path / "out")
    again = dpo_jax.load(tmp_path / "out", mesh=loaded.mesh)
    np.testing.assert_array_equal(
        again.log_probs(pairs).values, trainer.model.log_probs(pairs).values
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: dpo_jax.Trainer(m, "dpo", bta=0.5), "no setting 'bta'; did you mean beta"),
        (lambda m, p: dpo_jax.Trainer(m, "sft", beta=0.5), "no setting 'beta'"),
        (lambda m, p: dpo_jax.Trainer(m, "dpo", lora=dict(rnk=1)), "'rnk'; did you mean rank"),
        (lambda m, p: m.encode(ROWS, maxlength=9), "'maxlength'; did you mean max_length"),
        (lambda m, p: dpo_jax.Trainer(m, "dpo").step(ROWS), "takes examples of model.encode"),
        (lambda m, p: m.generate("w1"), "takes a list of prompts"),
        (lambda m, p: m.generate(["w1"], temperatur=1), "'temperatur'; did you mean temperature"),
        (lambda m, p: m.generate(["w1"], top_k="x"), r"generate: top_k='x' \(str\): .* whole n"),
        (lambda m, p: m.generate(["w1"], n=1.5), r"generate: n=1.5 \(float\): expected a whole n"),
        (lambda m, p: m.generate(["w1"], max_prompt_length=""), "generate: max_prompt_length=''"),
        (lambda m, p: m.encode(ROWS, max_length="x"), "encode: max_length='x'.* a whole number"),
        (lambda m, p: m.encode(ROWS, append_eos=1), r"append_eos=1 \(int\): .* True or False"),
        (lambda m, p: m.log_probs(ROWS), "log_probs takes examples of model.encode; found"),
        (lambda m, p: m.log_probs(p, batch_size="8"), r"log_probs: batch_size='8' \(str\)"),
        (lambda m, p: dpo_jax.batches(ROWS), "batches takes examples of model.encode; found"),
        (lambda m, p: dpo_jax.batches(p, seed="x"), r"batches: seed='x' \(str\)"),
        (lambda m, p: dpo_jax.batches(p, epochs=""), r"batches: epochs='' .*expected a number"),
        (lambda m, p: dpo_jax.Trainer("x"), r"Trainer takes a model .* dpo_jax.load\('x'\) loads"),
        (lambda m, p: dpo_jax.Trainer(m, lr="x"), r"'dpo'\): lr='x' \(str\): expected a number"),
        (lambda m, p: dpo_jax.Trainer(m, warmup_steps=True), r"warmup_steps=True \(bool\)"),
        (lambda m, p: dpo_jax.Trainer(m, lora=8), r"lora=8 \(int\): expected a dict"),
        (lambda m, p: dpo_jax.Trainer(m, lora=dict(rank="8")), r"lora: rank='8' \(str\)"),
        (lambda m, p: dpo_jax.Trainer(m, reference=3), r"reference=3 \(int\): expected 'init'"),
        (
            lambda m, p: dpo_jax.Trainer(m, reference_log_probs=np.zeros((4, 2))),
            "reference_log_probs takes what model.log_probs",
        ),
        (lambda m, p: dpo_jax.load("P", attenton="xla"), "load has .*'attenton'; .* attention"),
        (lambda m, p: dpo_jax.load("P", mesh=dict(fsd=1)), "mesh.* no setting 'fsd'; .* fsdp"),
        (lambda m, p: dpo_jax.load("P", mesh=dict(fsdp="2")), r"load: mesh.fsdp='2' \(str\)"),
        (lambda m, p: dpo_jax.load("P", mesh=2), r"load: mesh=2 \(int\): expected a jax mesh"),
        (lambda m, p: dpo_jax.run("toy", "W"), r"run takes a config of .*; found 'toy' \(str\)"),
        (
            lambda m, p: dpo_jax.run(dpo_jax.load_config("toy"), "W", loss="hinge"),
            r"run: loss='hinge' \(str\): expected a function",
        ),
        (lambda m, p: dpo_jax.load("P", unroll="x"), r"load: unroll='x' \(str\)"),
    ],
)
def test_wrong_arguments_are_named(loaded, pairs, call, message):
    with pytest.raises(TypeError, match=message):
        call(loaded, pairs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, p: dpo_jax.load("P", mesh=jax.make_mesh((4, 2), ("data", "rows"))),
            "load: the mesh has the axes data, rows: expected only some of data, fsdp, context",
        ),
        (lambda m, p: dpo_jax.Trainer(m, "dop"), "objective 'dop' is not one of"),
        (lambda m, p: dpo_jax.Trainer(m, "ppo"), "dpo_jax.run"),
        (lambda m, p: dpo_jax.Trainer(m, "dpo", beta=-1.0), "beta=-1.0: expected more than 0"),
        (lambda m, p: dpo_jax.Trainer(m, "dpo", loss="sigmod"), "expected one of sigmoid"),
        (lambda m, p: dpo_jax.Trainer(m, "dpo", lora=dict(rank=0)), "rank"),
        (lambda m, p: dpo_jax.Trainer(m, "dpo", reference="PATH"), "dpo_jax.load"),
        (lambda m, p: dpo_jax.Trainer(m, "sft", reference=m), "sft has no reference"),
        (lambda m, p: dpo_jax.Trainer(m, loss="orpo", reference=m), "orpo loss needs no reference"),
        (lambda m, p: dpo_jax.Trainer(m, loss="ipo", simpo_gamma=2.0), "ipo loss does not take it"),
        (
            lambda m, p: dpo_jax.Trainer(m, divergence="forward_kl", reference="none"),
            "divergence='forward_kl' needs a reference",
        ),
        (lambda m, p: dpo_jax.Trainer(m, "sft").step(p), "kind='sft'"),
        (lambda m, p: dpo_jax.Trainer(m, "dpo").step(m.encode(ROWS, kind="sft")), "takes pairs"),
        (lambda m, p: m.encode(ROWS, kind="pair"), "kind='pair'"),
        (lambda m, p: m.generate(["w1"], temperature=-1), "temperature=-1"),
        (lambda m, p: m.generate(["w1"], n=0), "generate: n=0: expected at least 1"),
        (lambda m, p: m.generate(["w1"], truncate="x"), "truncate='x': expected one of auto"),
        (lambda m, p: m.encode(ROWS, source="hhh"), "source='hhh': expected one of 'local', 'hh'"),
        (lambda m, p: m.encode(ROWS, max_length=1), "encode: max_length=1: expected at least 2"),
        (lambda m, p: m.log_probs(p, batch_size=0), "log_probs: batch_size=0: expected at least 1"),
        (lambda m, p: dpo_jax.batches(p, batch_size=0), "batches: batch_size=0: expected at least"),
        (lambda m, p: dpo_jax.batches(p, steps=-1), "batches: steps=-1: expected at least 0"),
        (lambda m, p: dpo_jax.batches(p, batch_size=1, epochs=-1), "make no batch"),
        (lambda m, p: dpo_jax.Trainer(m).evaluate(p, batch_size=0), "evaluate: batch_size=0"),
        (lambda m, p: dpo_jax.Trainer(m, steps=-1), r"'dpo'\): steps=-1: expected at least 0"),
        (
            lambda m, p: dpo_jax.load("P", dtype="float16"),
            "'float16': expected one of float32, bfl",
        ),
        (
            lambda m, p: dpo_jax.load("P", attention="flash"),
            "load: attention='flash': .* auto, xla",
        ),
        (lambda m, p: dpo_jax.load("P", remat="some"), "load: remat='some': expected one of none"),
        (lambda m, p: dpo_jax.load("P", unroll=-1), "load: unroll=-1: expected at least 0"),
        (lambda m, p: dpo_jax.load("P", head="value"), "head='value': expected one of 'lm', 'rewa"),
    ],
)
def test_wrong_values_are_named(loaded, pairs, call, message):
    with pytest.raises(ValueError, match=message):
        call(loaded, pairs)


def test_numbers_of_numpy_are_taken(loaded, pairs):
    trainer = trainer_of(loaded, beta=np.float32(0.5), warmup_steps=np.int64(2), lr=1)
    plain = trainer_of(loaded, beta=0.5, warmup_steps=2, lr=1.0)
    assert trainer.step(pairs) == plain.step(pairs)


def test_representations_are_short(loaded, pairs):
    assert repr(pairs) == "Examples(4 pairs)"
    assert repr(loaded.encode(ROWS, kind="sft")) == "Examples(4 completions)"
    assert repr(dpo_jax.batches(pairs, batch_size=2)) == (
        "BatchPlan(2 batches of 2 from Examples(4 pairs))"
    )
    assert repr(loaded.log_probs(pairs)) == "LogProbs(Examples(4 pairs))"
    trainer = trainer_of(loaded, lora=dict(rank=2))
    trainer.step(pairs)
    assert repr(trainer) == f"Trainer({loaded!r}, 'dpo', lora rank 2, 1 steps done)"


def test_warnings_name_the_callers_line(loaded):
    with pytest.warns(UserWarning, match="but the model was made for") as caught:
        loaded.generate(["w1"], max_new_tokens=loaded.config.max_positions)
    assert [warning.filename for warning in caught] == [__file__]


def test_fit_that_fails_closes_bar_and_thread(loaded, pairs, monkeypatch):
    closed = []
    monkeypatch.setattr("dpo_jax.console.Progress.close", lambda self: closed.append(self))
    before = threading.active_count()
    trainer = trainer_of(loaded, optimizer="sgd", lr=1e30, max_grad_norm=0.0)
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit(pairs, batch_size=2, steps=9)
    # `caught` holds the frames of the loop, as a notebook does: only closing ends the thread.
    assert caught.tb
    assert len(closed) == 1
    assert threading.active_count() == before


def test_nan_loss_names_rows(loaded, pairs):
    trainer = trainer_of(loaded, optimizer="sgd", lr=1e30, max_grad_norm=0.0)
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) on the batch of rows\[0\]"):
        for _ in range(4):
            trainer.step(pairs)
