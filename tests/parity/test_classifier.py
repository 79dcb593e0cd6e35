"""Sentiment classifiers against transformers, and tensors that do not fit."""

import json

import jax
import numpy as np
import pytest

from dpo_jax.parallel import sharding
from dpo_jax.rewards import classifier as classifiers
from dpo_jax.rewards import make
from tests.helpers.tiny_classifiers import CLASSIFIERS, write_classifier

WORDS = [f"w{i}" for i in range(50)]


torch = pytest.importorskip("torch", reason="the independent reference is transformers with torch")

TEXTS = [
    " ".join(f"w{i}" for i in np.random.default_rng(n).integers(0, 50, n))
    for n in (1, 5, 12, 38, 60, 2, 33)
]


@pytest.fixture(scope="module", params=list(CLASSIFIERS))
def classifier(request, tmp_path_factory):
    """(folder, the model in torch) of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, write_classifier(request.param, folder)


def test_classifier_equals_transformers(classifier):
    """Texts of different lengths, padded and cut, in one order and out of it, over eight
    devices.
    """
    import transformers

    folder, model = classifier
    words = transformers.AutoTokenizer.from_pretrained(folder)
    config = classifiers.read_config(folder)
    with torch.no_grad():
        expected = [
            model(
                **words(
                    text,
                    truncation=True,
                    max_length=config.max_tokens,
                    return_tensors="pt",
                    return_token_type_ids=False,
                )
            )
            .logits.softmax(-1)[0, config.positive]
            .item()
            for text in TEXTS
        ]
    assert config.max_tokens == 40
    found = classifiers.classifier(folder, 8, sharding.make_mesh())(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 0.05


def test_classifier_ignores_neighbours(classifier):
    folder, _ = classifier
    predict = classifiers.classifier(folder, 4, sharding.make_mesh(devices=jax.devices()[:1]))
    together = predict(TEXTS)
    np.testing.assert_allclose([predict([text])[0] for text in TEXTS], together, atol=1e-6)
    assert predict([]).shape == (0,)


@pytest.mark.parametrize(
    "labels, expected",
    [
        ({"0": "LABEL_0", "1": "LABEL_1"}, 1),
        ({"0": "POSITIVE", "1": "NEGATIVE"}, 0),
        ({"0": "joy", "1": "anger"}, None),
    ],
)
def test_read_config_positive_class(classifier, tmp_path, labels, expected):
    fields = json.loads((classifier[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(
            fields
            | dict(id2label=labels, label2id={name: int(index) for index, name in labels.items()})
        )
    )
    if expected is None:
        with pytest.raises(ValueError, match="joy.*expected one named POSITIVE"):
            classifiers.read_config(tmp_path)
    else:
        assert classifiers.read_config(tmp_path).positive == expected


def test_load_names_wrong_tensors(classifier, tmp_path):
    """A table that is too short would otherwise be read past its end, and give scores that look
    right.
    """
    from safetensors.numpy import load_file, save_file

    folder, _ = classifier
    config = classifiers.read_config(folder)
    tensors = load_file(folder / "model.safetensors")
    table = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    places = next(name for name in tensors if name.endswith("position_embeddings.weight"))
    norm = next(name for name in tensors if name.endswith("embeddings.LayerNorm.weight"))
    lost = norm.replace("weight", "bias")
    changed = {name: value for name, value in tensors.items() if name != lost} | {
        "extra": np.zeros(2, np.float32),
        table: tensors[table][:30],
        places: tensors[places].astype(np.int32),
        norm.removeprefix(f"{config.family}."): tensors[norm],
    }
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        classifiers.load(tmp_path, config)
    found = str(error.value)
    assert "missing: embeddings.LayerNorm.bias [32]" in found
    assert "unknown: extra [2] in model.safetensors" in found
    assert f"wrong shape: {table} [30, 32] in model.safetensors, expected [60, 32]" in found
    assert f"wrong type: {places} I32" in found
    assert found.count("set twice: embeddings.LayerNorm.weight") == 1
    assert found.count("\n  ") == 5


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def random_texts(count, longest, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(count)]


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_classifier_reward_equals_pipeline(mesh, tmp_path, family):
    """As the paper scores: the pipeline's p(positive) of prompt + completion, cut at the model's
    longest.
    """
    pytest.importorskip("torch", reason="the independent reference is transformers with torch")
    import transformers

    from tests.helpers.tiny_classifiers import write_classifier

    write_classifier(family, tmp_path)
    prompts = random_texts(11, 5, seed=0)
    completions = [" " + text for text in random_texts(11, 60, seed=1)]
    pipeline = transformers.pipeline(
        "text-classification",
        model=str(tmp_path),
        device="cpu",
        top_k=None,
        truncation=True,
        max_length=40,
    )
    joined = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    assert max(len(text.split()) for text in joined) > 40
    expected = [
        {row["label"].lower()[:3]: row["score"] for row in rows}["pos"] for rows in pipeline(joined)
    ]
    reward = make.make_reward("classifier", str(tmp_path), 8, mesh)
    found = reward(prompts, completions, None)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.diff(np.sort(expected)).max() > 0.01  # texts do differ in score
    np.testing.assert_allclose(reward(prompts[3:4], completions[3:4], None), found[3:4], atol=1e-6)
    assert reward([], [], []).shape == (0,)
    assert make.make_reward("classifier", str(tmp_path), 8, mesh) is reward
