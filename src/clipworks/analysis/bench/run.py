"""`bench`: run methods on sets by a protocol; one JSON file per run, finished runs are skipped, several at a time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ...atomic import write_text
from ...data.labelled import LabelledSet, read_labelled
from ...data.shots import with_parts
from ...errors import BadImage, ClipworksError, check_choice, check_range, naming
from ...progress import Progress
from .contestants import Contestant, Material, Question, contestants
from .features import FeatureCache, data_digest, slug
from .protocols import Grid, Test, Trial, protocols, trials
from .work import Job, encoder_of, results_of

VERSION = 1  # of what a run computes; a change makes old runs count as not done
VALIDATION = ("shots", "extra")
PACKAGES = ("clipworks", "numpy", "scipy", "scikit-learn", "torch", "pillow", "simplejpeg")


@dataclass
class Done:
    """What `bench` did.

    Attributes
    ----------
    out : folder of the runs
    ran, skipped, failed : numbers of runs; skipped ones were finished before, failed ones say why in their file
    left_out : method -> why it does not take part
    not_applicable : protocol and set -> why
    unreadable : images that cannot be used; they are left out of their set before anything is drawn
    """

    out: Path
    ran: int = 0
    skipped: int = 0
    failed: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    unreadable: list[BadImage] = field(default_factory=list)


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
    """Measure methods that classify, from words or from a few labelled images.

    Parameters
    ----------
    data : labelled sets as NAME=FOLDER (or FOLDER, named after itself). A name such as "oxford_pets" is read in its
        published layout; any other as CoOp's split json, folders per class, a table, or a Hugging Face folder. From
        Python also a mapping of names to folders or to `LabelledSet`s
    out : folder for runs, splits and cached features; the same command goes on where it was stopped
    methods : "all" that classify features, "images" for all that learn from the images themselves (prompts, tuning;
        slow), names, "-name" to leave one out, or names with arguments, "gda(alpha=1.0)"
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
    jobs : processes; each computes with one thread
    batch_size : images per pass of the encoder
    progress : None shows a bar on a terminal

    Returns
    -------
    Done

    Raises
    ------
    ClipworksError
        If a name, a folder or an option cannot be used.
    """
    from ...encoders.loading import load

    check_choice("validation", validation, VALIDATION)
    check_range("jobs", jobs, 1)
    for name in protocol:
        check_choice("protocol", name, protocols())
    for name, numbers in (("shots", shots), ("seeds", seeds)):
        if not numbers or len(set(numbers)) < len(numbers):
            raise ClipworksError(f"{name} must be distinct numbers, at least one. Got {list(numbers)}.")
    for number in shots:
        check_range("shots", number, 1)
    place = Path(out)
    taking_part, left_out = contestants(methods, descriptions is not None)
    done = Done(place, left_out=left_out)
    sets = _with_noise(_sets(data), noisy_labels)
    grid = Grid(list(shots), list(seeds), test_images, ratio)
    _plan(protocol, sets, grid, done)  # what cannot be planned is told before an encoder is loaded
    state = _state()
    for name in model:
        with naming("model"):
            encoder = load(name)
        cache = FeatureCache(place / "features", encoder, batch_size, progress)
        sets, found = _embedded(cache, protocol, sets, grid, done)
        work = _jobs(name, cache, found, taking_part, place, validation, templates, descriptions, state)
        pending = []
        for job in work:
            if _is_done(job.path, job.key):
                done.skipped += 1
            else:
                pending.append(job)
        bar = Progress(results_of(pending, jobs), len(pending), f"benchmark, {name}", enabled=progress)
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
    return [dataclasses.replace(d, name=name) if isinstance(d, LabelledSet) else read_labelled(name, d)
            for name, d in data.items()]  # fmt: skip


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
    model: str, cache: FeatureCache, found: list[Trial], taking_part: list[Contestant], place: Path, validation: str,
    templates: str | None, descriptions: str | None, state: dict[str, Any],
) -> Iterator[Job]:  # fmt: skip
    encoder = cache.encoder
    source = None if descriptions is None else _descriptions(descriptions)
    home = place / "runs" / f"{slug(Path(model).stem)}-{encoder.fingerprint[:8]}"
    first = min(trial.seed for trial in found)
    ready: dict[int, dict[str, Question]] = {}

    def question(test: Test) -> Question:
        said = cache.words(test.classes, templates or test.data.templates)
        items = [test.data.items[row] for row in test.rows]
        return Question(cache.vectors(test.data, test.rows), test.y, said, test.classes, items=items)

    for trial in found:
        split = trial.split()
        path, text = place / "splits" / f"{split.digest[:16]}.json", split.to_json()
        if not _holds(path, text):
            write_text(path, text)
        words = cache.words(trial.classes, templates or trial.data.templates)
        held = trial.validation if validation == "extra" and len(trial.validation[0]) else None
        described = None if source is None else _described(source, trial)
        material = Material(
            cache.vectors(trial.data, trial.rows) if len(trial.rows) else np.empty((0, encoder.dim), np.float32),
            trial.y, words, trial.classes, (cache.vectors(trial.data, held[0]), held[1]) if held else None,
            functools.partial(encoder_of, model), described, encoder.logit_scale, trial.seed,
            [trial.data.items[row] for row in trial.rows],
        )  # fmt: skip
        if id(trial.tests) not in ready:  # the trials of a set share their tests
            ready[id(trial.tests)] = {name: question(test) for name, test in trial.tests.items()}
        tests = {name: dataclasses.replace(asked, own=asked.names == trial.classes)
                 for name, asked in ready[id(trial.tests)].items()}  # fmt: skip
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


def _embedded(
    cache: FeatureCache, protocol: Sequence[str], sets: list[LabelledSet], grid: Grid, done: Done
) -> tuple[list[LabelledSet], list[Trial]]:
    """The sets without the images that cannot be used, and all trials, whose images the cache holds now.

    Where an image falls out, its set is drawn from anew: a class must not have a shot fewer than the others for it.
    """
    while True:
        found = _plan(protocol, sets, dataclasses.replace(grid, splits={}), done)
        bad = _embed_all(cache, found)
        if not bad:
            return sets, found
        done.unreadable += [error for errors in bad.values() for error in errors]
        for i, data in enumerate(sets):
            if data.name in bad:
                whole, left_out = with_parts(data), {error.key for error in bad[data.name]}
                rows = [row for row, item in enumerate(whole.items) if item.key not in left_out]
                sets[i] = whole.only(np.array(rows, int))
                if lost := sorted(set(whole.classes) - set(sets[i].classes)):
                    raise ClipworksError(f"data {data.name!r} must have images that can be used of every class. "
                                         f"Got none of {lost[0]!r}: {bad[data.name][0]}.")  # fmt: skip


def _embed_all(cache: FeatureCache, found: list[Trial]) -> dict[str, list[BadImage]]:
    """Every image of every trial, a set at a time, into the cache; returns set -> what cannot be used."""
    wanted: dict[str, tuple[LabelledSet, list[np.ndarray]]] = {}
    for trial in found:
        pairs = [(trial.data, trial.rows), (trial.data, trial.validation[0])]
        for data, rows in pairs + [(t.data, t.rows) for t in trial.tests.values()]:
            wanted.setdefault(data.name, (data, []))[1].append(rows)
    bad = {data.name: cache.fill(data, np.unique(np.concatenate(parts))) for data, parts in wanted.values()}
    return {name: errors for name, errors in bad.items() if errors}


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
    """Hash of the method's file and of what its area shares: a changed method is run again."""
    file = Path(inspect.getfile(contestant.target))
    parts = [part for part in (file, file.with_name("common.py")) if part.exists()]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def _key(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


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
