"""From 1,000 JPEG files to a finished collection: exact, bf16 and int8 beside sentence-transformers and open_clip.

    python benchmarks/end_to_end.py --peers /tmp/peers/bin/python [--images 1000] [--turns 3]

Every row is a process of its own that has loaded its model and waits; they are asked in turns, so that other work on
the machine hits all alike, and ratios are the median over turns. All encode the same files with a ViT-B/32 of random
weights. The clock runs from the list of paths to what the row keeps: clipworks a collection that can be searched (rows
committed, copy for searching made), the peers a single .npy. Peers run as their documentation shows them, batch 32;
open_clip with torch's fast fp32 setting as well, which it does not set itself. The peers' environment needs torch,
torchvision, open_clip_torch and sentence-transformers; a torchvision that was built for another torch is helped over
its missing operators. `--rows` runs some of the rows alone.

The limits are measured in the same turns: decoding the files with nothing else, and a matrix product of the tower's
largest shape in each precision. What both leave at best, decoding and arithmetic sharing the cores, is the bound that
`share_of_limit` refers to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
SIZE, QUALITY, BATCH = (1000, 700), 88, 32
FLOP = 8.8e9  # of the image tower, per image
OURS = ("clipworks exact fp32", "clipworks bf16", "clipworks openvino fp32", "clipworks openvino bf16",
        "clipworks openvino int8", "clipworks onnxruntime int8")  # fmt: skip
PEERS = ("sentence-transformers", "open_clip", "open_clip medium")
LIMITS = ("decode", "product fp32", "product bf16", "product int8")
FORMS = {"clipworks openvino fp32": ("openvino", "fp32"),
         "clipworks openvino bf16": ("openvino", "bf16"),
         "clipworks openvino int8": ("openvino", "int8"),
         "clipworks onnxruntime int8": ("onnxruntime", "int8")}  # fmt: skip
AIMS = {"clipworks exact fp32": 1.8, "clipworks bf16": 2.8, "clipworks openvino int8": 4.0}


def photos(folder: Path, count: int) -> list[str]:
    """JPEG files of about a megapixel: parts of scikit-learn's two photos, enlarged, mirrored and lit differently."""
    from PIL import Image, ImageEnhance
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(SEED)
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        source, share = sources[i % len(sources)], draw.uniform(0.55, 1.0)
        wide, tall = int(source.width * share), int(source.height * share)
        left, top = draw.integers(0, source.width - wide + 1), draw.integers(0, source.height - tall + 1)
        image = source.crop((left, top, left + wide, top + tall)).resize(SIZE, Image.Resampling.BICUBIC)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image
        image = ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(draw.uniform(0.6, 1.3))).enhance(
            draw.uniform(0.5, 1.4)
        )
        noise = draw.normal(0, 4, (SIZE[1], SIZE[0], 1))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
        paths.append(str(folder / f"{i:05}.jpg"))
        image.save(paths[-1], quality=QUALITY)
    return paths


def digest(paths: list[str]) -> str:
    state = hashlib.sha256()
    for path in paths:
        state.update(Path(path).read_bytes())
    return state.hexdigest()


# -- the rows: each returns what does the work once, from paths to the finished thing at `out`


def ours(row: str, box: Path) -> Callable[[list[str], Path], Any]:
    import clipworks
    from clipworks.encoders.loading import load

    source = box / (f"{FORMS[row][0]}-{FORMS[row][1]}" if row in FORMS else "b32.safetensors")
    encoder = load(source, precision="bf16" if row == "clipworks bf16" else None)

    def work(paths: list[str], out: Path) -> None:
        report = clipworks.embed(paths, out, encoder=encoder, batch_size=BATCH, progress=False)
        if report.n_rows != len(paths):
            raise SystemExit(f"{row}: {report}")

    return work


def mend_torchvision() -> None:
    """Declare the operators that a torchvision built for another torch lacks; nothing here calls them."""
    import torch

    global _library
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def sentence_transformers(row: str, box: Path) -> Callable[[list[str], Path], Any]:
    mend_torchvision()
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(box / "peer"), device="cpu")

    def work(paths: list[str], out: Path) -> None:
        parts = []
        for start in range(0, len(paths), BATCH):  # all images at once would not fit into small memories
            images = [Image.open(path) for path in paths[start : start + BATCH]]
            parts.append(model.encode(images, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False))
        np.save(out, np.concatenate(parts))

    return work


def open_clip(row: str, box: Path) -> Callable[[list[str], Path], Any]:
    mend_torchvision()
    import open_clip as library
    import torch
    from PIL import Image

    if row.endswith("medium"):
        torch.set_float32_matmul_precision("medium")
    torch.manual_seed(SEED)
    model, _, transform = library.create_model_and_transforms("ViT-B-32")
    model.eval()

    def work(paths: list[str], out: Path) -> None:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(paths), BATCH):
                pixels = torch.stack([transform(Image.open(path)) for path in paths[start : start + BATCH]])
                parts.append(torch.nn.functional.normalize(model.encode_image(pixels), dim=-1).numpy())
        np.save(out, np.concatenate(parts))

    return work


def decode(row: str, box: Path) -> Callable[[list[str], Path], Any]:
    """The files to pixels in memory, in as many threads as cores, and no more."""
    from concurrent.futures import ThreadPoolExecutor

    from clipworks.data.decode import decode_pixels
    from clipworks.data.loader import available_cores

    def work(paths: list[str], out: Path) -> None:
        with ThreadPoolExecutor(available_cores()) as pool:
            for _ in pool.map(decode_pixels, paths):
                pass

    return work


def product(row: str, box: Path) -> Callable[[list[str], Path], Any]:
    """A product of the tower's largest shape, as often as its arithmetic makes up that of the images."""
    import torch

    rows, inner, outer = BATCH * 50, 768, 3072
    x, w = torch.randn(rows, inner), torch.randn(outer, inner)
    if row.endswith("fp32"):
        torch.set_float32_matmul_precision("medium")
    if row.endswith("bf16"):
        x, w = x.bfloat16(), w.bfloat16()
    if row.endswith("int8"):
        x, w = (torch.randint(-128, 128, t.shape, dtype=torch.int8) for t in (x, w))
    multiply = torch._int_mm if row.endswith("int8") else torch.matmul
    turned = w.T

    def work(paths: list[str], out: Path) -> None:
        for _ in range(max(1, round(len(paths) * FLOP / (2 * rows * inner * outer)))):
            multiply(x, turned)

    return work


KINDS: dict[str, Callable[[str, Path], Callable[[list[str], Path], Any]]] = {
    "clipworks": ours, "sentence-transformers": sentence_transformers, "open_clip": open_clip, "decode": decode,
    "product": product,
}  # fmt: skip


def worker(row: str, box: Path, threads: int) -> None:
    """Load, say so, then do the work once for every line of standard input and print seconds of wall and processor."""
    import torch

    torch.set_num_threads(threads)
    work = KINDS[row.partition(" ")[0]](row, box)
    paths: list[str] = json.loads((box / "paths.json").read_text())
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        some = paths[: int(line)]
        with tempfile.TemporaryDirectory() as folder:
            start, busy = time.perf_counter(), time.process_time()
            work(some, Path(folder) / f"{number}.npy")
            print(json.dumps([time.perf_counter() - start, time.process_time() - busy]), flush=True)


def prepare(box: Path, rows: list[str], threads: int) -> dict[str, Any]:
    """Weights and exports of one and the same random ViT-B/32; what the gate measured of each export."""
    import torch

    from clipworks.encoders.config import EncoderConfig
    from clipworks.encoders.encoder import Encoder
    from clipworks.encoders.loading import load, save
    from clipworks.encoders.runtime import export
    from clipworks.encoders.tokenizers.bpe import CLIPTokenizer

    torch.set_num_threads(threads)
    save(Encoder(EncoderConfig(), CLIPTokenizer(), seed=SEED), box / "b32.safetensors")
    exact, measured = load(box / "b32.safetensors"), {}
    for row, (runtime, precision) in FORMS.items():
        if row in rows:  # random weights say nothing of the quality on trained ones: the bound is not for them
            report = export(exact, box / f"{runtime}-{precision}", images=str(box / "photos"), runtime=runtime,
                            precision=precision, bound=0.0)  # fmt: skip
            measured[row] = report.chosen.as_row()
    return measured


# run in the peers' environment; the layout is that of the published "clip-ViT-B-32"
PEER = """
import json, pathlib, sys
sys.path[:0] = [sys.argv[2], str(pathlib.Path(sys.argv[2]).parent / "src")]
import end_to_end
end_to_end.mend_torchvision()
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from clipworks.encoders.tokenizers import bpe
torch.manual_seed(end_to_end.SEED)
folder = pathlib.Path(sys.argv[1])
vocabulary, ranks, _ = bpe._tables()
tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(ranks))
CLIPModel(CLIPConfig()).save_pretrained(folder / "0_CLIPModel")
CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(folder / "0_CLIPModel")
module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
(folder / "modules.json").write_text(json.dumps([module]))
"""


def start(row: str, box: Path, python: str, threads: int) -> subprocess.Popen:
    command = [python, __file__, "--worker", row, "--box", str(box), "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:  # type: ignore[union-attr]
        if line.strip() == "ready":
            return process
    raise SystemExit(f"{row} did not start")


def ask(process: subprocess.Popen, count: int) -> list[float]:
    process.stdin.write(f"{count}\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    return json.loads(process.stdout.readline())  # type: ignore[union-attr]


def summary(times: dict[str, list[list[float]]], count: int, threads: int) -> dict[str, Any]:
    """Images per second, ratios to each peer, and the share of what decoding and arithmetic allow."""
    wall = {row: statistics.median(t[0] for t in turns) for row, turns in times.items()}
    found: dict[str, Any] = {}
    for row, turns in times.items():
        entry: dict[str, Any] = {
            "seconds": round(wall[row], 2),
            "images_per_s": round(count / wall[row], 1),
            "cpu_ms_per_image": round(1e3 * statistics.median(t[1] for t in turns) / count, 2),
        }
        for peer in PEERS:
            if peer in times and row not in LIMITS:
                pairs = list(zip(times[peer], turns, strict=True))
                entry[f"ratio to {peer}"] = round(statistics.median(a[0] / b[0] for a, b in pairs), 2)
                entry[f"cpu ratio to {peer}"] = round(statistics.median(a[1] / b[1] for a, b in pairs), 2)
        form = next((p for p in ("int8", "bf16") if p in row), "fp32")
        if row in OURS and {"decode", f"product {form}"} <= wall.keys():
            entry["share_of_limit"] = round((wall["decode"] + wall[f"product {form}"]) / wall[row], 3)
        found[row] = entry
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peers", help="Python of the environment of open_clip and sentence-transformers")
    options.add_argument("--images", type=int, default=1000)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rows", help="some of the rows, separated by commas")
    options.add_argument("--name", default="end_to_end", help="of the result file")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    options.add_argument("--box", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        return worker(given.worker, given.box, given.threads)
    from common import record

    rows = [*OURS, *(PEERS if given.peers else ()), *LIMITS]
    rows = [row for row in rows if not given.rows or row in given.rows.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        box = Path(folder)
        paths = photos(box / "photos", given.images)
        (box / "paths.json").write_text(json.dumps(paths))
        measured = prepare(box, rows, given.threads)
        if given.peers:
            subprocess.run([given.peers, "-c", PEER, str(box / "peer"), str(Path(__file__).parent)], check=True)
        running = {row: start(row, box, given.peers if row in PEERS else sys.executable, given.threads) for row in rows}
        times: dict[str, list[list[float]]] = {row: [] for row in rows}
        try:
            for process in running.values():
                ask(process, min(2 * BATCH, given.images))  # what is done on first use
            for turn in range(given.turns):
                for row, process in running.items():
                    times[row].append(ask(process, given.images))
                    print(turn, f"{row:28s}", *(f"{s:8.2f} s" for s in times[row][-1]), flush=True)
        finally:
            for process in running.values():
                process.stdin.close()  # type: ignore[union-attr]
                process.wait()
        size = sum(os.path.getsize(path) for path in paths) / len(paths)
        results = {
            "rows": summary(times, given.images, given.threads), "aims": AIMS, "exports": measured,
            "turns": {row: [[round(s, 3) for s in turn] for turn in turns] for row, turns in times.items()},
            "settings": {"model": "ViT-B/32, random weights", "images": given.images, "bytes_per_image": round(size),
                         "pixels": SIZE, "batch": BATCH, "threads": given.threads, "turns": given.turns,
                         "peers": peer_versions(given.peers)},
        }  # fmt: skip
        print(json.dumps(results["rows"], indent=1))
        print(record(given.name, results, SEED, digest(paths)))


def peer_versions(python: str | None) -> dict[str, str]:
    """Versions in the peers' environment."""
    if not python:
        return {}
    code = (
        "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in ('torch', 'torchvision', "
        "'open_clip_torch', 'sentence-transformers', 'transformers', 'pillow')}))"
    )
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
