"""Train a tokenizer on film reviews.

    python -m experiments.imdb_tokenizer --data=FOLDER_OR_HUB_NAME --out=DIR

The tokenizer is a byte-level BPE like GPT-2's with 8,192 tokens. It is trained on the train and
unsupervised reviews and written to DIR in Hugging Face format. The same reviews always give the
same tokenizer.
"""

import pathlib
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_jax.data import readers, sources

END = "<|endoftext|>"  # before and after each review, as in GPT-2
SPLITS = ("train", "unsupervised")


def train(texts: Iterable[str], pieces: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with `pieces` tokens, END included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=[END],
        show_progress=False,
        # All 256 bytes, so that any text can be written, whatever the reviews contain.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END
    )


def reviews(path: str) -> Iterator[str]:
    """Yield the texts that a policy is trained on, cleaned as the imdb source cleans them."""
    splits = readers.find_splits(path)
    for name in SPLITS:
        for _, record in splits[name]():
            yield sources.imdb(readers.fields_of(record)).responses[0]


def main():
    from absl import flags

    from dpo_jax import command_line

    data = flags.DEFINE_string(
        "data", "stanfordnlp/imdb", "The reviews: a hub name or a local folder."
    )
    out = flags.DEFINE_string("out", None, "Folder for the tokenizer. It must not exist yet.")
    pieces = flags.DEFINE_integer("pieces", 8192, "Size of the vocabulary.")
    flags.mark_flags_as_required(["out"])

    def make_tokenizer():
        if pathlib.Path(out.value).exists():
            raise FileExistsError(f"--out={out.value} exists: give another name, or remove it.")
        tokenizer = train(reviews(data.value), pieces.value)
        tokenizer.save_pretrained(out.value)
        print(f"{len(tokenizer)} pieces in {out.value}")

    command_line.run(make_tokenizer, __doc__)


if __name__ == "__main__":
    main()
