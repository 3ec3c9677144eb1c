"""Runs of `embed` that are killed, in children of one warm process: `python killed.py PLAN` with a plan in JSON.

The children inherit torch and a tiny encoder, so that a run begins within milliseconds and most kills fall into its
work. LanceDB is imported here and used in the children only, where it starts its threads anew.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import lancedb  # noqa: F401
import torch
from small_store import encoder

from clipworks.errors import ClipworksError
from clipworks.store import embed as embedding
from clipworks.store import journal, snapshot, writer

DIED, NOTED = 77, 4
LATER = 0.02  # seconds, about those of a commit: the kill may fall into it


def child(plan: dict, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a run of `embed` and return its process.

    What it encodes is listed in `plan["log"]`, its error is written to `plan["error"]`.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        prepare()
        encode = embedding._Run._encode

        def counted(run: embedding._Run, batch: object) -> None:
            encode(run, batch)
            with open(plan["log"], "a") as log:
                log.write("".join(f"{key}\n" for key in batch.keys))

        embedding._Run._encode = counted
        sizes = {"batch_size": plan["batch"], "commit_every": plan["commit"]}
        made = embedding.embed(plan["photos"], plan["out"], encoder=MODEL, workers=1, **sizes)
        code = NOTED if made.notes else 0
    except ClipworksError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        Path(plan["error"]).write_text(f"{type(error).__name__}: {error}")
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(plan: dict, prepare: Callable[[], None] = lambda: None) -> int:
    """Exit code of a run; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child(plan, prepare), 0)[1])


def killed(plan: dict) -> dict:
    """Kill runs at random moments, most of them in their work, then let one finish."""
    run(plan | {"out": plan["out"] + ".whole", "log": os.devnull})
    draw, kills = random.Random(plan["seed"]), 0
    for number in range(plan["kills"]):
        images = draw.randint(1, plan["most"]) if number % 8 else 0  # every eighth is killed while it starts
        kills += run(plan, kill_after(images, draw.uniform(0.0, LATER))) == -signal.SIGKILL
    return {"kills": kills, "code": run(plan)}


def kill_after(images: int, seconds: float) -> Callable[[], None]:
    """Let the process be killed some seconds after it has encoded so many images; never, if it has fewer to do.

    It is a thread of the process that does it: a machine with other work holds up both or none.
    """

    def prepare() -> None:
        encode, done = embedding._Run._encode, [0]
        kill = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        kill.daemon = True

        def hook(run: embedding._Run, batch: object) -> None:
            encode(run, batch)
            done[0] += len(batch)
            if 0 < images <= done[0] and kill.ident is None:
                kill.start()

        embedding._Run._encode = hook
        if not images:
            kill.start()

    return prepare


def dies(place: object, name: str, after: int, before: bool = True) -> Callable[[], None]:
    """Let a function end the process at its call number `after`, before its work or behind it."""

    def prepare() -> None:
        function, calls = getattr(place, name), [0]

        def hook(*args: object, **options: object) -> object:
            calls[0] += 1
            if calls[0] == after and before:
                os._exit(DIED)
            result = function(*args, **options)
            if calls[0] == after:
                os._exit(DIED)
            return result

        setattr(place, name, hook)

    return prepare


def half_a_line() -> None:
    """Let the second write to the checksums stop in the middle of a line."""
    write, calls = journal.Journal._write, [0]

    def hook(book: journal.Journal, entries: list) -> None:
        calls[0] += 1
        if calls[0] == 2:
            with open(book.folder / journal.NAME, "ab") as stream:
                stream.write(b"".join(map(journal._line, entries))[:-20])
            os._exit(DIED)
        write(book, entries)

    journal.Journal._write = hook


HOOKS = {
    "table made, not recorded": dies(writer.Writer, "_record", 1),
    "rows committed, not recorded": dies(writer.Writer, "_record", 3),
    "files on the disk, not recorded": dies(journal.Journal, "_write", 3),
    "half a line of the checksums": half_a_line,
    "rows recorded": dies(writer.Writer, "_record", 3, before=False),
    "clean-up announced": dies(journal.Journal, "mark_cleaning", 1, before=False),
    "cleaned up, not recorded": dies(journal.Journal, "mark_cleaning", 2),
    "clean-up recorded": dies(journal.Journal, "mark_cleaning", 2, before=False),
    "checksums written, not in place": dies(os, "replace", 1),
    "checksums in place": dies(os, "replace", 1, before=False),
    "search copy begun": dies(snapshot, "_write", 1),
    "search copy written, not in place": dies(os, "rename", 1),
    "search copy in place": dies(os, "rename", 1, before=False),
}


def crash(plan: dict) -> dict:
    """A run that dies at a named step."""
    return {"code": run(plan, HOOKS[plan["hook"]])}


def full(plan: dict) -> dict:
    """A run in which no file can grow beyond `limit` bytes."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["limit"], resource.RLIM_INFINITY))

    return {"code": run(plan, limited)}


def plain(plan: dict) -> dict:
    """A run like any other."""
    return {"code": run(plan)}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="lancedb fork support")
    torch.set_num_threads(1)
    MODEL = encoder()
    MODEL.images([torch.zeros(20, 20, 3, dtype=torch.uint8).numpy()])  # warm
    for line in sys.stdin:
        given = json.loads(line)
        print(json.dumps(globals()[given["kind"]](given)), flush=True)
