"""What holds for any rows and any text: nothing is lost or changed on the way to a batch."""

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_jax.data import packing, readers
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.examples import Example
from dpo_jax.data.rows import TextExample
from dpo_jax.data.tokenizer import encode
from tests.helpers.paths import STORIES
from tests.helpers.rows import data_config

# The same few examples each time.
settings.register_profile(
    "few",
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
settings.load_profile("few")

# Any text: no half of a surrogate pair, which no file in UTF-8 holds.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ROW = st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT})
ROWS = st.lists(ROW, min_size=1, max_size=8)


def read_back(name: str, write) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        write(file)
        splits = readers.find_splits(str(file))
        return [readers.fields_of(record) for _, record in splits["train"]()]


@given(ROWS)
def test_json_lines_are_read_as_written(rows):
    text = "".join(json.dumps(row, ensure_ascii=len(rows) % 2) + "\n" for row in rows)
    assert read_back("a.jsonl", lambda file: file.write_text(text, "utf-8")) == rows


@given(ROWS, st.sampled_from([None, 1]))
def test_json_arrays_are_read_as_written(rows, indent):
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    assert read_back("a.json", lambda file: file.write_text(text, "utf-8")) == rows


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
@given(rows=ROWS)
def test_tables_of_text_are_read_as_written(name, delimiter, rows):
    def write(file):
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)

    # All ends of lines are read as \n.
    expected = []
    for row in rows:
        fields = {}
        for field, text in row.items():
            fields[field] = text.replace("\r\n", "\n").replace("\r", "\n")
        expected.append(fields)
    assert read_back(name, write) == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@given(rows=ROWS)
def test_tables_are_read_as_written(name, rows):
    table = pyarrow.Table.from_pylist(rows)

    def write(file):
        if name == "a.parquet":
            pyarrow.parquet.write_table(table, file)
            return
        with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)

    assert read_back(name, write) == rows


@given(st.binary(max_size=200), st.sampled_from(sorted(readers.READERS)))
def test_any_bytes_are_read_or_refused_by_name(content, suffix):
    try:
        read_back(f"rows{suffix}", lambda file: file.write_bytes(content))
    except ValueError as error:
        # A row that is wrong is named by who reads it.
        assert isinstance(error, readers.Malformed) or f"rows{suffix}" in str(error)


STORIES_TOKENIZER = tokenizers.load(STORIES)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=6))
def test_tokens_say_what_the_text_said(texts):
    examples = []
    for number, (prompt, chosen, rejected) in enumerate(texts, 1):
        examples.append(TextExample(prompt, (f" {chosen}.", f" {rejected}!"), f"row {number}"))
    data = data_config(max_length=100_000, max_prompt_length=50_000, append_eos=True)
    encoded, counts = encode(examples, STORIES_TOKENIZER, data, "keep_end")
    assert counts.kept + sum(counts.dropped.values()) == len(examples)
    places = {example.where: example for example in examples}
    for example, where in zip(encoded, encoded.where, strict=True):
        text = places[where]
        assert example.prompt[0] == STORIES_TOKENIZER.bos_token_id
        for response, said in zip(example.responses, text.responses, strict=True):
            assert response[-1] == STORIES_TOKENIZER.eos_token_id
            ids = [*example.prompt[1:].tolist(), *response[:-1].tolist()]
            # The tokenizer's own encoding of the whole text, or of both parts, and nothing else.
            whole = STORIES_TOKENIZER(text.prompt + said, add_special_tokens=False).input_ids
            parts = []
            for part in (text.prompt, said):
                parts += STORIES_TOKENIZER(part, add_special_tokens=False).input_ids
            assert STORIES_TOKENIZER.decode(ids) in (
                STORIES_TOKENIZER.decode(whole),
                STORIES_TOKENIZER.decode(parts),
            )


@given(
    st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=6),
    st.integers(8, 40),
    st.sampled_from(["keep_start", "keep_end", "keep_cue"]),
)
def test_no_example_is_longer_than_is_allowed(texts, length, truncate):
    data = data_config(max_length=length, max_prompt_length=length // 2, append_eos=True)
    examples = [TextExample(a, (b + "x", c + "y"), "row 1") for a, b, c in texts]
    encoded, counts = encode(examples, STORIES_TOKENIZER, data, truncate)
    assert counts.kept + sum(counts.dropped.values()) == len(examples)
    for example in encoded:
        for response in example.responses:
            assert len(example.prompt) + len(response) <= length


IDS = st.lists(st.integers(1, 50), min_size=1, max_size=12)


@given(st.lists(st.tuples(IDS, IDS, IDS, st.booleans()), min_size=1, max_size=8), st.booleans())
def test_packed_batches_hold_what_was_packed(parts, share):
    examples = []
    for prompt, chosen, rejected, has_first_prompt in parts:
        # Some have the prompt of the first, which is then laid down once.
        ids = [parts[0][0] if has_first_prompt else prompt, chosen, rejected]
        prompt_ids, *responses = [np.array(part, np.int32) for part in ids]
        examples.append(Example(prompt_ids, tuple(responses)))
    batch = packing.pack(examples, packing.shape_of(examples, share=share), share=share)
    assert batch.weights.tolist() == [1] * len(examples)
    for example, numbers in zip(examples, batch.response_index, strict=True):
        for response, number in zip(example.responses, numbers, strict=True):
            of_response = batch.segment_ids == number
            # The numerators of its log-prob: its tokens, each predicted by the one before it.
            assert batch.targets[of_response].tolist() == response.tolist()
            before = [*example.prompt[-1:].tolist(), *response[:-1].tolist()]
            positions = batch.logit_positions[of_response]
            assert batch.tokens[positions].tolist() == before
            first = len(example.prompt) - 1
            assert batch.positions[positions].tolist() == list(range(first, first + len(response)))
            assert batch.response_lengths[number] == len(response)
    distinct = {number for numbers in batch.response_index.tolist() for number in numbers}
    expected = sum(batch.response_lengths[number] for number in distinct)
    assert (batch.segment_ids < len(batch.response_lengths)).sum() == expected
