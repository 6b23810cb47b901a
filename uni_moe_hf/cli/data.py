"""`uni-moe data`: rows out of folders (`rows`), looked at (`check`), encoded (`encode`), spoken (`speak`)."""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from .common import (
    BYTES,
    device_of,
    load_checkpoint,
    load_config,
    new_command,
    not_negative,
    positive,
    register,
    speak_up,
)


MAX_LISTED = 100  # rows that are named one by one


def add_command(commands: Any) -> None:
    """Options of `uni-moe data check`, `encode` and `speak`."""
    text = "Make rows of folders, look at rows, encode their media beforehand, or have them spoken."
    data = commands.add_parser("data", help=text, description=text).add_subparsers(required=True, metavar="COMMAND")

    text = "Make rows out of folders of media: tables that name files, texts beside files, folders named by content."
    parser = new_command(data, "rows", text, rows)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="searched with all folders in it")
    parser.add_argument("--output", metavar="DIR", required=True, type=Path, help="gets train.jsonl and test.jsonl")
    parser.add_argument("--hold-out", type=_share, default=0.2, metavar="SHARE", help="of files, for test (0.2)")
    parser.add_argument("--speech", nargs="+", default=[], metavar="FOLDER", help="whose sound is spoken language")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME=WHAT", help="of tables, such as photo=image label=answer"
    )
    parser.add_argument("--question", nargs="+", metavar="TEXT", help="what is asked about plain media")
    parser.add_argument("--no-decode", action="store_true", help="look for media files without opening them")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the split (default: 0)")

    text = "List the rows that training could not use, and count what the others hold."
    parser = _add(data, "check", text, check)
    parser.add_argument("--sheet", metavar="OUT.png", help="a picture of some clips of every modality")
    parser.add_argument(
        "--model", metavar="CHECKPOINT", help="accept only the modalities of this model (default: all)"
    )
    parser.add_argument("--voice", choices=["speech", "audio"], default="speech", help="what `voice` files are")
    parser.add_argument("--no-decode", action="store_true", help="look for media files without opening them")

    text = "Run the frozen towers on all media once, and keep their features for training (`--feature_cache`)."
    parser = _add(data, "encode", text, encode)
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--model", metavar="CHECKPOINT", dest="checkpoint", help="whose towers")
    whose.add_argument("--recipe", metavar="FILE.yaml", help="of `uni-moe train`: its parts, and its feature cache")
    parser.add_argument("--output", metavar="CACHE", help="folder; what it holds already stays")
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
    parser = new_command(commands, name, text, run)
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


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return share


def rows(args: argparse.Namespace) -> int:
    """Exit code 1 where something was left out."""
    from ..recipes.gathering import gather_rows, hold_out, write_rows

    register()
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output '{args.output}' is a file; name a folder.")
    gathered = gather_rows(args.folders, args.speech, args.columns, args.question, not args.no_decode, args.output)
    parts = dict(zip(("train", "test"), hold_out(gathered.rows, args.hold_out, args.seed), strict=True))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, made in parts.items():
        (args.output / f"{name}.jsonl").unlink(missing_ok=True)  # of another split
        if made:
            write_rows(made, args.output / f"{name}.jsonl", ("task",) if name == "test" else ())
    count = _list(f"left out: {line}" for line in gathered.left_out)
    sys.stdout.write(f"{'':<24}{'train':>8}{'test':>8}{'distinct answers':>18}\n")
    for task in sorted({row["task"] for row in gathered.rows}):
        train, test = (sum(row["task"] == task for row in made) for made in parts.values())
        answers = len({row["answer"] for row in gathered.rows if row["task"] == task})
        sys.stdout.write(f"{task:<24}{train:>8,}{test:>8,}{answers:>18,}\n")
    written = " and ".join(f"'{args.output / name}.jsonl'" for name, made in parts.items() if made)
    sys.stdout.write(
        f"{len(gathered.rows):,} rows are in {written}{f'; {count} files or rows were left out' if count else ''}\n"
    )
    return int(count > 0)


def check(args: argparse.Namespace) -> int:
    """Exit code 1 where a row is bad."""
    from ..training.checking import MODALITIES, check_rows
    from ..training.row_files import iter_rows

    modalities = load_config(args.model).modalities if args.model else MODALITIES
    source, reading = _reading(args)
    reading["media_root"] = args.media_root
    unread, kinds, found = Counter(), Counter(), {}
    bad = check_rows(source, modalities, args.voice, not args.no_decode, unread, kinds, found, **reading)
    count = _list(f"row {number}: {reason}" for number, reason in bad)
    for name, rows in unread.items():
        sys.stdout.write(f"nothing is made of the field '{name}' ({rows} row{'s' * (rows != 1)})\n")
    if found:
        sys.stdout.write(f"{'':<10}{'rows':>8}{'clips':>8}{'files':>8}{'distinct answers':>18}  what they are\n")
    for modality in [modality for modality in MODALITIES if modality in found]:
        each = found[modality]
        line = f"{modality:<10}{each.rows:>8,}{each.clips:>8,}{len(each.files):>8,}{len(each.answers):>18,}"
        sys.stdout.write(f"{line}  {_measured(each)}\n")
    if args.sheet:
        from ..insight.contact_sheet import contact_sheet

        media_root = reading.pop("media_root")
        looked_at = ({**row, **({"_root": media_root} if media_root else {})} for row in iter_rows(source, **reading))
        shown = contact_sheet(looked_at, args.sheet, voice=args.voice)
        sys.stdout.write(f"'{args.sheet}' shows {', '.join(f'{n} {kind}' for kind, n in shown.items())} clips\n")
    held = ", ".join(f"{rows} of {kind}" for kind, rows in kinds.most_common())
    sys.stdout.write(f"rows that can be used: {held or 'none'}\n")
    named = " ".join(args.source)
    sys.stdout.write(f"{named}: {f'{count} rows cannot be used' if count else 'every row can be used'}\n")
    return int(count > 0)


def _measured(found: Any) -> str:
    """Sizes or lengths of the clips of a modality: the middle one, and the range."""
    if found.sizes:
        ordered = [f"{width} x {height}" for width, height in sorted(found.sizes, key=lambda size: size[0] * size[1])]
        return _spread(ordered)
    if found.seconds:
        ordered = [f"{seconds:.1f} s" for seconds in sorted(found.seconds)]
        return f"{_spread(ordered)}, {sum(found.seconds) / 60:.1f} min in all"
    return "not decoded"


def _spread(ordered: list[str]) -> str:
    """The middle one of some, and the range where they differ."""
    middle = ordered[len(ordered) // 2]
    return middle if ordered[0] == ordered[-1] else f"{middle} ({ordered[0]} to {ordered[-1]})"


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
    from ..training.row_files import count_rows, iter_rows

    if args.recipe:
        model, processor = _of_recipe(args)
    elif args.output is None:
        raise ValueError("--output is missing; name the folder of the cache.")
    checked_folder(args.output)
    source, reading = _reading(args)
    if not args.recipe:
        model, processor = load_checkpoint(args)
    with tempfile.TemporaryDirectory() as nowhere:
        is_new = not Path(args.output, "features.json").is_file()
        folder = nowhere if args.dry_run and is_new else args.output
        cache = FeatureCache(folder, model, processor, dtype=args.stored, fill=is_new or not args.dry_run)
        collator = UniMoEDataCollator(processor, voice=args.voice, media_root=args.media_root)
        rows = iter_rows(source, **reading)
        # Counting reads the source once more, for the estimate of a bar that only a terminal shows.
        num_rows = count_rows(source, **reading) if sys.stderr.isatty() else None
        try:
            done = encode_rows(rows, model, collator, cache, args.batch_size, args.workers, args.dry_run, num_rows)
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


def _of_recipe(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model that stage 1 begins with, and its processor; the cache is the recipe's unless another is named."""
    register()
    from ..recipes.recipe import read_recipe, steps_of
    from ..training.options import PartsArguments

    recipe = read_recipe(args.recipe)
    steps_of(recipe)  # says what is wrong with it
    shared = recipe.get("shared", {})
    args.output = args.output or shared.get("feature_cache")
    if args.output is None:
        raise ValueError(
            f"'{args.recipe}' has no `feature_cache` in 'shared'; add one, or name a folder with --output."
        )
    loading = {name: shared[name] for name in ("dtype", "attn_implementation") if name in shared}
    model, processor = PartsArguments(**recipe["parts"]).build(**loading)
    speak_up()
    return model.to(device_of(args)), processor


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
