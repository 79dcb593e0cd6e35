"""Sentiment classifiers: what is refused."""

import pytest

from dpo_jax.rewards import classifier as classifiers


def test_read_config_refuses_other_model(model):
    with pytest.raises(
        ValueError, match="'llama' model; a sentiment classifier here is one of roberta, distilbert"
    ):
        classifiers.read_config(model)
