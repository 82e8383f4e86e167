"""Data: tokens are whole or refused, and the order depends on nothing but seed and position."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from planner.foundation.errors import InputError
from runtime.train.data.documents import find_sources, shipped_corpus
from runtime.train.data.order import BatchReader, permute
from runtime.train.data.prepare import DataOptions, open_data, prepare_data

VOCAB = 300


def prepare(data: Path | None, cache: Path, *, vocab: int = VOCAB, tokenizer: str = "bpe") -> Path:
    given = () if data is None else (str(data),)
    return prepare_data(DataOptions(data=given, tokenizer=tokenizer), vocab=vocab, cache=cache)


@pytest.fixture(scope="module")
def index_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = (shipped_corpus() / "pride_and_prejudice.txt").read_text()[:40_000]
    (folder / "one.txt").write_text(text[:25_000])
    (folder / "two.txt").write_text(text[25_000:] + "é — ünïcode\n")
    return prepare(folder, folder / "cache")


def _reader(index_path: Path, *, seed: int = 7, seq: int = 32, batch: int = 8) -> BatchReader:
    return BatchReader(data=open_data(index_path), seed=seed, seq=seq, batch=batch)


def test_tokens_decode_to_the_text(index_path: Path) -> None:
    from tokenizers import Tokenizer

    data = open_data(index_path)
    tokenizer = Tokenizer.from_str(index_path.with_suffix(".tokenizer.json").read_text())
    text = tokenizer.decode(data.tokens.tolist(), skip_special_tokens=True)
    folder = index_path.parent.parent
    assert text == (folder / "one.txt").read_text() + (folder / "two.txt").read_text()
    assert int(data.tokens.max()) < VOCAB
    assert int((data.tokens == 0).sum()) == 2, "each text ends with the end-of-text token"


def test_byte_tokens_are_as_many_as_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abc é\n" * 50)
    data = open_data(prepare(file, tmp_path / "c", vocab=256, tokenizer="byte"))
    assert data.index.tokens == file.stat().st_size
    assert len(np.unique(data.tokens)) == 7


def test_prepared_data_is_used_again_and_follows_its_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the cat sat on the mat\n" * 40)
    first = prepare(file, tmp_path / "c")
    stamp = first.with_suffix(".tokens").stat().st_mtime_ns
    assert prepare(file, tmp_path / "c") == first
    assert first.with_suffix(".tokens").stat().st_mtime_ns == stamp
    file.write_text("the dog sat on the mat\n" * 40)
    assert prepare(file, tmp_path / "c") != first


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 1000])
def test_permute_is_a_permutation(size: int) -> None:
    assert sorted(permute(i, size, key=11) for i in range(size)) == list(range(size))


def test_permutations_are_spread_evenly() -> None:
    """Where the first element of 10 goes over 5000 keys: 500 each on average, 5 sigma is 106."""
    places = np.bincount([permute(0, 10, key) for key in range(5000)], minlength=10)
    assert abs(places - 500).max() < 110


@pytest.mark.parametrize("sizes", [(1,), (2,), (4,), (8,), (1, 2, 4, 8)])
def test_ranks_cover_the_global_batch_once_in_any_layout(index_path: Path, sizes: tuple[int, ...]) -> None:
    reader = _reader(index_path)
    whole = reader.rows(5, data_rank=0, data_size=1)
    for size in sizes:
        parts = [reader.rows(5, data_rank=rank, data_size=size) for rank in range(size)]
        assert all(part.shape == (8 // size, 33) for part in parts)
        assert np.array_equal(np.concatenate(parts), whole)


def test_an_epoch_holds_every_sample_once_and_epochs_differ(index_path: Path) -> None:
    reader = _reader(index_path)
    (count,) = reader.data.samples(reader.seq)
    first = [reader.sample(position) for position in range(count)]
    second = [reader.sample(position) for position in range(count, 2 * count)]
    assert sorted(first) == sorted(second) == [(0, sample) for sample in range(count)]
    assert first != second


def test_order_depends_on_the_seed_and_not_on_the_batch(index_path: Path) -> None:
    reader, other = _reader(index_path), _reader(index_path, seed=8)
    assert [reader.sample(i) for i in range(20)] != [other.sample(i) for i in range(20)]
    small = _reader(index_path, batch=4)
    joined = np.concatenate([small.rows(step, data_rank=0, data_size=1) for step in (2, 3)])
    assert np.array_equal(joined, reader.rows(1, data_rank=0, data_size=1))


def test_order_is_the_same_for_ever() -> None:
    """Pinned: a resumed run of an older version must meet the same order."""
    assert [permute(i, 10, key=3) for i in range(10)] == PINNED


PINNED = [8, 9, 4, 3, 5, 7, 2, 1, 6, 0]


def _copy(index_path: Path, folder: Path) -> Path:
    for suffix in (".json", ".tokens", ".tokenizer.json"):
        source = index_path.with_suffix(suffix)
        (folder / source.name).write_bytes(source.read_bytes())
    return folder / index_path.name


def test_a_truncated_token_file_is_refused(index_path: Path, tmp_path: Path) -> None:
    copy = _copy(index_path, tmp_path)
    tokens = copy.with_suffix(".tokens")
    tokens.write_bytes(tokens.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"tokens: has \d+ bytes, its index \d+: it is cut short"):
        open_data(copy, verify=False)


def test_an_altered_token_file_is_refused(index_path: Path, tmp_path: Path) -> None:
    copy = _copy(index_path, tmp_path)
    tokens = bytearray(copy.with_suffix(".tokens").read_bytes())
    tokens[1000] ^= 1
    copy.with_suffix(".tokens").write_bytes(tokens)
    with pytest.raises(InputError, match="does not match its checksum"):
        open_data(copy)


def test_a_damaged_cache_is_made_again(index_path: Path) -> None:
    tokens = index_path.with_suffix(".tokens")
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:100])
    assert prepare(index_path.parent.parent, index_path.parent) == index_path
    assert tokens.read_bytes() == whole


def test_an_index_with_unknown_keys_is_refused(index_path: Path, tmp_path: Path) -> None:
    copy = _copy(index_path, tmp_path)
    copy.write_text(json.dumps({**json.loads(copy.read_text()), "shuffled": True}))
    with pytest.raises(InputError, match="shuffled"):
        open_data(copy)


def test_faults_of_the_input_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_sources((str(tmp_path / "missing"),))
    with pytest.raises(InputError, match=r"holds no \.txt, .*\.parquet, \.arrow file"):
        find_sources((str(tmp_path),))
    with pytest.raises(InputError, match=r"model\.vocab: is 100; byte-level tokens need 256"):
        prepare(None, tmp_path / "c", vocab=100)
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"abc\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        prepare(binary, tmp_path / "c")


def test_text_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("hello\n")
    index = prepare(file, tmp_path / "c", vocab=256, tokenizer="byte")
    with pytest.raises(InputError, match="holds 6 tokens; one sample needs 65"):
        BatchReader(data=open_data(index), seed=0, seq=64, batch=1)


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        prepare(None, tmp_path / "file", vocab=256, tokenizer="byte")
