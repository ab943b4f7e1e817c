"""
The drawing of LoRA at the top of the README, as SVG, for a light and a dark page.

    python docs/drawing.py          writes docs/lora-light.svg and docs/lora-dark.svg

A layer 768 -> 3072 is drawn with the sides of its matrices in proportion, except r: with
r = 8, the sides of A and B that are r long would be a line.
"""
from pathlib import Path

HERE = Path(__file__).resolve().parent
THEMES = {
    "light": {"text": "#1f2328", "faint": "#59636e", "frozen": "#c9d4e0", "trained": "#f0883e"},
    "dark": {"text": "#e6edf3", "faint": "#9198a1", "frozen": "#3d4a5c", "trained": "#d9722e"},
}
OUT, IN, RANK, VECTOR = 216, 54, 12, 8      # the sides, in pixels
TOP = 30
WIDTH, HEIGHT = 640, 336


def block(x, y, width, height, color):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{color}"/>'


def text(x, y, content, color, size=14, style="normal", anchor="middle"):
    return (
        f'<text x="{x}" y="{y}" fill="{color}" font-size="{size}" font-style="{style}" '
        f'text-anchor="{anchor}">{content}</text>'
    )


def drawing(theme):
    """y = W x + scaling B A x, with each of the six tensors as a block."""
    colors = THEMES[theme]
    ink, faint = colors["text"], colors["faint"]
    frozen, trained = colors["frozen"], colors["trained"]
    middle = TOP + OUT / 2
    under = TOP + OUT + 20
    top_of_x = middle - IN / 2
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" '
        'role="img">',
        "<title>y = W x + scaling B A x. W is frozen, and the thin matrices A and B are "
        "trained.</title>",
        block(20, TOP, VECTOR, OUT, faint),
        text(24, under, "y", ink, 16, "italic"),
        text(24, under + 20, "out", faint, 12),
        text(64, middle + 6, "=", ink, 22),

        block(110, TOP, IN, OUT, frozen),
        text(137, middle + 6, "W", ink, 20, "italic"),
        text(137, under, "frozen", ink),
        text(137, under + 20, "out × in", faint, 12),
        text(137, under + 38, "2,359,296 numbers", faint, 12),
        block(188, top_of_x, VECTOR, IN, faint),
        text(192, top_of_x - 10, "x", ink, 16, "italic"),
        text(236, middle + 7, "+", ink, 22),
        text(296, middle + 6, "scaling", ink, 16),

        block(366, TOP, RANK, OUT, trained),
        text(372, TOP - 9, "B", ink, 18, "italic"),
        text(372, under, "trained", ink),
        text(372, under + 20, "out × r", faint, 12),
        text(372, under + 38, "starts at zero", faint, 12),
        block(460, middle - RANK / 2, IN, RANK, trained),
        text(487, middle - 16, "A", ink, 18, "italic"),
        text(487, under, "trained", ink),
        text(487, under + 20, "r × in", faint, 12),
        text(487, under + 38, "starts random", faint, 12),
        block(532, top_of_x, VECTOR, IN, faint),
        text(536, top_of_x - 10, "x", ink, 16, "italic"),
        text(430, under + 58, "30,720 numbers for r = 8", faint, 12),
        text(594, TOP + 14, "in = 768", faint, 12),
        text(594, TOP + 32, "out = 3072", faint, 12),
        "</svg>", "",
    ])


if __name__ == "__main__":
    for theme in THEMES:
        HERE.joinpath(f"lora-{theme}.svg").write_text(drawing(theme), encoding="utf-8")
