"""The report as one HTML page that needs no other file and no network."""

import colorsys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import figures
from .examples import Example


STYLE = """
:root { --ink: #1c2330; --soft: #5a6478; --line: #c9ced8; --paper: #ffffff; --card: #f6f7fa; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebf2; --soft: #a3adc0; --line: #424b5e; --paper: #12161f; --card: #1b2130; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; }
p { margin: .4rem 0; max-width: 75ch; }
.soft { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0; padding: 0; list-style: none; }
.facts li { background: var(--card); border-radius: 8px; padding: .5rem .9rem; }
.facts b { display: block; font-size: 1.25rem; }
.facts span { color: var(--soft); font-size: .85rem; }
.findings { padding-left: 1.2rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 1rem 0; font-size: .9rem; }
a { color: var(--accent); }
.figure { overflow-x: auto; margin: .8rem 0; background: var(--card); border-radius: 10px; padding: .8rem; }
.figure svg { display: block; width: 100%; min-width: 620px; height: auto; color: var(--ink); }
.figure.small svg { width: auto; max-width: 100%; min-width: 0; }
.two { display: grid; gap: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.tokens { line-height: 2; overflow-wrap: anywhere; }
.tokens b { font-weight: 500; padding: .1rem .12rem; border-radius: 3px; color: #14171d; white-space: pre-wrap; }
.tokens i { color: var(--soft); padding: 0 .3rem; }
.key span { display: inline-block; margin-right: .9rem; }
.key b { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .3rem; }
""".strip()

# Name of a figure -> title and what one sees.
SECTIONS = {
    "utilisation": (
        "Utilisation",
        "Load of each expert in each layer over its fair share: 1 is even, red is more, blue is less. All tokens, "
        "then "
        "those of each modality, on one scale.",
    ),
    "utilisation-by-weight": (
        "The same by router weight",
        "Counted by the weight that a router gives, not by choices.",
    ),
    "spread": (
        "Who goes where",
        "How the tokens of each modality spread over experts, and what each expert gets; dashed lines are fair "
        "shares.",
    ),
    "paths": (
        "Paths through the layers",
        "The commonest ways of a token through its heaviest experts, as thick as they are common, and the modalities "
        "that take them.",
    ),
    "together": ("Experts that work together", "Of the tokens of an expert, how many go to another one as well."),
    "layers": (
        "Layer by layer",
        "Entropy of the load, its diversity (1 is even), experts without a single token, and standard deviation over "
        "mean.",
    ),
    "information": (
        "Mutual information",
        "How much the chosen expert tells of the token's modality, and of the media in the row. Whiskers are 95 % "
        "intervals over rows; orange is what shuffled labels reach.",
    ),
    "knock-out": (
        "Without each expert",
        "How much the loss of the answers rises when an expert is taken out of all layers and the others share its "
        "weight.",
    ),
    "compared": ("Both models, layer by layer", "On the same rows."),
    "connectors": (
        "Connectors among words",
        "Norms of what connectors put into the sequence, beside the text embeddings.",
    ),
}


def page(
    data: Mapping[str, Any], notes: Sequence[str], pictures: Mapping[str, str], examples: Sequence[Example]
) -> str:
    """
    Args:
        data (`dict`): Of [`MixtureReport`].
        notes (`list[str]`): What could not be measured.
        pictures (`dict[str, str]`): Name -> SVG.
        examples (`list[Example]`): Rows to show token by token.

    Returns:
        `str`: HTML.
    """
    parts, links = [], []
    other = data.get("compared_with", {}).get("model", "")
    for name, (title, text) in SECTIONS.items():
        if name not in pictures:
            continue
        links.append(f'<a href="#{name}">{escape(title)}</a>')
        parts.append(f'<h2 id="{name}">{escape(title)}</h2><p class="soft">{escape(text)}</p>')
        small = " small" if name == "together" else ""
        parts.append(f'<div class="figure{small}">{_themed(pictures[name])}</div>')
        if f"{name}-other" in pictures:
            drawn = _themed(pictures[f"{name}-other"])
            parts.append(f'<p class="soft">{escape(other)}:</p><div class="figure{small}">{drawn}</div>')
        if name == "connectors":
            parts.append(_words(data))
        if name == "knock-out":
            parts.append(_knock_out_table(data["knock_out"]))
    if examples:
        links.append('<a href="#examples">Token by token</a>')
        parts.append('<h2 id="examples">Token by token</h2>')
        parts.append(
            '<p class="soft">The heaviest expert of each token, for a few rows. Tokens of a Q-Former have no '
            "place in time: they stand in their own order.</p>"
        )
        parts += [_example(number, example, pictures) for number, example in enumerate(examples, start=1)]
    remarks = "".join(f"<p class='soft'>{escape(note)}</p>" for note in notes)
    title = escape(str(data["model"]))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: what the mixture does</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>\n{STYLE}\n</style></head><body><main>\n"
        f'<p class="soft">Routing report</p><h1>{title}</h1>\n{_facts(data)}{_findings(data)}{remarks}'
        f"<nav>{''.join(links)}</nav>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _themed(svg: str) -> str:
    """An SVG whose text and lines follow the page's theme."""
    inline = svg[svg.index("<svg") :]
    return inline.replace(figures.INK, "var(--ink)").replace(figures.LINE, "var(--line)")


def _facts(data: Mapping[str, Any]) -> str:
    if "experts" not in data:
        return ""
    tokens = sum(data["tokens"].values())
    facts = {
        "rows": f"{data['rows']:,}",
        "tokens": f"{tokens:,}",
        "sparse layers": len(data["layers"]),
        "experts": len(data["experts"]),
        "active per token": data["num_experts_per_tok"],
    }
    return '<ul class="facts">' + "".join(f"<li><b>{v}</b><span>{k}</span></li>" for k, v in facts.items()) + "</ul>"


def findings(data: Mapping[str, Any]) -> list[str]:
    """
    Args:
        data (`dict`): Of [`MixtureReport`].

    Returns:
        `list[str]`: what is worth knowing first, in sentences with numbers.
    """
    if "experts" not in data:
        return []
    experts, layers = data["experts"], data["layers"]
    found = []
    tables = data["utilisation"]["by choice"]["all"]
    high, layer, expert = max(
        (value, layer, expert) for layer, row in enumerate(tables) for expert, value in enumerate(row)
    )
    found.append(
        f"The busiest expert is {experts[expert]} in layer {layers[layer]}, with {high:.2f} of its fair share."
    )
    dead = [(layers[y], experts[x]) for y, row in enumerate(tables) for x, value in enumerate(row) if value == 0]
    names = ", ".join(f"{name} in layer {layer}" for layer, name in dead[:4])
    found.append(
        f"{len(dead)} of {len(experts) * len(layers)} experts get no token: {names}{', ...' if len(dead) > 4 else ''}."
        if dead
        else "No expert is without tokens."
    )
    for title, key in (("token's modality", "of token types"), ("row's media", "of rows")):
        best, layer = max(
            (each["share_of_bound"], layer) for layer, each in zip(layers, data["information"][key], strict=True)
        )
        found.append(
            f"Mutual information of the expert and the {title} is up to {best:.1%} of its bound (layer {layer})."
        )
    certain = [
        (each["value"], name, kind)
        for name, kinds in data["knock_out"].items()
        for kind, each in kinds.items()
        if each["low"] is not None and each["low"] > 0
    ]
    if certain:
        rise, name, kind = max(certain)
        base = data["losses"].get(kind)
        of = f" from {base:.3f}" if base is not None else ""
        found.append(
            f"Without {name}, the loss of {kind} rows rises{of} by {rise:.3f} nats: the largest of {len(certain)} "
            "certain rises."
        )
    elif data["knock_out"]:
        found.append("No expert is missed: without any one of them no loss rises beyond its interval.")
    return found


def _findings(data: Mapping[str, Any]) -> str:
    return '<ul class="findings">' + "".join(f"<li>{escape(each)}</li>" for each in findings(data)) + "</ul>"


def _knock_out_table(rises: Mapping[str, Any]) -> str:
    if len(rises) > figures.FEW_EXPERTS:
        return ""
    kinds = list(next(iter(rises.values())))
    head = "".join(f"<th>{escape(kind)}</th>" for kind in kinds)
    rows = ""
    for name, of in rises.items():
        cells = "".join(f"<td>{of[k]['value']:+.3f} ({of[k]['low']:+.3f} to {of[k]['high']:+.3f})</td>" for k in kinds)
        rows += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return f'<div class="scroll"><table><tr><th>without</th>{head}</tr>{rows}</table></div>'


def _words(data: Mapping[str, Any]) -> str:
    """What each modality's tokens are closest to, after and before."""
    rows = ""
    sides = [("", data)] + (
        [(data["compared_with"]["model"], data["compared_with"])] if "compared_with" in data else []
    )
    for when, side in sides:
        found = side.get("connectors", {})
        for modality, words in found.get("nearest_words", {}).items():
            listed = ", ".join(f"{escape(word)} {share:.0%}" for word, share in words[:8])
            ratio = found["ratios"].get(modality)
            rows += f"<tr><th>{modality}</th><td>{escape(when)}</td><td>{ratio:.2f}</td><td>{listed}</td></tr>"
    head = "<tr><th></th><th></th><th>median norm / text</th><th>nearest words of its tokens</th></tr>"
    return f'<div class="scroll"><table>{head}{rows}</table></div>' if rows else ""


def _css(colour: Any) -> str:
    if isinstance(colour, str):
        return colour
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in colour[:3])


def _pale(colour: Any) -> str:
    """Bright enough for dark text."""
    code = _css(colour)
    red, green, blue = (int(code[at : at + 2], 16) / 255 for at in (1, 3, 5))
    hue, light, depth = colorsys.rgb_to_hls(red, green, blue)
    return _css(colorsys.hls_to_rgb(hue, max(light, 0.72), depth))


def _shown(piece: str) -> str:
    """A token's text; a line's end as a sign, so that a row stays one line."""
    return escape(piece.replace("\n", "\u21b5")) or "&nbsp;"


def _example(number: int, example: Example, pictures: Mapping[str, str]) -> str:
    palette = figures.colours(len(example.expert_names))
    lines = []
    for layer, experts in zip(example.layers, example.experts, strict=True):
        shown = "".join(
            f"<i>{escape(piece)}</i>"
            if expert < 0
            else f'<b style="background:{_pale(palette[expert])}" title="{escape(example.expert_names[expert])}">'
            f"{_shown(piece)}</b>"
            for piece, expert in zip(example.pieces, experts.tolist(), strict=True)
        )
        lines.append(f'<div class="tokens"><span class="soft">layer {layer}</span> {shown}</div>')
    used = sorted({int(expert) for expert in example.experts.flat if expert >= 0})
    key = "".join(
        f'<span><b style="background:{_pale(palette[expert])}"></b>{escape(example.expert_names[expert])}</span>'
        for expert in used[:16]
    )
    drawn = "".join(
        f'<div class="figure small">{_themed(svg)}</div>'
        for name, svg in pictures.items()
        if name.startswith(f"example-{number}-")
    )
    return f"<h3>{escape(example.kind)}</h3>{drawn}{''.join(lines)}<p class='key soft'>{key}</p>"


__all__ = ["findings", "page"]
