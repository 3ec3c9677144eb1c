"""A run, done: fit, answer every test, measure, write one file; in this process or in several."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ...atomic import write_text
from ...errors import ClipworksError, naming
from .contestants import Contestant, Material, Question
from .measure import Cost, score

REPEATS = 3  # of the answer, for its time


@dataclass
class Job:
    """One run: everything a worker needs, and where the result goes."""

    path: Path
    config: dict[str, Any]
    key: str
    contestant: Contestant
    material: Material
    tests: dict[str, Question]
    facts: dict[str, Any]


def results_of(pending: list[Job], jobs: int) -> Iterator[bool]:
    """Whether each run failed, as they end."""
    if jobs == 1:
        yield from map(run_one, pending)
        return
    import multiprocessing

    # one thread each, also for libraries that read the environment once
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from _through(pool, iter(pending), 2 * jobs)
    except BrokenProcessPool as error:
        raise ClipworksError("a process was ended from outside, perhaps for want of memory. Finished runs are kept: "
                             "the same command goes on, with fewer jobs.") from error  # fmt: skip
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _through(pool: ProcessPoolExecutor, pending: Iterator[Job], most: int) -> Iterator[bool]:
    """Keep a few runs in flight, so that not all their vectors wait in the queue at once."""
    flying: set[Future] = set()
    for job in pending:
        flying.add(pool.submit(run_one, job))
        if len(flying) >= most:
            ended, flying = wait(flying, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended)
    yield from (future.result() for future in flying)


def run_one(job: Job) -> bool:
    """Do one run and write its file; returns whether the method failed."""
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            results = _measured(job)
    finally:
        torch.set_num_threads(threads)
    facts = dict(job.facts)
    told = sorted({f"{w.category.__name__}: {' '.join(str(w.message).split())}"[:300] for w in said})
    results |= {"warnings": told[:5]} if told else {}
    record = {"key": job.key, "config": job.config, **facts.pop("state"), **facts, **results,
              "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}  # fmt: skip
    text = json.dumps(record, indent=1, default=float) + "\n"
    write_text(job.path, text)
    return "error" in results


def _measured(job: Job) -> dict[str, Any]:
    """Fit, answer every test, and what it cost. A method that refuses the shots says so as its result."""
    material = job.material
    if not job.contestant.learns and job.contestant.info.name != "classifier":
        material.encoder().texts(["a"])  # loaded before the clock runs
    cost = Cost()
    try:
        fitted = cost.step("fit", lambda: job.contestant.fit(material))
        found: dict[str, Any] = {}
        images = best = 0.0
        for name, asked in job.tests.items():
            answer = functools.partial(fitted.answer, asked)
            given = cost.step("answer", answer)
            times = [cost.seconds["answer"]]
            while job.contestant.learns and len(times) < REPEATS and sum(times) < 1:
                cost.step("answer", answer)
                times.append(cost.seconds["answer"])
            found[name] = {**score(asked.y, given.found, given.probabilities), "by": given.by}
            images, best = images + len(asked.y), best + min(times)
    except Exception as error:  # whatever a method raises must not end the others' runs
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
    return {"results": found, "summary": summary(job.config["protocol"], found),
            "cost": {"fit_seconds": cost.seconds["fit"], "microseconds_per_image": 1e6 * best / images,
                     "peak_mb": cost.peak_mb(), "threads": 1}}  # fmt: skip


def summary(protocol: str, results: Mapping[str, Mapping[str, float]]) -> float:
    """The one number of a run: accuracy; base-to-new: harmonic mean; cross: mean of the sets; imbalanced: mean of the
    classes."""
    if protocol == "base-to-new":
        base, new = results["base"]["accuracy"], results["new"]["accuracy"]
        return 2 * base * new / (base + new) if base + new else 0.0
    kind = "mean_per_class" if protocol == "imbalanced" else "accuracy"
    return float(np.mean([values[kind] for values in results.values()]))


@functools.lru_cache(maxsize=1)
def encoder_of(model: str) -> Any:
    from ...encoders.loading import load

    with naming("model"):
        return load(model)
