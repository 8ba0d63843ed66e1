"""Draws the mechanism: `python docs/draw_move.py` writes move.svg. The gates in it are made up."""
from pathlib import Path

WIDTH, HEIGHT = 960, 560
COLORS = "#56a3e8", "#e6a01a", "#2fae84", "#d87aa8"  # of slots 1 to M, told apart by all kinds of eyes
VALUE = "#98a2ae"  # of the ordinary value
ROWS = ["river", "bolt", "winter", "spring", "autumn", "well", "coil", "jump"]
WORD = ROWS.index("spring")
CELL, GAP, STEP = 38, 5, 31  # width of a slot, space between two, height of a row
GRID_X, GRID_Y = 112, 118
LAYERS = [("layer L", 40, (0.5, 0.25, 1.15, 1.75, 0.4)),  # y, and the gates of M_1 … M_M and of V
          ("layer 2", 204, (0.3, 1.7, 0.5, 0.9, 1.0)),
          ("layer 1", 342, (1.5, 0.45, 0.8, 0.25, 1.4))]
PAST = [(0.9, 0.3, 0.6, 1.2, 0.5), (0.2, 0.5, 0.9, 0.2, 1.7), (0.7, 1.3, 0.2, 0.6, 0.8)]  # of other tokens
STYLE = """
text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 16px; fill: #1f2328 }
.small { font-size: 14px; fill: #59636e } .bold { font-weight: 600 } .on { fill: #10161d }
.page { fill: #ffffff } .panel { fill: #f4f6f8; stroke: #d1d9e0 } .box { fill: #ffffff; stroke: #8c959f }
.cell { fill: #e3e7ec } .line { stroke: #59636e; stroke-width: 2; fill: none } .head { fill: #59636e }
.bus { stroke: #8250df; stroke-width: 3; fill: none } .bushead { fill: #8250df } .lit { fill: #8250df }
.frame { stroke: #8250df; stroke-width: 2.5; fill: none } .mark { fill: #ece2fc; stroke: #8250df }
.one { stroke: #8c959f; stroke-dasharray: 3 4 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .small { fill: #aab4bf } .page { fill: #0d1117 }
.panel { fill: #151b23; stroke: #3d444d } .box { fill: #212830; stroke: #6b7683 } .cell { fill: #2a313a }
.line { stroke: #aab4bf } .head { fill: #aab4bf } .one { stroke: #6b7683 } .on { fill: #10161d }
.bus, .frame { stroke: #b58cff } .bushead, .lit { fill: #b58cff } .mark { fill: #2e2150; stroke: #b58cff }
}
"""
parts = []


def add(element):
    parts.append(element)


def text(x, y, words, kind="", anchor="start"):
    """Words at (x, y); what stands in [ ] becomes a subscript."""
    words = words.replace("[", '<tspan font-size="75%" dy="5">')
    words = words.replace("]", '</tspan><tspan dy="-5">&#8203;</tspan>')
    add(f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>')


def box(x, y, width, height, kind="", radius=4, fill=None):
    color = f' style="fill:{fill}"' if fill else ""
    add(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" class="{kind}"'
        f"{color}/>")


def line(points, kind="line", head=True):
    path = " L".join(f"{x} {y}" for x, y in points)
    end = f' marker-end="url(#{"bushead" if kind == "bus" else "head"})"' if head else ""
    add(f'<path d="M{path}" class="{kind}" stroke-linejoin="round"{end}/>')


def stack(x, bottom, width, gates, scale):
    """A mixed value: its parts on top of each other, as high as their gates, the ordinary value lowest."""
    for gate, color in zip((gates[-1], *gates[:-1]), (VALUE, *COLORS), strict=True):
        bottom -= gate * scale
        box(x, bottom, width, gate * scale, radius=0, fill=color)


def bank(y_row):
    text(30, 40, "one bank E", "bold")
    text(30, 62, "V × M slots of width d, for all layers", "small")
    text(GRID_X + 2 * (CELL + GAP) - GAP / 2, 102, "M slots for each token", "small", "middle")
    for i, word in enumerate(ROWS):
        y, lit = GRID_Y + i * STEP, i == WORD
        text(GRID_X - 12, y + 18, word, "lit bold" if lit else "small", "end")
        for j, color in enumerate(COLORS):
            box(GRID_X + j * (CELL + GAP), y, CELL, 25, "" if lit else "cell", fill=color if lit else None)
    for j in range(len(COLORS)):
        text(GRID_X + j * (CELL + GAP) + CELL / 2, GRID_Y + len(ROWS) * STEP + 17, "⋮", "small", "middle")
    text(GRID_X - 34, GRID_Y + len(ROWS) * STEP + 17, "V rows", "small", "middle")
    box(GRID_X - 5, y_row - 17.5, 4 * (CELL + GAP) + 5, 35, "frame", 7)


def layer(name, y, gates):
    x = 396
    box(x, y, 534, 118, "panel", 10)
    text(x + 14, y + 25, name, "bold")
    box(x + 14, y + 38, 82, 36, "box", 6)
    text(x + 55, y + 61, "router", "", "middle")
    line([(x + 96, y + 56), (x + 122, y + 56)])
    line([(x + 132, y + 42), (x + 316, y + 42)], "one", False)
    text(x + 108, y + 46, "g", "small", "middle")
    text(x + 322, y + 47, "1", "small")
    for i, (gate, color) in enumerate(zip(gates, (*COLORS, VALUE), strict=True)):
        left = x + 132 + i * 37
        box(left + 7, y + 74 - 32 * gate, 22, 32 * gate, fill=color, radius=2)
        box(left, y + 80, 34, 26, fill=color)
        text(left + 17, y + 98, f"M[{'123M'[i]}]" if i < 4 else "V", "on", "middle")
    line([(x + 322, y + 66), (x + 346, y + 66)])
    text(x + 333, y + 86, "Σ", "small", "middle")
    stack(x + 353, y + 88, 26, gates, 14)
    text(x + 366, y + 108, "V[S]", "bold", "middle")
    line([(x + 384, y + 66), (x + 408, y + 66)])
    box(x + 414, y + 12, 108, 94, "box", 6)
    text(x + 468, y + 32, "attention", "", "middle")
    for i, past in enumerate((*PAST, gates)):
        stack(x + 432 + i * 20, y + 83, 13, past, 10)
    text(x + 468, y + 100, "KV cache", "small", "middle")


def draw():
    """The drawing, as the text of an SVG file."""
    parts.clear()
    y_row = GRID_Y + WORD * STEP + 12.5
    box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "page", 12)
    bank(y_row)
    right = GRID_X + 4 * (CELL + GAP)
    for name, y, gates in LAYERS:
        layer(name, y, gates)
        line([(right, y_row), (344, y_row), (344, y + 93), (522, y + 93)], "bus")
    text(right + 8, y_row - 12, "M[t]", "lit bold")
    line([(663, 342), (663, 330)])
    line([(663, 204), (663, 190)], head=False)
    text(663, 184, "⋮", "", "middle")
    line([(663, 172), (663, 166)])
    y = 488  # the text, which is read at the bottom
    text(150, y + 22, "ice melts in early", "", "end")
    box(158, y, 66, 32, "mark", 7)
    text(191, y + 22, "spring", "lit bold", "middle")
    line([(158 + 33, y), (191, 462), (22, 462), (22, y_row), (36, y_row)], "bus")
    text(232, y + 22, "w[t]", "small")
    line([(258, y + 16), (663, y + 16), (663, 468)])
    text(400, y + 8, "x, the ordinary way", "small")
    text(30, y + 56, "one row a token: an index, no product", "small")
    text(930, y + 56, "gates g = 2σ(x W[G]) of each layer and head say how much of V and of each slot to use",
         "small", "end")
    heads = "".join(f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="{size}" '
                    f'markerHeight="{size}" orient="auto"><path d="M0 0L10 5L0 10z" class="{name}"/></marker>'
                    for name, size in (("head", 5), ("bushead", 4)))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
            f"<title>MoVE: one bank of value embeddings, a router in each layer</title>\n"
            f"<style>{STYLE}</style>\n<defs>{heads}</defs>\n" + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    Path(__file__).with_name("move.svg").write_text(draw(), encoding="utf-8")
