"""DCP's file writer, with checksums and the commit marker.

    dcp.save(states, storage_writer=MarkedWriter(folder, about, snapshot), planner=planner_for("a run's state"))

Each rank reads back and hashes the files it wrote; the coordinator writes DCP's index, config.json and, last of all,
complete.json. What fails on one rank (a full disk, say) is raised on all by DCP, and no marker is written.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..files import write_json
from .marker import INDEX, Marker, checksum, write_marker


@dataclass(frozen=True)
class About:
    """What the marker says beside the files; see `marker.Marker`."""

    step: int
    ranks: int
    reason: str
    validation_loss: float | None = None


@dataclass(frozen=True)
class _Hashed(WriteResult):
    """A write result with size and SHA-256 of the file it is in."""

    file: tuple[int, str] = (0, "")


def planner_for(what: str) -> DefaultSavePlanner:
    """Plans a save as DCP does, and remembers the plan: ranks then send only what changed.

    `what` is saved; under another name nothing is remembered. All ranks have to give the same, and another one after a
    save that failed, in which some ranks may have remembered a plan that others never saw.
    """
    planner = DefaultSavePlanner(enable_plan_caching=True)
    planner._cached_plans_key = what
    for name, plans in vars(SavePlanner).items():
        if name.startswith("_cached_") and isinstance(plans, dict):
            for other in plans.keys() - {what}:
                del plans[other]
    return planner


class MarkedWriter(FileSystemWriter):
    """Writes one checkpoint folder; `about` goes into the marker, `snapshot` into config.json (None: there is none)."""

    def __init__(self, folder: str | Path, about: About, snapshot: dict | None = None) -> None:
        super().__init__(folder, overwrite=True)
        self.about, self.snapshot = about, snapshot

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's files, then reads them back."""
        results = super().write_data(plan, planner).wait()
        folder = Path(self.path)
        hashes = {name: checksum(folder / name) for name in {r.storage_data.relative_path for r in results}}
        hashed: Future[list[WriteResult]] = Future()
        places = [(r.index, r.size_in_bytes, r.storage_data) for r in results]
        hashed.set_result([_Hashed(*place, file=hashes[place[2].relative_path]) for place in places])
        return hashed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all ranks have written."""
        super().finish(metadata, results)
        folder = Path(self.path)
        files = {r.storage_data.relative_path: r.file for of_rank in results for r in of_rank}
        names = [INDEX]
        if self.snapshot is not None:
            write_json(folder / "config.json", self.snapshot)
            names.append("config.json")
        files |= {name: checksum(folder / name) for name in names}
        write_marker(folder, Marker(time=round(time.time(), 3), files=files, **vars(self.about)))
