"""Sentiment classifiers: what is refused."""

import pytest

from dpo_jax.rewards import classifier as classifiers


def test_another_model_is_refused(model):
    with pytest.raises(
        ValueError, match="'llama' model; a sentiment classifier here is one of roberta, distilbert"
    ):
        classifiers.read_config(model)
