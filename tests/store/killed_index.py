"""Builds of an index that die at a step, in children of one process: `python killed_index.py COLLECTION STEP...`.

Prints the exit code of each, and the index that is there after it.
"""

import os
import sys
from pathlib import Path

import faiss  # noqa: F401
from killed import dies

from clipworks.store import derived, index
from clipworks.store.collection import Collection
from clipworks.store.indexed import newest

STEPS = {
    "begun": dies(index, "_write", 1),
    "covered": dies(index, "write_covered", 1, before=False),
    "measured": dies(derived, "seal", 1),
    "sealed": dies(derived, "seal", 1, before=False),
    "not in place": dies(os, "rename", 1),
    "in place": dies(os, "rename", 1, before=False),
    "cleared": dies(derived, "clear", 1, before=False),
}

if __name__ == "__main__":
    for step in sys.argv[2:]:
        pid = os.fork()
        if not pid:
            STEPS[step]()
            index.build_index(Collection.open(sys.argv[1]), kind="ivf", rebuild=True)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), newest(Path(sys.argv[1]), "ivf").name, flush=True)
