"""
Files, folders and data sets of rows, in the form in which they lie, whole, streamed, or several mixed by weight.

Rows stay what they are: what becomes of them is said in `rows.py`. Media are never decoded here.
"""

import base64
import csv
import glob
import gzip
import io
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..hub.files_uni_moe import reason
from .rows import PLACE, asked, named_files, parse_columns, renamed


NUM_SHARDS = 64  # of a stream: at most as many readers share it
# Whoever gets a run of shards, or every n-th of them, gets as many rows as the others, two more or less.
SHARD_STEP = 39
# Columns that hold lists, which CSV can only write as JSON.
LISTS = ("messages", "conversations", "prompt", "completion", "images", "videos", "audios", "image", "video", "voice")


def spread_over(total: int, count: int) -> list[int]:
    """
    Args:
        total (`int`): Rows that there are.
        count (`int`): How many are wanted.

    Returns:
        `list[int]`: numbers of so many rows in their order, or of all: always the same ones, drawn from everywhere, as
        data may be sorted, and kinds of rows may take turns.
    """
    return sorted(random.Random(0).sample(range(total), min(count, total)))


def load_rows(
    source: str | Path | list | Mapping[str, float],
    split: str = "train",
    streaming: bool = False,
    seed: int = 0,
    config: str | None = None,
    columns: Any = None,
    question: str | list[str] | None = None,
) -> Any:
    r"""
    Args:
        source (`str`, `Path`, `list` or `dict[str, float]`): A file of rows (`.json` as one list, `.jsonl`, `.csv`,
            `.tsv`, `.parquet`; all but Parquet also as `.gz`), a pattern such as `data/*.jsonl`, a folder of media
            with `metadata.csv` or `.jsonl`, a folder of `save_to_disk`, a data set that `datasets.load_dataset`
            finds, or a list of files. Or several files with weights: how often an epoch shows each of its rows, 2.0
            twice, 0.5 a random half.
        split (`str`, *optional*, defaults to `"train"`): Of a data set or folder that has several.
        streaming (`bool`, *optional*, defaults to `False`): Whether rows are read while they are used. Streams are
            divided among processes and workers.
        seed (`int`, *optional*, defaults to 0): Of what weights draw.
        config (`str`, *optional*): Configuration of a data set that has several.
        columns (`dict[str, str]`, *optional*): Which column is what, as in [`~rows.parse_columns`]: `{"photo":
            "image", "label": "answer"}`.
        question (`str` or `list[str]`, *optional*): What is asked about plain media; each row draws one of several.

    Returns:
        `datasets.Dataset` or `IterableDataset`. Media stay paths, relative to their file, or bytes. Rows of files know
        their number (from 1) and file.

    Raises:
        ValueError: a file is missing or not what its name says; a weight is not positive; there is no such split.
        ImportError: `datasets` is needed and missing.
    """
    datasets = _datasets()
    change = row_changes(columns, question)
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return _undecoded(datasets, source, change, None, seed)
    files = _files_of(source, split, config)
    if files is None:
        data = _data_set(datasets, source, split, config, streaming)
        return _undecoded(datasets, data, change, Path(str(source)), seed)
    if streaming:
        counts = {name: _count(Path(name)) for name in files}
        if not any(counts.values()):
            raise ValueError(f"Data file '{next(iter(files))}' holds no rows.")
        # Every shard reads the lines and parses its own: cheap beside media.
        given = {"weights": files, "counts": counts, "seed": seed, "shard": list(range(NUM_SHARDS)), "change": change}
        return datasets.IterableDataset.from_generator(_stream, gen_kwargs=given)
    chosen = []
    for name, weight in files.items():
        rows = _whole(datasets, Path(name), change)
        whole, rest = divmod(weight, 1)
        extra = rows.shuffle(seed=seed).select(range(round(rest * len(rows))))
        chosen += [rows] * int(whole) + [extra] * bool(len(extra))
    if not chosen:
        raise ValueError(f"The weights {files} leave no row; give larger ones.")
    return datasets.concatenate_datasets(chosen)


def iter_rows(
    source: Any,
    split: str = "train",
    config: str | None = None,
    columns: Any = None,
    question: str | list[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Args:
        source, split, config, columns, question: As in [`load_rows`].

    Yields:
        `dict`: each row once, with its number, from 1.

    Raises:
        ValueError: as in [`load_rows`].
    """
    change, files = row_changes(columns, question), _files_of(source, split, config)
    if files is None:
        datasets = _datasets()
        data = _data_set(datasets, source, split, config, False)
        data = _undecoded(datasets, data, change, Path(str(source)))
        for number, row in enumerate(data, start=1):
            yield {**row, "_row": number, "_source": str(source)}
        return
    for name in files:
        row = None
        for row in numbered_rows(Path(name), change=change):
            yield row
        if row is None:
            raise ValueError(f"Data file '{name}' holds no rows.")


def count_rows(source: Any, split: str = "train", config: str | None = None, **_: Any) -> int:
    """
    Args:
        source, split, config: As in [`load_rows`].

    Returns:
        `int`: how many rows [`iter_rows`] yields, good and bad.

    Raises:
        ValueError: as in [`load_rows`].
    """
    files = _files_of(source, split, config)
    if files is None:
        return len(_data_set(_datasets(), source, split, config, False))
    return sum(_count(Path(name)) for name in files)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Loading rows needs `datasets`: `pip install uni-moe-hf[train]`.") from error
    return datasets


def row_changes(columns: Any, question: str | list[str] | None) -> Callable[[dict], dict]:
    """What is done to a row when it is read."""
    questions = [question] if isinstance(question, str) else list(question or ())
    return partial(_changed, columns=parse_columns(columns), questions=questions)


def _changed(row: dict, columns: Mapping[str, str], questions: list[str]) -> dict:
    return asked(renamed(row, columns), questions)


# --- What a source is


def _files_of(source: Any, split: str, config: str | None) -> dict[str, float] | None:
    """Files of rows with their weights; `None` for what only `datasets` can read."""
    if isinstance(source, Mapping):
        files = {str(name): weight for name, weight in source.items()}
        if not files or not all(_is_weight(weight) for weight in files.values()):
            raise ValueError(f"Sources need positive weights, got {files}.")
    elif isinstance(source, list | tuple):
        if not source or not all(isinstance(name, str | Path) for name in source):
            raise ValueError("A list of sources must name files; rows themselves go into a `datasets.Dataset`.")
        files = dict.fromkeys(map(str, source), 1)
    else:
        files = {str(source): 1}
    found: dict[str, float] = {}
    for name, weight in files.items():
        for file in _expanded(name, split):
            found[file] = found.get(file, 0) + weight
        if not _expanded(name, split):
            if isinstance(source, Mapping | list | tuple):
                raise ValueError(f"'{name}' is no {', '.join(KINDS)} file; only files can be mixed.")
            return None
    if config is not None:
        raise ValueError(f"'{next(iter(files))}' is a file, which has no configurations; leave out '{config}'.")
    if split != "train" and not all(Path(name).is_dir() for name in files):
        raise ValueError(f"'{next(iter(files))}' is a file without splits, so without '{split}'; name another file.")
    return found


def _expanded(name: str, split: str) -> list[str]:
    """The files that a name stands for; none where only `datasets` knows what it is."""
    path = Path(name)
    if glob.has_magic(name) and not path.exists():
        files = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
        if not files:
            raise ValueError(f"No file matches '{name}'; check the pattern.")
        return [each for file in files for each in _expanded(file, split)]
    if path.is_dir():
        places = [place for place in (path / split, path) if split == "train" or place != path]
        names = ("metadata.*", "rows.*")  # of `datasets`, and of what we write ourselves
        files = [[file for pattern in names for file in sorted(place.glob(pattern))] for place in places]
        found = [[str(file) for file in each if kind_of(file)] for each in files]
        every = [file for files in found for file in files]
        if len(every) > 1:
            raise ValueError(f"'{name}' has both '{every[0]}' and '{every[1]}'; name the one that is meant.")
        if every:
            return every
        rows = sorted({kind for file in path.iterdir() if file.is_file() and (kind := kind_of(file))})
        if len(rows) > 1:
            raise ValueError(f"'{name}' holds rows as {' and '.join(rows)}; name the files that are meant.")
        return []
    if path.is_file():
        if kind_of(path) is None:
            raise ValueError(f"'{name}' is no {', '.join(KINDS)} file; check the path.")
        return [name]
    if kind_of(path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or ("." in name and "/" not in name):
        raise ValueError(f"Data file '{name}' does not exist; check the path.")
    return []


def kind_of(path: Path) -> str | None:
    """`"json"`, `"jsonl"`, `"csv"`, `"tsv"` or `"parquet"`, by a file's ending in any case; `None` for others."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings[-1:] == [".gz"] and endings[:-1][-1:] != [".parquet"]:
        endings = endings[:-1]
    return KINDS.get(endings[-1]) if endings else None


def _is_weight(weight: Any) -> bool:
    return isinstance(weight, int | float) and math.isfinite(weight) and weight > 0


def _data_set(datasets: Any, source: Any, split: str, config: str | None, streaming: bool) -> Any:
    """Of `save_to_disk`, of a folder that `datasets` understands, or of the Hub."""
    path = Path(str(source))
    is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if not is_saved:
            return datasets.load_dataset(str(source), config, split=split, streaming=streaming)
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds, and few of them told from another by their class
        where = f"'{source}'{f', configuration {config!r},' if config else ''} could not be loaded"
        while error.__cause__ is not None:  # the library wraps what says most
            error = error.__cause__
        hint = "; a folder of media needs a metadata.csv or metadata.jsonl" if path.is_dir() else ""
        raise ValueError(f"{where} with the split '{split}' ({reason(error)}){hint}.") from error
    if config is not None:
        raise ValueError(f"'{source}' was saved to disk, and has no configurations; leave out '{config}'.")
    if hasattr(data, "keys"):
        if split not in data:
            raise ValueError(f"'{source}' has no split '{split}'; it has {sorted(data)}.")
        data = data[split]
    return data.to_iterable_dataset() if streaming else data


def _undecoded(datasets: Any, data: Any, change: Callable, root: Path | None, seed: int = 0) -> Any:
    """The same data set; pictures, sound and video as paths or bytes, classes by their names; streams shuffled."""
    features = data.features
    names = {}
    for name, feature in (features or {}).items():
        plain = _without_decoding(datasets, feature)
        if plain is not feature:
            data = data.cast_column(name, plain)
        if isinstance(feature, datasets.ClassLabel):
            names[name] = feature.names
    place = {"_root": str(root)} if root is not None and root.is_dir() else {}
    finish = partial(_finished, change=change, names=names, place=place)
    if isinstance(data, datasets.IterableDataset):
        return data.shuffle(seed=seed, buffer_size=1000).map(finish, remove_columns=list(features or ()) or None)
    return data.with_transform(partial(_finished_batch, finish=finish))


def _without_decoding(datasets: Any, feature: Any) -> Any:
    """A feature that leaves media as they are, whatever it is inside of; the same object where there are none."""
    if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
        return type(feature)(decode=False)
    if isinstance(feature, Mapping):
        inner = {name: _without_decoding(datasets, each) for name, each in feature.items()}
        return feature if all(inner[name] is feature[name] for name in inner) else inner
    if hasattr(feature, "feature"):
        inner = _without_decoding(datasets, feature.feature)
        return feature if inner is feature.feature else type(feature)(inner)
    return feature


def _finished(row: dict, change: Callable, names: Mapping[str, list[str]], place: Mapping[str, str]) -> dict:
    row = {name: value for name, value in row.items() if value is not None}
    for name, labels in names.items():
        if isinstance(row.get(name), int) and 0 <= row[name] < len(labels):
            row[name] = labels[row[name]]
    return {**change(row), **place}


def _finished_batch(batch: Mapping[str, list], finish: Callable) -> dict[str, list]:
    """As `datasets` asks for transformed rows: by column."""
    count = len(next(iter(batch.values())))
    rows = [finish({name: values[index] for name, values in batch.items()}) for index in range(count)]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


# --- Files


def _whole(datasets: Any, path: Path, change: Callable) -> Any:
    """All rows of a file. JSON in all columns: a common schema would fill every part with the keys of all parts."""
    if kind_of(path) == "parquet":  # which may hold media: rows go to disk, not into memory
        names = dict.fromkeys(_parquet_names(path), "")
        if path.name.startswith("metadata."):  # what files are shows when rows are read
            names |= named_files(names) | dict.fromkeys(("image", "audio", "video"), "")
        columns = {change.keywords["columns"].get(name, name) for name in names}
        stamp = path.stat()
        return datasets.Dataset.from_generator(
            _encoded_rows,
            features=_features(datasets, sorted({*columns, "question"}) + list(PLACE)),
            gen_kwargs={"path": str(path), "change": change, "stamp": (stamp.st_mtime_ns, stamp.st_size)},
        )
    rows = list(_encoded_rows(str(path), change))
    if not rows:
        raise ValueError(f"Data file '{path}' holds no rows.")
    if all("_unreadable" in row for row in rows):
        raise ValueError(f"Row 1 of '{path}' cannot be used: {rows[0]['_unreadable']}.")
    columns = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_list(
        [{**dict.fromkeys(columns), **row} for row in rows], features=_features(datasets, columns)
    )


def _features(datasets: Any, columns: Iterable[str]) -> Any:
    kinds = dict.fromkeys(PLACE, datasets.Value("string")) | {"_row": datasets.Value("int64")}
    return datasets.Features({name: kinds.get(name) or datasets.Json() for name in columns})


def _encoded_rows(path: str, change: Callable, stamp: Any = None) -> Iterator[dict[str, Any]]:
    """Rows as `datasets` keeps them: every field as its JSON. `stamp` tells a file from what it was before."""
    for row in numbered_rows(Path(path), change=change):
        place = {name: row[name] for name in PLACE if name in row}
        fields = {name: value for name, value in row.items() if name not in PLACE and value is not None}
        try:
            encoded = {name: json.dumps(value, ensure_ascii=False) for name, value in fields.items()}
            "".join(encoded.values()).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            what = "it is nested too deep" if isinstance(error, RecursionError) else "a text holds half a character"
            encoded = {"_unreadable": what}
        yield {**encoded, **place}


def numbered_rows(
    path: Path, wanted: Callable[[int], bool] = lambda number: True, change: Callable = lambda row: row
) -> Iterator[dict[str, Any] | None]:
    """
    Args:
        path (`Path`): A file of a kind in `KINDS`.
        wanted (`Callable`, *optional*): Whether the row of a number, from 1, is wanted; all are by default.
        change (`Callable`, *optional*): What is done to each row.

    Yields:
        `dict`: the fields of a row, with its number, file and folder; `None` for one not wanted. What is no row has
        the field `_unreadable`, which says why.

    Raises:
        ValueError: the file is not what its name says.
    """
    is_metadata = path.name.startswith("metadata.")
    for number, row in enumerate(READERS[kind_of(path)](path, wanted), start=1):
        if not wanted(number):
            yield None
            continue
        if isinstance(row, Mapping):
            row = {str(name): _without_bytes(value) for name, value in row.items()}
            row = named_files(row) if is_metadata else row
        else:
            row = {"_unreadable": row if isinstance(row, NoRow) else f"it is a {type(row).__name__}, not an object"}
        place = {"_row": number, "_source": str(path), "_root": str(path.parent)}
        yield change({**row, **place})


class NoRow(str):
    """Why something in a file is no row."""


def _without_bytes(value: Any) -> Any:
    """Bytes, as Parquet may hold them, become `data:` URLs, and what JSON cannot say, text."""
    if isinstance(value, bytes):
        return f"data:;base64,{base64.b64encode(value).decode()}"
    if isinstance(value, Mapping):
        return {str(key): _without_bytes(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_bytes(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _stream(
    weights: dict[str, float], counts: dict[str, int], seed: int, shard: list[int], change: Callable
) -> Iterator[dict[str, Any]]:
    """The rows of some shards of all files, each as often as its weight says, the files mixed evenly."""
    shards, chance = set(shard), random.Random(f"{seed} {shard}")

    def rows(name: str) -> Iterator[dict[str, Any]]:
        whole, rest = divmod(weights[name], 1)
        for row in numbered_rows(Path(name), lambda number: number * SHARD_STEP % NUM_SHARDS in shards, change):
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


def _count(path: Path) -> int:
    """Rows of a file."""
    if kind_of(path) == "parquet":
        import pyarrow.parquet

        with _parquet_errors(path):
            return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    return sum(1 for _ in numbered_rows(path, lambda number: False))


def _text(path: Path, newline: str | None = None) -> io.TextIOBase:
    """A file of text, packed by gzip or not."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", newline=newline)


def _json_rows(path: Path, wanted: Callable[[int], bool]) -> Iterator[Any]:
    try:
        with _text(path) as file:
            rows = json.load(file)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # lines of JSON under the name of the other form
            yield from _json_lines(path, wanted)
            return
        raise ValueError(f"Data file '{path}' is no valid json ({error}).") from error
    except RecursionError as error:
        raise ValueError(f"Data file '{path}' is nested too deep to be read; write it as .jsonl.") from error
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"Data file '{path}' is no valid json ({error}).") from error
    if not isinstance(rows, list):
        raise ValueError(f"Data file '{path}' must hold a non-empty list of objects, one per row.")
    yield from rows


def _json_lines(path: Path, wanted: Callable[[int], bool]) -> Iterator[Any]:
    number = line_number = 0
    try:
        with _text(path, newline="\n") as lines:  # other line breaks may stand in JSON strings
            for line in lines:
                line_number += 1
                if line.strip():
                    number += 1
                    try:
                        yield json.loads(line) if wanted(number) else None
                    except RecursionError:
                        yield NoRow("its JSON is nested too deep")
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"Data file '{path}' is no valid jsonl (line {line_number}: {error}).") from error


def _table_rows(path: Path, wanted: Callable[[int], bool]) -> Iterator[dict[str, Any]]:
    try:
        csv.field_size_limit(1 << 30)  # of the whole process; a conversation with its pictures is one field
        with _text(path, newline="") as file:
            first = file.readline()
            file.seek(0)
            # Where the comma is in numbers, spreadsheets write semicolons.
            delimiter = "\t" if kind_of(path) == "tsv" else ";" if ";" in first and "," not in first else ","
            table = csv.DictReader(file, delimiter=delimiter, strict=True)
            names = table.fieldnames or []
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"Data file '{path}' has the column '{twice[0]}' twice; rename one.")
            for row in table:
                if None in row or None in row.values():
                    yield NoRow("it has another number of fields than the first line")
                else:
                    yield {name: _table_value(name, value) for name, value in row.items()}
    except (csv.Error, UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"Data file '{path}' is no valid {kind_of(path)} ({error}).") from error


def _table_value(name: str, value: str) -> Any:
    """A list where one is meant, which a table can only hold as JSON."""
    if name in LISTS and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"Data file '{path}' is no valid parquet ({error}).") from error


def _parquet_names(path: Path) -> list[str]:
    import pyarrow.parquet

    with _parquet_errors(path):
        return pyarrow.parquet.ParquetFile(path).schema_arrow.names


def _parquet_rows(path: Path, wanted: Callable[[int], bool]) -> Iterator[dict[str, Any]]:
    import datasets
    import pyarrow.parquet

    with _parquet_errors(path):
        file = pyarrow.parquet.ParquetFile(path)
        # Columns that `datasets` wrote as JSON come back as text.
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
        encoded = datasets.Features({name: kind for name, kind in features.items() if "Json(" in repr(kind)})
        classes = {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
        for batch in file.iter_batches(batch_size=32):  # rows may hold whole videos
            for row in batch.to_pylist():
                row |= encoded.decode_example({name: row[name] for name in encoded})
                row |= {name: names[row[name]] for name, names in classes.items() if row[name] is not None}
                yield row


KINDS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
READERS = {"json": _json_rows, "jsonl": _json_lines, "csv": _table_rows, "tsv": _table_rows, "parquet": _parquet_rows}


__all__ = ["KINDS", "count_rows", "iter_rows", "kind_of", "load_rows", "numbered_rows", "row_changes", "spread_over"]
