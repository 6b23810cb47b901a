"""
Files of rows: JSON, JSON lines and Parquet to a data set, whole, streamed, or several mixed by weight.

Rows stay what they are, in either format: what becomes of them is said in `data.py`.
"""

import base64
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


FIELDS = ("messages", "conversations", "image", "voice", "video")  # what training reads
NUM_SHARDS = 64  # of a stream: at most as many readers share it
# Whoever gets a run of shards, or every n-th of them, gets as many rows as the others, two more or less.
SHARD_STEP = 39


def load_rows(
    source: str | Path | Mapping[str, float], split: str = "train", streaming: bool = False, seed: int = 0
) -> Any:
    r"""
    Args:
        source (`str`, `Path` or `dict[str, float]`): A `.json` (one list), `.jsonl` or `.parquet` file of rows in
            either format, or a data set that `datasets.load_dataset` finds. Or several files with weights: how often
            an epoch shows each of its rows, 2.0 twice, 0.5 a random half.
        split (`str`, *optional*, defaults to `"train"`): Split of such a data set.
        streaming (`bool`, *optional*, defaults to `False`): Whether rows are read while they are used. Streams are
            divided among processes and workers.
        seed (`int`, *optional*, defaults to 0): Of what weights draw.

    Returns:
        `datasets.Dataset` or `IterableDataset`. Media stay paths, relative to their file: nothing is decoded. Rows of
        files know their number (from 1) and file; of their other fields those stay that training reads.

    Raises:
        ValueError: a file is missing, or no JSON list, lines of objects or Parquet; a weight is not positive.
        ImportError: `datasets` is needed and missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Loading rows needs `datasets`: `pip install uni-moe-hf[train]`.") from error
    if isinstance(source, Mapping):
        weights = {str(name): weight for name, weight in source.items()}
        if not weights or not all(_is_weight(weight) for weight in weights.values()):
            raise ValueError(f"Sources need positive weights, got {weights}.")
    elif Path(source).suffix in READERS:
        weights = {str(source): 1}
    else:
        return datasets.load_dataset(str(source), split=split, streaming=streaming)
    for name in weights:
        if Path(name).suffix not in READERS:
            raise ValueError(f"'{name}' is no {', '.join(READERS)} file; only files can be mixed by weight.")
        if not Path(name).is_file():
            raise ValueError(f"Data file '{name}' does not exist; check the path.")
    if streaming:
        counts = {name: sum(1 for _ in numbered_rows(Path(name), lambda number: False)) for name in weights}
        # Every shard reads the lines and parses its own: cheap beside media.
        given = {"weights": weights, "counts": counts, "seed": seed, "shard": list(range(NUM_SHARDS))}
        return datasets.IterableDataset.from_generator(_stream, gen_kwargs=given)
    chosen = []
    for name, weight in weights.items():
        rows = _whole(datasets, Path(name))
        whole, rest = divmod(weight, 1)
        extra = rows.shuffle(seed=seed).select(range(round(rest * len(rows))))
        chosen += [rows] * int(whole) + [extra] * bool(len(extra))
    if not chosen:
        raise ValueError(f"The weights {weights} leave no row; give larger ones.")
    return datasets.concatenate_datasets(chosen)


def _whole(datasets: Any, path: Path) -> Any:
    """All rows of a file. JSON in all columns: a common schema would fill every part with the keys of all parts."""
    rows = list(numbered_rows(path))
    if not rows:
        raise ValueError(f"Data file '{path}' holds no rows.")
    text, kinds = datasets.Value("string"), dict.fromkeys(FIELDS, datasets.Json())
    features = datasets.Features({**kinds, "_row": datasets.Value("int64"), "_source": text, "_root": text})
    try:
        return datasets.Dataset.from_list(rows, features=features)
    except UnicodeEncodeError:
        for row in rows:
            check_characters(json.dumps(row, ensure_ascii=False), f"Row {row['_row']} of '{row['_source']}'")
        raise


def check_characters(text: str, what: str) -> None:
    """
    Raises:
        ValueError: the text of `what` holds a surrogate without its other half, as a cut escape in JSON leaves it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a character ({error.reason})") from error


def _is_weight(weight: Any) -> bool:
    return isinstance(weight, int | float) and math.isfinite(weight) and weight > 0


def numbered_rows(path: Path, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[dict[str, Any] | None]:
    """
    Args:
        path (`Path`): A file of a kind in `READERS`.
        wanted (`Callable`, *optional*): Whether the row of a number, from 1, is wanted; all are by default.

    Yields:
        `dict`: the fields of a row that training reads, with its number, file and folder; `None` for one not wanted.

    Raises:
        ValueError: the file is not what its name says, or a row is no object.
    """
    for number, row in enumerate(READERS[path.suffix](path, wanted), start=1):
        if not wanted(number):
            yield None
        elif not isinstance(row, dict):
            raise ValueError(f"Row {number} of '{path}' is a {type(row).__name__}, not an object.")
        else:
            stored = {field: _stored(field, row.get(field)) for field in FIELDS}
            yield {**stored, "_row": number, "_source": str(path), "_root": str(path.parent)}


def _stored(field: str, value: Any) -> Any:
    """A field without bytes, as a list or object: text alone comes back from a JSON column as what it spells."""
    if field == "video" and isinstance(value, str):
        return {"path": value}  # one file, where a list is one video's frames
    return _without_bytes(value if isinstance(value, list | dict | None) else [value])


def _without_bytes(value: Any) -> Any:
    """Bytes, as Parquet may hold them, become `data:` URLs."""
    if isinstance(value, bytes):
        return f"data:;base64,{base64.b64encode(value).decode()}"
    if isinstance(value, Mapping):
        return {key: _without_bytes(each) for key, each in value.items()}
    return [_without_bytes(each) for each in value] if isinstance(value, list) else value


def _stream(
    weights: dict[str, float], counts: dict[str, int], seed: int, shard: list[int]
) -> Iterator[dict[str, Any]]:
    """The rows of some shards of all files, each as often as its weight says, the files mixed evenly."""
    shards, chance = set(shard), random.Random(f"{seed} {shard}")

    def rows(name: str) -> Iterator[dict[str, Any]]:
        whole, rest = divmod(weights[name], 1)
        for row in numbered_rows(Path(name), lambda number: number * SHARD_STEP % NUM_SHARDS in shards):
            if row is not None:
                yield from [row] * (int(whole) + (rest > 0 and chance.random() < rest))

    left = {name: rows(name) for name in weights}
    while left:
        (name,) = chance.choices(list(left), [weights[name] * counts[name] + 1e-9 for name in left])
        row = next(left[name], None)
        if row is None:
            del left[name]
        else:
            yield row


def _json_rows(path: Path, wanted: Callable[[int], bool]) -> Iterator[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"Data file '{path}' is no valid json ({error}).") from error
    if not isinstance(rows, list):
        raise ValueError(f"Data file '{path}' must hold a non-empty list of objects, one per row.")
    yield from rows


def _json_lines(path: Path, wanted: Callable[[int], bool]) -> Iterator[Any]:
    number = line_number = 0
    with open(path, encoding="utf-8-sig", newline="\n") as lines:  # other line breaks may stand in JSON strings
        try:
            for line in lines:
                line_number += 1
                if line.strip():
                    number += 1
                    yield json.loads(line) if wanted(number) else None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"Data file '{path}' is no valid jsonl (line {line_number}: {error}).") from error


def _parquet_rows(path: Path, wanted: Callable[[int], bool]) -> Iterator[dict[str, Any]]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        # Columns that `datasets` wrote as JSON come back as text.
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
        encoded = datasets.Features({name: kind for name, kind in features.items() if "Json(" in repr(kind)})
        for batch in file.iter_batches(columns=[name for name in file.schema_arrow.names if name in FIELDS]):
            for row in batch.to_pylist():
                yield row | encoded.decode_example({name: row[name] for name in encoded if name in row})
    except pyarrow.ArrowException as error:
        raise ValueError(f"Data file '{path}' is no valid parquet ({error}).") from error


READERS = {".json": _json_rows, ".jsonl": _json_lines, ".parquet": _parquet_rows}


__all__ = ["READERS", "load_rows", "numbered_rows"]
