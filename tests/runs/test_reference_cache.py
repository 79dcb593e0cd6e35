"""Runs with kept log-probs of the reference."""

import itertools
import json
import types

import numpy as np
import pytest

from dpo_jax.data import dataset
from dpo_jax.models import attention, loading, log_probs
from dpo_jax.parallel import sharding
from dpo_jax.training import reference_cache
from dpo_jax.training.self_check import SelfCheckFailed
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    weights,
    write_model,
    write_pairs,
)


def config(model, pairs, run="", seed=0, **fields):
    made = dpo_config(model, pairs, cache_reference=True, **fields)
    made.run, made.seed = run, seed
    return made


def kept(workdir):
    """Split -> its file, of one reference."""
    found = list((workdir / "reference").glob("*/*.npy"))
    assert len(found) == len({path.name for path in found})  # no second KEY was made
    return {path.name: path for path in found}


@pytest.fixture(scope="module")
def live(model, pairs, tmp_path_factory):
    return run(dpo_config(model, pairs), tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def cached(model, pairs, tmp_path_factory):
    return run(config(model, pairs), tmp_path_factory.mktemp("cached"))


def test_cached_run_equals_live(live, cached):
    """The last evaluation batch is filled up, so fillers are in it too."""
    for mine, its in zip(rows_without_timings(cached), rows_without_timings(live), strict=True):
        assert mine.keys() == its.keys()
        # Before the first update the two sides are a tie, and rounding decides.
        for name, value in its.items():
            if mine["step"] > 1 or "accuracies" not in name:
                assert mine[name] == pytest.approx(value, abs=1e-4, rel=1e-3), name
    for name, value in weights(live).items():
        np.testing.assert_allclose(weights(cached)[name], value, atol=1e-5)


def test_cache_is_shared_by_sweep(model, pairs, cached, monkeypatch, capsys):
    before = {name: path.read_bytes() for name, path in kept(cached.parent).items()}
    scored = []
    monkeypatch.setattr(
        reference_cache, "score_responses", lambda *args: scored.append(args) or iter(())
    )
    run(config(model, pairs, beta=0.5, run="beta"), cached.parent)
    assert not scored and capsys.readouterr().out.count("rows are in") == 2
    assert {name: path.read_bytes() for name, path in kept(cached.parent).items()} == before
    monkeypatch.undo()
    few = config(model, pairs, steps=2, run="few", seed=1)
    run(few, cached.parent)
    assert kept(cached.parent).keys() == before.keys()


def test_cache_fill_resumes(model, pairs, tmp_path, monkeypatch, capsys):
    few = config(model, pairs, steps=4)
    score = reference_cache.score_responses

    def killed(*args):
        for number, found in enumerate(score(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference_cache, "score_responses", killed)
        run(few, tmp_path)
    half = np.load(kept(tmp_path)["train.npy"])
    assert np.isfinite(half).all(axis=1).sum() == 16  # two batches of 8
    capsys.readouterr()
    run(few, tmp_path)
    shown = capsys.readouterr().out
    assert "reference: 16 of 32 train rows to compute, 32 distinct responses" in shown
    whole = np.load(kept(tmp_path)["train.npy"])
    there = np.isfinite(half).all(axis=1)
    np.testing.assert_array_equal(whole[there], half[there])
    run(few, tmp_path / "uninterrupted")
    uninterrupted = np.load(kept(tmp_path / "uninterrupted")["train.npy"])
    np.testing.assert_allclose(whole, uninterrupted, rtol=1e-6)


def write_groups(path, prompts=6, completions=4):
    """Write all pairs of some completions of each prompt; those of a prompt are far apart."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(prompts):
        words = [f"w{word}" for word in rng.integers(0, 37, 9)]
        answers = [f"{' '.join(words[: 2 + i])} w{30 + i}" for i in range(completions)]
        for chosen, rejected in itertools.combinations(answers, 2):
            prompt = " ".join([f"w{number}", *words])
            rows.append(dict(prompt=prompt, chosen=chosen, rejected=rejected))
    order = rng.permutation(len(rows))
    path.write_text("".join(json.dumps(rows[index]) + "\n" for index in order))
    return path


@pytest.fixture
def one_device():
    with on_devices(1):
        yield


@pytest.mark.usefixtures("one_device")
def test_each_response_to_a_prompt_is_computed_once(model, tmp_path, monkeypatch, capsys):
    """36 pairs of 24 responses, in a fill that is killed, and goes on with other pairs."""
    grouped = write_groups(tmp_path / "groups.jsonl")
    fields = dict(data__eval_fraction=0.0, data__order="prompts", batch_size=6, microbatch_size=3)
    live = run(dpo_config(model, grouped, steps=6, **fields), tmp_path / "live")
    computed = []
    score = reference_cache.score_responses

    def recorded(*args):
        for places, values in score(*args):
            computed.append(len(set(values.tolist())))
            yield places, values

    monkeypatch.setattr(reference_cache, "score_responses", recorded)
    whole = run(config(model, grouped, steps=6, **fields), tmp_path / "whole")
    assert sum(computed) == 24
    values = np.load(kept(tmp_path / "whole")["train.npy"])
    # Of 72 numbers as many are distinct as there are responses.
    assert values.shape == (36, 2) and len(np.unique(values)) == 24
    losses = []
    for folder in (whole, live):
        rows = rows_without_timings(folder)
        losses.append([row["loss/train"] for row in rows if "loss/train" in row])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, atol=1e-5)

    computed.clear()
    capsys.readouterr()
    run(config(model, grouped, steps=2, **fields), tmp_path / "parts")
    first = sum(computed)
    assert 0 < first < 24
    run(config(model, grouped, run="longer", steps=6, **fields), tmp_path / "parts")
    assert sum(computed) == 24
    np.testing.assert_allclose(
        np.load(kept(tmp_path / "parts")["train.npy"]), values, rtol=1e-5, atol=1e-5
    )
    shown = capsys.readouterr().out
    assert f"{24 - first} distinct responses" in shown

    # What is read, in the run's first lines and in its ledger.
    reading = json.loads((whole / "ledger.json").read_text())["reading"]
    assert reading["examples"] == 36
    assert reading["tokens"] < 0.8 * reading["tokens_one_at_a_time"]
    assert (
        f"dpo: {reading['tokens']:,} tokens are read for 36 pairs; one pair at a time it would be "
        f"{reading['tokens_one_at_a_time']:,}"
    ) in shown


def test_cache_of_other_weights_stops_run(model, pairs, tmp_path):
    run(config(model, pairs, steps=2), tmp_path)
    path = kept(tmp_path)["train.npy"]
    np.save(path, np.load(path) + 1)
    path.with_suffix(".sha256").unlink()  # which would have told before
    with pytest.raises(
        SelfCheckFailed, match=r"1 nats from those of the weights.*remove WORKDIR/reference"
    ):
        run(config(model, pairs, steps=2, beta=0.5, run="again"), tmp_path)


def test_cache_key(model, pairs, tmp_path, monkeypatch):
    whole, shared = sharding.make_mesh(), sharding.make_mesh(context=2)

    def key(folder, file, mesh=whole, **options):
        found = loading.open_checkpoint(str(folder), **options)
        data = dataset.load(dpo_config(folder, file).data, found.tokenizer, "pairs").train
        return reference_cache.ReferenceCache(tmp_path, found, mesh, 8).key(data)

    same = key(model, pairs)
    assert same == key(model, pairs) == key(write_model(tmp_path / "copy"), pairs)
    assert same == key(model, pairs, remat="full", unroll=2)
    other = write_model(tmp_path / "other", scale=5)
    keys = {
        same,
        key(other, pairs),
        key(model, write_pairs(tmp_path / "pairs.jsonl", seed=1)),
        key(model, pairs, dtype="bfloat16"),
    }
    monkeypatch.setattr(log_probs, "FORWARD_VERSION", log_probs.FORWARD_VERSION + 1)
    keys.add(key(model, pairs))
    assert len(keys) == 5
    # Devices that share tokens cannot run a GPU's fused kernel, which rounds in its own way.
    assert key(model, pairs, shared) == key(model, pairs)
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(attention, "device", lambda: gpu)
    # It would not take heads as narrow as these.
    monkeypatch.setattr(attention, "why_not_cudnn", lambda *given: "shared" if given[3] > 1 else "")
    fused, plain = (key(model, pairs, mesh) for mesh in (whole, shared))
    assert fused != plain


def test_cache_of_reference_by_path(model, pairs, tmp_path, monkeypatch):
    other = write_model(tmp_path / "other", scale=5)
    expected = run(dpo_config(model, pairs, reference=str(other), steps=2), tmp_path / "live")
    found = run(config(model, pairs, reference=str(other), steps=2), tmp_path / "cached")
    first, its = rows_without_timings(found)[1], rows_without_timings(expected)[1]
    assert (
        first["loss/train"]
        == pytest.approx(its["loss/train"], abs=1e-5)
        != pytest.approx(np.log(2), abs=1e-3)
    )

    def refused(*_):
        raise AssertionError("the reference's weights were loaded")

    opened = loading.open_checkpoint

    def open_checkpoint(path, **options):
        made = opened(path, **options)
        if path == str(other):
            made.load_params = refused
        return made

    monkeypatch.setattr(loading, "open_checkpoint", open_checkpoint)
    run(
        config(model, pairs, reference=str(other), steps=2, beta=0.3, run="again"),
        tmp_path / "cached",
    )


def test_changed_cache_is_refused(model, pairs, tmp_path):
    """Of a reference by path, with which a run need not start at log 2: the self-check could not
    tell.
    """
    by_path = config(model, pairs, reference=str(model), steps=2)
    run(by_path, tmp_path)
    path = next(tmp_path.glob("reference/*/train.npy"))
    values = np.load(path)
    values[np.isfinite(values).all(axis=1).argmax(), 0] += 0.5
    np.save(path, values)
    by_path.run = "again"
    with pytest.raises(ValueError, match="train.npy is not what was written there"):
        run(by_path, tmp_path)
