"""Write what both sides of a benchmark train: a random model and rows of random words.

    FOLDER/model/  FOLDER/data/train.jsonl  FOLDER/data/test.jsonl  FOLDER/work.json

The sizes of the model and the lengths of the rows are those of real ones. The model is in Hugging
Face format. Its tokenizer has a word for each id of the vocabulary, so nothing comes from a hub.

Letters: G prompts, R responses to a prompt.
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np

from dpo_jax.planning import presets

# In the file, one per pair. Shapes are chosen from all, though only the first steps are made.
ROWS = 4096
END = "</s>"  # id 0, which ends every response
TINY_GPT2 = dict(model_type="gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
TINY_LLAMA = dict(
    model_type="llama",
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    # Tunix uses this base whatever the config says.
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)
# Name -> config fields. The smoke models only show that the benchmark works.
MODELS = {
    "smoke": TINY_GPT2 | dict(vocab_size=512, n_embd=32, n_layer=2, n_head=2),
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
}
REAL = ("gpt2", "pythia-160m", "pythia-410m", "pythia-1b", "pythia-2.8b")
MODELS |= {name: presets.MODELS[name] for name in REAL}


@dataclasses.dataclass(frozen=True)
class Work:
    """The settings that both sides share, in work.json."""

    pairs: int  # per step
    steps: int  # the most that will be made
    cached: bool  # whether the reference's log-probs are computed before the first step
    dtype: str
    compiled: bool = False  # whether TRL runs its model under torch.compile
    lr: float = 1e-4  # large enough for a few steps to show in the loss
    beta: float = 0.1
    max_grad_norm: float = 10.0

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Work":
        """Read the settings from a benchmark's folder."""
        return cls(**json.loads((folder / "work.json").read_text()))


def read_rows(folder: pathlib.Path, work: Work) -> list[dict]:
    """Read the rows of the steps that will be made: dicts of prompt, chosen and rejected."""
    with (folder / "data" / "train.jsonl").open() as file:
        return [json.loads(line) for line in itertools.islice(file, work.steps * work.pairs)]


@dataclasses.dataclass(frozen=True)
class Between:
    """The least and the most tokens of a text; drawn lengths are clipped to them."""

    least: int
    most: int

    def clip(self, lengths: np.ndarray) -> np.ndarray:
        """Return the lengths as whole numbers of tokens within the bounds."""
        return np.clip(lengths.round().astype(int), self.least, self.most)


def tldr(rng: np.random.Generator, prompts: int, responses: int) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths like TL;DR's: posts of about 380 tokens and summaries of about 50."""
    prompt_G = Between(100, 512).clip(rng.normal(380, 80, prompts))
    response_GR = Between(10, 100).clip(rng.normal(50, 15, (prompts, responses)))
    return prompt_G, response_GR


def imdb(rng: np.random.Generator, prompts: int, responses: int) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths like IMDb's: beginnings of 4 to 8 tokens and completions of 60."""
    prompt_G = rng.integers(4, 9, prompts)
    response_GR = np.full((prompts, responses), 60)
    return prompt_G, response_GR


def hh(rng: np.random.Generator, prompts: int, responses: int) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths like those of Anthropic's harmless-base in Pythia's tokens, log-normal.

    Dialogues have a median of 80 tokens and answers of 31. In the data the means are 118 and 46,
    and the standard deviations 93 and 43.
    """
    prompt_G = Between(12, 384).clip(rng.lognormal(4.39, 0.95, prompts))
    response_GR = Between(2, 128).clip(rng.lognormal(3.44, 0.89, (prompts, responses)))
    return prompt_G, response_GR


SHAPES = {"tldr": tldr, "imdb": imdb, "hh": hh}


def lengths(
    shape: str, prompts: int, responses: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of each prompt [G] and of each response [G, R], END included."""
    return SHAPES[shape](np.random.default_rng(seed), prompts, responses)


def pairs_of_prompt(responses: int, pairs: int) -> list[tuple[int, int]]:
    """Return the chosen and the rejected response of each pair of a prompt.

    Responses count from the best. The best is preferred to each of the others, then the second to
    each after it, and so on, until there are enough pairs. Raises ValueError where the responses
    make fewer pairs, or where the pairs would leave a response out.
    """
    all_pairs = list(itertools.combinations(range(responses), 2))
    if not responses - 1 <= pairs <= len(all_pairs):
        raise ValueError(
            f"--responses={responses} --pairs_per_prompt={pairs}: {responses} responses make at "
            f"most {len(all_pairs)} pairs, and {responses - 1} are needed so that each response is "
            "in one. Change one of the two."
        )
    return all_pairs[:pairs]


def write(
    folder: pathlib.Path,
    work: Work,
    model: dict,
    prompt_G,
    response_GR,
    pairs_per_prompt: int = 1,
    seed: int = 0,
) -> None:
    """Write the folder for a model with these config fields and texts of these lengths. Uses jax.

    The pairs of a prompt, as `pairs_of_prompt` makes them, are consecutive rows.
    """
    vocab = _write_model(folder / "model", model, seed)
    data = folder / "data"
    data.mkdir(parents=True)
    rng = np.random.default_rng([seed, 1])
    lines = _rows(rng, prompt_G, response_GR, pairs_per_prompt, vocab)
    (data / "train.jsonl").write_text("".join(lines))
    # An eval split of its own, so that no row of the others is held out for it.
    (data / "test.jsonl").write_text(lines[0])
    (folder / "work.json").write_text(json.dumps(dataclasses.asdict(work)))


def _rows(
    rng: np.random.Generator, prompt_G, response_GR, pairs_per_prompt: int, vocab: int
) -> list[str]:
    """Return a line of JSON for each pair, of random words."""

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(1, vocab, count))

    pairs = pairs_of_prompt(response_GR.shape[1], pairs_per_prompt)
    lines = []
    for prompt_length, response_lengths in zip(prompt_G, response_GR, strict=True):
        prompt = words(prompt_length)
        # The tokenizer adds END, so a response has one word less.
        responses = [" " + words(length - 1) for length in response_lengths]
        for chosen, rejected in pairs:
            row = dict(prompt=prompt, chosen=responses[chosen], rejected=responses[rejected])
            lines.append(json.dumps(row) + "\n")
    return lines


def _tokenizer(vocab: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {END: 0} | {f"w{i}": i for i in range(1, vocab)}
    words = Tokenizer(models.WordLevel(ids))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)


def _write_model(folder: pathlib.Path, fields: dict, seed: int) -> int:
    """Write a model with random weights; return the size of its vocabulary."""
    import jax

    from dpo_jax.models import families, hf, transformer

    hf_config = hf.make_config(fields | dict(bos_token_id=0, eos_token_id=0))
    config = families.from_hf(hf_config)
    params = jax.jit(lambda key: transformer.init(config, key))(jax.random.key(seed))
    hf.save(folder, config, hf_config, params, _tokenizer(config.vocab))
    return config.vocab
