"""From documents to tokens: batches of texts through a vocabulary, with BOS, EOS, byte counts and places.

One job, `encode_shards`, is what a worker of `prepare` runs: it reads pieces of a source and writes a shard or more.
"""

import contextlib
import functools
import gc
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from t5x_like.core.errors import UserError
from t5x_like.data import token_shards
from t5x_like.data.config import PLAIN, FieldsConfig
from t5x_like.data.templates.sandbox import TemplateRefused
from t5x_like.data.tokenizers import behind, long_texts, vocabularies
from t5x_like.data.write import bad_records, chats, preprocessors, sources
from t5x_like.data.write.preprocessors import Document
from t5x_like.data.write.sources import Piece, Source, SourceFile

_BATCH_CHARACTERS = 1 << 18
_REPORT_EVERY = 1 << 14  # bytes or records
_OBJECTS_BEFORE_COLLECTION = 1 << 17
_LONG_TEXT = 1 << 22  # characters; a longer text is tokenized in parts

Placed = tuple[int, int, Document]  # number of the file, offset in it, document
Report = Callable[[int], None]  # called with characters or records done since the last call


def encode_shards(job: dict[str, Any], report: Report) -> list[dict[str, Any]]:
    """Writes the shards a job of data/write/prepare.py describes, in one reading; returns their facts."""
    vocabulary = load_vocabulary(job["tokenizer"])
    plain = job["kind"] in ("text", "lines")
    columns = PLAIN.columns if plain else tuple(job["columns"])
    pieces = {index: [Piece(*piece) for piece in given] for index, given in job["shards"]}
    fields = FieldsConfig(**job["fields"]) if not plain else PLAIN
    wanted = () if plain else (*fields.names, *fields.beside)

    def read(file: int, begin: int, end: int) -> Iterator[sources.Record]:
        path, separator = job["files"][file], job["separator"]
        return sources.read(job["kind"], path, begin, end, name=job["name"], wanted=wanted, separator=separator)

    cursor = sources.Cursor(read, [piece for given in pieces.values() for piece in given])
    written = []
    with _rare_collections():
        for index, given in pieces.items():
            tally = bad_records.Tally(job["kind"], job["files"], rule=job["on_bad_record"], several=bool(job["chat"]))
            documents = _documents(job, cursor, given, tally, report, vocabulary)
            batches = encode(documents, vocabulary, columns=columns, joined=job["joined"])
            place, kind = pathlib.Path(job["folder"]), job["token_type"]
            written.append(token_shards.write_shard(place, index, batches, kind, columns=columns, notes=tally.facts))
    return written


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Text is many small objects without a cycle; looking for cycles among them takes a seventh of the time."""
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@functools.lru_cache(maxsize=2)
def load_vocabulary(path: str) -> vocabularies.Vocabulary:
    return vocabularies.load(path)


def _documents(
    job: dict[str, Any],
    cursor: sources.Cursor,
    pieces: Sequence[Piece],
    tally: bad_records.Tally,
    report: Report,
    vocabulary: vocabularies.Vocabulary,
) -> Iterator[Placed]:
    fields, names = FieldsConfig(**job["fields"]), job["preprocessors"]
    writer = chats.Writer(job["chat"], vocabulary) if job["chat"] else None
    for piece in pieces:
        yield from _read_piece(job["kind"], cursor.records(piece), piece, fields, names, tally, report, writer)


def read_pieces(
    source: Source,
    files: Sequence[SourceFile],
    pieces: Iterable[Piece],
    fields: FieldsConfig,
    names: Sequence[str],
    *,
    separator: str = "",
    on_bad_record: str = "stop",
    tally: bad_records.Tally | None = None,
) -> Iterator[Placed]:
    """The documents of some pieces of a native source, in order. tally: counts bad records, by its own rule."""
    if tally is None:
        tally = bad_records.Tally(source.kind, [file.path for file in files], rule=on_bad_record)
    wanted = () if source.kind in ("text", "lines") else (*fields.names, *fields.beside)
    for piece in pieces:
        path = files[piece.file].path
        records = sources.read(
            source.kind, path, piece.begin, piece.end, name=source.name, wanted=wanted, separator=separator
        )
        yield from _read_piece(source.kind, records, piece, fields, names, tally, _no_report)


def first_texts(documents: Iterable[Placed], limit: int) -> Iterator[str]:
    """The texts of documents until `limit` bytes of UTF-8 are reached; the last one is cut between two characters."""
    for _, _, document in documents:
        texts = [_first_bytes(text, limit) for text in (document.inputs, document.text)]
        yield from filter(None, texts)
        limit -= sum(len(text.encode()) for text in texts)
        if limit <= 0 or texts != [document.inputs, document.text]:
            return


def _first_bytes(text: str, limit: int) -> str:
    """As much of the begin of a text as `limit` bytes of UTF-8 hold."""
    if not text[:limit].isascii():
        return text[:limit].encode()[:limit].decode(errors="ignore")
    return text[:limit]


def _no_report(amount: int) -> None:
    del amount


def _read_piece(
    kind: str,
    records: Iterable[sources.Record],
    piece: Piece,
    fields: FieldsConfig,
    names: Sequence[str],
    tally: bad_records.Tally,
    report: Report,
    writer: chats.Writer | None = None,
) -> Iterator[Placed]:
    """`report` gets the offsets passed. Without a writer, of a conversation the texts alone are read."""
    done = piece.begin
    reading = PLAIN if kind in ("text", "lines") else fields
    for record in records:
        if record.offset - done > _REPORT_EVERY:
            report(record.offset - done)
            done = record.offset
        tally.records += 1
        problem, documents = record.problem, []
        if not problem:
            try:
                documents = _documents_of(record.fields, reading, names, writer)
            except TemplateRefused as error:  # no fault of the record
                raise tally.refused(piece.file, record.offset, error) from None
            except UserError as error:
                problem = str(error)
        if problem:
            tally.add(piece.file, record.offset, problem)
            continue
        for document in documents:
            yield piece.file, record.offset, document
    report(piece.end - done)


def _documents_of(
    record: dict[str, Any], fields: FieldsConfig, names: Sequence[str], writer: chats.Writer | None
) -> list[Document]:
    if writer is not None and fields.rejected:
        return [Document("", "", written=writer.pair(*preprocessors.conversations(record, fields, names)))]
    if not preprocessors.is_conversation(record, fields) and (writer is None or not fields.targets):
        return [preprocessors.document(record, fields, names)]
    messages = preprocessors.conversation(record, fields, names)
    if writer is None:
        return [Document("", "\n".join(message.get("content", "") for message in messages))]
    return [Document("", "", written=written) for written in writer.written(messages)]


def encode(
    documents: Iterable[Placed],
    vocabulary: vocabularies.Vocabulary,
    *,
    columns: Sequence[str] = (),
    joined: bool = False,
) -> Iterator[token_shards.Encoded]:
    """Batches of encoded documents with these columns; those without a token are left out and counted.

    joined: answers are encoded as they stand behind their inputs.
    """
    batch: list[Placed] = []
    size = 0
    for placed in documents:
        batch.append(placed)
        document = placed[2]
        size += len(document.inputs) + len(document.text) + len(document.rejected) + 16
        size += document.written.size if document.written else 0
        if size >= _BATCH_CHARACTERS:
            yield _encode_batch(batch, vocabulary, columns, joined)
            batch, size = [], 0
    if batch:
        yield _encode_batch(batch, vocabulary, columns, joined)


def _encode_batch(
    batch: list[Placed], vocabulary: vocabularies.Vocabulary, columns: Sequence[str], joined: bool
) -> token_shards.Encoded:
    documents = [document for _, _, document in batch]
    if documents[0].written is not None:
        places = [(file, offset) for file, offset, _ in batch]
        return chats.encode([document.written for document in documents], places, vocabulary)
    if "rejected" in columns:
        parts = [part for d in documents for part in (d.inputs, d.text, d.rejected)]
    elif any(document.inputs for document in documents):
        parts = [part for d in documents for part in (d.inputs, d.text)]
    else:
        parts = [document.text for document in documents]
    several = len(parts) // len(documents)
    if joined and several > 1 and vocabulary.adds_space:
        ids, counts, lengths = _encode_joined(parts, several, vocabulary)
    else:
        ids, counts, lengths = _encode_texts(parts, vocabulary)
    lengths = lengths.reshape(len(documents), -1)
    if lengths.shape[1] == 1:
        lengths = np.concatenate([np.zeros_like(lengths), lengths], axis=1)
    labels = np.array([document.label for document in documents]) if "labels" in columns else None
    return assemble(ids, counts, lengths, [(file, offset) for file, offset, _ in batch], vocabulary, labels)


def _encode_joined(
    texts: list[str], several: int, vocabulary: vocabularies.Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_encode_texts`, of documents of so many texts: the answers of each as they stand behind its first text."""
    inputs = texts[::several]
    columns = [behind.encode(vocabulary, [""] * len(inputs), inputs)]
    columns += [behind.encode(vocabulary, inputs, texts[column::several]) for column in range(1, several)]
    found = [part for row in zip(*columns, strict=True) for part in row]
    ids, counts = (np.concatenate(column) for column in zip(*found, strict=True))
    return ids, counts, np.array([len(part) for part, _ in found], np.int64)


def _encode_texts(texts: list[str], vocabulary: vocabularies.Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, bytes per id, ids per text); long texts part by part, of which only arrays are kept."""
    if max(map(len, texts)) <= _LONG_TEXT:
        ids, lengths = vocabulary.encode_batch(texts)
        return ids, vocabulary.count_bytes(texts, ids, lengths), lengths
    lengths = np.zeros(len(texts), np.int64)
    all_ids: list[np.ndarray] = []
    all_counts: list[np.ndarray] = []
    for index, text in enumerate(texts):
        for ids, counts in long_texts.encode(vocabulary, text, size=_LONG_TEXT):
            all_ids.append(ids)
            all_counts.append(counts.astype(np.int32))
            lengths[index] += len(ids)
    ids = np.concatenate(all_ids)
    all_ids.clear()  # they are as large as the text, or larger
    return ids, np.concatenate(all_counts), lengths


def assemble(
    ids: np.ndarray,
    counts: np.ndarray,
    parts: np.ndarray,
    places: list[tuple[int, int]],
    vocabulary: vocabularies.Vocabulary,
    labels: np.ndarray | None = None,
) -> token_shards.Encoded:
    """Puts BOS (where there is one) before and EOS behind each document of parts[i] = (input tokens, text tokens).

    Of pairs, parts[i] = (prompt, chosen, rejected tokens), with EOS behind each answer.
    """
    lengths = parts.sum(axis=1)
    kept = lengths > 0
    lengths, parts = lengths[kept], parts[kept]
    where = np.array(places, np.int64).reshape(-1, 2)[kept]
    if vocabulary.eos_id is None:
        raise UserError("the tokenizer names no end-of-text token; name one in a tokenizer_config.json beside it")
    before = 0 if vocabulary.bos_id is None else 1
    wholes = lengths + before + parts.shape[1] - 1
    begins = np.cumsum(wholes) - wholes
    content = np.ones(wholes.sum(), bool)
    content[begins + wholes - 1] = False
    without_loss = np.where(parts[:, 0] > 0, parts[:, 0] + before, 0)
    columns = {} if labels is None else {"labels": labels[kept]}
    if parts.shape[1] == 3:
        without_loss = parts[:, 0] + before
        columns = {"rejected": without_loss + parts[:, 1] + 1}
        content[begins + columns["rejected"] - 1] = False
    if before:
        content[begins] = False
    out_ids = np.full(len(content), vocabulary.eos_id, np.int32)
    out_counts = np.zeros(len(content), np.int32)
    out_ids[content], out_counts[content] = ids, counts
    if vocabulary.bos_id is not None:
        out_ids[begins] = vocabulary.bos_id
    skipped = int(len(kept) - kept.sum())
    return token_shards.Encoded(out_ids, out_counts, wholes, without_loss, where[:, 0], where[:, 1], skipped, columns)
