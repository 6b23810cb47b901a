"""
Metrics against the packages that define them, the demo's questions in lmms-eval, and the time of a question.

    make demo
    python benchmarks/bench_evaluation.py --model outputs/demo/model --data outputs/demo/data/test.jsonl \
        [--texts aokvqa.json ...] [--lmms-eval bin/lmms-eval] [--output benchmarks/results/evaluation.md]

Packages that are not installed are named as such: pycocoevalcap (with Java for its tokenizer), jiwer, sacrebleu,
rouge-score. `--texts` are files of the original's `data_sample`: both normalise their answers and split their
questions. `--lmms-eval` is the program of an environment that has this package too. Without `--model` all is tiny.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from bench_training import model_of, processor_of, write_rows
from comparing import publish, quotient
from transformers import AutoModel, AutoProcessor

from uni_moe_hf import evaluate
from uni_moe_hf.evaluation.answering import answer_questions
from uni_moe_hf.evaluation.lmms_eval_tasks import export_to_lmms_eval
from uni_moe_hf.evaluation.metrics import METRICS, Answered, caption_words, cider, normalize_answer
from uni_moe_hf.evaluation.questions import load_questions
from uni_moe_hf.evaluation.tasks import Task, load_task


WORDS = "a the man dog rain is falls on roof loud bird sings and water runs engine hums while people talk door".split()
SHORT = {"max_new_tokens": 8, "do_sample": False}


# --- Metrics


def installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name) if importlib.util.find_spec(name) else None
    except ImportError:
        return None


def captions(generator: random.Random, count: int) -> tuple[list[str], list[list[str]]]:
    """Predictions and one to five references each; half of the predictions are some row's reference."""
    make = lambda: " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, 14)))  # noqa: E731
    references = [[make() for _ in range(generator.randint(1, 5))] for _ in range(count)]
    return [
        generator.choice(generator.choice(references)) if generator.random() < 0.5 else make() for _ in references
    ], (references)


def corpora(number: int = 100) -> Iterator[tuple[list[str], list[list[str]]]]:
    for seed in range(number):
        generator = random.Random(seed)
        yield captions(generator, generator.randint(2, 30))


def against_cider() -> str | None:
    theirs = installed("pycocoevalcap.cider.cider")
    if theirs is None:
        return None
    worst = 0.0
    for said, references in corpora():
        _, scores = theirs.Cider().compute_score(
            dict(enumerate(references)), {index: [each] for index, each in enumerate(said)}
        )
        mine = cider([each.split() for each in said], [[each.split() for each in row] for row in references])
        worst = max(worst, *(abs(a - b) for a, b in zip(mine, scores, strict=True)))
    return f"100 corpora: largest difference of a caption {worst:.1e}"


def against_library(name: str, package: str, theirs: Callable[[Any, list, list], float]) -> str | None:
    """A metric of whole corpora against a call of its package, one reference a row."""
    module = installed(package)
    if module is None:
        return None
    worst = 0.0
    for said, references in corpora():
        rows = [Answered(each, row[:1]) for each, row in zip(said, references, strict=True)]
        mine = METRICS[name].score(rows)[next(iter(METRICS[name].figures))].figure().value
        worst = max(worst, abs(mine - theirs(module, said, [row[0] for row in references])))
    return f"100 corpora: largest difference {worst:.1e}"


def mean_rouge(module: Any, said: list[str], references: list[str]) -> float:
    scorer = module.RougeScorer(["rougeL"])
    return statistics.mean(
        scorer.score(right, each)["rougeL"].fmeasure for each, right in zip(said, references, strict=True)
    )


def texts_of(files: list[Path]) -> tuple[list[str], list[str]]:
    """Short answers and questions in the original's files."""
    answers, questions = set(), set()
    for file in files:
        rows = json.loads(file.read_text(encoding="utf-8"))
        for row in rows["data"] if isinstance(rows, dict) else rows:
            given = row.get("gt", row.get("answers", ()))
            answers |= {*([given] if isinstance(given, str) else given)}
            questions.add(str(row.get("text", row.get("question", ""))).split("\n")[0])
    return sorted(answers), sorted(each for each in questions if each.strip())


def against_normaliser(answers: list[str], path: Path | None) -> str | None:
    """The VQA normaliser's port in lmms-eval, without what it adds for TextVQA."""
    if path is None or not answers:
        return None
    spec = importlib.util.spec_from_file_location("theirs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Plain(module.EvalAIAnswerProcessor):
        def word_tokenize(self, word: str) -> str:
            return word

    theirs = Plain()
    different = [each for each in answers if theirs(each) != normalize_answer(each)]
    return f"{len(answers):,} answers: {len(different)} differ"


def against_tokenizer(questions: list[str]) -> str | None:
    theirs = installed("pycocoevalcap.tokenizer.ptbtokenizer")
    if theirs is None or not questions or shutil.which("java") is None:
        return None
    split = theirs.PTBTokenizer().tokenize({index: [{"caption": each}] for index, each in enumerate(questions)})
    different = [each for index, each in enumerate(questions) if split[index][0].split() != caption_words(each)]
    return f"{len(questions):,} questions: {len(different)} are split differently"


def metrics(files: list[Path], program: Path | None) -> list[str]:
    answers, questions = texts_of(files)
    port = program and next(program.resolve().parents[1].rglob("_task_utils/vqa_eval_metric.py"), None)
    wer = lambda module, said, right: module.wer(right, said)  # noqa: E731
    bleu = lambda module, said, right: module.corpus_bleu(said, [right]).score / 100  # noqa: E731
    found = {
        "CIDEr / pycocoevalcap's, on the same words": against_cider(),
        "words of captions / pycocoevalcap's `PTBTokenizer` (Java)": against_tokenizer(questions),
        "VQA normaliser / its port in lmms-eval": against_normaliser(answers, port),
        "word error rate / jiwer": against_library("word_error_rate", "jiwer", wer),
        "BLEU / sacrebleu": against_library("bleu", "sacrebleu", bleu),
        "ROUGE-L / rouge-score": against_library("rouge", "rouge_score.rouge_scorer", mean_rouge),
    }
    lines = ["Metrics against the packages that define them:", "", "| metric / reference | seen |", "|---|---|"]
    return [*lines, *(f"| {name} | {seen or 'not installed, or no texts'} |" for name, seen in found.items())]


# --- Both harnesses


def harness(model: Path, task: Task, data: Path, program: Path | None, loaded: tuple[Any, Any]) -> list[str]:
    """The same rows by `uni-moe evaluate` and by lmms-eval, our model in it and its generic one."""
    questions = load_questions(task, data)
    mine = evaluate(*loaded, task, data, batch_size=48)
    lines = ["", f"The {len(questions):,} questions in both harnesses (exact match, all rows):", ""]
    lines += ["| harness | exact match | chance |", "|---|--:|--:|"]
    figures = [mine.figures["all"][name].value for name in ("exact_match", "chance")]
    lines.append(f"| `uni-moe evaluate` | {figures[0]:.6f} | {figures[1]:.6f} |")
    if program is None:
        return [*lines, "| lmms-eval | not installed | |"]
    with tempfile.TemporaryDirectory() as folder:
        name = export_to_lmms_eval(task, questions, folder)
        backends = {
            "uni_moe": f"pretrained={model}",
            "huggingface": f"pretrained={model},trust_remote_code=True,device=cpu,device_map=cpu",
        }
        for backend, arguments in backends.items():
            command = [program, "--model", backend, "--model_args", arguments, "--tasks", name]
            command += ["--include_path", folder, "--batch_size", "48", "--output_path", f"{folder}/{backend}"]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                lines.append(f"| lmms-eval, `--model {backend}` | failed: {done.stderr.strip().splitlines()[-1]} | |")
                continue
            results = json.loads(next(Path(folder, backend).rglob("*_results.json")).read_text())["results"][name]
            values = [results[f"{figure},none"] for figure in ("exact_match", "chance")]
            agrees = "" if backend != "uni_moe" or values == figures else " DISAGREES"
            lines.append(f"| lmms-eval, `--model {backend}` | {values[0]:.6f}{agrees} | {values[1]:.6f} |")
    return lines


# --- Time


def seconds_of(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speed(model: Any, processor: Any, task: Task, data: Path, rounds: int, limit: int | None) -> list[str]:
    """Ways to answer the same questions, in turn."""
    questions = load_questions(task, data, limit=limit)
    said: dict[str, dict] = {}

    def answer(name: str, **settings: Any) -> float:
        def run() -> None:
            said[name] = {}
            for records in answer_questions(model, processor, task, questions, **settings):
                said[name] |= records

        return seconds_of(run)

    ways = {
        "one by one": {"batch_size": 1, "workers": 0, "in_order": True},
        "batches of 48, as they come, read in between": {"batch_size": 48, "workers": 0, "in_order": True},
        "batches of 48 by kind and length, read in between": {"batch_size": 48, "workers": 0},
        "batches of 48 by kind and length, read ahead": {"batch_size": 48, "workers": 1},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, settings in ways.items():
            seconds[name].append(answer(name, **settings))
    (first, *_), before = ways, "batches of 48, as they come, read in between"
    answers = {
        name: {number: record["prediction"] for number, record in found.items()} for name, found in said.items()
    }
    lines = [
        "",
        f"Time of a question, {len(questions):,} of the demo's, {rounds} rounds in turn; the second way is what the ",
    ]
    lines[-1] += "demo did until now; ratios are medians with their middle half:"
    lines += [
        "",
        "| way | ms a question | one by one / it | until now / it | other answers |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, spent in seconds.items():
        ratios = [
            quotient(seconds[other], spent) if len(spent) > 1 else f"{seconds[other][0] / spent[0]:.2f}"
            for other in (first, before)
        ]
        other = sum(answers[name][number] != text for number, text in answers[first].items())
        middle = statistics.median(spent) / len(questions) * 1000
        lines.append(f"| {name} | {middle:.2f} | {ratios[0]} | {ratios[1]} | {other} |")
    return lines


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint for the rows of --data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", default=[])
    parser.add_argument("--lmms-eval", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))  # half for the model, half for who reads ahead
    task = Task("demo", metrics=load_task("short-answers").metrics, decoding=SHORT)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            args.data = Path(folder, "rows.jsonl")
            args.data.write_text("\n".join(map(json.dumps, write_rows(Path(folder), 6))))
            model = model_of("tiny", 3, "float32", "cpu").eval()
            processor = processor_of(model)
        else:
            model = AutoModel.from_pretrained(args.model, device_map=args.device).eval()
            processor = AutoProcessor.from_pretrained(args.model)
        where = (
            torch.cuda.get_device_name()
            if args.device == "cuda"
            else f"{os.cpu_count()} cores, one of them for the model"
        )
        lines = [f"Evaluation, {date.today()}, torch {torch.__version__}, {platform.machine()}, {where}.", ""]
        lines += metrics(args.texts, args.lmms_eval)
        lines += harness(args.model, task, args.data, args.lmms_eval, (model, processor))
        lines += speed(model, processor, task, args.data, args.rounds, args.limit)
    publish(lines, args.output)


if __name__ == "__main__":
    main()
