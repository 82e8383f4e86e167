"""Training data: text files to a memory-mapped file of tokens, and the order in which it is read.

A prepared data set is three files of one key in a cache folder: `KEY.tokens` (token ids, little endian),
`KEY.tokenizer.json` and `KEY.json`, the index, written last. KEY is a digest of the texts, the tokenizer
kind and the vocabulary, so a changed input makes new files and never meets old ones.

The order is a pure function of (seed, global sample index): neither the number of ranks nor the layout
enters, so a run can go on under any other plan.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from planner.codec import load_json, noun, to_json, write_atomic
from planner.errors import InputError, Problem
from planner.units import format_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DATA_SCHEMA = 1
END_OF_TEXT = "<|endoftext|>"
BYTES = 256
"""Byte-level tokens: every text can be written with these alone."""
CHUNK_BYTES = 1 << 20
MASK = (1 << 64) - 1


class TokenizerKind(StrEnum):
    """How text becomes tokens: byte-pair merges up to the model's vocabulary, or plain bytes."""

    BPE = "bpe"
    BYTE = "byte"


@noun
class SourceText:
    """One text file that went into a data set."""

    name: str
    bytes: int
    sha256: str


@noun
class DataIndex:
    """The index of a prepared data set. `digest` covers texts, tokenizer kind and vocabulary."""

    schema_version: int
    digest: str
    tokenizer: TokenizerKind
    vocab: int
    token_bytes: int
    tokens: int
    sha256: str
    sources: tuple[SourceText, ...]


def shipped_corpus() -> Path:
    """The folder of public-domain text that comes with the package."""
    return Path(__file__).parent / "corpus"


def text_files(path: Path | None) -> tuple[Path, ...]:
    """The text files that `--data PATH` names: the file, or every .txt below the folder, in name order."""
    root = shipped_corpus() if path is None else path
    if not root.exists():
        raise InputError(Problem(where=f"--data {root}", fault="no such file or folder."))
    if root.is_file():
        return (root,)
    files = tuple(sorted(file for file in root.rglob("*.txt") if file.is_file()))
    if not files:
        raise InputError(
            Problem(
                where=f"--data {root}", fault="holds no .txt file.", legal="a text file, or a folder of .txt"
            )
        )
    return files


def _describe(file: Path, name: str) -> SourceText:
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("rb") as handle:
            while block := handle.read(CHUNK_BYTES):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise InputError(Problem(where=str(file), fault=f"cannot be read: {error.strerror}.")) from None
    return SourceText(name=name, bytes=size, sha256=digest.hexdigest())


def _chunks(file: Path) -> Iterator[str]:
    """The text of a file in pieces of about CHUNK_BYTES that end at line ends."""
    try:
        with file.open(encoding="utf-8", newline="") as handle:
            while lines := handle.readlines(CHUNK_BYTES):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise InputError(
            Problem(where=str(file), fault=f"is not UTF-8 text: {error.reason}.", fix="convert it to UTF-8")
        ) from None


def _train_tokenizer(files: tuple[Path, ...], kind: TokenizerKind, vocab: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocab` tokens; with kind `byte`, one without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT] if vocab > BYTES else []
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES + len(special) if kind is TokenizerKind.BYTE else vocab,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((chunk for file in files for chunk in _chunks(file)), trainer)
    return tokenizer


def _write_tokens(
    tokenizer: Any, files: tuple[Path, ...], handle: BinaryIO, token_bytes: int
) -> tuple[int, str]:
    """Writes the tokens of all files; returns their number and the SHA-256 of what was written."""
    import numpy as np

    end, count, digest = tokenizer.token_to_id(END_OF_TEXT), 0, hashlib.sha256()
    dtype = np.dtype(f"<u{token_bytes}")
    for file in files:
        pieces = (tokenizer.encode(chunk).ids for chunk in _chunks(file))
        for ids in itertools.chain(pieces, [] if end is None else [[end]]):
            block = np.asarray(ids, dtype=dtype).tobytes()
            handle.write(block)
            digest.update(block)
            count += len(ids)
    handle.flush()
    os.fsync(handle.fileno())
    return count, digest.hexdigest()


def _digest(sources: tuple[SourceText, ...], kind: TokenizerKind, vocab: int) -> str:
    text = f"{DATA_SCHEMA}\n{kind}\n{vocab}\n" + "\n".join(f"{s.sha256} {s.bytes}" for s in sources)
    return hashlib.sha256(text.encode()).hexdigest()


def prepare_data(
    path: Path | None, *, vocab: int, cache: Path, kind: TokenizerKind = TokenizerKind.BPE
) -> Path:
    """The index of the tokenized data set, made in the folder `cache` if it is not there already.

    `path` is what `--data` names (None: the shipped corpus). Raises InputError where text is missing,
    empty or not UTF-8, where the vocabulary cannot hold the 256 bytes, or where the disk is full.
    """
    if vocab < BYTES:
        raise InputError(
            Problem(
                where="model.vocab",
                fault=f"is {vocab}; byte-level tokens need {BYTES}.",
                legal=f"{BYTES} or more",
                fix="use a model with a larger vocabulary",
            )
        )
    files = text_files(path)
    root = files[0].parent if path is None or path.is_file() else path
    sources = tuple(_describe(file, str(file.relative_to(root))) for file in files)
    digest = _digest(sources, kind, vocab)
    index_path = cache / f"{digest[:16]}.json"
    if not _usable(index_path, digest):
        _build(files, sources, kind, vocab, digest, index_path)
    return index_path


def _usable(index_path: Path, digest: str) -> bool:
    """Whether a whole data set of this digest lies in the cache; a damaged one is made again."""
    try:
        return open_data(index_path).index.digest == digest
    except InputError:
        return False


def _build(
    files: tuple[Path, ...],
    sources: tuple[SourceText, ...],
    kind: TokenizerKind,
    vocab: int,
    digest: str,
    index_path: Path,
) -> None:
    stem = index_path.with_suffix("")
    temporary = stem.with_name(f".{stem.name}.{os.getpid()}.tmp")
    token_bytes = 2 if vocab <= 1 << 16 else 4
    try:
        index_path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            tokenizer = _train_tokenizer(files, kind, vocab)
            count, sha256 = _write_tokens(tokenizer, files, handle, token_bytes)
        temporary.replace(stem.with_suffix(".tokens"))
    except OSError as error:
        raise InputError(
            Problem(where=str(index_path.parent), fault=f"cannot be written: {error.strerror}.")
        ) from None
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    write_atomic(stem.with_suffix(".tokenizer.json"), tokenizer.to_str())
    index = DataIndex(
        schema_version=DATA_SCHEMA,
        digest=digest,
        tokenizer=kind,
        vocab=vocab,
        token_bytes=token_bytes,
        tokens=count,
        sha256=sha256,
        sources=sources,
    )
    write_atomic(index_path, to_json(index))


@dataclass(frozen=True, slots=True)
class TokenData:
    """A data set open for reading; `tokens` is a read-only memory map."""

    index: DataIndex
    tokens: NDArray[np.unsignedinteger]

    def samples(self, seq: int) -> int:
        """Number of samples of `seq` + 1 tokens; neighbours share one token, the last target."""
        return max(0, (self.index.tokens - 1) // seq)


def open_data(index_path: Path, *, verify: bool = True) -> TokenData:
    """The data set of an index. Raises InputError where the token file is cut short or altered.

    Without `verify` only the length is compared: one process of a machine reads the whole file, the
    others trust it.
    """
    import numpy as np

    index = load_json(index_path, DataIndex)
    path = index_path.with_suffix(".tokens")
    expected_bytes = index.tokens * index.token_bytes
    found_bytes = path.stat().st_size if path.exists() else 0
    cure = f"delete {path} and {index_path.name}; they are made again from the text"
    if found_bytes != expected_bytes:
        raise InputError(
            Problem(
                where=str(path),
                fault=f"has {found_bytes} bytes, its index {expected_bytes}: it is cut short or altered.",
                fix=cure,
            )
        )
    if verify and _describe(path, path.name).sha256 != index.sha256:
        raise InputError(Problem(where=str(path), fault="does not match its checksum.", fix=cure))
    if not index.tokens:
        raise InputError(Problem(where=str(path), fault="holds no tokens: the text is empty."))
    dtype = np.dtype(f"<u{index.token_bytes}")
    return TokenData(index=index, tokens=np.memmap(path, dtype=dtype, mode="r"))


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: every input bit reaches every output bit.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def permute(offset: int, size: int, key: int, rounds: int = 6) -> int:
    """Where `offset` goes in the permutation of range(size) that `key` names.

    A Feistel network over the next even number of bits, walked until it lands below `size` (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): no table, so the size of the data does not
    matter, and no library's random stream, which may change between its versions.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = offset >> half, offset & mask
        for number in range(rounds):
            left, right = right, left ^ (_mix(right ^ _mix(key + number)) & mask)
        offset = left << half | right
        if offset < size:
            return offset


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReader:
    """The global batches of a run. Sample k of step s is global sample s * batch + k of the order."""

    data: TokenData
    seed: int
    seq: int
    batch: int

    def __post_init__(self) -> None:
        if self.data.samples(self.seq) == 0:
            raise InputError(
                Problem(
                    where="--data",
                    fault=f"holds {self.data.index.tokens} tokens; one sample needs {self.seq + 1}.",
                    fix="give more text, or plan with a shorter --seq",
                )
            )

    @property
    def epoch_samples(self) -> int:
        return self.data.samples(self.seq)

    def sample(self, position: int) -> int:
        """The sample of the data set at a global position: a new permutation in every epoch."""
        epoch, offset = divmod(position, self.epoch_samples)
        return permute(offset, self.epoch_samples, _mix(_mix(self.seed & MASK) ^ epoch))

    def positions(self, step: int, *, data_rank: int, data_size: int) -> range:
        """The global positions of one data rank's share of the batch of step `step` (0 is the first)."""
        local = self.batch // data_size
        first = step * self.batch + data_rank * local
        return range(first, first + local)

    def rows(self, step: int, *, data_rank: int, data_size: int) -> NDArray[np.int64]:
        """Token ids [batch / data_size, seq + 1] of one data rank at step `step`."""
        import numpy as np

        positions = self.positions(step, data_rank=data_rank, data_size=data_size)
        starts = (self.sample(position) * self.seq for position in positions)
        return np.stack([self.data.tokens[s : s + self.seq + 1] for s in starts]).astype(np.int64)


def data_summary(index: DataIndex) -> str:
    """One line for people: `1 file, 669 KiB, 190,000 tokens (bpe, 4096)`."""
    size = format_bytes(sum(source.bytes for source in index.sources))
    files = f"{len(index.sources)} file" + ("s" if len(index.sources) != 1 else "")
    return f"{files}, {size}, {index.tokens:,} tokens ({index.tokenizer}, vocabulary {index.vocab})"
