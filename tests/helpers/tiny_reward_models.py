"""Tiny sequence classifiers of one label, as others write them: by transformers, with torch."""

import json
import pathlib

from tests.helpers import tiny_models
from tests.helpers.chat_tokenizers import make_tokenizer, template_of

# variant -> its tokenizer: a template of TRL's, EOS, BOS and kind; "" for no template
TOKENIZERS = {
    "gpt2": ("", "<|endoftext|>", None, "bytes"),
    "gptj": ("qwen2_5", "<|im_end|>", None, "bytes"),
    "neox-parallel": ("phi3", "<|endoftext|>", None, "bytes"),
    "llama3": ("llama3", "<|eot_id|>", "<|begin_of_text|>", "bytes"),
    "mistral": ("", "</s>", "<s>", "metaspace"),
    "qwen2": ("qwen2_5", "<|im_end|>", None, "bytes"),
    "qwen3": ("qwen3", "<|im_end|>", None, "bytes"),
}


def tokenizer(variant: str):
    """Return the tokenizer of a variant's classifier."""
    name, eos, bos, kind = TOKENIZERS[variant]
    found = make_tokenizer(template_of(name) if name else "", eos, bos, kind)
    if not name:
        found.chat_template = None
    return found


def write(folder, variant: str, *, pad: str | None = None, bias: bool = False, **changes):
    """Write a random classifier with its tokenizer; return the folder and the model in torch.

    pad: the token that config.json calls padding. bias: give the head one, which transformers'
    own classes have no place for. changes: of the model's config.
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    words = tokenizer(variant)
    size = dict(vocab_size=len(words), num_labels=1)
    positions = "n_positions" if variant.startswith("gpt") else "max_position_embeddings"
    changes = size | {positions: 512} | changes
    if pad is not None:
        changes["pad_token_id"] = words.convert_tokens_to_ids(pad)
    hf_config = tiny_models.hf_config(variant, **changes)
    model = transformers.AutoModelForSequenceClassification.from_config(
        hf_config, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name or "ln_" in name else 0.2 * noise)
    folder = pathlib.Path(folder)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    if bias:
        file = folder / "model.safetensors"
        stored = load_file(file) | {"score.bias": torch.tensor([0.75])}
        save_file(stored, file, metadata={"format": "pt"})
    return folder, model.eval()


def change_config(folder, **fields) -> None:
    """Set fields of a folder's config.json; None removes one."""
    file = pathlib.Path(folder) / "config.json"
    kept = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))
