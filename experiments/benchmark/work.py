"""What both sides of a benchmark train: a model at random and rows of random words, by sizes that
real ones have.

    FOLDER/model/  in Hugging Face format    FOLDER/data/train.jsonl  test.jsonl    FOLDER/work.json

The tokenizer is made on the spot, a word for each id of the vocabulary, so nothing comes from a
hub.
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np

from dpo_jax.planning import presets

ROWS = 4096  # of a run, from which static shapes are chosen; only its first steps are made
END = "</s>"  # id 0, which ends every response
TINY_GPT2 = dict(model_type="gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
TINY_LLAMA = dict(
    model_type="llama",
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)  # which Tunix takes, whatever is said
MODELS = {
    "smoke": TINY_GPT2
    | dict(vocab_size=512, n_embd=32, n_layer=2, n_head=2),  # to see that the benchmark works
    "smoke-llama": TINY_LLAMA
    | dict(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    "gpt2-tiny": TINY_GPT2 | dict(n_embd=512, n_layer=6, n_head=8),
    "llama-tiny": TINY_LLAMA
    | dict(
        vocab_size=50257,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    **{
        name: presets.MODELS[name]
        for name in ("gpt2", "pythia-160m", "pythia-410m", "pythia-1b", "pythia-2.8b")
    },
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker is told."""

    pairs: int  # per step
    steps: int  # that will be made at most
    cached: bool  # the reference's log-probs are computed before the first step
    dtype: str
    lr: float = 1e-4  # so much that a few steps show in the loss
    beta: float = 0.1
    max_grad_norm: float = 10.0

    @classmethod
    def read(cls, folder) -> "Work":
        return cls(**json.loads((pathlib.Path(folder) / "work.json").read_text()))


def read_rows(folder: pathlib.Path, work: Work) -> list[dict]:
    """The rows of the steps that will be made: dicts prompt, chosen, rejected."""
    with (folder / "data" / "train.jsonl").open() as file:
        return [json.loads(line) for line in itertools.islice(file, work.steps * work.pairs)]


def tldr(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Posts of about 380 tokens (100 to 512) and summaries of about 50 (10 to 100), as TL;DR's
    are.
    """
    return _normal(rng, count, 380, 80, 100, 512), _normal(rng, (count, 2), 50, 15, 10, 100)


def imdb(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Beginnings of reviews of 4 to 8 tokens and completions of 60."""
    return rng.integers(4, 9, count), np.full((count, 2), 60)


def hh(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Dialogues (prompts with a median of 80 tokens, 12 to 384) and answers (31, 2 to 128):
    log-normal, as Anthropic's harmless-base is in Pythia's tokens, where the means are 118 and 46
    and the deviations 93 and 43.
    """
    return _log_normal(rng, count, 4.39, 0.95, 12, 384), _log_normal(
        rng, (count, 2), 3.44, 0.89, 2, 128
    )


SHAPES = {"tldr": tldr, "imdb": imdb, "hh": hh}


def lengths(shape: str, count: int = ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each prompt [P] and of each response, END included [P, 2]."""
    return SHAPES[shape](np.random.default_rng(seed), count)


def write(
    folder: pathlib.Path, work: Work, model: dict, prompt_P, response_P2, seed: int = 0
) -> None:
    """Writes the folder, as the module says, for a model of these config fields and rows of these
    lengths. Uses jax.
    """
    vocab = _write_model(folder / "model", model, seed)
    data = folder / "data"
    data.mkdir(parents=True)
    lines = _rows(np.random.default_rng([seed, 1]), prompt_P, response_P2, vocab)
    (data / "train.jsonl").write_text("".join(lines))
    (data / "test.jsonl").write_text(lines[0])  # so that no row is held out of the others
    (folder / "work.json").write_text(json.dumps(dataclasses.asdict(work)))


def _rows(rng, prompt_P, response_P2, vocab: int) -> list[str]:
    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(1, vocab, count))

    return [
        json.dumps(
            dict(
                prompt=words(prompt),
                chosen=" " + words(chosen - 1),
                rejected=" " + words(rejected - 1),
            )
        )
        + "\n"
        for prompt, (chosen, rejected) in zip(prompt_P, response_P2, strict=True)
    ]


def _tokenizer(vocab: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({END: 0} | {f"w{i}": i for i in range(1, vocab)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)


def _write_model(folder, fields, seed) -> int:
    """Writes it; the size of its vocabulary."""
    import jax

    from dpo_jax.models import families, hf, transformer

    hf_config = hf.make_config(fields | dict(bos_token_id=0, eos_token_id=0))
    config = families.from_hf(hf_config)
    params = jax.jit(lambda key: transformer.init(config, key))(jax.random.key(seed))
    hf.save(folder, config, hf_config, params, _tokenizer(config.vocab))
    return config.vocab


def _normal(rng, size, mean, deviation, least, most):
    return np.clip(rng.normal(mean, deviation, size).round().astype(int), least, most)


def _log_normal(rng, size, mean, deviation, least, most):
    return np.clip(rng.lognormal(mean, deviation, size).round().astype(int), least, most)
