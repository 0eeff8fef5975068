"""Charts of a report as SVG, made for 340 pixels: that is half a laptop's column and the whole of a phone's.

Colours are classes (``c0`` .. ``c7``) that the page's style sheet defines for light and dark; what a colour tells is
told by a dash, a shape or a name as well.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

COLOURS, DASHES = 8, ("", "5 3", "1.5 3", "8 3 2 3")
_WIDTH, _HEIGHT = 340, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 36

Number = float | int | None


@dataclass
class Series:
    """A line; ``y`` is None where there is no value."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    colour: int = 0
    dash: int = 0


@dataclass
class Axis:
    """``low``, ``high``: by default those of the values; of a logarithmic axis both must be positive."""

    label: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False
    percent: bool = False
    step: float | None = None  # between ticks

    def fitted(self, values: Sequence[float]) -> "Axis":
        values = [v for v in values if math.isfinite(v) and (v > 0 or not self.log)] or [1.0]
        low = min(values) if self.low is None else self.low
        high = max(values) if self.high is None else self.high
        if high <= low:
            high = low * 2 if low > 0 else low + 1
        return Axis(self.label, low, high, self.log, self.percent)

    def rounded(self) -> "Axis":
        """Out to the next ticks, where the ends were not given."""
        assert self.low is not None
        assert self.high is not None
        if self.log:
            return self
        step = _step(self.low, self.high)
        low, high = math.floor(self.low / step + 1e-9) * step, math.ceil(self.high / step - 1e-9) * step
        return Axis(self.label, low, high, percent=self.percent, step=step)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        assert self.low is not None
        assert self.high is not None
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        assert self.low is not None
        assert self.high is not None
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, math.ceil((last - first) / 4))
            return [10.0**k for k in range(last, first - 1, -every)][::-1]
        step = self.step or _step(self.low, self.high)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]

    def text(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:.6g} %".replace("e-0", "e-")
        if value and abs(value) < 1e-3:
            digits, power = f"{value:.2e}".split("e")
            return f"{float(digits):g}e{int(power)}"
        if abs(value) >= 1e4:
            return f"{value / 1000:,.6g}k"
        return f"{value:,.6g}"


def _step(low: float, high: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, of which about four lie between."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)


def line_chart(series: Sequence[Series], x: Axis, y: Axis, title: str) -> Markup:
    """Lines over a common axis; ``title`` says in words what is drawn, for those who do not see it."""
    x = x.fitted([value for s in series for value in s.x])
    y = y.fitted([value for s in series for value in s.y if value is not None]).rounded()
    parts = _frame(x, y)
    for s in series:
        points = [
            None if value is None or not math.isfinite(value) else (_x(x, at), _y(y, value))
            for at, value in zip(s.x, s.y, strict=True)
        ]
        parts.append(f'<path class="line c{s.colour % COLOURS}"{_dash(s.dash)} d="{_path(points)}"/>')
        known = [p for p in points if p is not None]
        if len(known) <= 12:  # few enough to be told apart
            parts += [
                f'<circle class="dot c{s.colour % COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>' for a, b in known
            ]
    return _svg(_WIDTH, _HEIGHT, title, parts)


def histogram_chart(edges: Sequence[float], series: Sequence[Series], x: Axis, title: str) -> Markup:
    """Shares of values in bins, as filled steps; ``y`` of a series is one value a bin."""
    x = Axis(x.label, edges[0], edges[-1], percent=x.percent)
    y = Axis("", 0.0, max([value or 0 for s in series for value in s.y] + [1e-9]) * 1.05, percent=True)
    parts = _frame(x, y)
    for s in series:
        steps = [(_x(x, edges[0]), _y(y, 0))]
        for low, high, value in zip(edges, edges[1:], s.y, strict=False):
            steps += [(_x(x, low), _y(y, value or 0)), (_x(x, high), _y(y, value or 0))]
        steps.append((_x(x, edges[-1]), _y(y, 0)))
        parts.append(f'<path class="area c{s.colour % COLOURS}" d="{_path(steps)}Z"/>')
        parts.append(f'<path class="line thin c{s.colour % COLOURS}"{_dash(s.dash)} d="{_path(steps)}"/>')
    return _svg(_WIDTH, _HEIGHT, title, parts)


def _frame(x: Axis, y: Axis) -> list[str]:
    """Grid, ticks and labels."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y.ticks():
        at = _y(y, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(y.text(tick))}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    for tick in x.ticks():
        at = _x(x, tick)
        anchor = "end" if at > right - 12 else "middle"
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{escape(x.text(tick))}</text>')
    if x.label:
        middle = (_LEFT + right) / 2
        parts.append(
            f'<text class="label" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x.label)}</text>'
        )
    return parts


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - min(1.0, max(0.0, axis.place(value))) * (_HEIGHT - _TOP - _BOTTOM)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    text, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        text.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L"
    return "".join(text)


def _dash(number: int) -> str:
    dash = DASHES[number % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _svg(width: float, height: float, title: str, parts: Sequence[str], kind: str = "chart") -> Markup:
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def swatch(colour: int, dash: int) -> Markup:
    """A line of a legend."""
    line = f'<path class="line c{colour % COLOURS}"{_dash(dash)} d="M1 6H23"/>'
    return Markup(f'<svg class="swatch" viewBox="0 0 24 12" width="24" height="12" aria-hidden="true">{line}</svg>')


def strip(rows: Sequence[tuple[float, float, float, int] | None], chance: Number, others: Sequence[float]) -> Markup:
    """Metrics in 0..1 on one scale: of each run (value, low, high, colour) a dot on its interval; a line for chance,
    and below diamonds for figures of ``others``."""
    width, step, left = 190, 13, 6
    below = 4 + step * len(rows)
    height = below + (12 if others else 4)

    def at(value: float) -> float:
        return left + min(1.0, max(0.0, value)) * (width - 2 * left)

    parts = [f'<path class="grid" d="M{at(v):.1f} 2V{height - 2}"/>' for v in (0, 0.25, 0.5, 0.75, 1)]
    if chance is not None:
        parts.append(f'<path class="chance" d="M{at(chance):.1f} 1V{height - 1}"/>')
    for number, row in enumerate(rows):
        if row is None:
            continue
        (value, low, high, colour), y = row, 4 + step * (number + 0.5)
        parts.append(f'<path class="whisker c{colour % COLOURS}" d="M{at(low):.1f} {y}H{at(high):.1f}"/>')
        parts.append(f'<circle class="dot c{colour % COLOURS}" cx="{at(value):.1f}" cy="{y}" r="3.6"/>')
    parts += [f'<path class="other" d="M{at(v):.1f} {below + 1}l3.5 3.5l-3.5 3.5l-3.5 -3.5z"/>' for v in others]
    return _svg(width, height, "the same figures drawn from 0 to 100 %", parts, "strip")


def confusion_matrix(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    """Rows are what an image shows, columns what it was taken for; shaded by the share of the row."""
    size = len(classes)
    cell = 25 if size <= 12 else 14
    letters = min(14, max(map(len, classes)))
    left, top = 10 + 6 * letters, 10 + 5 * letters
    parts = []
    for i, (name, row) in enumerate(zip(classes, counts, strict=True)):
        label, y = escape(_short(name, 14)), top + i * cell
        parts.append(f'<text x="{left - 6}" y="{y + cell / 2 + 3.5:g}" text-anchor="end">{label}</text>')
        x, total = left + i * cell + cell / 2 + 2, max(1, sum(row))
        parts.append(f'<text transform="translate({x:g} {top - 6}) rotate(-50)">{label}</text>')
        for j, count in enumerate(row):
            if not count:
                continue
            what = f"{name} taken for {classes[j]}: {count} of {total}"
            shade = 0.12 + 0.88 * count / total
            parts.append(
                f'<rect class="cell {"c0" if i == j else "c1"}" x="{left + j * cell + 1}" y="{y + 1}" '
                f'width="{cell - 2}" height="{cell - 2}" rx="3" fill-opacity="{shade:.2f}">'
                f"<title>{escape(what)}</title></rect>"
            )
            if size <= 12:
                strong = ' class="on"' if shade > 0.5 else ' class="off"'
                at = f'x="{left + (j + 0.5) * cell:g}" y="{y + cell / 2 + 3.5:g}"'
                parts.append(f'<text {at} text-anchor="middle"{strong}>{count}</text>')
    side = size * cell
    parts.insert(0, f'<rect class="board" x="{left}" y="{top}" width="{side}" height="{side}" rx="4"/>')
    return _svg(left + side + 6 * min(letters, 8), top + side + 6, "confusion matrix", parts, "matrix")


def route_map(unit: str, routes: dict[str, Sequence[str]], own: Callable[[str, int], Number]) -> Markup:
    """One unit of all tasks: in each layer (a column) the tasks that share are joined; a square is a copy of its own, a
    diamond not decided yet. ``own(task, layer)``: its probability, where it was learned."""
    cell, letters = 22, min(16, max(map(len, routes)))
    left, top = 12 + 7 * letters, 20
    layers = max(map(len, routes.values()))
    every = 1 if layers <= 16 else 4
    parts = []
    for layer in range(layers):
        x = left + (layer + 0.5) * cell
        if layer % every == 0 and layers > 1:
            parts.append(f'<text x="{x:g}" y="{top - 7}" text-anchor="middle">{layer + 1}</text>')
        sharing = [row for row, by_layer in enumerate(routes.values()) if by_layer[layer] == "shared"]
        if len(sharing) > 1:
            first, last = (top + (row + 0.5) * cell for row in (sharing[0], sharing[-1]))
            parts.append(f'<path class="join" d="M{x:g} {first:g}V{last:g}"/>')
    for row, (task, by_layer) in enumerate(routes.items()):
        y = top + (row + 0.5) * cell
        name = escape(_short(task, 16))
        parts.append(f'<text class="name" x="{left - 8:g}" y="{y + 4:g}" text-anchor="end">{name}</text>')
        for layer, route in enumerate(by_layer):
            x, probability = left + (layer + 0.5) * cell, own(task, layer)
            sure = "" if probability is None else f" (own {100 * probability:.0f} %)"
            tip = f"<title>{escape(f'{task}, {unit} {layer + 1}: {route}{sure}')}</title>"
            if route == "shared":
                parts.append(f'<circle class="shared" cx="{x:g}" cy="{y:g}" r="5.2">{tip}</circle>')
            elif route == "own":
                at = f'x="{x - 6:g}" y="{y - 6:g}" width="12" height="12" rx="2.5"'
                parts.append(f'<rect class="own" {at}>{tip}</rect>')
            else:
                parts.append(f'<path class="open" d="M{x:g} {y - 6:g}l6 6l-6 6l-6 -6z">{tip}</path>')
    width = left + layers * cell + 8
    return _svg(width, top + len(routes) * cell + 6, f"routes of {unit}", parts, "map")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
