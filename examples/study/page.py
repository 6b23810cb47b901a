"""The study's page and its figures, from its results."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims import Claim, Comparison
from recipe import KINDS, SINGLE

from uni_moe_hf.insight import figures


# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom: intervals are over few seeds.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Runs = dict[str, dict[int, dict[str, Any]]]  # digest -> seed -> result


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval, by Student's t; without ends for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    reach = T[min(len(values) - 2, len(T) - 1)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def score(result: dict[str, Any], kinds: Sequence[str] = KINDS, point: str = "end", what: str = "accuracy") -> float:
    """Mean over kinds of rows, each alike."""
    return float(np.mean([result[point][what][kind] for kind in kinds]))


def effect(claim: Claim, comparison: Comparison, runs: Runs) -> tuple[float, float, float] | None:
    """Difference in points with its interval, over the seeds that both arms have."""
    first, second = (runs.get(claim.arms[name].digest(), {}) for name in (comparison.better, comparison.worse))
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    return interval([100 * (score(first[s], comparison.kinds) - score(second[s], comparison.kinds)) for s in seeds])


def sentence(claim: Claim, comparison: Comparison, runs: Runs) -> str:
    """A comparison in words and numbers."""
    found = effect(claim, comparison, runs)
    if found is None:
        return f"`{comparison.better}` against `{comparison.worse}`: not run yet."
    mean, low, high = found
    means = [
        np.mean([100 * score(run, comparison.kinds) for run in runs[claim.arms[name].digest()].values()])
        for name in (comparison.better, comparison.worse)
    ]
    if low > 0:
        verdict = "as the paper leads one to expect" if comparison.expected else "a difference that holds"
    elif high < 0:
        verdict = "against what the paper leads one to expect" if comparison.expected else "a difference that holds"
    else:
        verdict = "no difference that so many seeds can show"
    return (
        f"On {comparison.what}, `{comparison.better}` answers {means[0]:.1f} % right and `{comparison.worse}` "
        f"{means[1]:.1f} %: {mean:+.1f} points ({low:+.1f} to {high:+.1f}), {verdict}."
    )


def arm_table(claim: Claim, runs: Runs) -> list[str]:
    """One line for each arm."""
    head = ["arm", "steps", "all", *KINDS, "loss", "MI token", "MI row"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for name, recipe in claim.arms.items():
        of_arm = list(runs.get(recipe.digest(), {}).values())
        if not of_arm:
            lines.append(f"| {name} | {recipe.steps} | not run yet |" + " |" * (len(head) - 3))
            continue
        mean, low, high = interval([100 * score(run) for run in of_arm])
        cells = [name, str(recipe.steps), f"{mean:.1f} ± {(high - low) / 2:.1f}"]
        cells += [f"{100 * np.mean([run['end']['accuracy'][kind] for run in of_arm]):.0f}" for kind in KINDS]
        cells.append(f"{np.mean([score(run, what='loss') for run in of_arm]):.3f}")
        for key in ("information_types", "information_rows"):
            found = [max(run["end"][key]) for run in of_arm if key in run["end"]]
            cells.append(f"{100 * np.mean(found):.1f} %" if found else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def own_and_others(knock_out: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Rise of the loss on rows of an expert's own media without it, and on rows of other media: means."""
    own_kinds = {"vision": ("image", "video"), "audio": ("audio",), "speech": ("speech",)}
    own, others = [], []
    for name, kinds in own_kinds.items():
        for kind in SINGLE:
            (own if kind in kinds else others).append(knock_out[name][kind])
    return float(np.mean(own)), float(np.mean(others))


def depth_table(claim: Claim, runs: Runs) -> list[str]:
    """Specialisation before stage 3, after a quarter and at the end, for arms that were measured in depth."""
    head = ["arm", "when", "right", "MI token", "MI row", "without the own expert", "without another"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    for name, recipe in claim.arms.items():
        of_arm = [run for run in runs.get(recipe.digest(), {}).values() if "start" in run]
        for point, when in (("start", "before stage 3"), ("quarter", "a quarter of it"), ("end", "after it")):
            if not of_arm:
                continue
            mean, low, high = interval([100 * score(run, point=point) for run in of_arm])
            cells = [name, when, f"{mean:.1f} ± {(high - low) / 2:.1f}"]
            for key in ("information_types", "information_rows"):
                found = [max(run[point][key]) for run in of_arm if key in run[point]]
                cells.append(f"{100 * np.mean(found):.1f} %" if found else "-")
            rises = [own_and_others(run[point]["knock_out"]) for run in of_arm if "knock_out" in run[point]]
            for place in (0, 1):
                mean, low, high = interval([rise[place] for rise in rises]) if rises else (math.nan,) * 3
                cells.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if rises else "-")
            lines.append("| " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def depth_sentences(claim: Claim, runs: Runs) -> list[str]:
    """Paired differences of what is lost without the rows' own expert, after stage 3."""
    told = []
    for each in dict.fromkeys((each.better, each.worse) for each in claim.comparisons if each.kinds == KINDS):
        first, second = (runs.get(claim.arms[name].digest(), {}) for name in each)
        seeds = [s for s in sorted(set(first) & set(second)) if "start" in first[s] and "start" in second[s]]
        if not seeds:
            continue
        rises = [own_and_others(run[s]["end"]["knock_out"])[0] for s in seeds for run in (first, second)]
        mean, low, high = interval([rises[at] - rises[at + 1] for at in range(0, len(rises), 2)])
        verdict = "more" if low > 0 else "less" if high < 0 else "no difference that so many seeds can show"
        told.append(
            f"* Without the rows' own expert, `{each[0]}` loses what `{each[1]}` loses {mean:+.3f} nats ({low:+.3f} "
            f"to {high:+.3f}): {verdict}."
        )
    return told


def draw(claim: Claim, runs: Runs) -> Any | None:
    """Arms with every seed as a dot, beside the differences that the claim stands or falls with."""
    arms = [(name, runs[recipe.digest()]) for name, recipe in claim.arms.items() if runs.get(recipe.digest())]
    compared = [(each, effect(claim, each, runs)) for each in claim.comparisons]
    compared = [(each, found) for each, found in compared if found is not None]
    if not arms or not compared:
        return None
    module = figures.figure_module()
    with figures.style():
        figure = module.Figure(figsize=(9.5, 1.4 + 0.27 * max(len(arms), 1.6 * len(compared))), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        for place, (_, of_seed) in enumerate(arms):
            values = [100 * score(run) for run in of_seed.values()]
            mean, low, high = interval(values)
            left.plot(values, [place] * len(values), "o", ms=3.5, color=figures.PALETTE[0], alpha=0.45)
            left.plot([low, high], [place, place], color=figures.PALETTE[0], lw=2)
            left.plot(mean, place, "|", ms=12, mew=2, color=figures.PALETTE[0])
        left.set_yticks(range(len(arms)), [name for name, _ in arms])
        left.set_ylim(len(arms) - 0.5, -0.5)
        left.set_xlabel("% right, all kinds of rows alike")
        left.grid(axis="x", color=figures.LINE, lw=0.5)
        left.set_title(claim.question)
        for place, (_, (mean, low, high)) in enumerate(compared):
            colour = figures.PALETTE[2] if low > 0 else figures.PALETTE[5] if high < 0 else "#8a94a6"
            right.plot([low, high], [place, place], color=colour, lw=2)
            right.plot(mean, place, "o", ms=6, color=colour)
        right.axvline(0, color=figures.INK, lw=0.8)
        names = [
            f"{each.better}\nminus {each.worse}" + (f"\n({each.what})" if each.what != "all rows" else "")
            for each, _ in compared
        ]
        right.set_yticks(range(len(compared)), names, size=7)
        right.set_ylim(len(compared) - 0.5, -0.5)
        right.set_xlabel("points, with 95 % intervals")
        right.grid(axis="x", color=figures.LINE, lw=0.5)
        seeds = max(len(of_seed) for _, of_seed in arms)
        figure.supxlabel(f"{seeds} seeds, paired; {len(KINDS)} kinds of held-out rows", size=8)
    return figure


def write_page(path: Path, claims: Sequence[Claim], seeds: int, lines: Sequence[str]) -> None:
    """
    Args:
        path (`Path`): Of the page; figures go into a folder of its name beside it.
        claims (`Sequence[Claim]`): In their order.
        seeds (`int`): How many were asked for.
        lines (`Sequence[str]`): Results as JSON.
    """
    runs: Runs = {}
    for line in lines:
        result = json.loads(line)
        runs.setdefault(result["digest"], {})[result["seed"]] = result
    wanted = {recipe.digest() for claim in claims for recipe in claim.arms.values()}
    done = sum(min(seeds, len(runs.get(digest, {}))) for digest in wanted)
    hours = sum(run["seconds"] for digest in wanted for run in runs.get(digest, {}).values()) / 3600
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        "# The paper's claims in miniature",
        "",
        "`make study` makes this page: `examples/study/run.py` on a harder version of the demo's world (fewer rows, "
        "noise on every clip, a fourth combination of media), where the reference recipe answers two thirds of the "
        "held-out rows. The expectations below were written before the first run.",
        "",
        f"{len(wanted)} arms x {seeds} seeds, {done} of {len(wanted) * seeds} runs done, {hours:.1f} hours of one "
        "core. All arms with a seed share its training rows, and start from the same connectors and experts where "
        "their recipes agree; held-out rows are the same for all. Differences are paired by seed, intervals are "
        "Student's t over seeds at 95 %. `right`: the likeliest answer is the whole right one, 96 rows a kind. "
        "`MI`: mutual information of expert and token's modality or row's media, chance taken off, in % of "
        "its bound, in the layer where it is largest. With dozens of comparisons at 95 %, one or two are expected to "
        "look certain by chance.",
    ]
    for claim in claims:
        text += ["", f"## {claim.letter}. {claim.question}", "", f"**Expected:** {claim.expected}", "", "**Found:**"]
        text[-1] += " " + " ".join(sentence(claim, each, runs) for each in claim.comparisons[:2])
        text += ["", *[f"* {sentence(claim, each, runs)}" for each in claim.comparisons[2:]]]
        if claim.note:
            text += ["", claim.note]
        figure = draw(claim, runs)
        if figure is not None:
            figures.write_png(figure, folder / f"{claim.letter}.png")
            text += ["", f"![{claim.question}]({folder.name}/{claim.letter}.png)"]
        text += ["", *arm_table(claim, runs)]
        if claim.letter in ("a", "start") and (depth := depth_table(claim, runs)):
            title = "g. Specialisation, stage by stage" if claim.letter == "a" else "Stage by stage"
            text += ["", f"### {title}", ""]
            text += [
                "Rise of the loss of answers without the expert of the rows' own medium, and without that of another "
                "medium, in nats.",
                "",
                *depth,
                "",
                *depth_sentences(claim, runs),
            ]
    path.write_text("\n".join(text) + "\n")


__all__ = ["write_page"]
