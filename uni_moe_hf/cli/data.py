"""`uni-moe data`: rows that could not be used (`check`), features of clips (`encode`), spoken rows (`speak`)."""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from .common import BYTES, load_checkpoint, load_config, not_negative, positive


MAX_LISTED = 100  # rows that are named one by one


def add_command(commands: Any) -> None:
    """Options of `uni-moe data check`, `encode` and `speak`."""
    text = "Look at rows, encode their media beforehand, or have them spoken."
    data = commands.add_parser("data", help=text, description=text).add_subparsers(required=True, metavar="COMMAND")

    text = "List the rows that training could not use."
    parser = _add(data, "check", text, check)
    parser.add_argument("--model", metavar="CHECKPOINT", help="whose towers they are for (default: all)")
    parser.add_argument("--voice", choices=["speech", "audio"], default="speech", help="what `voice` files are")
    parser.add_argument("--no-decode", action="store_true", help="look for media files without opening them")

    text = "Run the frozen towers on all media once, and keep their features for training (`--feature_cache`)."
    parser = _add(data, "encode", text, encode)
    parser.add_argument("--model", metavar="CHECKPOINT", required=True, dest="checkpoint", help="whose towers")
    parser.add_argument("--output", metavar="CACHE", required=True, help="folder; what it holds already stays")
    parser.add_argument("--dtype", choices=[*BYTES], dest="stored", help="of the features (default: the towers')")
    parser.add_argument("--model-dtype", default="auto", choices=["auto", *BYTES], dest="dtype", help="of the towers")
    parser.add_argument("--voice", choices=["speech", "audio"], default="speech", help="what `voice` files are")
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="clips at once (default: 8)")
    parser.add_argument(
        "--workers", type=not_negative, default=0, metavar="N", help="processes that read media (default: 0)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say how large it would be, and encode nothing")

    text = "Have a text of every row spoken: questions, or a column such as RACE's article."
    parser = _add(data, "speak", text, speak)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for rows.jsonl and speech/")
    parser.add_argument("--field", metavar="COLUMN", help="what is said (default: the question)")
    parser.add_argument("--task", metavar="NAME|FILE", help="say this task's whole prompt, with hint and options")
    parser.add_argument("--all", action="store_true", help="say how to answer, too; else that stays written")
    parser.add_argument("--voice", default="en-us", metavar="NAME", help="of espeak-ng (default: en-us)")
    parser.add_argument("--speed", type=positive, default=160, metavar="N", help="words a minute (default: 160)")
    parser.add_argument(
        "--command", metavar="COMMAND", help="another voice: a command with {output}, and {text} or the text on stdin"
    )


def _add(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    """A command that reads rows."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("source", metavar="SOURCE", nargs="+", help="files, a folder or a data set of rows")
    parser.add_argument("--media-root", metavar="DIR", help="where relative paths start (default: beside the file)")
    parser.add_argument("--split", default="train", help="of a data set (default: train)")
    parser.add_argument("--config", metavar="NAME", help="of a data set that has several")
    parser.add_argument("--columns", nargs="+", metavar="NAME=WHAT", help="such as photo=image label=answer")
    parser.add_argument("--question", nargs="+", metavar="TEXT", help="what is asked about plain media")
    return parser


def _reading(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The source of rows, and how it is read."""
    source = args.source[0] if len(args.source) == 1 else args.source
    return source, {name: getattr(args, name) for name in ("split", "config", "columns", "question")}


def check(args: argparse.Namespace) -> int:
    """Exit code 1 where a row is bad."""
    from ..training.data import MODALITIES, check_rows

    modalities = load_config(args.model).modalities if args.model else MODALITIES
    source, reading = _reading(args)
    reading["media_root"] = args.media_root
    unread, kinds = Counter(), Counter()
    bad = check_rows(source, modalities, args.voice, not args.no_decode, unread, kinds, **reading)
    count = _list(f"row {number}: {reason}" for number, reason in bad)
    for name, rows in unread.items():
        sys.stdout.write(f"nothing is made of the field '{name}' ({rows} row{'s' * (rows != 1)})\n")
    held = ", ".join(f"{rows} of {kind}" for kind, rows in kinds.most_common())
    sys.stdout.write(f"rows that can be used: {held or 'none'}\n")
    named = " ".join(args.source)
    sys.stdout.write(f"{named}: {f'{count} rows cannot be used' if count else 'every row can be used'}\n")
    return int(count > 0)


def _list(lines: Any) -> int:
    """Prints the first lines; how many there are."""
    count = 0
    for line in lines:
        if count < MAX_LISTED:
            sys.stdout.write(f"{line}\n")
        count += 1
    if count > MAX_LISTED:
        sys.stdout.write(f"... and {count - MAX_LISTED} more\n")
    return count


def encode(args: argparse.Namespace) -> int:
    """Exit code 1 where a row or clip could not be read; the others are encoded."""
    from ..training.data import UniMoEDataCollator
    from ..training.encoding import encode_rows
    from ..training.feature_cache import FeatureCache, checked_folder
    from ..training.row_files import iter_rows

    checked_folder(args.output)
    source, reading = _reading(args)
    model, processor = load_checkpoint(args)
    with tempfile.TemporaryDirectory() as nowhere:
        is_new = not Path(args.output, "features.json").is_file()
        folder = nowhere if args.dry_run and is_new else args.output
        cache = FeatureCache(folder, model, processor, dtype=args.stored, fill=is_new or not args.dry_run)
        collator = UniMoEDataCollator(processor, voice=args.voice, media_root=args.media_root)
        rows = iter_rows(source, **reading)
        try:
            done = encode_rows(rows, model, collator, cache, args.batch_size, args.workers, args.dry_run)
        except KeyboardInterrupt:
            sys.stderr.write(f"Interrupted with {len(cache)} clips in '{args.output}'; the same command goes on.\n")
            raise
    count = _list(done.refused)
    sys.stdout.write(f"{'':<8}{'clips':>10}{'known':>10}{'new':>10}{'MB':>12}\n")
    for modality, each in done.modalities.items():
        line = f"{modality:<8}{each.clips:>10,}{each.known:>10,}{each.new:>10,}{each.bytes / 1e6:>12,.1f}\n"
        sys.stdout.write(line)
    total = sum(each.bytes for each in done.modalities.values()) / 1e6
    what = "would be added to" if args.dry_run else "were added to"
    sys.stdout.write(f"{total:,.1f} MB {what} '{args.output}'{f', {count} could not be read' if count else ''}\n")
    return int(count > 0)


def speak(args: argparse.Namespace) -> int:
    """Exit code 0 when every row is written."""
    from ..evaluation.speaking import command_voice, espeak_voice, speak_rows
    from ..evaluation.tasks import load_task

    task = load_task(args.task) if args.task else None
    voice = command_voice(args.command) if args.command is not None else espeak_voice(args.voice, args.speed)
    source, reading = _reading(args)
    said = Counter(
        bool(text)
        for text in speak_rows(source, args.output, voice, args.field, args.all, task, args.media_root, **reading)
    )
    silent = f", {said[False]} of them as they were: their media ask by themselves" if said[False] else ""
    sys.stdout.write(f"{said.total()} rows are in '{Path(args.output, 'rows.jsonl')}'{silent}\n")
    return 0
