"""What every benchmark script shares: one JSON per claim, with all that is needed to judge and repeat it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("clipworks", "torch", "numpy", "pillow", "transformers", "faiss-cpu", "lancedb", "scikit-learn",
            "simplejpeg", "open_clip_torch", "fastapi", "uvicorn", "openvino", "onnxruntime", "nncf")  # fmt: skip


def record(name: str, results: Any, seed: int, data_digest: str | None = None) -> Path:
    """Write `benchmarks/results/<name>.json` and return its path.

    Parameters
    ----------
    name : of the benchmark
    results : what was measured, ready for JSON
    seed : from which everything random was drawn
    data_digest : SHA-256 of the data, where data was used
    """
    versions = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"] in PACKAGES}
    entry = {
        "name": name,
        "command": " ".join(["python", *(os.path.relpath(a) if os.path.exists(a) else a for a in sys.argv)]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "data_digest": data_digest,
        "git": {"commit": _git("rev-parse", "HEAD"), "clean": not _git("status", "--porcelain", "-uno")},
        "versions": {"python": platform.python_version(), **dict(sorted(versions.items()))},
        "machine": machine(),
        "results": results,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """Processor (family and model too, since virtual machines hide the name), cores that may be used, threads, load."""
    cpuinfo = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in (cpuinfo.read_text() if cpuinfo.exists() else "").splitlines())
    known = {key.strip(): value.strip() for key, _, value in pairs}
    processor = " ".join(known.get(k, "") for k in ("model name", "cpu family", "model")) or platform.processor()
    return {"processor": processor, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)}  # fmt: skip


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
