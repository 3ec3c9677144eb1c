"""A small run as a program, to be killed: `python killed.py OUT [RANK COUNT PORT]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    out, *process = sys.argv[1:]
    if process:
        rank, count, port = process
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_PORT=port,
                          MASTER_ADDR="127.0.0.1")  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from clipworks.training.loop import train
    from training.toy import drawings, infonce, tiny

    train(drawings(96), tiny(), out=out, loss=infonce, epochs=10, batch_size=16, micro_batch=6, lr=1e-3, ema=0.9,
          clip=1.0, augment="standard", save_every=3, log_every=1, timeout=20, device="cpu", workers=1)  # fmt: skip
