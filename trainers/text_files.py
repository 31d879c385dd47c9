"""Text files of rows that people write: each error says the file, the line and what is wrong there."""

import csv
import io
import json
import math
from pathlib import Path

# A number of a row, as errors give it, and the row.
Row = tuple[str, dict]


def read_text(path: str | Path) -> str:
    """
    A UTF-8 file's text, without a byte order mark.

    Raises:
        ValueError: if it is not UTF-8; the message names the line.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8 text ({error.reason}); save it as UTF-8.") from error


def parse_json(text: str, name: str) -> object:
    """
    A JSON value whose objects have no key twice.

    Args:
        name (`str`): what errors call it.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        place = f", line {error.lineno}" if "\n" in text else ""
        raise ValueError(f"{name}{place}: this is no JSON ({error.msg}, column {error.colno}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: this is no JSON that can be read ({error}).") from error


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return fields


def read_json(path: str | Path) -> object:
    """[`parse_json`] of a file."""
    return parse_json(read_text(path), str(path))


def json_object(value: object, name: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: this must be a JSON object, {{...}}, not {json.dumps(value)[:60]}.")
    return value


def numbered_lines(text: str, name: str) -> list[tuple[str, str]]:
    """The lines that are not blank, each with the name and its number."""
    return [(f"{name}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def read_json_rows(path: str | Path) -> list[Row]:
    """
    The objects of a JSON array, or of a file with one on each line.

    Raises:
        ValueError: if it holds anything else.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        array = parse_json(text, str(path))
        rows = [(f"{path}, row {number}", value) for number, value in enumerate(array, start=1)]
    else:
        rows = [(where, parse_json(line, where)) for where, line in numbered_lines(text, str(path))]
    return [(where, json_object(value, where)) for where, value in rows]


def read_csv_rows(path: str | Path) -> list[Row]:
    """
    The rows of a CSV file with a line of column names. Cells are the text that they are: `NA` and `007` too.

    Raises:
        ValueError: if a row has other columns than the first line, or quotes do not close.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    columns, rows, end = [], [], 0
    try:
        for cells in reader:
            where, end = f"{path}, line {end + 1}", reader.line_num
            if not columns:
                columns = cells
            elif cells and len(cells) != len(columns):
                raise ValueError(f"{where}: the row has {len(cells)} cells and the file {len(columns)} columns.")
            elif cells:
                rows.append((where, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {end + 1}: this is no CSV ({error}).") from error
    return rows


def text_of(value: object, where: str) -> str:
    """
    A cell as text: of a number the number, of nothing the empty text.

    Args:
        where (`str`): the row and the column, for errors.

    Raises:
        ValueError: if it is neither, or no Unicode text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, not {str(value)[:60]} ({type(value).__name__}).")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a character (a lone surrogate, \\u{ord(value[error.start]):x}).") from error
    return value
