"""Paints many scenes, in several processes if wanted. Imports no torch: every process would pay for it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np

from cacr_uniter.data.scenes.catalogue import Catalogue
from cacr_uniter.data.scenes.render import Rendered, render
from cacr_uniter.data.scenes.statements import Scene
from cacr_uniter.errors import UserError

Job = tuple[Scene, list[int]]
"""A scene and the seed of its painting."""


def paint(jobs: list[Job], catalogue: Catalogue, workers: int) -> Generator[Rendered, None, None]:
    """The finished pictures in order; by other processes if there are enough to be worth their start."""
    if workers <= 1 or len(jobs) < 64 * workers:
        yield from (_paint(catalogue, job) for job in jobs)
        return
    chunks = [jobs[i : i + 32] for i in range(0, len(jobs), 32)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for part in pool.map(partial(_paint_all, catalogue), chunks):
                yield from part
        except BrokenProcessPool as error:
            raise UserError("a painting process was stopped (out of memory?); try --workers 1") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _paint(catalogue: Catalogue, job: Job) -> Rendered:
    return render(job[0], catalogue, np.random.default_rng(job[1]))


def _paint_all(catalogue: Catalogue, jobs: list[Job]) -> list[Rendered]:
    return [_paint(catalogue, job) for job in jobs]
