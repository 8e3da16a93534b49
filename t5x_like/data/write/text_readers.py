"""Readers of text, lines and JSON Lines: offsets are bytes of the content, without a byte order mark at its begin."""

import json
import tarfile
from collections.abc import Iterator

from t5x_like.core.errors import UserError
from t5x_like.data.write import content
from t5x_like.data.write.records import BOM, Record, bad, first_line, not_utf8

# text: one document a file, cut (for held-out text) where a character begins; of a tar archive one document a member


def read_text(path: str, begin: int, end: int, wanted: tuple[str, ...] = ()) -> Iterator[Record]:
    if content.is_tar(path):
        yield from _read_tar(path, begin, end)
        return
    record = _text_record(path, begin, end)
    if record is not None:
        yield record


def _text_record(path: str, begin: int, end: int) -> Record | None:
    """A function of its own, so that the bytes of a large file are gone while its text is used."""
    with content.open_content(path) as file:
        if begin < len(BOM) and file.read(len(BOM)) == BOM:
            begin = len(BOM)
    if begin >= end:
        return None
    with content.open_content(path) as file:
        content.skip(file, begin)
        found = file.read(end - begin + 3)  # a character that straddles the end has at most 3 more bytes
    first = _character_start(found, 0) if begin else 0
    last = min(_character_start(found, end - begin), len(found))
    if last <= first:
        return None
    return _decoded(found[first:last], begin + first)


def _character_start(found: bytes, at: int) -> int:
    """The first position from `at` on where a UTF-8 character begins (continuation bytes are 10xxxxxx)."""
    while at < len(found) and found[at] & 0xC0 == 0x80:
        at += 1
    return at


def _decoded(found: bytes, offset: int) -> Record:
    try:
        return Record(offset, {"text": found.decode("utf-8")})
    except UnicodeDecodeError as error:
        return bad(offset, not_utf8(found, error, offset))


def _read_tar(path: str, begin: int, end: int) -> Iterator[Record]:
    """The regular files of an archive; those whose names begin with a dot are the system's."""
    try:
        with content.open_content(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if member.offset >= end:
                    return
                name = member.name.rpartition("/")[2]
                if member.offset < begin or not member.isfile() or name.startswith("."):
                    continue
                stream = archive.extractfile(member)
                assert stream is not None
                try:
                    text = stream.read().removeprefix(BOM).decode("utf-8")
                except UnicodeDecodeError as error:
                    reason = f"byte {error.start} is not UTF-8; convert the file (iconv -t utf-8)"
                    yield bad(member.offset, f"{member.name}: {reason}")
                else:
                    yield Record(member.offset, {"text": text})
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a whole tar archive ({first_line(error)}); copy or write it again") from None


# lines, jsonl: records end at "\n" alone, since texts may hold U+2028 or U+0085


def _lines(path: str, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its end) of every line that begins in [begin, end)."""
    with content.open_content(path) as file:
        offset = 0
        if begin <= len(BOM):
            marked = file.read(len(BOM)) == BOM
            offset = len(BOM) if marked else 0
            if not marked:
                file.close()
                file = content.open_content(path)  # a stream does not go back
        if begin > offset:
            content.skip(file, begin - 1)
            offset = begin - 1 + len(file.readline())  # through the end of the line that begins before
        with file:
            for line in file:
                if offset >= end:
                    return
                yield offset, line.removesuffix(b"\n")
                offset += len(line)


def read_lines(path: str, begin: int, end: int, wanted: tuple[str, ...] = ()) -> Iterator[Record]:
    for offset, line in _lines(path, begin, end):
        yield _decoded(line.removesuffix(b"\r"), offset)


def read_jsonl(path: str, begin: int, end: int, wanted: tuple[str, ...] = ()) -> Iterator[Record]:
    for offset, line in _lines(path, begin, end):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield bad(offset, not_utf8(line, error, offset))
            continue
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # the latter for what is nested very deep
            _check_array(path, offset, text, None)
            yield bad(offset, f"the line is not JSON ({error}): {text[:60]!r}; expected an object a line")
            continue
        if not isinstance(fields, dict):
            _check_array(path, offset, text, fields)
            yield bad(offset, f"the line should be a JSON object, is {text[:60]!r}")
            continue
        yield Record(offset, fields)


def _check_array(path: str, offset: int, text: str, value: object) -> None:
    """UserError for a file that is one array: that is no record which is bad."""
    objects = value is None or (isinstance(value, list) and all(isinstance(each, dict) for each in value))
    if offset <= len(BOM) and text.lstrip().startswith("[") and objects:
        raise UserError(
            f"{path}: begins with a JSON array; expected JSON Lines, an object a line: jq -c '.[]' FILE > FILE.jsonl"
        )
