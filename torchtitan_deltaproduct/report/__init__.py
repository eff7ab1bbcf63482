"""Writes a run as one page: curves, what was asked, launches, checkpoints, samples, evaluations, data, provenance.

    python -m torchtitan_deltaproduct.report outputs/run                    outputs/run/report.html, complete in itself
    python -m torchtitan_deltaproduct.report outputs/run --markdown         outputs/run/report.md, pictures in report/
    python -m torchtitan_deltaproduct.report outputs/run --out page.html

Whatever stands in the run's files is shown as text: nothing of it is markup, and the page loads nothing.
"""

import html
import re
import time
from pathlib import Path
from typing import Any

from rich.text import Text

from .. import arguments
from ..files import write_atomically
from ..runs import Run, read_run, shown, visible
from ..status import state
from .sections import numbers, sections_of, stamp


def main(words: list[str] | None = None) -> None:
    parser = arguments.Parser("torchtitan_deltaproduct.report", __doc__)
    parser.add_argument("run", metavar="RUN", type=arguments.path, help="run folder")
    parser.add_argument("--markdown", action="store_true", help="Markdown and a folder of pictures, not HTML")
    parser.add_argument("--out", metavar="FILE", type=arguments.path,
                        help="to write (default: report.html or report.md in the run folder)")  # fmt: skip
    options = parser.parse_args(words)
    run = read_run(options.run)
    path = Path(options.out or run.path / ("report.md" if options.markdown else "report.html"))
    write(run, path, options.markdown)
    print(f"report: {path}")


def write(run: Run, path: Path, markdown: bool = False) -> None:
    """Writes the page; for Markdown also the folder of its pictures, beside it and named as it."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, autoescape=not markdown, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True)  # fmt: skip
    environment.filters |= {"md": escape_markdown, "indented": indented}
    folder = path.with_suffix("")
    if markdown:
        folder.mkdir(parents=True, exist_ok=True)
    template = environment.get_template("report.md" if markdown else "report.html")
    write_atomically(path, template.render(content(run, time.time()), folder=folder))


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#!|~$])", r"\\\1", text)


def indented(text: str) -> str:
    """Text as a code block of Markdown, whatever ends its lines."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def content(run: Run, now: float) -> dict[str, Any]:
    """What the templates show.

    Args:
        run: the run.
        now: seconds since 1970.
    """
    job = run.part("config").get("job")
    description = job.get("description") if isinstance(job, dict) else None
    described = "" if description in (None, "", "default job") else shown(description, 200)
    how = Text.from_markup(state(run.events, {}, now)).plain if run.events else ""
    written = f"page written {stamp(now)}"
    return {
        "title": visible(arguments.shown(run.path.resolve().name)),
        "subtitle": [text for text in (described, "; ".join(filter(None, (how, written)))) if text],
        "numbers": list(numbers(run)),
        "problems": run.problems,
        "sections": sections_of(run),
    }
