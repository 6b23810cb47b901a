"""
Figures of a routing report, drawn with matplotlib: each function makes one from plain arrays.

Letters: L sparse layers, M token types, E experts, K kinds of rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np


# What text and lines are drawn in; the page replaces them so that they follow its theme.
INK, LINE = "#1c2330", "#c9ced8"
# Okabe and Ito's colours, which most colour-blind readers tell apart, then more of the same lightness.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7a6fbe")
TYPE_COLOURS = {"text": "#7a6fbe", "image": "#b8a800", "video": "#d55e00", "audio": "#56b4e9", "speech": "#cc79a7"}
FEW_EXPERTS = 8  # up to here experts have colours of their own and names beside them
SPREAD = 4.0  # utilisation is coloured from one quarter to four times the fair share
LABELS = 24  # ticks on an axis


def figure_module() -> Any:
    """
    matplotlib's figures, without a window system.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("Figures are drawn with matplotlib: `pip install uni-moe-hf[plot]`.") from error
    return matplotlib.figure


@contextmanager
def style() -> Iterator[None]:
    """How all figures look."""
    figure_module()
    import matplotlib

    settings = {
        "font.size": 9,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": LINE,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.fonttype": "none",
        "text.parse_math": False,  # names may hold a dollar sign
        "svg.hashsalt": "uni-moe",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(settings):
        yield


def short(name: str, length: int = 18) -> str:
    """A name that fits beside a figure: the end of a long one, which tells paths apart."""
    return name if len(name) <= length else f"\u2026{name[1 - length :]}"


def type_colours(types: Sequence[str]) -> list[str]:
    """Of token types, the same in every figure."""
    return [TYPE_COLOURS.get(name, "#8a94a6") for name in types]


def colours(count: int) -> list[Any]:
    """One for each of `count` experts."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    import matplotlib

    wheel = matplotlib.colormaps["hsv"]
    return [wheel(0.92 * number / count) for number in range(count)]


def svg(figure: Any) -> str:
    """A figure as SVG, without a date, so that equal figures are equal files."""
    from io import StringIO

    with style():
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def write_png(figure: Any, path: Any) -> None:
    """A figure on white, for whom a page is too much."""
    with style():
        figure.savefig(path, format="png", dpi=130, facecolor="white")


def new(width: float, height: float) -> Any:
    """`matplotlib.figure.Figure`: empty, of so many inches."""
    return figure_module().Figure(figsize=(width, height), layout="constrained")


def _ticks(axis: Any, names: Sequence[str], rotate: bool = False) -> None:
    """Names along an axis, as many as there is room for."""
    step = max(1, math.ceil(len(names) / LABELS))
    axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
    axis.set_tick_params(length=0)
    if rotate and (len(names) > FEW_EXPERTS or max(map(len, map(str, names))) > 6):
        axis.set_tick_params(rotation=90 if len(names) > FEW_EXPERTS else 30)


def utilisation(
    panels: Mapping[str, np.ndarray], layers: Sequence[int], experts: Sequence[str], note: str, by: str
) -> Any:
    """
    Args:
        panels (`dict[str, np.ndarray]`): Title -> utilisation `(L, E)`, load over fair share; NaN where there is none.
        layers, experts: Names of the axes.
        note (`str`): Sample size, printed beneath.
        by (`str`): What is counted: choices or router weight.

    Returns:
        `matplotlib.figure.Figure`: one heat map for each on one scale.
    """
    from matplotlib.colors import LogNorm

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = min(5.0, max(1.5, 0.3 + 0.16 * len(layers) + 0.02 * len(experts)))
    with style():
        figure = new(9.5, rows * (height + 0.55) + 0.5)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for place, axis in enumerate(axes.flat):
            if place >= len(panels):
                axis.set_axis_off()
                continue
            title, table = list(panels.items())[place]
            shown = np.clip(table, 1 / SPREAD, SPREAD)
            image = axis.imshow(
                shown, aspect="auto", cmap="RdBu_r", norm=LogNorm(1 / SPREAD, SPREAD), interpolation="nearest"
            )
            axis.set_title(title)
            for side in axis.spines.values():
                side.set_visible(False)
            _ticks(axis.xaxis, experts, rotate=True)
            _ticks(axis.yaxis, layers)
            if place % columns == 0:
                axis.set_ylabel("layer")
            if table.size <= 48:
                for (y, x), value in np.ndenumerate(table):
                    if value == value:
                        dark = value > 2.2 or value < 1 / 2.2
                        axis.text(
                            x,
                            y,
                            f"{value:.2f}",
                            ha="center",
                            va="center",
                            color="white" if dark else "#1b1b1b",
                            size=7.5,
                        )
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, ticks=[0.25, 0.5, 1, 2, 4])
        bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
        bar.ax.minorticks_off()
        bar.set_label(f"load over fair share, by {by}")
        figure.supxlabel(note, size=8)
    return figure


def spread(load: np.ndarray, types: Sequence[str], experts: Sequence[str], tokens: Sequence[int], note: str) -> Any:
    """
    Args:
        load (`np.ndarray` of shape `(M, E)`): Choices, all layers together.
        types, experts: Names.
        tokens (`Sequence[int]`): Of each type.
        note (`str`): Sample size.

    Returns:
        `matplotlib.figure.Figure`: how each type spreads over experts, and what each expert is made of.
    """
    over_experts = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
    of_types = load / np.maximum(load.sum(axis=0, keepdims=True), 1)
    fair = load.sum(axis=1) / max(load.sum(), 1)
    count = len(experts)
    with style():
        if count > FEW_EXPERTS:
            figure = new(9.5, 1.6 + 0.6 * len(types))
            left, right = figure.subplots(2, 1, sharex=True)
            image = left.imshow(over_experts * count, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
            figure.colorbar(image, ax=left, fraction=0.03, label="over fair share")
            bottom = np.zeros(count)
            for row, (name, colour) in enumerate(zip(types, type_colours(types), strict=True)):
                right.bar(range(count), of_types[row], bottom=bottom, color=colour, label=name, width=0.85)
                bottom += of_types[row]
            right.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
            right.set_ylim(0, 1)
            _ticks(left.yaxis, [f"{name} ({n:,})" for name, n in zip(types, tokens, strict=True)])
            _ticks(right.xaxis, experts, rotate=True)
            left.set_title("each modality's spread over experts")
            right.set_title("each expert's mixture of modalities")
        else:
            figure = new(9.5, 1.7 + 0.42 * max(len(types), count))
            left, right = figure.subplots(1, 2)
            start = np.zeros(len(types))
            for column, (name, colour) in enumerate(zip(experts, colours(count), strict=True)):
                left.barh(
                    range(len(types)), over_experts[:, column], left=start, color=colour, label=name, height=0.72
                )
                start += over_experts[:, column]
            for share in np.arange(1, count) / count:
                left.axvline(share, color=INK, lw=0.8, ls=(0, (3, 3)))
            start = np.zeros(count)
            for row, (name, colour) in enumerate(zip(types, type_colours(types), strict=True)):
                right.barh(range(count), of_types[row], left=start, color=colour, label=name, height=0.72)
                start += of_types[row]
            for share in np.cumsum(fair)[:-1]:
                right.axvline(share, color=INK, lw=0.8, ls=(0, (3, 3)))
            _ticks(left.yaxis, [f"{name} ({n:,})" for name, n in zip(types, tokens, strict=True)])
            _ticks(right.yaxis, experts)
            for axis, title, entries in (
                (left, "each modality's spread over experts", count),
                (right, "each expert's mixture of modalities", len(types)),
            ):
                axis.invert_yaxis()
                axis.set_xlim(0, 1)
                axis.set_title(title)
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=min(5, entries))
        figure.supxlabel(f"{note}; dashed: fair share" if count <= FEW_EXPERTS else note, size=8)
    return figure


def paths(
    found: Sequence[tuple[tuple[int, ...], Mapping[str, int]]],
    total: int,
    layers: Sequence[int],
    experts: Sequence[str],
    types: Sequence[str],
    note: str,
) -> Any:
    """
    Args:
        found (`Sequence`): Paths, commonest first, and their tokens by type, as [`RoutingTables.paths`] gives them.
        total (`int`): Tokens in all.
        layers, experts, types: Names.
        note (`str`): Sample size.

    Returns:
        `matplotlib.figure.Figure`: lines through the layers, as thick as they are common, and who takes them.
    """
    with style():
        figure = new(9.5, max(3.2, 1.4 + min(4.2, 0.3 * len(experts))))
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        palette = [*PALETTE, "#8c564b", "#5f6b7a"][: len(found)]
        largest = max(sum(by_type.values()) for _, by_type in found)
        lanes = np.linspace(-0.28, 0.28, len(found)) if len(found) > 1 else [0.0]
        for (path, by_type), colour, lane in zip(found, palette, lanes, strict=False):
            share = sum(by_type.values()) / largest
            x = np.arange(len(layers)) if len(layers) > 1 else np.array([-0.2, 0.2])
            y = np.array(path if len(layers) > 1 else path * 2) + lane
            left.plot(
                x,
                y,
                color=colour,
                lw=0.8 + (5 if len(layers) <= 8 else 1.5) * share,
                alpha=0.85,
                solid_capstyle="round",
            )
        for number in range(len(experts)):
            left.axhline(number + 0.5, color=LINE, lw=0.5)
        left.set_ylim(len(experts) - 0.5, -0.5)
        _ticks(left.yaxis, experts)
        _ticks(left.xaxis, layers)
        left.set_xlabel("layer")
        left.set_title("heaviest expert, layer after layer")
        start = np.zeros(len(found))
        for name, colour in zip(types, type_colours(types), strict=True):
            shares = np.array([100 * by_type.get(name, 0) / max(total, 1) for _, by_type in found])
            right.barh(range(len(found)), shares, left=start, color=colour, label=name, height=0.7)
            start += shares
        right.set_yticks(range(len(found)), [f"{number + 1}" for number in range(len(found))])
        for tick, colour in zip(right.get_yticklabels(), palette, strict=False):
            tick.set_color(colour)
            tick.set_fontweight("bold")
        right.invert_yaxis()
        right.set_xlabel("% of all tokens")
        right.set_title(f"the {len(found)} commonest paths")
        right.legend(loc="lower right")
        figure.supxlabel(note, size=8)
    return figure


def together(table: np.ndarray, experts: Sequence[str], note: str) -> Any:
    """
    Args:
        table (`np.ndarray` of shape `(E, E)`): Tokens that went to both, choices on the diagonal.
        experts, note: Names and sample size.

    Returns:
        `matplotlib.figure.Figure`: how often the second expert joins the first.
    """
    given = table / np.maximum(np.diag(table)[:, None], 1)
    np.fill_diagonal(given, np.nan)
    side = min(6.0, 2.6 + 0.12 * len(experts))
    with style():
        figure = new(max(6.4, side + 1.6), side)
        axis = figure.subplots()
        image = axis.imshow(given, cmap="Blues", vmin=0, vmax=max(0.01, np.nanmax(given)), interpolation="nearest")
        figure.colorbar(image, fraction=0.04, label="share of the row's tokens")
        _ticks(axis.xaxis, experts, rotate=True)
        _ticks(axis.yaxis, experts)
        axis.set_title("which expert goes along with which")
        axis.set_ylabel("tokens of")
        axis.set_xlabel("also go to")
        figure.supxlabel(note, size=8)
        if len(experts) <= FEW_EXPERTS:
            for (y, x), value in np.ndenumerate(given):
                if value == value:
                    dark = value > 0.6 * np.nanmax(given)
                    axis.text(
                        x, y, f"{value:.0%}", ha="center", va="center", color="white" if dark else "#1b1b1b", size=8
                    )
    return figure


def lines(panels: Mapping[str, Mapping[str, Sequence[float]]], layers: Sequence[int], note: str) -> Any:
    """
    Args:
        panels (`dict`): Title -> name of a line -> a value for each layer.
        layers, note: Names and sample size.

    Returns:
        `matplotlib.figure.Figure`: one panel for each measure.
    """
    with style():
        figure = new(9.5, 2.6)
        for axis, (title, drawn) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for (name, values), colour in zip(drawn.items(), (*PALETTE, *PALETTE), strict=False):
                axis.plot(range(len(layers)), values, marker="o", ms=3, lw=1.4, color=colour, label=name)
            _ticks(axis.xaxis, layers, rotate=len(layers) > FEW_EXPERTS)
            axis.set_title(title)
            axis.set_xlabel("layer")
            axis.set_ylim(0, 1.08 * max(1e-3, *(value for values in drawn.values() for value in values)))
            axis.grid(axis="y", color=LINE, lw=0.5)
        named = {n: h for axis in figure.axes for h, n in zip(*axis.get_legend_handles_labels(), strict=True)}
        if len(named) > 1:
            figure.legend(named.values(), named.keys(), loc="outside upper right", ncols=len(named))
        figure.supxlabel(note, size=8)
    return figure


def information(panels: Mapping[str, Sequence[Mapping[str, Any]]], layers: Sequence[int], note: str) -> Any:
    """
    Args:
        panels (`dict`): Title -> for each layer an [`Information`] as a dictionary.
        layers, note: Names and sample size.

    Returns:
        `matplotlib.figure.Figure`: bars with intervals, the shuffled baseline and the bound.
    """
    with style():
        figure = new(9.5, 2.9)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, found) in zip(axes, panels.items(), strict=True):
            values = np.array([each["value"]["value"] for each in found])
            low = values - [each["value"]["low"] for each in found]
            high = [each["value"]["high"] for each in found] - values
            axis.bar(range(len(found)), values, color=PALETTE[0], width=0.6)
            axis.errorbar(range(len(found)), values, yerr=[low, high], fmt="none", ecolor=INK, lw=1, capsize=3)
            for place, each in enumerate(found):
                axis.plot([place - 0.4, place + 0.4], [each["shuffled_high"]] * 2, color=PALETTE[5], lw=2)
            bound = max(each["bound"] for each in found)
            axis.set_title(f"{title} (of at most {bound:.2f})")
            axis.set_ylabel("nats")
            _ticks(axis.xaxis, layers, rotate=len(layers) > FEW_EXPERTS)
            axis.set_xlabel("layer")
        figure.supxlabel(f"{note}; orange: what shuffled labels reach in 97.5 % of draws", size=8)
    return figure


def over_steps(history: Sequence[Mapping[str, float]], experts: Sequence[str]) -> Any:
    """
    Args:
        history (`Sequence[dict]`): Logs of the trainer with `step`, `load/<expert>` and `specialisation/...`.
        experts (`Sequence[str]`): Names.

    Returns:
        `matplotlib.figure.Figure`: shares of the experts, and specialisation, over the steps.
    """
    steps = [each["step"] for each in history]
    with style():
        figure = new(9.5, 3.0)
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        shares = [[each[f"load/{name}"] for each in history] for name in experts]
        left.stackplot(steps, shares, colors=colours(len(experts)), labels=experts)
        left.set_ylim(0, 1)
        left.set_title("share of all tokens")
        if len(experts) <= FEW_EXPERTS:
            left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=len(experts))
        for name, colour in (("mean", PALETTE[0]), ("max", PALETTE[5])):
            right.plot(
                steps, [each[f"specialisation/{name}"] for each in history], color=colour, label=f"{name} of layers"
            )
        right.set_ylim(bottom=0)
        right.set_title("what the expert tells of the modality, of 1")
        right.legend()
        for axis in (left, right):
            axis.set_xlabel("step")
    return figure


def knock_out(rises: Mapping[str, Mapping[str, Mapping[str, float]]], note: str) -> Any:
    """
    Args:
        rises (`dict`): Expert -> kind of rows -> a `Figure` as a dictionary, in nats.
        note (`str`): Sample size.

    Returns:
        `matplotlib.figure.Figure`: dots with intervals for few experts, a heat map for many.
    """
    experts, kinds = list(rises), list(next(iter(rises.values())))
    with style():
        if len(experts) > FEW_EXPERTS:
            table = np.array([[rises[name][kind]["value"] for kind in kinds] for name in experts])
            reach = max(1e-9, np.nanmax(np.abs(table)))
            figure = new(9.5, 1.6 + 0.34 * len(kinds))
            axis = figure.subplots()
            image = axis.imshow(
                table.T, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest"
            )
            figure.colorbar(image, fraction=0.03, label="rise of the loss, nats")
            _ticks(axis.xaxis, experts, rotate=True)
            _ticks(axis.yaxis, kinds)
            axis.set_xlabel(f"without expert\n{note}")
            axis.set_title("what is lost without each expert")
            return figure
        figure = new(9.5, 1.6 + 0.32 * len(kinds))
        axes = figure.subplots(1, len(experts), sharey=True, sharex=True, squeeze=False)[0]
        for axis, name, colour in zip(axes, experts, colours(len(experts)), strict=True):
            for place, kind in enumerate(kinds):
                each = rises[name][kind]
                axis.plot([each["low"], each["high"]], [place, place], color=colour, lw=2)
                axis.plot(each["value"], place, "o", color=colour, ms=5)
            axis.axvline(0, color=INK, lw=0.8)
            axis.grid(axis="x", color=LINE, lw=0.5)
            axis.set_title(f"without {name}")
            axis.set_ylim(len(kinds) - 0.5, -0.5)
            axis.tick_params(axis="x", rotation=30)
        _ticks(axes[0].yaxis, kinds)
        figure.supxlabel(f"rise of the answers' loss in nats, with 95 % intervals; {note}", size=8)
    return figure


def distributions(panels: Mapping[str, Mapping[str, np.ndarray]], note: str) -> Any:
    """
    Args:
        panels (`dict`): Title, such as "before" -> "text" or a modality -> norms of its vectors.
        note (`str`): Sample size.

    Returns:
        `matplotlib.figure.Figure`: densities of the norms on a logarithmic axis.
    """
    everything = np.concatenate([norms for drawn in panels.values() for norms in drawn.values()])
    edges = np.geomspace(max(everything.min(), 1e-4) * 0.9, max(everything.max(), 1e-3) * 1.1, 48)
    names = list(dict.fromkeys(name for drawn in panels.values() for name in drawn))
    with style():
        figure = new(9.5, 2.7)
        for axis, (title, drawn) in zip(
            figure.subplots(1, len(panels), squeeze=False, sharex=True)[0], panels.items(), strict=True
        ):
            for name, colour in zip(names, type_colours(names), strict=True):
                if name in drawn:
                    shares = np.histogram(drawn[name], edges)[0] / len(drawn[name])
                    axis.stairs(
                        shares, edges, color=colour, fill=True, alpha=0.55, label=f"{name} ({len(drawn[name]):,})"
                    )
            axis.set_xscale("log")
            axis.set_title(title)
            axis.set_xlabel("norm of a vector")
            axis.set_yticks([])
            axis.legend()
        figure.supxlabel(note, size=8)
    return figure


def picture(
    pixels: np.ndarray, grids: Sequence[np.ndarray], layers: Sequence[int], experts: Sequence[str], title: str
) -> Any:
    """
    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`): In [0, 1].
        grids (`Sequence[np.ndarray]`): For each layer the expert of each patch, `(rows, columns)`.
        layers, experts, title: Names.

    Returns:
        `matplotlib.figure.Figure`: the picture, and beside it its patches in the colours of their experts.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    palette = colours(len(experts))
    with style():
        figure = new(min(9.5, 2.2 * (1 + len(grids))), 2.6)
        axes = figure.subplots(1, 1 + len(grids))
        for place, axis in enumerate(axes):
            axis.imshow(pixels, extent=(0, 1, 1, 0), interpolation="nearest")
            axis.set_axis_off()
            if place:
                axis.imshow(
                    grids[place - 1],
                    cmap=ListedColormap(palette),
                    vmin=-0.5,
                    vmax=len(experts) - 0.5,
                    alpha=0.6,
                    extent=(0, 1, 1, 0),
                    interpolation="nearest",
                )
            axis.set_title(f"layer {layers[place - 1]}" if place else title)
        used = sorted({int(expert) for grid in grids for expert in grid.flat})
        handles = [Patch(color=palette[expert], label=experts[expert]) for expert in used[:12]]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    return figure


def spectrogram(
    mel: np.ndarray, strips: Sequence[np.ndarray], layers: Sequence[int], experts: Sequence[str], title: str
) -> Any:
    """
    Args:
        mel (`np.ndarray` of shape `(frames, bands)`): What the tower hears.
        strips (`Sequence[np.ndarray]`): For each layer the experts of the clip's tokens, in their order.
        layers, experts, title: Names.

    Returns:
        `matplotlib.figure.Figure`: the spectrogram, and under it the tokens in the colours of their experts.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    palette = colours(len(experts))
    with style():
        figure = new(7.5, 1.9 + 0.28 * len(strips))
        top, *rows = figure.subplots(1 + len(strips), 1, height_ratios=[6] + [1] * len(strips))
        top.imshow(mel.T, aspect="auto", origin="lower", cmap="magma", interpolation="nearest")
        top.set_xticks([])
        top.set_yticks([])
        top.set_title(title)
        for axis, strip, layer in zip(rows, strips, layers, strict=True):
            axis.imshow(
                strip[None], aspect="auto", cmap=ListedColormap(palette), vmin=-0.5, vmax=len(experts) - 0.5,
                interpolation="nearest",
            )  # fmt: skip
            axis.set_xticks([])
            axis.set_yticks([0], [f"layer {layer}"])
            axis.tick_params(length=0)
        used = sorted({int(expert) for strip in strips for expert in strip})
        handles = [Patch(color=palette[expert], label=experts[expert]) for expert in used[:12]]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    return figure


__all__ = [
    "INK",
    "LINE",
    "colours",
    "distributions",
    "figure_module",
    "information",
    "knock_out",
    "lines",
    "new",
    "over_steps",
    "paths",
    "picture",
    "short",
    "spectrogram",
    "spread",
    "style",
    "svg",
    "together",
    "utilisation",
    "write_png",
]
