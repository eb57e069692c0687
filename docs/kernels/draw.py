"""Draws the pictures of docs/kernels.md: python docs/kernels/draw.py [FOLDER]."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

INK, FAINT, PAPER = "#20242c", "#c9ced8", "#ffffff"
BLUE, GREEN, AMBER, RED = "#7aa6e0", "#84c191", "#f0c36d", "#d96b62"
HUES = ["#7aa6e0", "#84c191", "#f0c36d", "#d96b62", "#b18bd0", "#6fc3c4", "#d99ac0", "#a9a26b"]


class Drawing:
    """Shapes on white paper, which reads on a dark page too."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height, self.shapes = width, height, []

    def box(self, x: float, y: float, width: float, height: float, fill: str = "none", edge: str = INK) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{edge}"/>'
        )

    def line(self, x: float, y: float, to_x: float, to_y: float, edge: str = INK) -> None:
        self.shapes.append(f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{edge}"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start", size: int = 13) -> None:
        place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
        self.shapes.append(f'<text {place} fill="{INK}">{escape(text)}</text>')

    def save(self, path: Path) -> None:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="sans-serif">'
        )
        paper = f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>'
        path.write_text("\n".join([head, paper, *self.shapes, "</svg>"]) + "\n")


def product() -> Drawing:
    """The matrix product that a convolution is: a block's tile, and one step through its depth."""
    drawing = Drawing(720, 290)
    taps, slabs, size = 9, 2, 16  # a 3 x 3 window of 128 channels
    left, top, rows = 60, 60, 160
    depth = taps * slabs * size
    step = 7 * size
    for tap in range(taps):
        x = left + tap * slabs * size
        drawing.box(x, top, slabs * size, rows, "#eef2f8" if tap % 2 else PAPER, FAINT)
        drawing.text(x + size, top - 6, f"{tap // 3},{tap % 3}", "middle", 11)
    drawing.box(left, top, depth, rows)
    drawing.box(left, top + 64, depth, 40, "none", RED)
    drawing.box(left + step, top + 64, size, 40, BLUE)
    drawing.text(left, top - 26, "depth: taps (r, s), of each the channels in slabs of 64")
    drawing.text(left - 8, top + rows / 2, "pixels", "end", 11)
    drawing.text(left, top + rows + 20, "windows of x: never written down")
    right, columns = left + depth + 44, 120
    drawing.text(right - 22, top + rows / 2 + 5, "×", "middle", 22)
    drawing.box(right, top, columns, rows, PAPER)
    drawing.box(right, top, 48, rows, "none", RED)
    drawing.box(right, top + step * rows / depth, 48, size * rows / depth, GREEN)
    drawing.text(right, top - 6, "output channels", size=11)
    drawing.text(right, top + rows + 20, "weight")
    result = right + columns + 44
    drawing.text(result - 22, top + rows / 2 + 5, "=", "middle", 22)
    drawing.box(result, top, columns - 20, rows, PAPER)
    drawing.box(result, top + 64, 40, 40, AMBER, RED)
    drawing.text(result, top - 6, "output channels", size=11)
    drawing.text(result, top + rows + 20, "y, before bias and ReLU")
    drawing.text(
        left, 270, "red: a block's tile · blue, green: what one step of its depth copies and multiplies", size=12
    )
    return drawing


def walk() -> Drawing:
    """The pixels that one im2col copy reads: those of the second tile of 128, at the first tap of a 3 x 3 window."""
    side, padding, tile, cell = 13, 1, 128, 16
    whole = side + 2 * padding
    drawing = Drawing(720, 340)
    for image in range(2):
        left, top = 60 + image * 340, 50
        read = {}
        for pixel in range(tile, 2 * tile):
            number, within = divmod(pixel, side * side)
            if number == image:
                read[divmod(within, side)] = pixel - tile  # tap (0, 0): the padded image's same row and column
        for row in range(whole):
            for column in range(whole):
                inside = padding <= row < whole - padding and padding <= column < whole - padding
                fill = (BLUE if inside else AMBER) if (row, column) in read else ("#f2f4f8" if inside else PAPER)
                x, y = left + column * cell, top + row * cell
                drawing.box(x, y, cell, cell, fill, FAINT)
                if (row, column) in read and read[row, column] in (0, tile - 1):
                    drawing.text(x + cell / 2, y + 12, "a" if read[row, column] == 0 else "z", "middle", 11)
        drawing.box(left + padding * cell, top + padding * cell, side * cell, side * cell)
        drawing.text(left, top - 10, f"image {image}, {side} × {side}, with its padding")
    drawing.text(
        60,
        318,
        "one copy: output pixels 128 (a) to 255 (z) at tap (0, 0) · amber: padding, which arrives as zeros",
        size=12,
    )
    return drawing


def swizzle() -> Drawing:
    """Eight lines of eight 16-byte chunks in shared memory, plain and as bulk copies store them."""
    cell = 34
    drawing = Drawing(720, 370)
    for number, (title, mask) in enumerate(
        (("plain: chunk 3 of all lines in the same banks", 0), ("swizzled: chunk c of line l at c xor l", 7))
    ):
        left, top = 50 + number * 340, 60
        drawing.text(left, top - 26, title)
        for place in range(8):
            drawing.text(left + (place + 0.5) * cell, top - 6, f"{4 * place}–{4 * place + 3}", "middle", 10)
        for line in range(8):
            drawing.text(left - 8, top + line * cell + 22, f"line {line}", "end", 10)
            for place in range(8):
                chunk = place ^ (line & mask)
                x, y = left + place * cell, top + line * cell
                drawing.box(x, y, cell, cell, HUES[chunk], PAPER)
                drawing.text(x + cell / 2, y + 22, str(chunk), "middle")
                if chunk == 3:
                    drawing.box(x + 2, y + 2, cell - 4, cell - 4)
    drawing.text(
        50,
        354,
        "numbers above: banks of 4 bytes · a product reads one chunk of eight lines at a time: outlined, chunk 3",
        size=12,
    )
    return drawing


def ring() -> Drawing:
    """The ring of stages in time: copies go ahead as far as stages are free, products follow one another."""
    stages, steps, latency, every, multiply, unit = 4, 10, 7, 2, 3, 15
    drawing = Drawing(720, 250)
    left, top, height = 80, 50, 34
    begins, landed, free = [], [], []
    for step in range(steps):
        begin = max(begins[-1] + every if begins else 0, free[step - stages] if step >= stages else 0)
        begins.append(begin)
        landed.append(begin + latency)
        free.append(max(landed[step], free[-1] if free else 0) + multiply)
    for stage in range(stages):
        y = top + stage * height
        drawing.text(left - 10, y + 19, f"stage {stage}", "end", 12)
        drawing.line(left, y + height - 5, left + 40 * unit, y + height - 5, FAINT)
        for step in range(stage, steps, stages):
            start = free[step] - multiply
            drawing.box(left + begins[step] * unit, y, (landed[step] - begins[step]) * unit, height - 8, BLUE, PAPER)
            drawing.box(left + landed[step] * unit, y, (start - landed[step]) * unit, height - 8, "#f2f4f8", PAPER)
            drawing.box(left + start * unit, y, multiply * unit, height - 8, GREEN, PAPER)
            drawing.text(left + (start + multiply / 2) * unit, y + 18, str(step), "middle", 12)
    drawing.text(left, top - 20, "time →", size=12)
    drawing.text(
        left, 206, "blue: expect, then copies on their way · at its end the last byte completes full[stage]", size=12
    )
    drawing.text(
        left,
        224,
        "grey: landed, waits for its turn · green: step n is multiplied · at its end empty[stage] completes",
        size=12,
    )
    drawing.text(left, 242, "lengths are made up: the picture shows the order, not a card", size=12)
    return drawing


def planes() -> Drawing:
    """A row of the folded image in shared memory, and what a product over its first sixteen channels reads of it at two
    of a row's taps."""
    chunks, pixels, cell, gap = 6, 18, 32, 26
    drawing = Drawing(720, 345)
    left, top = 100, 50
    drawing.text(left, top - 26, "one row: a plane of pixels for each 8 channels, 16 bytes a pixel")
    for pixel in range(pixels):
        drawing.text(left + (pixel + 0.5) * cell, top - 6, str(pixel), "middle", 10)
    for chunk in range(chunks):
        y = top + chunk * (cell + 4)
        drawing.text(left - 10, y + 20, f"channels {8 * chunk}–{8 * chunk + 7}", "end", 10)
        for pixel in range(pixels):
            fill = HUES[pixel // 8] if chunk < 2 and pixel < 16 else "#f2f4f8"
            drawing.box(left + pixel * cell, y, cell, cell, fill, PAPER)
        for group in range(2 if chunk < 2 else 0):
            drawing.box(left + (8 * group + 1) * cell, y + 2, 8 * cell - 1, cell - 4, "none", RED)
    bottom = top + chunks * (cell + 4)
    lines = (
        "blue, green: what one product reads at tap s = 0, in core matrices of eight pixels × 16 bytes",
        "red: the same at tap s = 1: the descriptor begins 16 bytes later, and is otherwise the same",
        "leading: from plane to plane, 58 × 16 bytes · stride: eight pixels, 128 bytes",
    )
    for number, line in enumerate(lines):
        drawing.text(left, bottom + gap + 18 * number, line, size=12)
    return drawing


PICTURES = {"product": product, "walk": walk, "swizzle": swizzle, "ring": ring, "planes": planes}


def draw(folder: Path) -> None:
    for name, picture in PICTURES.items():
        picture().save(folder / f"{name}.svg")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
