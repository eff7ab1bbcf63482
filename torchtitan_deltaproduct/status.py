"""Where a run is, from the files it writes: metrics.jsonl, events.jsonl, heartbeat.json.

    python -m torchtitan_deltaproduct.status outputs/run                       all of one run
    python -m torchtitan_deltaproduct.status outputs/*/run --watch 10          a line a run, every ten seconds

Of checkpoints it reads no more than the markers. It needs neither torch nor the machine that trains.
"""

import contextlib
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .arguments import Parser, path, seconds
from .checkpoint.folders import step_folders
from .checkpoint.marker import read_marker
from .errors import CheckpointError, UserError, exit_on_user_error
from .events import LIMIT, NAME, last_stop, read_events
from .files import read_object
from .formats import LARGEST, sparkline
from .history import overview, thinned
from .runs import short_names

LAUNCHES = 20
"""Lines of launches that are shown."""
ROW = ("state", "step", "loss", "validation", "best", "tokens/s", "to go")
"""What the line of one of several runs says."""
WIDE = 110
"""Characters of a terminal that has room for all of it, with curves."""
FRESH = 60.0
"""Seconds after which a heartbeat is no longer taken for a living run."""


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("torchtitan_deltaproduct.status", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=path, help="run folder; of several, a line each")
    parser.add_argument("--watch", type=seconds, metavar="SECONDS", help="again every so often, until Ctrl-C")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    while True:
        content, refused = reports(list(map(Path, options.runs)), time.time(), console.width)
        if options.watch:
            # Does nothing where the output is no terminal.
            console.clear()
        console.print(content)
        for error in refused:
            print(f"left out: {error}", file=sys.stderr)
        if not options.watch:
            return
        time.sleep(options.watch)


def reports(runs: list[Path], now: float, width: int) -> tuple[Table, list[UserError]]:
    """All of one run, or a line for each of several; and why others are left out.

    Args:
        runs: the run folders.
        now: seconds since 1970.
        width: of the terminal, in characters.

    Raises:
        UserError: none of the folders is a run's.
    """
    good, refused = [], []
    for run in runs:
        try:
            good.append((run, *read(run)))
        except UserError as error:
            refused.append(error)
    if not good:
        raise refused[0]
    if len(runs) == 1:
        return report(runs[0], now), refused
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold", min_width=8)
    wide = width >= WIDE
    columns = [name for name in ROW if wide or name not in ("best", "tokens/s")]
    for name in columns:
        table.add_column(name, no_wrap=True)
    for name, (run, records, _, events) in zip(short_names([run for run, *_ in good]), good, strict=True):
        cells = row(run, records, events, now, blocks=12 if wide else 0)
        table.add_row(escape(name), *(cells[name] for name in columns))
    return table, refused


def read(run: Path) -> tuple[list[dict], bool, list[dict]]:
    """Records, whether these are all, and events.

    Raises:
        UserError: the folder is not a run's.
    """
    records, whole = overview(run / "metrics.jsonl", setting(run, "validation", "freq"))
    events = read_events(run)
    if not records and not events:
        what = "has neither metrics.jsonl nor events.jsonl" if run.is_dir() else "is not a folder"
        raise UserError(f"{run} {what}; expected the dump_folder of a run that was started")
    return records, whole, events


def row(run: Path, records: list[dict], events: list[dict], now: float, blocks: int) -> dict[str, str]:
    """What the line of one of several runs says, see `ROW`.

    Args:
        run: the folder.
        records, events: of it.
        now: seconds since 1970.
        blocks: width of the curve of losses; 0: none.
    """
    steps, total = [r for r in records if "loss" in r], setting(run, "training", "steps")
    how = re.split(r"[:,]| \d", state(events, read_object(run / "heartbeat.json"), now))[0]
    step = f"{steps[-1]['step']:,}" + (f"/{total:,}" if total else "") if steps else ""
    values = [r["validation_loss"] for r in records if r.get("validation_loss") is not None]
    newest, best = (f"{values[-1]:.4f}", f"{min(values, key=order):.4f}") if values else ("", "")
    typical = typical_step(steps)
    left = (total or 0) - steps[-1]["step"] if steps else 0
    speed = f"{typical['tokens_per_second']:,.0f}" if typical else ""
    to_go = ago(left * typical["seconds"]) if typical and left > 0 else ""
    last = [r["loss"] for r in steps if r["loss"] is not None]
    curve = f"{sparkline(last, blocks)} " if blocks and last else ""
    loss = f"{curve}{sum(last[-20:]) / len(last[-20:]):.4f}" if last else ""
    return dict(zip(ROW, (how, step, loss, newest, best, speed, to_go), strict=True))


def report(run: Path, now: float) -> Table:
    """The lines of one run.

    Args:
        run: the run folder.
        now: seconds since 1970.

    Raises:
        UserError: the folder is not a run's.
    """
    records, whole, events = read(run)
    beat, every = read_object(run / "heartbeat.json"), setting(run, "validation", "freq")
    steps, total = [r for r in records if "loss" in r], setting(run, "training", "steps")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in [
        ("run", f"[bold]{escape(str(run))}[/]"),
        ("state", state(events, beat, now)),
        ("step", progress(steps, total)),
        ("loss", losses(steps, whole)),
        ("validation", validation(records, every if not whole else None)),
        ("speed", speed(steps, total)),
        ("trouble", trouble(steps, events)),
        ("checkpoint", checkpoint(events, now)),
        ("best kept", best_kept(run)),
        *launches(events, cut=size_of(run / NAME) > LIMIT),
    ]:
        if text:
            table.add_row(name, text)
    return table


def setting(run: Path, section: str, name: str) -> int | None:
    """A number of the run's config.json; None if that does not say."""
    try:
        value = read_object(run / "config.json")["config"][section][name]
    except (KeyError, TypeError):
        return None
    return value if isinstance(value, int) else None


def state(events: list[dict], beat: dict, now: float) -> str:
    """One or two words, coloured, and since when."""
    beat = beat if isinstance(beat.get("time"), int | float) else {}
    stop, age = last_stop(events), now - beat.get("time", 0)
    if stop is None and beat and age < FRESH:
        where = escape(f"on {beat.get('host')} after the {beat.get('after')}")
        return f"[green]running[/], heartbeat {age:.0f} s ago {where}"
    if stop is None:
        since = f"no heartbeat for {ago(age)}" if beat else "no heartbeat yet"
        return f"[red]silent[/]: {since}, and no word of a stop: killed, hanging, or starting"
    when = ago(now - stop["time"])
    if stop["reason"] == "finished":
        return f"[green]finished[/] {when} ago"
    word = {"signal": f"stopped on {escape(stop['detail'])}", "walltime": "stopped at its walltime"}.get(stop["reason"])
    if word:
        return f"[yellow]{word}[/] {when} ago, {'everything saved' if stop['saved'] else 'not saved'}"
    how = {"lost_peer": "lost a rank", "machine": "failed by its machine"}.get(stop["reason"], stop["reason"])
    return f"[red]{escape(how)}[/] {when} ago: {escape(stop['detail'])}"


def progress(steps: list[dict], total: int | None) -> str:
    if not steps:
        return ""
    step, tokens = steps[-1]["step"], steps[-1].get("tokens") or 0
    share = f" of {total:,} ({step / total:.1%})" if total else ""
    return f"{step:,}{share}, {tokens:,} tokens"


def losses(steps: list[dict], whole: bool = True, width: int = 48) -> str:
    """A line of blocks over the whole run, between its extremes, and the mean of the last steps."""
    values = [r["loss"] for r in steps if r["loss"] is not None]
    if not values:
        return ""
    last = values[-20:]
    mean = sum(last) / len(last)
    of = "" if whole else f" of {len(values):,} steps read"
    low = min(values, key=order)
    return f"{sparkline(values, width)}  {mean:.4f} over the last {len(last)} steps, lowest {low:.4f}{of}"


def validation(records: list[dict], every: int | None = None) -> str:
    """The newest and the best; `every` so many steps there is one, where not all need to have been read."""
    found = [r for r in records if "validation_loss" in r]
    if not found:
        return ""
    newest = found[-1]
    best = min(found, key=lambda r: order(r["validation_loss"]))
    extra = [
        f"{name} {newest[key]:,.4g}"
        for name, key in (("perplexity", "validation_perplexity"), ("bits/byte", "validation_bits_per_byte"),
                          ("token accuracy", "validation_token_accuracy"))
        if newest.get(key) is not None
    ]  # fmt: skip
    # A loss that is not finite is recorded as null.
    loss = "not finite" if newest["validation_loss"] is None else f"{newest['validation_loss']:.4f}"
    said = f"loss {loss} at step {newest['step']:,}" + "".join(f", {e}" for e in extra)
    if best is newest or not measured(best["validation_loss"]):
        return said
    some = f" of {len(found)} read" if thinned(newest["step"], every) else ""
    return f"{said}; best{some} {best['validation_loss']:.4f} at step {best['step']:,}"


def measured(value: float | None) -> bool:
    """Whether a number of a record is finite; an older file may hold NaN and Infinity."""
    return value is not None and abs(value) < LARGEST


def order(loss: float | None) -> float:
    """What losses are ordered by: those that are not finite behind all others."""
    return loss if measured(loss) else float("inf")


def typical_step(steps: list[dict]) -> dict | None:
    """The median of the last steps by their seconds: one that validates or saves is not typical."""
    timed = [r for r in steps[-50:] if measured(r.get("seconds")) and measured(r.get("tokens_per_second"))]
    return sorted(timed, key=lambda r: r["seconds"])[len(timed) // 2] if timed else None


def speed(steps: list[dict], total: int | None) -> str:
    typical = typical_step(steps)
    if typical is None:
        return ""
    newest = steps[-1]
    mfu = f", MFU {typical['mfu']:.1%}" if typical.get("mfu") else ""
    left = (total or 0) - steps[-1]["step"]
    eta = f", {ago(left * typical['seconds'])} to go" if left > 0 else ""
    goodput = f", goodput {newest['goodput']:.1%}" if newest.get("goodput") else ""
    said = f"{typical['tokens_per_second']:,.0f} tokens/s, {typical['seconds']:.3g} s a step{mfu}{goodput}{eta}"
    return f"{said}, {typical['memory_gib']:.1f} GiB a device" if typical.get("memory_gib") is not None else said


def trouble(steps: list[dict], events: list[dict]) -> str:
    parts = []
    for kind in ("skipped_step", "loss_spike", "save_failed", "bad_checkpoint"):
        found = [event for event in events if event["event"] == kind]
        if found:
            parts.append(f"{len(found)} x {kind.replace('_', ' ')} (last at step {found[-1]['step']:,})")
    lost = steps[-1].get("lost_records") if steps else 0
    return "; ".join(parts + ([f"{lost} records lost"] if lost else []))


def checkpoint(events: list[dict], now: float) -> str:
    saves = [event for event in events if event["event"] == "save"]
    if not saves:
        return "none yet"
    newest = saves[-1]
    when, took = ago(now - newest["time"]), newest["seconds"]
    why = escape(newest["reason"])
    return f"step {newest['step']:,}, complete with checksums {when} ago, took {took:.1f} s ({why})"


def best_kept(run: Path) -> str:
    """The checkpoints that `checkpoint.keep_best` keeps, by their markers; "" if it keeps none."""
    count = setting(run, "checkpoint", "keep_best")
    if not count:
        return ""
    losses, name = [], read_object(run / "config.json")["config"]["checkpoint"].get("folder", "checkpoint")
    for step, folder in step_folders(run / str(name)):
        with contextlib.suppress(CheckpointError):
            loss = read_marker(folder).validation_loss
            losses += [(loss, step)] if loss is not None else []
    return "; ".join(f"step {step:,}, validation loss {loss:.4f}" for loss, step in sorted(losses)[:count])


def size_of(path: Path) -> int:
    """Bytes of a file; 0 without one."""
    return path.stat().st_size if path.is_file() else 0


def launches(events: list[dict], cut: bool) -> Iterable[tuple[str, str]]:
    """One line for each of the newest launches: when, from which step, on how many ranks, and how it ended.

    Args:
        events: of the run.
        cut: whether some are missing, and launches cannot be numbered.
    """
    starts = [i for i, event in enumerate(events) if event["event"] == "launch"]
    for number, a in list(enumerate(starts, start=1))[-LAUNCHES:]:
        b = starts[number] if number < len(starts) else len(events)
        launch = events[a]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(launch["time"]))
        ranks = launch.get("ranks", "?")
        job = f", SLURM job {launch['slurm_job']}" if launch.get("slurm_job") else ""
        where = escape(f"{ranks} rank{'' if ranks == 1 else 's'} of {launch.get('host')}{job}")
        end = ending(last_stop(events[a:b]), newest=b == len(events))
        yield "launch" if cut else f"launch {number}", f"{when} from step {launch['step']:,} on {where}{escape(end)}"


def ending(stop: dict | None, newest: bool) -> str:
    """How a launch ended, to be appended to how it began."""
    if stop is None:
        return "" if newest else ", killed"
    at = "" if stop["step"] is None else f" at step {stop['step']:,}"
    if stop["reason"] in ("signal", "walltime", "finished"):
        return f", {stop['detail'] or stop['reason']}{at}"
    return f", {stop['reason']}{at}: {stop['detail']}"


def ago(seconds: float) -> str:
    """`42 s`, `3 min`, `5 h 20 min`, `2 d 3 h`."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


if __name__ == "__main__":
    exit_on_user_error(main)
