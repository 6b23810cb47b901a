"""
A demo's model asked over HTTP: `vllm serve`, `transformers serve` and our pipeline with the same questions; and how
`transformers serve` bears a load in which every tenth request is broken.

    make demo test-vllm
    python benchmarks/serving.py throughput outputs/demo [--output benchmarks/results/serving.md]
    python benchmarks/serving.py load outputs/demo [--output benchmarks/results/serving_load.md]

Questions are held-out rows of all tasks in turn: pictures, videos, sound, speech, and two of them at once. Every
answer has 64 tokens, the end of the answer ignored, greedy, float32.
"""

import argparse
import base64
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from comparing import publish
from transformers import pipeline


ROOT = Path(__file__).parents[1]
VLLM = ROOT / ".vllm/bin/vllm"
TOKENS, AT_ONCE = 64, 16
NAMES = {"image": "image_url", "video": "video_url", "audio": "audio_url", "speech": "audio_url"}
FORMS = {"image": "image/png", "video": "video/mp4", "audio": "audio/wav", "speech": "audio/wav"}


class Answer(NamedTuple):
    """What came back of a request: its text, or why there is none; when its first piece came, and the last."""

    status: int
    text: str
    first: float
    seconds: float
    tokens: int


def questions(demo: Path, count: int) -> list[list[dict]]:
    """Conversations, media by path, task after task in turn."""
    rows = [json.loads(line) for line in (demo / "data/test.jsonl").read_text(encoding="utf-8").splitlines()]
    by_task: dict[str, list] = {}
    for row in rows:
        parts = row["messages"][0]["content"]
        parts = [{**part, "path": str(demo / "data" / part["path"])} if "path" in part else part for part in parts]
        by_task.setdefault(row["task"], []).append([{"role": "user", "content": parts}])
    tasks = sorted(by_task)
    return [by_task[tasks[index % len(tasks)]][index // len(tasks)] for index in range(count)]


def for_clients(kind: str, chat: list[dict]) -> list[dict]:
    """A conversation as a server's clients send it, files in it. Each server has its way of saying "speech"."""
    parts = []
    for part in chat[0]["content"]:
        if part["type"] == "text":
            parts.append(part)
            continue
        name, form, more = NAMES[part["type"]], FORMS[part["type"]], {}
        if part["type"] == "speech" and kind == "vllm":
            more = {"ear": "speech"}
        elif part["type"] == "speech":
            form += ";ear=speech"
        data = base64.b64encode(Path(part["path"]).read_bytes()).decode()
        parts.append({"type": name, name: {"url": f"data:{form};base64,{data}"}, **more})
    return [{"role": "user", "content": parts}]


@contextlib.contextmanager
def serving(kind: str, folder: Path, log: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a server, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command = [str(VLLM), "serve"] if kind == "vllm" else command
    command += [str(folder), "--trust-remote-code", "--dtype", "float32", "--port", port, *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if "--tensor-parallel-size" in options:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # on one CPU they must be told where to run
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=log.parent)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(300):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                if process.poll() is not None:
                    raise SystemExit(f"The server ended: {log.read_text()[-2000:]}")
                time.sleep(0.5)
            yield address, process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def ask(address: str, body: dict[str, Any]) -> Answer:
    """A streamed answer."""
    start, first, text, tokens = time.perf_counter(), 0.0, "", 0
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
                for choice in event.get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    first = first or (time.perf_counter() - start if piece else 0.0)
                    text += piece
            return Answer(answer.status, text, first, time.perf_counter() - start, tokens)
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(), 0.0, time.perf_counter() - start, 0)


def long_answer(kind: str, messages: list[dict]) -> dict[str, Any]:
    """A request for exactly [`TOKENS`] tokens."""
    body = {"messages": messages, "max_tokens": TOKENS, "stream": True, "temperature": 0, "model": "demo"}
    if kind == "vllm":
        return {**body, "ignore_eos": True, "stream_options": {"include_usage": True}}
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    del body["temperature"], body["model"]
    return {**body, "generation_config": json.dumps(settings)}


class Timed(NamedTuple):
    """
    Of each of two runs: tokens per second, median seconds to the first word, median seconds of an answer. And what was
    said where it can be compared: ways that forbid the end of an answer say other words than those that ignore it.
    """

    runs: list[tuple[float, float, float]]
    said: list[str] | None = None


def timed_server(kind: str, folder: Path, log: Path, chats: list[list[dict]], *options: str) -> Timed:
    """A server's times."""
    named = ["--served-model-name", "demo", "--max-num-seqs", str(AT_ONCE)] if kind == "vllm" else []
    with serving(kind, folder, log, *named, *options) as (address, _), ThreadPoolExecutor(AT_ONCE) as pool:
        bodies = [long_answer(kind, for_clients(kind, chat)) for chat in chats]
        list(pool.map(lambda body: ask(address, body), bodies[:4]))
        results = []
        for _ in range(2):
            start = time.perf_counter()
            answers = list(pool.map(lambda body: ask(address, body), bodies))
            seconds = time.perf_counter() - start
            if failed := [answer for answer in answers if answer.status != 200]:
                raise SystemExit(f"{len(failed)} requests failed: {failed[0].text[:500]}")
            first = statistics.median(answer.first for answer in answers)
            results.append((len(answers) * TOKENS / seconds, first, statistics.median(a.seconds for a in answers)))
        return Timed(results, [answer.text for answer in answers] if kind == "vllm" else None)


def timed_pipeline(folder: Path, chats: list[list[dict]], batch_size: int) -> Timed:
    """The same of `pipeline("any-to-text")`, whose words come when a batch is done."""
    pipe = pipeline("any-to-text", model=str(folder), trust_remote_code=True)
    kwargs = {"max_new_tokens": TOKENS, "return_full_text": False}
    kwargs["generate_kwargs"] = {"min_new_tokens": TOKENS, "do_sample": False}
    pipe(chats[:batch_size], batch_size=batch_size, **kwargs)
    results = []
    for _ in range(2):
        start, ends = time.perf_counter(), []
        for first in range(0, len(chats), batch_size):
            pipe(chats[first : first + batch_size], batch_size=batch_size, **kwargs)
            ends += [time.perf_counter() - start] * len(chats[first : first + batch_size])
        results.append((len(chats) * TOKENS / ends[-1], statistics.median(ends), statistics.median(ends)))
    return Timed(results)


def throughput(demo: Path, output: Path | None) -> None:
    """The table of `benchmarks/results/serving.md`."""
    folder, chats, log = demo / "model", questions(demo, 64), demo / "server.log"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    ways = {
        "pipeline, one after the other": lambda: timed_pipeline(folder, chats, 1),
        "pipeline, batches of 16": lambda: timed_pipeline(folder, chats, 16),
        "`transformers serve`": lambda: timed_server("transformers", folder, log, chats),
        "`vllm serve`": lambda: timed_server("vllm", folder, log, chats, "--enforce-eager"),
        "`vllm serve`, compiled": lambda: timed_server("vllm", folder, log, chats),
        "`vllm serve`, experts fused": lambda: timed_server(
            "vllm", folder, log, chats, "--enforce-eager", "--additional-config", '{"fuse_experts": true}'
        ),
        "`vllm serve`, two processes by request": lambda: timed_server(
            "vllm", folder, log, chats, "--enforce-eager", "--data-parallel-size", "2"
        ),
        "`vllm serve`, two processes by tensor": lambda: timed_server(
            "vllm", folder, log, chats, "--enforce-eager", "--tensor-parallel-size", "2"
        ),
    }
    release = subprocess.run([str(VLLM), "--version"], capture_output=True, text=True).stdout.split()[-1]
    lines = [
        f"# 64 mixed requests, {AT_ONCE} at once",
        "",
        f"{date.today()}, {os.cpu_count()} cores, transformers {transformers.__version__}, vLLM {release}; "
        "`python benchmarks/serving.py throughput outputs/demo`, both runs of one start. A model this small is all "
        "overhead: what it says is how the ways compare, not how fast a 7B model is.",
        "",
        "| | tokens/s | against the first | seconds to the first word | seconds to the last | words of `vllm serve` |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    base = words = None
    for name, run in ways.items():
        try:
            runs, said = run()
        except SystemExit as error:
            lines.append(f"| {name} | did not run: {str(error).splitlines()[-1][:120]} | | | | |")
            continue
        base, words = base or runs, words or said
        same = "" if said is None else f"{sum(map(str.__eq__, words, said))} of {len(said)}"
        cells = [
            " / ".join(f"{each[column]:.{digits}f}" for each in runs) for column, digits in ((0, 0), (1, 2), (2, 2))
        ]
        gain = " / ".join(f"{each[0] / first[0]:.2f}" for each, first in zip(runs, base, strict=True))
        lines.append(f"| {name} | {cells[0]} | {gain} | {cells[1]} | {cells[2]} | {same} |")
        publish(lines, output)


def memory(process: subprocess.Popen) -> float:
    """MiB that a process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


BROKEN = [
    {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + base64.b64encode(b"RIFF nothing").decode()}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"\x89PNG no").decode()}},
    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + base64.b64encode(bytes(4000)).decode()}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,###"}},
    {"type": "audio_url", "audio_url": {"url": "/no/such/file.wav"}},
]


def load(demo: Path, output: Path | None) -> None:
    """500 requests, every tenth of them broken: right answers, a living server, memory back at its level."""
    folder, chats, log = demo / "model", questions(demo, 42), demo / "server.log"
    bodies = [{"messages": for_clients("transformers", chat), "max_tokens": 8, "stream": True} for chat in chats]
    rng = random.Random(0)
    with serving("transformers", folder, log) as (address, process), ThreadPoolExecutor(AT_ONCE) as pool:
        alone = [ask(address, body) for body in bodies]
        jobs = []
        for index in range(500):
            own = rng.randrange(len(bodies))
            if index % 10 == 9:
                messages = [
                    {"role": "user", "content": [BROKEN[index // 10 % len(BROKEN)], {"type": "text", "text": "?"}]}
                ]
                jobs.append((None, {**bodies[own], "messages": messages}))
            else:
                jobs.append((own, bodies[own]))
        list(pool.map(lambda body: ask(address, body), bodies * 2))
        before, start = memory(process), time.perf_counter()
        answers = list(pool.map(lambda job: ask(address, job[1]), jobs))
        seconds = time.perf_counter() - start
        time.sleep(2)
        after = memory(process)
        healthy = urllib.request.urlopen(f"{address}/health", timeout=5).status
        models = json.loads(urllib.request.urlopen(f"{address}/v1/models", timeout=5).read())["data"]
    valid = [(own, answer) for (own, _), answer in zip(jobs, answers, strict=True) if own is not None]
    equal = sum(answer.status == 200 and answer.text == alone[own].text for own, answer in valid)
    broken = [answer for (own, _), answer in zip(jobs, answers, strict=True) if own is None]
    refused = sum(400 <= answer.status < 500 for answer in broken)
    publish(
        [
            "# 500 requests to `transformers serve`, every tenth broken",
            "",
            f"{date.today()}, {os.cpu_count()} cores, transformers {transformers.__version__}, {AT_ONCE} at once; "
            "`python benchmarks/serving.py load outputs/demo`.",
            "",
            "| | |",
            "|---|--:|",
            f"| right requests answered as when asked alone | {equal} of {len(valid)} |",
            f"| broken ones refused with 400 and a sentence | {refused} of {len(broken)} |",
            f"| requests per second | {len(jobs) / seconds:.1f} |",
            f"| memory before and after | {before:.0f} and {after:.0f} MiB ({after / before - 1:+.1%}) |",
            f"| health, models afterwards | {healthy}, {len(models)} |",
        ],
        output,
    )


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("throughput", "load"))
    parser.add_argument("demo", type=Path, help="what `make demo` left")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    {"throughput": throughput, "load": load}[args.what](args.demo.resolve(), args.output)


if __name__ == "__main__":
    main()
