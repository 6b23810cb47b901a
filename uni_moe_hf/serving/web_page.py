"""What the web page shows of an answer, as HTML: its words, and the experts behind them. No scripts."""

from collections.abc import Sequence
from html import escape

import numpy as np

from ..insight.figures import PALETTE
from ..mixtures.routing import TOKEN_TYPES
from .live_answers import LiveAnswer, Word


MAX_COLUMNS_OF_A_CLIP, MAX_COLUMNS = 16, 160
CELL = 15
# Modalities as the page calls them.
NAMES = {"image": "picture", "audio": "sound"}

STYLE = """
.uni { --ink: #1c2330; --soft: #5a6478; --line: #d4d9e2; --card: #f4f6fa; --tip: #1c2330; --on-tip: #fff;
  color: var(--ink); font: 15px/1.55 system-ui, "DejaVu Sans", sans-serif; }
.dark .uni { --ink: #e8ebf2; --soft: #a3adc0; --line: #3a4357; --card: #1b2130; --tip: #e8ebf2; --on-tip: #12161f; }
.uni-title h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 .1rem; overflow-wrap: anywhere; }
.uni-title p, .uni .soft { color: var(--soft); margin: 0; }
.uni-title .chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: .6rem 0 0; }
.uni .chip { border: 1px solid var(--line); border-radius: 999px; padding: .05rem .6rem; font-size: .82rem; }
.uni .chip b { display: inline-block; width: .62rem; height: .62rem; border-radius: 50%; margin-right: .35rem; }
.uni.card { border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1.1rem; background: var(--card); }
.uni .said { min-height: 3.4rem; font-size: 1.35rem; line-height: 1.7; overflow-wrap: anywhere; }
.uni .said .waiting { color: var(--soft); font-size: 1rem; }
.uni .word { position: relative; border-bottom: 3px solid; border-radius: 2px; cursor: help; outline-offset: 2px; }
.uni .tip { display: none; position: absolute; left: 0; top: 1.9rem; z-index: 9; background: var(--tip);
  color: var(--on-tip); border-radius: 8px; padding: .45rem .6rem; font-size: .8rem; line-height: 1.4; width: 12rem; }
.uni .word:hover .tip, .uni .word:focus .tip { display: block; }
.uni .tip * { color: var(--on-tip); }
.uni .tip span { display: grid; grid-template-columns: 5.5rem 1fr 2.6rem; gap: .4rem; align-items: center; }
.uni .tip i { height: .45rem; background: currentColor; opacity: .75; border-radius: 3px; }
.uni .tip em { font-style: normal; text-align: right; font-variant-numeric: tabular-nums; }
.uni .tip u { text-decoration: none; overflow: hidden; text-overflow: ellipsis; white-space: pre; }
.uni .problem { border-left: 4px solid #d55e00; background: var(--card); padding: .6rem .9rem; border-radius: 6px;
  font-size: 1rem; overflow-wrap: anywhere; }
.uni h3 { font-size: .95rem; margin: 0 0 .45rem; color: var(--ink); }
.uni .bars + h3 { margin-top: 1.2rem; }
.uni .bars { display: grid; grid-template-columns: minmax(4.2rem, max-content) 1fr; gap: .3rem .7rem;
  align-items: center; font-size: .88rem; }
.uni .bar { display: flex; height: 1.35rem; border-radius: 5px; overflow: hidden; background: var(--line); }
.uni .bar span { color: #fff; font-size: .74rem; line-height: 1.35rem; text-align: center; overflow: hidden;
  white-space: nowrap; text-shadow: 0 0 3px rgba(0, 0, 0, .55); }
.uni .strip { overflow-x: auto; padding-bottom: .3rem; }
.uni .strip text { fill: var(--ink); font: 10px system-ui, "DejaVu Sans", sans-serif; }
.uni .strip .quiet { fill: var(--soft); }
""".strip()


def colour(expert: int) -> str:
    """CSS colour of an expert, the same as in reports."""
    return PALETTE[expert] if expert < len(PALETTE) else f"hsl({expert * 137 % 360} 45% 50%)"


def title(name: str, modalities: Sequence[str], experts: Sequence[str] | None, level: int = 1) -> str:
    """What is served: its name, what it takes where that is to be said, and, of one model, its experts' colours."""
    kinds = ["text", *({**NAMES, "image": "pictures"}.get(modality, modality) for modality in modalities)]
    takes = ", ".join(kinds[:-1]) + (f" and {kinds[-1]}" if len(kinds) > 1 else kinds[-1])
    chips = "".join(
        f'<span class="chip"><b style="background:{colour(index)}"></b>{escape(expert)}</span>'
        for index, expert in enumerate(experts or ())
    )
    said = [f"Reads {escape(takes)} in any mix."] if modalities else []
    if experts is not None:
        said.append(f"A mixture of {len(experts)} experts." if experts else "A dense model, without experts.")
    return (
        f'<div class="uni uni-title"><h{level}>{escape(name)}</h{level}><p>{" ".join(said)}</p>'
        f'<div class="chips">{chips}</div></div>'
    )


def problem(sentence: str) -> str:
    """What went wrong."""
    return f'<div class="uni"><div class="problem" role="alert">{escape(sentence)}</div></div>'


def answer(live: LiveAnswer | None, note: str = "") -> str:
    """The words so far; each is underlined in the colour of its heaviest expert and tells what else was likely."""
    if live is None or not live.words:
        return f'<div class="uni card"><div class="said"><span class="waiting">{escape(note)}</span></div></div>'
    start = len(live.pieces) - live.from_answer
    words = []
    for index, word in enumerate(live.words):
        place, line = start + index, "var(--line)"
        if place < live.weights.shape[1] and live.experts:
            line = colour(int(live.weights[:, place].mean(axis=0).argmax()))
        words.append(_word(word, line))
    hint = "Point at a word for what else was likely"
    hint += "; its line is its heaviest expert." if live.experts else "."
    ending = f'<p class="soft">{escape(note)} {hint}</p>'
    return f'<div class="uni card"><div class="said" aria-live="polite">{"".join(words)}</div>{ending}</div>'


def _word(word: Word, line: str) -> str:
    shown = escape(word.text) or '<span class="waiting"> (end)</span>'
    rows = "".join(
        f"<span><u>{escape(text) or '␠'}</u><i style='width:{100 * value:.0f}%'></i><em>{value:.0%}</em></span>"
        for text, value in word.alternatives
    )
    return (
        f'<span class="word" tabindex="0" style="border-color:{line}">{shown}'
        f'<span class="tip" role="tooltip">{rows}</span></span>'
    )


def panel(live: LiveAnswer | None) -> str:
    """Who works on what: shares of the experts by modality, and the heaviest expert of every token in every layer."""
    if live is None:
        return '<div class="uni card"><p class="soft">Experts appear here with the first word.</p></div>'
    if not live.experts:
        return '<div class="uni card"><p class="soft">A dense model: there are no experts to show.</p></div>'
    bars = "".join(
        f"<span>{NAMES.get(name, name)}</span>{_bar(shares, live.experts)}" for name, shares in live.shares().items()
    )
    return (
        f'<div class="uni card"><h3>Router weight by modality</h3><div class="bars">{bars}</div>'
        f"<h3>Heaviest expert of every token</h3>{_strip(live)}</div>"
    )


def _bar(shares: np.ndarray, experts: Sequence[str]) -> str:
    parts = "".join(
        f'<span style="width:{100 * share:.2f}%;background:{colour(index)}" title="{escape(name)}: {share:.0%}">'
        f"{f'{share:.0%}' if share > 0.11 else ''}</span>"
        for index, (name, share) in enumerate(zip(experts, shares, strict=True))
    )
    return f'<div class="bar">{parts}</div>'


def _columns(live: LiveAnswer) -> list[tuple[str, int, int]]:
    """Label, first and last token (not itself) of each column: text token by token, clips in few."""
    columns, place, length = [], 0, live.weights.shape[1]
    while place < length:
        kind, end = live.types[place], place + 1
        while kind and end < length and live.types[end] == kind:
            end += 1
        edges = np.linspace(place, end, min(MAX_COLUMNS_OF_A_CLIP, end - place) + 1).astype(int)
        for index, (first, last) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            label = live.pieces[place] if not kind else (_clip(kind, end - place) if index == 0 else "")
            columns.append((label, first, last))
        place = end
    return columns


def _clip(kind: int, tokens: int) -> str:
    """What stands above a clip's columns."""
    name = TOKEN_TYPES[kind]
    return f"{NAMES.get(name, name)} ({tokens})"


def _strip(live: LiveAnswer) -> str:
    """An SVG: a column for each token, a row for each layer."""
    columns = _columns(live)
    skipped = max(0, len(columns) - MAX_COLUMNS)
    columns = columns[skipped:]
    left, top = 30, 74
    tall = CELL if len(live.layers) > 6 else 2 * CELL
    width, height = left + CELL * len(columns) + 60, top + tall * len(live.layers) + 4
    drawn = []
    for row, layer in enumerate(live.layers):
        y = top + tall * row + tall // 2 + 4
        drawn.append(f'<text class="quiet" x="{left - 6}" y="{y}" text-anchor="end">{layer}</text>')
    first_of_answer = live.weights.shape[1] - live.from_answer
    for index, (label, first, last) in enumerate(columns):
        x = left + CELL * index
        if label.strip():
            shown = escape(label.strip()[:16])
            weight = ' font-weight="700"' if first >= first_of_answer else ""
            drawn.append(
                f'<text x="{x + 9}" y="{top - 6}"{weight} transform="rotate(-55 {x + 9} {top - 6})">{shown}</text>'
            )
        for row in range(len(live.layers)):
            weights = live.weights[row, first:last].mean(axis=0)
            expert = int(weights.argmax())
            drawn.append(
                f'<rect x="{x}" y="{top + tall * row}" width="{CELL - 1}" height="{tall - 1}" rx="2" '
                f'fill="{colour(expert)}" fill-opacity="{0.35 + 0.65 * weights[expert]:.2f}">'
                f"<title>layer {live.layers[row]}: {escape(live.experts[expert])} {weights[expert]:.0%}</title></rect>"
            )
    note = f'<p class="soft">{skipped} earlier columns are left out.</p>' if skipped else ""
    return (
        f'<div class="strip"><svg width="{width}" height="{height}" role="img" '
        f'aria-label="Heaviest expert of every token in every sparse layer">{"".join(drawn)}</svg></div>{note}'
    )


__all__ = ["STYLE", "answer", "colour", "panel", "problem", "title"]
