"""`bench`: run methods on sets by a protocol; one JSON file per run, finished runs are skipped, several at a time."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ...data.labelled import LabelledSet, read_labelled
from ...errors import ClipworksError, check_choice, check_range
from ...progress import Progress
from .contestants import Contestant, Material, contestants
from .features import FeatureCache, data_digest, slug, write_atomically
from .measure import Cost, score
from .protocols import Grid, Test, Trial, protocols, trials

VERSION = 1  # of what a run computes; a change makes old runs count as not done
VALIDATION = ("shots", "extra")
PACKAGES = ("clipworks", "numpy", "scipy", "scikit-learn", "torch", "pillow", "simplejpeg")
REPEATS = 3  # of the answer, for its time


@dataclass
class Done:
    """What `bench` did.

    Attributes
    ----------
    out : folder of the runs
    ran, skipped, failed : numbers of runs; skipped ones were finished before, failed ones say why in their file
    left_out : method -> why it does not take part
    not_applicable : protocol and set -> why
    """

    out: Path
    ran: int = 0
    skipped: int = 0
    failed: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)


@dataclass
class Job:
    """One run: everything a worker needs, and where the result goes."""

    path: Path
    config: dict[str, Any]
    key: str
    contestant: Contestant
    material: Material
    tests: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, list[str], bool]]  # x, y, text, names, own classes
    facts: dict[str, Any]


def bench(
    data: Mapping[str, str | os.PathLike] | Sequence[str],
    *,
    out: str | os.PathLike,
    methods: Sequence[str] = ("all",),
    protocol: Sequence[str] = ("few-shot",),
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    model: Sequence[str] = ("clipworks-small",),
    validation: str = "shots",
    templates: str | None = None,
    test_images: int | None = None,
    descriptions: str | None = None,
    noisy_labels: Sequence[str] = (),
    ratio: float = 16.0,
    jobs: int = 1,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Done:
    """Measure methods that classify features, from words or from a few labelled images.

    Parameters
    ----------
    data : labelled sets as NAME=FOLDER (or FOLDER, named after itself). A name such as "oxford_pets" is read in its
        published layout; any other as CoOp's split json, folders per class, a table, or a Hugging Face folder. From
        Python also a mapping of names to folders or to `LabelledSet`s
    out : folder for runs, splits and cached features; the same command goes on where it was stopped
    methods : "all", names, "-name" to leave one out, or names with arguments, "gda(alpha=1.0)"
    protocol : few-shot, base-to-new, cross, domains, imbalanced, noisy; one or several
    shots : images per class
    seeds : of the draws; 1, 2, 3 are CoOp's
    model : encoders, by name or path; one or several
    validation : "shots": settings are chosen on the shots alone, by cross-validation; "extra": on up to four more
        images per class, as CoOp's protocol has them
    templates : sentences for the class names (default: those that belong to the set)
    test_images : most images to test on; the subset depends on the set alone (default: all)
    descriptions : JSON file from class names to descriptions, or WordNet's data.noun, for methods that need them
    noisy_labels : NAME=FILE.npz, other annotators' labels of a set's training images, for the protocol noisy
    ratio : imbalanced: images of the largest class over those of the smallest
    jobs : processes; each computes with one thread, so that costs can be compared
    batch_size : images per pass of the encoder
    progress : None shows a bar on a terminal

    Returns
    -------
    Done

    Raises
    ------
    ClipworksError
        If a name, a folder or an option cannot be used.
    BadImage
        For an image that cannot be read; nothing is left out silently.
    """
    check_choice("validation", validation, VALIDATION)
    check_range("jobs", jobs, 1)
    for name in protocol:
        check_choice("protocol", name, protocols())
    for name, numbers in (("shots", shots), ("seeds", seeds)):
        if not numbers or len(set(numbers)) < len(numbers):
            raise ClipworksError(f"{name} must be distinct numbers, at least one. Got {list(numbers)}.")
    place = Path(out)
    taking_part, left_out = contestants(methods, descriptions is not None)
    done = Done(place, left_out=left_out)
    sets = _with_noise(_sets(data), noisy_labels)
    grid = Grid(list(shots), list(seeds), test_images, ratio)
    found = _plan(protocol, sets, grid, done)
    state = _state()
    for name in model:
        work = _jobs(name, found, taking_part, place, validation, templates, descriptions, state, batch_size, progress)
        pending = []
        for job in work:
            if _is_done(job.path, job.key):
                done.skipped += 1
            else:
                pending.append(job)
        bar = Progress(_results(pending, jobs), len(pending), f"benchmark, {name}", enabled=progress)
        for failed in bar:
            done.ran += 1
            done.failed += failed
    return done


def _sets(data: Mapping[str, Any] | Sequence[str]) -> list[LabelledSet]:
    if not isinstance(data, Mapping):
        pairs = [text.partition("=") for text in data]
        named = [(a, b) if sep else (Path(a).name, a) for a, sep, b in pairs]
        if len({name for name, _ in named}) < len(named):
            raise ClipworksError(f"data must have a name of its own each. Got {', '.join(n for n, _ in named)}.")
        data = dict(named)
    if not data:
        raise ClipworksError("data must name at least one set, NAME=FOLDER. Got none.")
    return [d if isinstance(d, LabelledSet) else read_labelled(name, d) for name, d in data.items()]


def _with_noise(sets: list[LabelledSet], noisy_labels: Sequence[str]) -> list[LabelledSet]:
    for text in noisy_labels:
        name, _, path = text.partition("=")
        check_choice("noisy_labels", name, [data.name for data in sets])
        sets = [data.with_noisy(path) if data.name == name else data for data in sets]
    return sets


def _plan(protocol: Sequence[str], sets: list[LabelledSet], grid: Grid, done: Done) -> list[Trial]:
    """All trials; a set that a protocol does not fit is noted, not fatal, unless nothing remains."""
    found: list[Trial] = []
    for name in protocol:
        for group in [sets] if name == "cross" else [[data] for data in sets]:
            try:
                found += trials(name, group, grid)
            except ClipworksError as error:
                done.not_applicable[f"{name}, {', '.join(data.name for data in group)}"] = str(error)
    if not found:
        raise ClipworksError(" ".join(done.not_applicable.values()) or "no trial is left: see shots.")
    return found


def _jobs(
    model: str, found: list[Trial], taking_part: list[Contestant], place: Path, validation: str,
    templates: str | None, descriptions: str | None, state: dict[str, Any], batch_size: int, progress: bool | None,
) -> Iterator[Job]:  # fmt: skip
    from ...encoders.loading import load

    encoder = load(model)
    cache = FeatureCache(place / "features", encoder, batch_size, progress)
    _embed_all(cache, found)
    source = None if descriptions is None else _descriptions(descriptions)
    home = place / "runs" / f"{slug(Path(model).stem)}-{encoder.fingerprint[:8]}"
    first = min(trial.seed for trial in found)
    ready: dict[int, dict[str, Any]] = {}

    def said_by(test: Test) -> np.ndarray:
        return cache.words(test.classes, templates or test.data.templates)

    for trial in found:
        split = trial.split()
        path = place / "splits" / f"{split.digest[:16]}.json"
        if not path.exists():
            write_atomically(path, lambda file, split=split: file.write(split.to_json().encode()))
        words = cache.words(trial.classes, templates or trial.data.templates)
        held = trial.validation if validation == "extra" and len(trial.validation[0]) else None
        described = None if source is None else _described(source, trial)
        material = Material(
            cache.vectors(trial.data, trial.rows) if len(trial.rows) else np.empty((0, encoder.dim), np.float32),
            trial.y, words, trial.classes, (cache.vectors(trial.data, held[0]), held[1]) if held else None,
            functools.partial(_encoder, model), described, encoder.logit_scale, trial.seed,
        )  # fmt: skip
        if id(trial.tests) not in ready:  # the trials of a set share their tests
            ready[id(trial.tests)] = {name: (cache.vectors(t.data, t.rows), t.y, said_by(t), t.classes)
                                      for name, t in trial.tests.items()}  # fmt: skip
        tests = {name: (*given, given[3] == trial.classes) for name, given in ready[id(trial.tests)].items()}
        facts = {"encoder": encoder.fingerprint, "split": split.digest, "data": _digest_of(trial),
                 "classes": len(trial.data.classes), "state": state}  # fmt: skip
        for one in taking_part:
            if one.learns != bool(trial.setting["shots"]) or not (one.learns or one.draws or trial.seed == first):
                continue
            config = {"data": trial.data.name, "protocol": trial.protocol, "setting": trial.setting,
                      "seed": trial.seed, "method": one.spec, "area": one.info.area, "model": model,
                      "validation": validation, "templates": templates, "descriptions": descriptions}  # fmt: skip
            same = {k: v for k, v in config.items() if k not in ("model", "descriptions")}  # by content, not by path
            same |= {k: facts[k] for k in ("encoder", "split", "data")}
            key = _key({**same, "described": described if one.describes else None, "source": _source(one),
                        "version": VERSION})  # fmt: skip
            setting = "-".join(f"{k}-{v}" for k, v in trial.setting.items())
            file = f"{slug(one.spec)}--{slug(setting)}--seed{trial.seed}.json"
            yield Job(home / slug(trial.data.name) / trial.protocol / file, config, key, one, material, tests, facts)


def _embed_all(cache: FeatureCache, found: list[Trial]) -> None:
    """Every image of every trial, a set at a time, so that the cache is filled in one go."""
    wanted: dict[str, tuple[LabelledSet, list[np.ndarray]]] = {}
    for trial in found:
        pairs = [(trial.data, trial.rows), (trial.data, trial.validation[0])]
        for data, rows in pairs + [(t.data, t.rows) for t in trial.tests.values()]:
            wanted.setdefault(data.name, (data, []))[1].append(rows)
    for data, parts in wanted.values():
        cache.vectors(data, np.unique(np.concatenate(parts)))


def _results(pending: list[Job], jobs: int) -> Iterator[bool]:
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
        with threadpool_limits(1):
            results = _measured(job)
    finally:
        torch.set_num_threads(threads)
    facts = dict(job.facts)
    record = {"key": job.key, "config": job.config, **facts.pop("state"), **facts, **results,
              "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}  # fmt: skip
    text = json.dumps(record, indent=1, default=float) + "\n"
    write_atomically(job.path, lambda file: file.write(text.encode()))
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
        for name, (x, y, text, names, own) in job.tests.items():

            def answer(x=x, text=text, names=names, own=own):
                return fitted.answer(x) if own else fitted.answer_new(x, text, names)

            given = cost.step(name, answer)
            times = [cost.seconds[name]]
            while job.contestant.learns and len(times) < REPEATS and sum(times) < 1:
                cost.step(name, answer)
                times.append(cost.seconds[name])
            found[name] = {**score(y, given.found, given.probabilities), "by": given.by}
            images, best = images + len(y), best + min(times)
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
def _encoder(model: str) -> Any:
    from ...encoders.loading import load

    return load(model)


def _described(source: Any, trial: Trial) -> dict[str, list[str]]:
    """What a source says of the classes of a trial, so that a run does not carry all of WordNet with it."""
    from ...zeroshot.descriptions import descriptions_of

    names = sorted({*trial.classes, *(name for test in trial.tests.values() for name in test.classes)})
    try:
        return {name: own for name, own in zip(names, descriptions_of(names, source), strict=True) if own}
    except ClipworksError:  # none of the names is known: the methods that need it say so as their result
        return {}


def _descriptions(path: str) -> Any:
    from ...zeroshot.descriptions import WordNetGlosses, read_descriptions

    return WordNetGlosses(path) if Path(path).name == "data.noun" else read_descriptions(path)


def _digest_of(trial: Trial) -> str:
    """Hash of all images of a trial with their labels."""
    tests: Iterable[Test] = trial.tests.values()
    parts = [data_digest(trial.data, np.concatenate([trial.rows, trial.validation[0]]))]
    parts += [data_digest(test.data, test.rows) for test in tests]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _source(contestant: Contestant) -> str:
    """Hash of the method's file: a changed method is run again."""
    return hashlib.sha256(Path(inspect.getfile(contestant.target)).read_bytes()).hexdigest()


def _key(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _is_done(path: Path, key: str) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _state() -> dict[str, Any]:
    """Versions and, in a checkout, the state of the code."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"versions": versions, "git": _git(), "machine": f"{platform.system()} {platform.machine()}"}


def _git() -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent,
                              check=True).stdout.strip()  # fmt: skip

    try:
        return {"commit": ask("rev-parse", "HEAD"), "clean": not ask("status", "--porcelain", "-uno")}
    except (OSError, subprocess.CalledProcessError):
        return None
