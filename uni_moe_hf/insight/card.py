"""A model's page on the Hub: how to ask it, its scores, and what its experts do. Sections can be renewed."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..evaluation.evaluation import Evaluation
from ..evaluation.predictions import write_whole
from ..hub.configuration_uni_moe import UniMoEConfig
from ..hub.files_uni_moe import reason
from ..training.model_card import ANSWERING, trained_card
from .report import MixtureReport


# Figure of a report -> what is said below it.
FIGURES = {
    "spread": "How the tokens of each modality spread over the experts; dashed lines are fair shares.",
    "knock-out": "How much the loss rises without each expert, by modality.",
}
SECTION = "<!-- {name} -->\n{text}\n<!-- end of {name} -->\n"
SERVING = f"""## Asking it

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{{name}}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{{name}}", trust_remote_code=True)
{ANSWERING}
```

For many: `pip install uni-moe-hf` beside vLLM, then

```bash
vllm serve {{name}} --trust-remote-code
```

Parts of a message are `image_url`, `video_url`, `input_audio`, and `input_audio` with `"ear": "speech"` for speech."""


def complete_card(
    folder: str | Path,
    report: MixtureReport | str | Path | None = None,
    evaluation: Evaluation | str | Path | None = None,
    name: str | None = None,
) -> Path:
    r"""
    Adds to the `README.md` of a checkpoint, or begins one: how to ask the model, figures of a routing report and the
    table of an evaluation. Sections of an earlier call are replaced, what else stands there stays.

    Args:
        folder (`str` or `Path`): A checkpoint's. Gets `README.md` and `figures/*.png`.
        report ([`MixtureReport`], `str` or `Path`, *optional*): What [`routing_report`] returned, or the folder in
            which it was saved.
        evaluation ([`Evaluation`], `str` or `Path`, *optional*): What [`evaluate`] returned, or the file that
            `uni-moe evaluate --json` wrote.
        name (`str`, *optional*): The model's repository; the one that the card's code names by default.

    Returns:
        `Path` of the card.

    Raises:
        ValueError: the folder holds no Uni-MoE, the report no figures, or the file no figures of an evaluation.
        OSError: a file is missing or cannot be written.

    Example:

    ```python
    >>> from uni_moe_hf import complete_card

    >>> complete_card("outputs/stage3/merged", "outputs/report", "results.json", name="me/my-uni-moe")
    ```
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' holds no `config.json`, so it is no checkpoint; name the folder of a model.")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"'{folder / 'config.json'}' is no config of a model ({error}); save the model again."
        ) from error
    if kind != "uni_moe":
        raise ValueError(f"'{folder}' is a model of type '{kind}', not 'uni_moe'.")
    path = folder / "README.md"
    if path.is_file():
        card = _read_card(path)
    else:
        card = trained_card(UniMoEConfig.from_pretrained(folder), name or folder.resolve().name, is_adapter=False)
    before = _name_of(card.text) or folder.resolve().name
    name = name or before
    if not re.fullmatch(r"[\w./~-]+", name):
        raise ValueError(f"The name {name!r} is none of a repository; use letters, digits, '.', '_' and '-'.")
    card.text = card.text.replace(f'model="{before}"', f'model="{name}"')
    sections = {"asking": SERVING.format(name=name)}
    if evaluation is not None:
        data = evaluation.to_dict() if isinstance(evaluation, Evaluation) else _read_results(Path(evaluation))
        sections["scores"] = _scores(data)
        card.data.model_name = name.split("/")[-1]
        own = _results(data)
        names = {(each.dataset_name, each.metric_type) for each in own}
        others = [r for r in card.data.eval_results or [] if (r.dataset_name, r.metric_type) not in names]
        card.data.eval_results = [*others, *own] or None
    if report is not None:
        sections["routing"] = _routing(report, folder)
    for section, text in sections.items():
        card.text = _replaced(card.text, section, text)
    write_whole(path, f"---\n{card.data.to_yaml()}\n---\n{card.text}")
    return path


def _replaced(text: str, name: str, content: str) -> str:
    """A card's text with a section in the place of its forerunner, or at its end."""
    section = SECTION.format(name=name, text=content)
    old = re.compile(rf"<!-- {name} -->.*?<!-- end of {name} -->(?:\r?\n|$)", flags=re.DOTALL)
    if old.search(text):
        return old.sub(lambda _: section, text, count=1)
    return f"{text.rstrip()}\n\n{section}"


def _read_card(path: Path) -> ModelCard:
    try:
        return ModelCard.load(path)
    except Exception as error:  # YAML's, and whatever else a file may cause
        raise ValueError(f"'{path}' cannot be read as a model card: {reason(error)}.") from error


def _name_of(text: str) -> str | None:
    """The repository that the code of a card names, the latest section's first."""
    section = re.search(r"<!-- asking -->.*?<!-- end of asking -->", text, flags=re.DOTALL)
    for place in (section.group() if section else "", text):
        if found := re.search(r'(?:from_pretrained\(|model=)"([^"]+)"', place):
            return found.group(1)
    return None


def _read_results(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON; pass what `uni-moe evaluate --json` wrote.") from error
    groups = data.get("figures") if isinstance(data, dict) and "task" in data else None
    if not isinstance(groups, dict) or not all(
        isinstance(figures, dict) and figures and all("rows" in figure for figure in figures.values())
        for figures in groups.values()
    ):
        raise ValueError(f"'{path}' holds no figures of an evaluation; pass what `uni-moe evaluate --json` wrote.")
    return data


def _scores(data: Mapping[str, Any]) -> str:
    """A table: groups of rows by figure, with intervals."""
    names = list(dict.fromkeys(name for figures in data["figures"].values() for name in figures))
    head = "".join(f" {name.replace('_', ' ')} |" for name in names)
    lines = [f"| | rows |{head}", f"|---|--:|{'--:|' * len(names)}"]
    for group, figures in data["figures"].items():
        cells = "".join(f" {_shown(figures[name]) if name in figures else ''} |" for name in names)
        lines.append(f"| {group.replace('|', '/')} | {max(figure['rows'] for figure in figures.values())} |{cells}")
    note = f"Task `{data['task']}`, 95 % bootstrap intervals, as `uni-moe evaluate` prints them."
    return f"## Scores\n\n{note}\n\n" + "\n".join(lines)


def _shown(figure: Mapping[str, Any]) -> str:
    scale, unit = (100, " %") if figure.get("unit") == "%" else (1, "")
    value, low, high = (figure.get(key) for key in ("value", "low", "high"))
    if value is None or not math.isfinite(value):
        return "none"
    interval = "" if low is None or high is None else f" ({scale * low:.1f} to {scale * high:.1f})"
    return f"{scale * value:.1f}{unit}{interval}"


def _results(data: Mapping[str, Any]) -> list[EvalResult]:
    """The figures of all rows as the Hub's pages list them; chance is no score."""
    return [
        EvalResult(
            task_type="any-to-any",
            dataset_type=re.sub(r"\W+", "-", str(data["task"])),  # by which the Hub tells data sets apart
            dataset_name=str(data["task"]),
            metric_type=name,
            metric_value=round(float(figure["value"]), 4),
        )
        for name, figure in data["figures"].get("all", {}).items()
        if name != "chance" and figure.get("value") is not None and math.isfinite(figure["value"])
    ]


def _routing(report: MixtureReport | str | Path, folder: Path) -> str:
    """Figures beside the card, and what they show."""
    target = folder / "figures"
    if isinstance(report, MixtureReport):
        from .figures import write_png

        drawn = {name: figure for name, figure in report.figures().items() if name in FIGURES}
        target.mkdir(exist_ok=True)
        for name, figure in drawn.items():
            write_png(figure, target / f"{name}.png")
        found = list(drawn)
    else:
        made = Path(report) / "figures"
        found = [name for name in FIGURES if (made / f"{name}.png").is_file()]
        if found:
            target.mkdir(exist_ok=True)
        for name in found:
            shutil.copyfile(made / f"{name}.png", target / f"{name}.png")
    if not found:
        raise ValueError(
            f"The report '{report if not isinstance(report, MixtureReport) else 'given'}' has none of the figures "
            f"{list(FIGURES)}; pass the folder that `uni-moe report --output` wrote of a mixture."
        )
    shown = "\n\n".join(
        f"![{FIGURES[name]}](figures/{name}.png)\n{FIGURES[name]}" for name in FIGURES if name in found
    )
    return f"## Who works on what\n\n{shown}"


__all__ = ["complete_card"]
