"""What every benchmark script shares: one JSON per claim, with all that is needed to judge and repeat it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("clipworks", "torch", "numpy", "pillow", "transformers", "faiss-cpu", "lancedb", "scikit-learn", "simplejpeg")


def record(name: str, results: Any, seed: int, data_digest: str | None = None) -> Path:
    """Write `benchmarks/results/<name>.json`.

    Parameters
    ----------
    name : of the benchmark
    results : what was measured, ready for JSON
    seed : from which everything random was drawn
    data_digest : SHA-256 of the data, where data was used

    Returns
    -------
    path of the file
    """
    entry = {
        "name": name,
        "command": " ".join(["python", *(os.path.relpath(a) if os.path.exists(a) else a for a in sys.argv)]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "data_digest": data_digest,
        "git": {"commit": _git("rev-parse", "HEAD"), "clean": not _git("status", "--porcelain", "--untracked-files=no")},
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := _version(p))}},
        "machine": machine(),
        "results": results,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, threads, load of the last minute and memory in GiB."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": names[0] if names else platform.processor(), "gpu": gpu, "cores": cores,
            "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2), "memory_gib": round(memory or 0, 1)}  # fmt: skip


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
