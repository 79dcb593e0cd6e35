"""A tiny chat model in the form in which Llama 3 Instruct is found on the hub.

Its config has the names of transformers 4, its weights are in bfloat16, its generation config ends
an answer at two tokens, and its tokenizer has a class and a chat template.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models import families, hf, safetensors_io
from tests.helpers.tiny_models import random_params

BEGIN, EOT, END = 0, 1, 2  # ids of the special tokens below
SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"]
HEADERS = ["<|user|>", "<|assistant|>"]
TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}<|{{ message.role }}|> {{ message.content }} "
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
WORDS = [*SPECIAL, *HEADERS, "?", *(f"w{i}" for i in range(58))]
ROPE = dict(
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    bos_token_id=BEGIN,
    eos_token_id=EOT,
    rope_theta=500_000.0,
    rope_scaling=ROPE,
    torch_dtype="bfloat16",
    transformers_version="4.45.0",
)
GENERATION = dict(
    bos_token_id=BEGIN, eos_token_id=[EOT, END], do_sample=False, transformers_version="4.45.0"
)
TOKENIZER = dict(
    bos_token=SPECIAL[BEGIN],
    eos_token=SPECIAL[EOT],
    unk_token="?",
    model_max_length=512,
    tokenizer_class="PreTrainedTokenizerFast",
    chat_template=TEMPLATE,
    additional_special_tokens=HEADERS,
)
SEED = 1
PROMPT = [BEGIN, 3, 20, 31, EOT, 4]  # tokens: a user's turn, and the cue for an answer


def write(folder: pathlib.Path, dtype: str = "bfloat16") -> pathlib.Path:
    """Write the model to a folder; its greedy answer to PROMPT ends with END."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=1))
    _tokenizer().save(str(folder / "tokenizer.json"))
    hf_config = hf.read_config(folder)
    config = families.from_hf(hf_config)
    rounded = jnp.dtype(dtype)
    # As they are stored, so that the same token is the likeliest.
    params = jax.tree.map(
        lambda leaf: leaf.astype(rounded).astype(np.float32), random_params(config, SEED)
    )
    _end_early(config, params)
    stored = {}
    for tensor in families.tensors("llama", config):
        paths = [path.split("/") for path in tensor.paths]
        leaves = [_leaf(params, path) for path in paths]
        for name, place in tensor.names(config):
            values = [leaf[place] for leaf in leaves]
            stored[name] = np.ascontiguousarray(tensor.pack(values).astype(rounded))
    safetensors_io.save_file(stored, folder / "model.safetensors")
    return folder


def _tokenizer():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in [*SPECIAL, *HEADERS]]
    )
    return words


def _leaf(params: dict, path: list[str]):
    for part in path:
        params = params[part]
    return params


def _end_early(config, params: dict) -> None:
    """Exchange the embedding of a later token of the greedy answer with that of END."""
    from dpo_jax.models import transformer

    ids = list(PROMPT)
    for _ in range(8):
        logits = transformer.logits(config, params, np.array([ids]))
        ids.append(int(np.argmax(logits[0, -1])))
    first = len(PROMPT) + 1
    last = next(token for token in ids[first:] if token not in ids[:first])
    embedding = params["embed"]["tokens"]
    embedding[[last, END]] = embedding[[END, last]]
