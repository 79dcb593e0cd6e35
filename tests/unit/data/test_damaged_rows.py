"""Rows and files that would be read as something else than what the user has, and are refused."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dpo_jax.data import readers
from dpo_jax.data.rows import MOST_NAMED, names_of, number_of
from tests.helpers.rows import PAIR, pairs, read, write_jsonl, write_parquet

HEADER = "prompt,chosen,rejected\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("p,yes, a lot,no", "the row has more cells than the first line has names"),
        ("yes,no", "the row has fewer cells .* empty cell too; found 2 cells, nothing for 'rej"),
        ("p", "the row has fewer cells"),
        ("prompt,chosen,rejected", "the row repeats the names of the columns"),
    ],
)
def test_ragged_rows_stop_or_are_counted(tmp_path, row, said):
    file = tmp_path / "rows.csv"
    file.write_text(f"{HEADER}q,a,b\n{row}\nr,c,d\n")
    with pytest.raises(ValueError, match=f"rows.csv row 2: {said}"):
        read(file)
    rows, ledger = read(file, on_bad_row="drop")
    assert [row.where for row in rows["train"]] == ["rows.csv row 1", "rows.csv row 3"]
    assert ledger.train.read == 3 and sum(ledger.train.dropped.values()) == 1


def test_a_missing_cell_shifts_no_column(tmp_path):
    # Without the question, all that is left fits, one column too far to the left.
    file = tmp_path / "rows.tsv"
    file.write_text("prompt\tchosen\trejected\tsource\nBlue.\tSeven.\tweb\n")
    with pytest.raises(ValueError, match="rows.tsv row 1: .* nothing for 'source'"):
        read(file)
    file.write_text("prompt\tchosen\trejected\t\nq\ta\tb\n")
    assert read(file)[0]["train"][0].responses == ("a", "b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('q,a,b\n"r,c,d\ns,e,f\n', "begins in line 3 has a quote without an end"),
        ('"q",a,"b\nr,c,d\n', "begins in line 2 has a quote without an end"),
        ('q,a,b\n"r,c,d\n"s",e,f\n', "begins in line 3 has a quote that ends within a cell, in l"),
        ('q,"a" b,c\n', "begins in line 2 has a quote that ends within a cell, in line 2"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_quotes_that_swallow_rows(tmp_path, text, said, on_bad_row):
    # It cannot be known how many rows are lost, so none is dropped.
    (tmp_path / "rows.csv").write_text(HEADER + text)
    with pytest.raises(ValueError, match=f"rows.csv is not CSV: the row that {said}.*doubled"):
        read(tmp_path / "rows.csv", on_bad_row=on_bad_row)


def test_quoted_cells_of_several_lines(tmp_path):
    (tmp_path / "rows.csv").write_text(f'{HEADER}"one, ""two""\nthree",a,b\n')
    assert read(tmp_path / "rows.csv")[0]["train"][0].prompt == 'one, "two"\nthree'


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
@pytest.mark.parametrize("text", ['"r,c,d\n' + "s,e,f\n" * 10_000, f"{'x' * 5000},c,d\n"])
def test_long_rows_of_csv(tmp_path, monkeypatch, text, on_bad_row):
    # A quote that swallows the rest of the file looks the same, so no such row is dropped.
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    file = tmp_path / "rows.csv"
    file.write_text(f"{HEADER}q,a,b\n{text}t,e,f\n")
    said = "row that begins in line 3 is longer than 1,000 .*quote.*remove the row or part its text"
    with pytest.raises(ValueError, match=said):
        read(file, on_bad_row=on_bad_row)


def test_cells_longer_than_the_csv_module_takes_by_itself(tmp_path):
    long = "x" * 200_000
    (tmp_path / "rows.csv").write_text(f"{HEADER}{long},a,b\n")
    rows, ledger = read(tmp_path / "rows.csv", on_bad_row="drop")
    assert rows["train"][0].prompt == long and ledger.train.dropped == {}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_nul_characters_are_kept(tmp_path, suffix):
    """They are characters as all others, which tokenizers of bytes have tokens for."""
    row = dict(prompt="a\0b", chosen="\0", rejected="\0\0c\0")
    file = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        file.write_text(HEADER + ",".join(row.values()) + "\n")
    else:
        (write_parquet if suffix == ".parquet" else write_jsonl)(file, [row])
    (found,) = read(file)[0]["train"]
    assert (found.prompt, *found.responses) == tuple(row.values())


def test_pages_of_parquet_are_compared_with_their_checksums(tmp_path):
    file = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(pairs(100))
    options = dict(compression="none", use_dictionary=False, write_page_checksum=True)
    pyarrow.parquet.write_table(table, file, **options)
    assert len(read(file)[0]["train"]) == 100
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"good 50", b"good 51", 1))
    with pytest.raises(ValueError, match="rows.parquet is no whole Parquet file: .*again"):
        read(file)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_long_rows(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    monkeypatch.setattr(readers, "CHUNK", 100)
    rows = [*pairs(2), PAIR | {"prompt": "x" * 5000}, *pairs(2, "q")]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        write_parquet(file, rows)
    elif suffix == ".json":
        file.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    else:
        write_jsonl(file, rows)
    if suffix == ".json":
        with pytest.raises(ValueError, match="begins at line 3 has not ended .* has at most 1,000"):
            read(file)
        return
    with pytest.raises(ValueError, match="row 3: the row is longer than 1,000 char.*; found .*5,0"):
        read(file)
    kept, ledger = read(file, on_bad_row="drop")
    assert len(kept["train"]) == 4 and sum(ledger.train.dropped.values()) == 1


def test_a_long_line_is_not_held_in_memory(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wt") as text:
        for _ in range(60):
            text.write("x" * (1 << 20))
    (found,) = readers._lines(file)
    assert "a line of 62,914,560 characters" in str(found)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1" * 5000, "a whole number has more than 4,300 digits; write it as a text"),
        ("[" * 300 + "]" * 300, "lists and objects lie more than 200 deep inside each other"),
        ("[" * 9000 + "]" * 9000, "lists and objects lie more than 200 deep inside each other"),
        ('{"a":' * 300 + "1" + "}" * 300, "lists and objects lie more than 200 deep"),
    ],
)
def test_numbers_and_nesting_beyond_reason(tmp_path, value, said):
    bad = '{"prompt": "q", "chosen": "a", "rejected": "b", "extra": VALUE}'.replace("VALUE", value)
    file = write_jsonl(tmp_path / "rows.jsonl", [PAIR, bad, PAIR])
    with pytest.raises(ValueError, match=f"rows.jsonl row 2: {said}"):
        read(file)
    kept, ledger = read(file, on_bad_row="drop")
    assert len(kept["train"]) == 2 and sum(ledger.train.dropped.values()) == 1
    (tmp_path / "rows.json").write_text(f"[{json.dumps(PAIR)},\n{bad}]")
    with pytest.raises(ValueError, match=f"rows.json.*{said}"):
        read(tmp_path / "rows.json")


def test_brackets_in_a_text_are_no_nesting(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [PAIR | {"prompt": "[{" * 1000}])
    assert read(file)[0]["train"][0].prompt == "[{" * 1000


def test_keys_twice_inside_messages(tmp_path):
    message = '{"role": "user", "content": "Hi", "content": "Ho"}'
    row = f'{{"prompt": [{message}], "chosen": "a", "rejected": "b"}}'
    file = write_jsonl(tmp_path / "rows.jsonl", [PAIR, row])
    with pytest.raises(ValueError, match="row 2: a key is twice in one object; found 'content'"):
        read(file)


def test_files_that_are_another_kind_than_their_name_says(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b"{}" * 100))
    with pytest.raises(ValueError, match="a.jsonl is not UTF-8 .* line 1. It looks like a gzip"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_bytes(HEADER.encode("utf-16"))
    with pytest.raises(ValueError, match="b.csv is not UTF-8 .* line 1. It looks like UTF-16"):
        read(tmp_path / "b.csv")
    (tmp_path / "c.jsonl").write_bytes(json.dumps(PAIR).encode() + b'\n\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match="c.jsonl is not UTF-8 .* 0xff, in line 3. Save it as"):
        read(tmp_path / "c.jsonl")


def test_tables_of_types_that_cannot_be_read(tmp_path):
    union = pyarrow.UnionArray.from_sparse(
        pyarrow.array([0], pyarrow.int8()), [pyarrow.array(["a"])]
    )
    table = pyarrow.table({"prompt": union})
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(
        ValueError, match="a.arrow has a column of a type that is not read: .*union"
    ):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("rows", [[PAIR], [PAIR] * 3])
def test_nothing_held_out_of_one_prompt(tmp_path, rows):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    kept, ledger = read(file, eval_fraction=0.1)
    assert not kept["eval"]
    (warning,) = ledger.train.warnings
    assert warning.startswith("all rows have one prompt") and "eval_fraction=0" in warning
    assert not read(file, eval_fraction=0.0)[1].train.warnings
    mixed, ledger = read("", mix=f"{file}", eval_fraction=0.1)
    (warning,) = ledger.train.warnings
    assert not mixed["eval"] and warning.startswith("no data set has two different prompts, so")


def test_messages_list_a_few_names():
    assert names_of(["a", "b\n\nc"]) == "a, 'b\\n\\nc'"
    many = names_of([f"column{i}" for i in range(10_000)])
    assert many.endswith(f" and {10_000 - MOST_NAMED:,} more") and len(many) < 400
    assert len(names_of(["x" * 10_000])) == 80


def test_numbers_that_are_none():
    assert number_of(10**4000) is None
    assert number_of("1e999") is None and number_of(float("-inf")) is None
    assert number_of("2.5") == 2.5


def test_a_first_line_without_names(tmp_path):
    (tmp_path / "rows.csv").write_text("\nq,a,b\n")
    with pytest.raises(ValueError, match="rows.csv has no names of columns in line 1"):
        read(tmp_path / "rows.csv", on_bad_row="drop")


def test_arrow_streams_that_were_joined(tmp_path):
    table = pyarrow.Table.from_pylist(pairs(3))
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content * 2)
    with pytest.raises(ValueError, match="a.arrow has .* bytes behind the end of its Arrow stream"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"FIELD": null}', '{"FIELD": []}', '{"FIELD": [3]}']
)
@pytest.mark.parametrize(
    "name, field", [("state.json", "_data_files"), ("dataset_dict.json", "splits")]
)
def test_damaged_listings_of_saved_sets_are_refused_by_name(tmp_path, name, field, damage):
    rows = datasets.Dataset.from_list(pairs(3))
    saved = datasets.DatasetDict(train=rows) if field == "splits" else rows
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(damage.replace("FIELD", field))
    with pytest.raises(ValueError, match=f'{name} is damaged: expected .*"{field}"'):
        read(tmp_path / "saved")
