"""The curves of one run's report: training by steps, drawn for a page that is light or dark.

for curve in curves_of(run):
    curve.svg()                # to stand in HTML: colours are the page's own
    curve.save(Path("report")) # a PNG on white
"""

import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ..evaluation.figures import STYLE
from ..events import began
from ..runs import Run

TEXT, RULE, FIRST, SECOND = "#1c1e21", "#e2e4e8", "#0072b2", "#d55e00"
PAGE = {TEXT: "currentColor", RULE: "var(--rule)", FIRST: "var(--first)", SECOND: "var(--second)"}
"""What the colours of a drawing are on a page, see `templates/report.html`."""
BINS = 120
"""Points of a smoothed curve."""
Points = list[tuple[float, float]]


@dataclass
class Curve:
    """One quantity over the steps of a run.

    Attributes:
        title: what it is, with its unit.
        name: of a file.
        raw: (step, value) of each step, drawn faintly, and smoothed by means over bins.
        exact: a second curve, drawn as it is.
        marks: steps at which a launch went on.
        highest: of the axis, beyond which little is left out; None: as the values are.
    """

    title: str
    name: str
    raw: Points
    exact: Points = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    highest: float | None = None

    def draw(self, figure: Figure) -> None:
        axis = figure.subplots()
        smooth = binned(self.raw)
        if len(self.raw) > 2 * len(smooth):
            axis.plot(*zip(*binned(self.raw, 6 * BINS), strict=True), color=FIRST, linewidth=0.6, alpha=0.3)
        both = [(smooth, FIRST, "training"), (self.exact, SECOND, "validation")]
        both = sorted((line for line in both if line[0]), key=lambda line: line[0][-1][1])
        for number, (points, colour, name) in enumerate(both):
            marker = "o" if len(points) < 30 else None
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, marker=marker, markersize=3)
            if len(both) > 1:
                # The lower line's name below its end, so that they do not overlap.
                axis.annotate(name, points[-1], xytext=(5, 0), textcoords="offset points", color=colour, fontsize=9,
                              va="bottom" if number else "top", annotation_clip=False)  # fmt: skip
        for step in self.marks:
            axis.axvline(step, color=TEXT, linewidth=0.7, linestyle=(0, (2, 3)), alpha=0.6)
        if self.highest is not None:
            low = min(value for _, value in self.raw + self.exact)
            axis.set_ylim(low - 0.05 * (self.highest - low), self.highest)
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        if self.name == "speed":
            axis.yaxis.set_major_formatter(EngFormatter(sep=" "))
        axis.set_xlabel("step")

    def render(self, **options) -> bytes:
        colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        look = dict.fromkeys(colours, TEXT) | {"grid.color": RULE, "svg.fonttype": "none", "svg.hashsalt": self.name}
        with matplotlib.rc_context(STYLE | look):
            figure = Figure(figsize=(5.4, 2.7), layout="constrained")
            self.draw(figure)
            stream = io.BytesIO()
            figure.savefig(stream, dpi=150, **options)
        return stream.getvalue()

    def svg(self) -> Markup:
        """For HTML. Nothing of the run but numbers is in it."""
        text = self.render(format="svg", transparent=True).decode()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        for colour, name in PAGE.items():
            text = text.replace(colour, name)
        # Elements of several drawings on a page need names of their own.
        return Markup(re.sub(r'(id="|url\(#|href="#)', rf"\1{self.name}-", text).replace("<svg", '<svg role="img"', 1))

    def save(self, folder: Path) -> str:
        """Writes folder/NAME.png; returns its path from beside the folder."""
        (folder / f"{self.name}.png").write_bytes(self.render(format="png"))
        return f"{folder.name}/{self.name}.png"


def binned(points: Points, count: int = BINS) -> Points:
    """Means over at most `count` stretches of steps."""
    if not points:
        return []
    width = max((points[-1][0] + 1) / count, 1)
    bins: dict[int, Points] = {}
    for point in points:
        bins.setdefault(int(point[0] / width), []).append(point)
    return [tuple(sum(column) / len(found) for column in zip(*found, strict=True)) for found in bins.values()]


def curves_of(run: Run) -> list[Curve]:
    """Loss, learning rate, gradient norm and speed, as far as they are recorded."""
    first = began(run.events)
    marks = [event["step"] for event in run.events if event["event"] == "launch" and event["time"] != first]

    def of(name: str) -> Points:
        return [(r["step"], r[name]) for r in run.steps if r.get(name) is not None]

    validations = [(r["step"], r["validation_loss"]) for r in run.validations]
    loss = of("loss")
    settled = [value for points in (binned(loss), validations) for _, value in points[len(points) // 10 :]]
    norms = sorted(value for _, value in binned(of("grad_norm")))
    curves = [
        Curve("loss, nats a token", "loss", loss, validations, highest=1.02 * max(settled) if settled else None),
        Curve("learning rate", "learning-rate", of("lr")),
        Curve("norm of the gradient, before clipping", "gradient-norm", of("grad_norm"),
              highest=2 * norms[len(norms) * 9 // 10] if norms else None),
        Curve("speed, tokens a second", "speed", of("tokens_per_second")),
    ]  # fmt: skip
    for curve in curves:
        curve.marks = marks
        if curve.highest is not None and any(value > curve.highest for _, value in curve.raw + curve.exact):
            curve.title += ", its highest values cut off"
        else:
            curve.highest = None
    return [curve for curve in curves if curve.raw or curve.exact]
