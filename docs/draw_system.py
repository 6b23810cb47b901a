"""
Draws the picture of the system at the head of the README: `docs/images/system.svg` and, for dark pages,
`system_dark.svg`.

    python docs/draw_system.py
"""

from html import escape
from pathlib import Path


WIDTH, HEIGHT = 980, 388
THEMES = {
    "system": {"ink": "#1c2330", "soft": "#5b6575", "line": "#98a2b3", "frozen": "#eef1f5", "edge": "#c5ccd8"}
    | {"trained": "#fff1d6", "trained_edge": "#d9920a", "panel": "#f8f9fb"},
    "system_dark": {"ink": "#e8ebf1", "soft": "#a4aebd", "line": "#6b7687", "frozen": "#262d39", "edge": "#465063"}
    | {"trained": "#4a3813", "trained_edge": "#e0a52e", "panel": "#161b23"},
}
# Each path of an input: its name, its tower, and what the tower may be.
PATHS = (
    ("pictures, video", "vision tower", "SigLIP, CLIP, DINO, ..."),
    ("speech", "speech tower", "Whisper"),
    ("sound", "audio tower", "BEATs, AST, CLAP, ..."),
)
# What each expert is for, in the colours of the routing figures.
EXPERTS = (("text", "#0072b2"), ("vision", "#e69f00"), ("audio", "#009e73"), ("speech", "#cc79a7"))
STAGES = (
    ("Stage 1", "connectors", "captions and transcripts"),
    ("Stage 2", "one expert per modality", "LoRA on the feed-forward layers"),
    ("Stage 3", "the mixture", "routers, experts and attention"),
)


class Drawing:
    """SVG elements in one theme."""

    def __init__(self, theme: dict[str, str]):
        self.theme, self.parts = theme, []

    def text(self, x: float, y: float, text: str, size: int = 13, kind: str = "ink", anchor: str = "middle") -> None:
        weight = ' font-weight="600"' if kind == "ink" and size >= 13 else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{self.theme[kind]}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, trained: bool, *lines: str) -> None:
        fill, edge = ("trained", "trained_edge") if trained else ("frozen", "edge")
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{self.theme[fill]}" '
            f'stroke="{self.theme[edge]}" stroke-width="1.4"/>'
        )
        top = y + height / 2 + 5 - 8.5 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 17 * number, line, 13 if not number else 11, "soft" if number else "ink")

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        middle = (x + to_x) / 2
        self.parts.append(
            f'<path d="M{x} {y} C{middle} {y} {middle} {to_y} {to_x - 6} {to_y}" fill="none" '
            f'stroke="{self.theme["line"]}" stroke-width="1.6" marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{self.theme["line"]}"/></marker>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            "<title>Frozen towers, trained connectors, and an LLM whose feed-forward layers are a mixture of modality "
            f"experts</title>\n<defs>{head}</defs>\n" + "\n".join(self.parts) + "\n</svg>\n"
        )


def draw(theme: dict[str, str]) -> str:
    """The whole picture."""
    made = Drawing(theme)
    rows = [34 + 62 * number for number in range(4)]  # tops of three towers and of the words
    for (name, tower, examples), y in zip(PATHS, rows, strict=False):
        made.text(124, y + 29, name, 14, anchor="end")
        made.arrow(132, y + 24, 160, y + 24)
        made.box(160, y, 158, 48, False, tower, examples)
        made.arrow(318, y + 24, 350, y + 24)
        made.box(350, y, 96, 48, True, "connector")
        made.arrow(446, y + 24, 498, 148)
    made.text(124, rows[3] + 29, "words", 14, anchor="end")
    made.parts.append(f'<path d="M132 {rows[3] + 24}H446" fill="none" stroke="{theme["line"]}" stroke-width="1.6"/>')
    made.arrow(446, rows[3] + 24, 498, 158)
    # The decoder: one of its layers, with attention and the mixture.
    made.parts.append(
        f'<rect x="500" y="16" width="372" height="254" rx="12" fill="{theme["panel"]}" stroke="{theme["edge"]}" '
        'stroke-width="1.4"/>'
    )
    made.text(600, 42, "a layer of the LLM", 14)
    made.text(600, 60, "Qwen3, Llama, Gemma, ...", 11, "soft")
    made.box(516, 122, 84, 56, True, "attention", "LoRA")
    made.arrow(600, 150, 626, 150)
    made.box(626, 122, 70, 56, True, "router", "top 2")
    for number, (name, colour) in enumerate(EXPERTS):
        y = 52 + 51 * number
        made.arrow(696, 150, 732, y + 20)
        made.box(732, y, 124, 40, True, f"{name} expert")
        made.parts.append(f'<rect x="732" y="{y + 1}" width="7" height="38" rx="3" fill="{colour}"/>')
    made.arrow(872, 150, 904, 150)
    made.text(942, 155, "answer", 14)
    # The recipe.
    for number, (stage, what, how) in enumerate(STAGES):
        x = 20 + 318 * number
        made.parts.append(
            f'<rect x="{x}" y="306" width="304" height="70" rx="10" fill="{theme["panel"]}" stroke="{theme["edge"]}"/>'
        )
        made.text(x + 16, 334, f"{stage}: {what}", 14, anchor="start")
        made.text(x + 16, 357, how, 12, "soft", anchor="start")
    made.parts.append(f'<rect x="20" y="284" width="12" height="12" rx="3" fill="{theme["frozen"]}" '
                      f'stroke="{theme["edge"]}"/>')  # fmt: skip
    made.text(38, 294, "frozen", 11, "soft", anchor="start")
    made.parts.append(f'<rect x="92" y="284" width="12" height="12" rx="3" fill="{theme["trained"]}" '
                      f'stroke="{theme["trained_edge"]}"/>')  # fmt: skip
    made.text(110, 294, "trained in some stage", 11, "soft", anchor="start")
    return made.svg()


def main() -> None:
    for name, theme in THEMES.items():
        (Path(__file__).parent / "images" / f"{name}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
