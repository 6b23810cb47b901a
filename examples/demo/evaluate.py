"""Measures a model on the demo's held-out questions, each task beside its chance level."""

import json
import random
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor


def evaluate(model_folder: Path, data: Path, control: bool, batch_size: int = 48) -> dict[str, dict[str, float]]:
    """
    Args:
        model_folder (`Path`): Model and processor.
        data (`Path`): Folder of `test.jsonl`.
        control (`bool`): Whether every question gets the media of another row of its task.

    Returns:
        `dict`: per task `questions`, `classes`, `accuracy` (exact match, greedy) and `chance`, the accuracy of
        answering with the answer of another row with the same written question, drawn at random.
    """
    model = AutoModel.from_pretrained(model_folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    prompts = [rooted(row["messages"][:1], data) for row in rows]
    answers = [row["messages"][1]["content"][0]["text"] for row in rows]
    if control:
        prompts = swapped(prompts, [row["task"] for row in rows])

    right: Counter[str] = Counter()
    for start in tqdm(range(0, len(rows), batch_size), desc="questions", unit="batch"):
        inputs = processor.apply_chat_template(
            prompts[start : start + batch_size],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text, answer in zip(rows[start:], texts, answers[start:], strict=False):
            right[row["task"]] += text.strip() == answer

    # By task and written question: who knows nothing but the question can still tell a colour from a shape.
    given: dict[str, dict[str, Counter[str]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        question = next((part["text"] for part in row["messages"][0]["content"] if part["type"] == "text"), "")
        given.setdefault(row["task"], {}).setdefault(question, Counter())[answer] += 1
    results = {}
    for task, questions in given.items():
        total = sum(counts.total() for counts in questions.values())
        hits = sum(
            count * (count - 1) / (counts.total() - 1) for counts in questions.values() for count in counts.values()
        )
        results[task] = {
            "questions": total,
            "classes": sum(len(counts) for counts in questions.values()),
            "accuracy": right[task] / total,
            "chance": hits / total,
        }
    return results


def rooted(messages: list[dict], data: Path) -> list[dict]:
    """Messages whose paths start at `data`."""
    return [
        {**m, "content": [{**p, "path": str(data / p["path"])} if "path" in p else p for p in m["content"]]}
        for m in messages
    ]


def swapped(prompts: list[list[dict]], tasks: list[str], seed: int = 0) -> list[list[dict]]:
    """The same questions, each with the media of another row of its task."""
    shuffler = random.Random(seed)
    result = list(prompts)
    for task in dict.fromkeys(tasks):
        rows = [index for index, name in enumerate(tasks) if name == task]
        shuffler.shuffle(rows)
        for target, source in zip(rows, rows[1:] + rows[:1], strict=True):
            question = [part for part in prompts[target][0]["content"] if part["type"] == "text"]
            media = [part for part in prompts[source][0]["content"] if part["type"] != "text"]
            result[target] = [{"role": "user", "content": media + question}]
    return result


def table(results: dict[str, dict[str, float]], control: bool) -> str:
    """One line per task."""
    title = "accuracy with another row's media" if control else "accuracy"
    lines = [f"{'held-out task':<16}{'questions':>10}{'answers':>9}{'chance':>9}   {title}"]
    for task, row in results.items():
        lines.append(
            f"{task:<16}{row['questions']:>10}{row['classes']:>9}{row['chance']:>9.1%}   {row['accuracy']:>6.1%}"
        )
    return "\n".join(lines)
