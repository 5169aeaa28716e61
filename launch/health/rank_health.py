"""Sets up the health checks of one rank: probes before the run, watchdog and search for slow ranks during it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.distributed as dist

from launch.config import JobConfig
from launch.environment import Place, node_name, node_pulses, start_name, under_slurm
from launch.health.hang_report import Member
from launch.health.health_folder import HealthFolder
from launch.health.probes import Links, outliers, probe, summary
from launch.health.stragglers import Stragglers
from launch.health.time_limits import Pace
from launch.health.watchdog import Patience, Watchdog
from launch.standard_output import say


@dataclass(frozen=True)
class Health:
    """One rank's view; all ranks make it together."""

    job: JobConfig
    place: Place
    members: list[Member]
    folder: HealthFolder
    pace: Pace
    watchdog: Watchdog

    @classmethod
    def of(cls, job: JobConfig, place: Place) -> Self:
        """All ranks say where they are, and are watched from here on. Collective."""
        members: list[Member] = [Member(0, "", 0)] * place.world_size
        dist.all_gather_object(members, Member(place.rank, node_name(), os.getpid()))
        name = [start_name()]
        dist.broadcast_object_list(name, src=0)
        folder, pace = HealthFolder(job.run_path, name[0]), Pace(job.health)
        patience = Patience(grace=job.health.hang_grace_seconds)
        pulses = node_pulses()
        beat = partial(pulses.write, place.local_rank) if pulses else lambda pulse: None
        stops = job.health.on_hang == "stop"
        watchdog = Watchdog(folder, pace, place.rank, members, patience, stops=stops, beat=beat)
        return cls(job, place, members, folder, pace, watchdog)

    def probe(self, device: torch.device) -> list[str] | None:
        """What the probes have found, in lines for the log; None where the run is to start again without some nodes.
        Collective."""
        wanted = self.job.health
        if not wanted.probe or self.place.world_size == 1:
            return []
        begun = time.perf_counter()
        links = Links(self.place.rank, self.members)
        measure = partial(probe, device, self.place.rank, self.members, links, self.folder.path)
        found = measure()
        slow = outliers(found, self.members, wanted.outlier)
        if slow:  # once may be chance
            before = {outlier.what for outlier in slow}
            found = measure()
            slow = [outlier for outlier in outliers(found, self.members, wanted.outlier) if outlier.what in before]
        links.close()
        lines = [summary(found, time.perf_counter() - begun), *(f"warning: {outlier.words}" for outlier in slow)]
        if not slow or not wanted.exclude or not under_slurm():
            return lines
        if self.place.rank == 0:
            nodes = list(dict.fromkeys(outlier.node for outlier in slow))
            self.folder.write_suspects(nodes)
            say("\n".join([*lines, f"no step before {', '.join(nodes)} is replaced"]))
        return None

    def stragglers(self, device: torch.device) -> Stragglers | None:
        """Collective; None for one alone."""
        if self.place.world_size == 1:
            return None
        return Stragglers(device, self.members, self.job.health.straggler)
