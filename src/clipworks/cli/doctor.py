"""`clipworks doctor`: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from .. import __version__
from ._command import command
from ._output import Json, facts, say

PACKAGE = Path(__file__).parent.parent


@command()
def doctor(*, json: Json = False) -> int:
    """Show device, precision, versions, and what is missing with the command that installs it.

    \b
    Exit code 1 if something that the main job needs is missing.

    \b
    Examples:
      clipworks doctor
      clipworks doctor --json
    """
    found = examine()
    problems: list[str] = found.pop("problems")
    missing: dict[str, str] = found.pop("missing")
    if json:
        facts({**found, "missing": missing, "problems": problems}, as_json=True)
    else:
        facts(found)
        for library, install in missing.items():
            say(f"optional, not installed: {library:<18} {install}")
        say("\n".join(f"problem: {p}" for p in problems) or "everything that the main job needs is here")
    return 1 if problems else 0


def examine() -> dict[str, Any]:
    """Return what `doctor` prints; `problems` is empty where the main job can run."""
    needed, optional = requirements()
    versions = {name: version(name) for name in needed}
    problems = [f"{name} is not installed: pip install {name}" for name, found in versions.items() if not found]
    weights = PACKAGE / "encoders" / "weights" / "clipworks-small.safetensors"
    if not weights.exists():
        problems.append("the bundled model is missing here: pip install --force-reinstall --no-deps clipworks")
    device = hardware() if versions.get("torch") else {}
    if version("torchvision") and "+cpu" in version("torch") and "+cpu" not in version("torchvision"):
        problems.append(
            "torchvision was built for another torch and breaks `import transformers`; clipworks does not use it: "
            "pip uninstall torchvision"
        )
    return {
        "clipworks": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **device,
        "model": f"clipworks-small, {weights.stat().st_size / 1e6:.0f} MB" if weights.exists() else "missing",
        "versions": {name: given for name, given in versions.items() if given},
        "missing": {n: f"pip install 'clipworks[{extra}]'" for n, extra in optional.items() if not version(n)},
        "problems": problems,
    }


def hardware() -> dict[str, Any]:
    """Return the device and the precision that suits it."""
    import torch

    if torch.cuda.is_available():
        device = f"cuda: {torch.cuda.get_device_name(0)}"
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    else:
        features = torch.backends.cpu.get_cpu_capability()
        device = f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {features}"
        # without bf16 arithmetic in the processor, bf16 weights are slower than fp32
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        precision = "fp32, bf16 is faster here" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
    return {"device": device, "precision": precision}


def requirements() -> tuple[list[str], dict[str, str]]:
    """Return the needed libraries, and the optional ones with their extra, from the package's metadata."""
    needed, optional = [], {}
    for line in importlib.metadata.requires("clipworks") or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", line)
        if extra is None:
            needed.append(name)
        elif extra.group(1) != "dev":
            optional[name] = extra.group(1)
    return needed, optional


def version(name: str) -> str:
    """Return the installed version, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
