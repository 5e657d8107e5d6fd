"""Harvest while training: the runs train on windows of activations that are deleted once every run has read them.

The harvest runs in a thread, ahead of training, and keeps at most `windows` windows on the disk. This lets runs
make one pass, in order, over text whose cache would take terabytes.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..cache.object_store import is_url
from ..cache.ring import RingCache
from ..common.errors import UsageError
from ..common.files import folder_bytes, free_space
from ..common.formatting import format_bytes
from ..common.process_group import rank_and_count
from ..harvest.description import describe_source, describe_time
from ..harvest.plan import HarvestConfig, HarvestPlan
from ..harvest.streaming import check_room, harvest_ahead, plan_ring
from ..train.plan import TrainConfig, TrainPlan, plan_training
from ..train.progress import TrainProgress
from ..train.streaming import train_streaming

WINDOWS = 4


@dataclass(frozen=True)
class StreamingPlan:
    """A harvest, the ring of its windows, and the training that reads them. Nothing has been written yet."""

    harvest: HarvestPlan
    ring: RingCache
    train: TrainPlan
    ring_bytes: int  # of the windows that are on the disk at one time, and of the text

    def describe(self, time: bool = False) -> list[str]:
        """The lines that `sae train --stream` prints before it begins.

        If `time` is set, the memory and time of training are estimated too.
        """
        ring, layout, folder = self.ring, self.ring.layout, self.harvest.folder
        return [
            *describe_source(self.harvest),
            f"size     {self.harvest.tokens:,} tokens in {layout.n_windows:,} windows of {layout.window_rows:,} rows, "
            f"{ring.capacity} or fewer at a time: {format_bytes(self.ring_bytes)}; "
            f"{format_bytes(free_space(folder))} free",
            f"order    {ring.n_groups:,} groups of windows, each read once; all are normalized like the first",
            *self.describe_outliers(),
            f"time     {describe_time(self.harvest)}; training runs at the same time",
            f"cache    {folder}",
            *self.train.describe(time),
            *self.describe_unread_rows(),
        ]

    def describe_outliers(self) -> list[str]:
        if self.ring.max_norm is None:
            return []
        return [f"masked   rows with a norm over {self.ring.max_norm:g}x the median of the first window"]

    def describe_unread_rows(self) -> list[str]:
        """For each batch size, a line with the number of rows that are left at the ends of groups and do not fill a
        batch.
        """
        lines = []
        for batch_size in sorted({run.config.batch_size for run in self.train.runs}):
            unread = self.harvest.tokens - self.ring.cumulative_batches(batch_size)[-1] * batch_size
            lines.append(f"dropped  {unread:,} rows that do not fill a batch of {batch_size:,} at the end of a group")
        return lines


def plan_streaming(config: TrainConfig, *, windows: int = WINDOWS, **harvest_options: Any) -> StreamingPlan:
    """Plan training on a text that is harvested at the same time.

    Args:
        config: what to train. Its `model`, `layers`, `site` or `modules`, and `device` also apply to the harvest; a
            `caches` entry is the folder for the windows.
        windows: how many windows may be on the disk at the same time, an even number.
        harvest_options: fields of HarvestConfig, such as `tokens`, `dataset`, `context`, `window` and `max_norm`.

    Raises:
        UsageError: the number of tokens is not given, `config.resume` is set, or a launcher has started several
            processes.
        UnavailableError: the model or the text cannot be reached, or the disk is too small.
    """
    if (count := rank_and_count()[1]) > 1:
        raise UsageError(
            f"--stream harvests and trains in one process, but a launcher has started {count}. Harvest first with the "
            "same launcher (`sae harvest`) and train on the cache, or do not use a launcher."
        )
    if config.resume:
        raise UsageError("--resume cannot be combined with --stream. To resume, repeat the run's original command.")
    if len(config.caches) > 1:
        raise UsageError("--stream writes one folder: give --cache at most once.")
    if config.caches and is_url(config.caches[0]):
        raise UsageError("--stream writes into a folder, not a store. Give a folder with --cache, or leave it out.")
    if config.model is not None:
        harvest_options["model"] = config.model
    harvest, ring = plan_ring(
        HarvestConfig(
            layers=config.layers,
            sites=() if config.modules else (config.site,),
            modules=config.modules,
            device=config.device,
            out=config.caches[0] if config.caches else None,
            origins=config.origins,
            **harvest_options,
        ),
        windows,
    )
    size = check_room(harvest, ring)
    reserved = {harvest.folder: max(size - folder_bytes(harvest.folder), 0)}
    return StreamingPlan(harvest, ring, plan_training(replace(config, source=ring), reserved), size)


def run_streaming(plan: StreamingPlan, progress: TrainProgress | None = None) -> None:
    """Harvest and train at the same time. On Ctrl-C, writes checkpoints and raises Interrupted."""
    train_streaming(plan.train, progress or TrainProgress(), partial(harvest_ahead, plan.harvest, plan.ring))
