"""Files of documents: every format gives the same tokens, and every broken file is named with its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from planner.foundation.errors import InputError
from runtime.train.data.documents import Columns, split_weight
from runtime.train.data.order import MIXING_BLOCK, BatchReader, shares
from runtime.train.data.prepare import DataOptions, TokenData, data_weights, open_data, prepare_data

TEXTS = ["the first document\nof two lines", "", "the second — ünïcode\n", "a third"]
RECORDS = [{"id": place, "text": text} for place, text in enumerate(TEXTS)]


def write_lines(path: Path, records: list[Any] = RECORDS) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n\n" for record in RECORDS).encode()))


def table() -> pyarrow.Table:
    return pyarrow.Table.from_pylist(RECORDS)


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(table(), path, row_group_size=2)


def write_arrow_file(path: Path) -> None:
    with pyarrow.ipc.new_file(path, table().schema) as writer:
        writer.write_table(table())


def write_dataset(folder: Path) -> None:
    """What `datasets.Dataset.save_to_disk` leaves: two shards in the stream format, and the state."""
    folder.mkdir(parents=True)
    for number, part in enumerate((table().slice(0, 3), table().slice(3))):
        with pyarrow.ipc.new_stream(folder / f"data-{number:05d}-of-00002.arrow", part.schema) as writer:
            writer.write_table(part)
    files = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_indices_files": None}))
    (folder / "dataset_info.json").write_text("{}")


def write_splits(folder: Path) -> None:
    write_dataset(folder / "train")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_lines,
    "a.jsonl.gz": write_gzip,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow_file,
    "dataset": write_dataset,
    "splits": write_splits,
}


def load(*data: Path | str, vocab: int = 300, tokenizer: str = "byte", **columns: str) -> TokenData:
    given = tuple(map(str, data))
    cache = Path(given[0].rpartition(":")[0] or given[0]).parent / "cache"
    options = DataOptions(data=given, tokenizer=tokenizer, columns=Columns(**columns))
    return open_data(prepare_data(options, vocab=vocab, cache=cache))


def byte_ids(text: str) -> list[int]:
    """The token ids of a text: byte-level tokens are sorted by the characters that stand for bytes."""
    from tokenizers import pre_tokenizers

    order = {mark: place + 1 for place, mark in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (marks, _), *rest = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text) or [("", 0)]
    assert not rest
    return [order[mark] for mark in marks]


PACKED = [token for text in TEXTS if text for token in (*byte_ids(text), 0)]
"""The documents one after another, each ended by token 0; the empty one leaves no trace."""


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_documents_in_order(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    data = load(tmp_path / name)
    assert data.tokens.tolist() == PACKED
    assert data.mask is None
    assert data.index.trained_tokens == data.index.tokens == len(PACKED)


def test_a_folder_holds_all_formats_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    write_parquet(folder / "1.parquet")
    write_lines(folder / "2.jsonl")
    (folder / "README.md").write_text("not data")
    assert load(folder).tokens.tolist() == PACKED * 2


def test_documents_larger_than_a_batch_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.train.data.prepare.BATCH_CHARACTERS", 5)
    write_lines(tmp_path / "a.jsonl")
    assert load(tmp_path / "a.jsonl").tokens.tolist() == PACKED


# ----------------------------------------------------------------------------------- broken files


def _cut(write: Callable[[Path], None], name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) * 3 // 4])
        return folder / name

    return make


def _bytes(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _cut_dataset(folder: Path) -> Path:
    """A shard that ends with a whole record batch, but not with the end marker: pyarrow alone reads it."""
    write_dataset(folder / "d")
    shard = folder / "d" / "data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    return folder / "d"


def _missing_shard(folder: Path) -> Path:
    write_dataset(folder / "d")
    (folder / "d" / "data-00001-of-00002.arrow").unlink()
    return folder / "d"


GOOD = b'{"text": "good"}\n'
BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (_bytes("a.jsonl", b""), r"a\.jsonl: is empty"),
    "json": (_bytes("a.jsonl", GOOD + b'{"text": \n' + GOOD), r"a\.jsonl, line 2: is not JSON"),
    "cut line": (_bytes("a.jsonl", GOOD * 2 + b'{"text": "go'), r"line 3: is not JSON.*may be cut short"),
    "list": (_bytes("a.jsonl", GOOD + b"[1]\n"), "line 2: holds a list, not an object"),
    "utf-8": (_bytes("a.jsonl", GOOD + b'{"text": "\xff\xfe"}\n'), "line 2: is not UTF-8 text"),
    "utf-8 text": (_bytes("a.txt", b"abc\xff"), r"a\.txt: is not UTF-8 text"),
    "key": (_bytes("a.jsonl", GOOD + b'{"body": "x"}\n'), r"line 2: has no 'text'. Legal here: 'body'"),
    "type": (_bytes("a.jsonl", b'{"text": 5}\n'), "line 1: text: is of type int, not text"),
    "gzip": (_cut(write_gzip, "a.jsonl.gz"), r"\.gz, after line \d: the compressed file is cut short"),
    "no gzip": (_bytes("a.jsonl.gz", GOOD), "cut short or damaged"),
    "parquet": (_cut(write_parquet, "a.parquet"), r"a\.parquet: cannot be read as parquet, it may be cut"),
    "arrow": (_cut(write_arrow_file, "a.arrow"), r"a\.arrow: cannot be read as arrow, it may be cut"),
    "dataset": (_cut_dataset, r"data-00001-of-00002\.arrow: .*its end marker is missing"),
    "shard": (_missing_shard, r"lacks data-00001-of-00002\.arrow"),
    "pickle": (_bytes("a.pkl", b"x"), r"\.pkl files are not read\..*pickles are never read"),
    "list of json": (_bytes("a.json", b"[]"), r"\.json files are not read.*one JSON object a line"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    make, fault = BROKEN[name]
    with pytest.raises(InputError, match=fault):
        load(make(tmp_path))
    assert not list((tmp_path / "cache").glob("*")), "nothing half-made is left"


def test_a_column_that_is_not_there_or_is_no_text_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"has no 'body'\. Legal here: 'id', 'text'\."):
        load(tmp_path / "a.parquet", text="body")
    with pytest.raises(InputError, match=r"id: is of type int64, not text"):
        load(tmp_path / "a.parquet", text="id")
    holes = pyarrow.Table.from_pylist([{"text": "x"}, {"text": None}])
    pyarrow.parquet.write_table(holes, tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet, row 1: text: is null"):
        load(tmp_path / "b.parquet")


def test_splits_without_train_and_views_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["dev", "test"]}')
    with pytest.raises(InputError, match="the splits dev, test, and none is called train"):
        load(tmp_path)
    write_dataset(tmp_path / "view")
    state = {"_data_files": [], "_indices_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "view" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"flatten_indices"):
        load(tmp_path / "view")


# ----------------------------------------------------------------------------- prompts and completions


def test_only_completions_are_trained_on(tmp_path: Path) -> None:
    records = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "the capital", "completion": " Paris"}]
    write_lines(tmp_path / "a.jsonl", records)
    data = load(tmp_path / "a.jsonl", prompt="prompt", completion="completion")
    expected = [
        (token, mark)
        for record in records
        for tokens, mark in ((byte_ids(record["prompt"]), 0), ([*byte_ids(record["completion"]), 0], 1))
        for token in tokens
    ]
    assert data.mask is not None
    assert list(zip(data.tokens.tolist(), data.mask.tolist(), strict=True)) == expected
    assert data.index.trained_tokens == 2 + 7
    reader = BatchReader(data=data, seed=0, seq=3, batch=2)
    trained = reader.trained(0, data_rank=0, data_size=1)
    rows = reader.rows(0, data_rank=0, data_size=1)
    for place, (row, marks) in enumerate(zip(rows, trained, strict=True)):
        start = reader.start(place)
        assert list(zip(row, marks, strict=True)) == expected[start : start + 4]
    with pytest.raises(InputError, match=r"has no 'text'.*--prompt-key prompt --completion-key completion"):
        load(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="only one of the two is given"):
        load(tmp_path / "a.jsonl", prompt="prompt")


# ------------------------------------------------------------------------------------------ mixtures


def test_sources_are_mixed_by_weight_and_each_epoch_reads_each_sample_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 400)
    (tmp_path / "b.txt").write_text("b" * 4000)
    given = (f"{tmp_path}/a.txt:0.75", f"{tmp_path}/b.txt:0.25")
    data = load(*given)
    reader = BatchReader(data=data, seed=3, seq=8, batch=4, weights=data_weights(DataOptions(data=given)))
    assert data.samples(8) == (50, 500)
    order = [reader.sample(position) for position in range(2 * MIXING_BLOCK)]
    for block in (order[:MIXING_BLOCK], order[MIXING_BLOCK:]):
        assert [part for part, _ in block].count(0) == 750
    first, second = ([sample for part, sample in order if part == place] for place in (0, 1))
    for epoch in range(0, 1500, 50):
        assert sorted(first[epoch : epoch + 50]) == list(range(50))
    assert sorted(second) == list(range(500)), "a second part of 250 samples a block lasts two blocks"
    for place in range(0, 2 * MIXING_BLOCK, 20):
        assert 14 <= [part for part, _ in order[place : place + 20]].count(0) <= 16, "evenly spread"
    a, b = byte_ids("a")[0], byte_ids("b")[0]
    rows = reader.rows(0, data_rank=0, data_size=1)
    letters = [a if part == 0 else b for part, _ in order[:4]]
    assert [row[0] for row in rows] == letters
    assert all(set(row) <= {letter, 0} for row, letter in zip(rows, letters, strict=True))


def test_weights_are_dealt_out_exactly_and_faults_are_named(tmp_path: Path) -> None:
    assert shares([0.7, 0.3]) == (700, 300)
    assert shares([1, 1, 1]) == (334, 333, 333)
    assert sum(shares([0.123, 7, 0.5])) == MIXING_BLOCK
    (tmp_path / "a.txt").write_text("a" * 400)
    (tmp_path / "odd:0.5").write_text("x" * 400)
    a = tmp_path / "a.txt"
    assert split_weight(str(tmp_path / "odd:0.5")) == (tmp_path / "odd:0.5", None)
    assert split_weight(f"{a}:2") == (a, 2.0)
    with pytest.raises(InputError, match=r"a\.txt has no weight, others have one"):
        load(a, f"{a}:0.5")
    with pytest.raises(InputError, match="the weight makes no sense"):
        load(f"{a}:-1")
    data = load(f"{a}:1", f"{tmp_path}/odd:0.5:0.0001")
    with pytest.raises(InputError, match="its source is never read"):
        BatchReader(data=data, seed=0, seq=8, batch=1, weights=(1.0, 0.0001))
    assert len(load(a, tmp_path / "odd:0.5").index.parts) == 1, "without weights, one text after the other"


# ---------------------------------------------------------------------------------------- tokenizers


def write_tokenizer(folder: Path, *, words: int = 20, end: str = "</s>") -> Path:
    from tokenizers import models, pre_tokenizers

    vocab = {f"w{place}": place for place in range(words)} | {"[UNK]": words, end: words + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def test_a_tokenizer_file_or_folder_makes_the_tokens(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "w3 w1 other w4"}, {"text": "w2"}])
    folder = write_tokenizer(tmp_path / "t")
    for named in (folder, folder / "tokenizer.json"):
        data = load(tmp_path / "a.jsonl", tokenizer=str(named), vocab=22)
        assert data.tokens.tolist() == [3, 1, 20, 4, 21, 2, 21], "its own truncation is off"
    assert data.index.tokenizer == "file"


def test_a_tokenizer_that_does_not_fit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")
    folder = write_tokenizer(tmp_path / "t")
    with pytest.raises(InputError, match=r"token ids up to 21; the model's vocabulary is 16"):
        load(tmp_path / "a.jsonl", tokenizer=str(folder), vocab=16)
    with pytest.raises(InputError, match="no such file or folder"):
        load(tmp_path / "a.jsonl", tokenizer="bpee")
    with pytest.raises(InputError, match=r"is no tokenizer of the tokenizers library"):
        load(tmp_path / "a.jsonl", tokenizer=str(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        load(tmp_path / "a.jsonl", tokenizer=str(tmp_path))


def test_the_end_of_text_is_configured_named_or_asked_for(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "w1"}])
    folder = write_tokenizer(tmp_path / "t", end="[STOP]")
    with pytest.raises(InputError, match=r"none of the usual end-of-text tokens.*--end-of-text TOKEN"):
        load(tmp_path / "a.jsonl", tokenizer=str(folder))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "[STOP]"}}')
    assert load(tmp_path / "a.jsonl", tokenizer=str(folder)).tokens.tolist() == [1, 21]
    options = DataOptions(data=(f"{tmp_path}/a.jsonl",), tokenizer=str(folder), end_of_text="w5")
    data = open_data(prepare_data(options, vocab=22, cache=tmp_path / "cache"))
    assert data.tokens.tolist() == [1, 5]
    with pytest.raises(InputError, match="has no token 'w99'"):
        prepare_data(
            DataOptions(data=(f"{tmp_path}/a.jsonl",), tokenizer=str(folder), end_of_text="w99"),
            vocab=22,
            cache=tmp_path / "cache",
        )


def test_damage_to_the_mask_is_found(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    options = DataOptions(
        data=(f"{tmp_path}/a.jsonl",),
        tokenizer="byte",
        columns=Columns(prompt="prompt", completion="completion"),
    )
    index = prepare_data(options, vocab=300, cache=tmp_path / "cache")
    index.with_suffix(".mask").write_bytes(b"\x01\x01\x01")
    with pytest.raises(InputError, match=r"\.mask: does not match its checksum"):
        open_data(index)
    assert np.array_equal(open_data(index, verify=False).tokens, [*byte_ids("p"), *byte_ids("c"), 0])
    assert prepare_data(options, vocab=300, cache=tmp_path / "cache") == index
    open_data(index)
