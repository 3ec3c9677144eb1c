"""What a CUDA device makes of the encoders: images and texts per second, beside transformers in the same run, and a
folder of JPEG files to a finished collection.

    python benchmarks/gpu_speed.py [--images 4000] [--batch 256]

Weights of ViT-B/32, B/16 and L/14 are random with the right shape; the pixels of the first part are on the device
already. Cosines are with the same encoder in fp32 on the CPU. Rows of one model take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import clipworks
from clipworks.encoders.config import EncoderConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.loading import load, save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from common import record
from end_to_end import photos
from server_speed import WORDS

SEED = 0
# patch, width and layers of the image tower, width of the text tower, dimension of the joint space
TOWERS = {"ViT-B/32": (32, 768, 12, 512, 512), "ViT-B/16": (16, 768, 12, 512, 512),
          "ViT-L/14": (14, 1024, 24, 768, 768)}  # fmt: skip


def sizes(width: int) -> dict[str, int]:
    return {"width": width, "heads": width // 64, "mlp_width": 4 * width}


def tower(name: str) -> Encoder:
    """The bundled encoder, or one of a published shape with random weights."""
    if name not in TOWERS:
        return load(name)
    patch, width, layers, text, dim = TOWERS[name]
    usual = EncoderConfig().to_dict()
    usual["dim"] = dim
    usual["vision"] |= {"patch_size": patch, "layers": layers, **sizes(width)}
    usual["text"] |= sizes(text)
    return Encoder(EncoderConfig.from_dict(usual), CLIPTokenizer(), seed=SEED)


def theirs(name: str) -> Any:
    """The image tower of the same shape in transformers."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    patch, width, layers, _, dim = TOWERS[name]
    torch.manual_seed(SEED)
    config = CLIPVisionConfig(patch_size=patch, hidden_size=width, num_hidden_layers=layers, projection_dim=dim,
                              num_attention_heads=width // 64, intermediate_size=4 * width)  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval().to("cuda")


def rates(rows: dict[str, Callable[[], Any]], count: int, turns: int = 5) -> dict[str, float]:
    """Things per second of every row, the median over turns."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(turns + 1):
        for name, work in rows.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: round(count / statistics.median(taken), 1) for name, taken in seconds.items()}


def images(name: str, batch: int) -> dict[str, Any]:
    """Images per second of our tower and of transformers', in fp32 and with weights in bf16."""
    exact = tower(name)
    few = torch.randn(8, 3, exact.image_size, exact.image_size, generator=torch.Generator().manual_seed(SEED))
    expected = exact.images(few)
    pixels = few.repeat(-(-batch // 8), 1, 1, 1)[:batch].cuda()
    rows: dict[str, Callable[[], Any]] = {}
    cosines = {}
    for precision in ("fp32", "bf16"):
        ours = tower(name).to("cuda").to_precision(precision)
        cosines[precision] = round(float(F.cosine_similarity(ours.images(few), expected).min()), 7)
        rows[f"clipworks {precision}"] = lambda ours=ours: ours.images(pixels, batch_size=batch)
    if name in TOWERS:
        peer = theirs(name)

        def other(model: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return F.normalize(model(x).image_embeds.float(), dim=-1).cpu()

        half, small = theirs(name).bfloat16(), pixels.bfloat16()
        rows["transformers fp32"] = lambda: other(peer, pixels)
        rows["transformers bf16"] = lambda: other(half, small)
    return {"images per second": rates(rows, batch), "cosine": cosines}


def texts(name: str, count: int = 4096) -> dict[str, float]:
    """Texts per second, tokenised before."""
    encoder = tower(name).to("cuda")
    words = [f"a photo of a {a} and a {b}, number {i}" for i in range(5) for a in WORDS for b in WORDS][:count]
    half = tower(name).to("cuda").to_precision("bf16")
    return rates({"clipworks fp32": lambda: encoder.texts(words, batch_size=1024),
                  "clipworks bf16": lambda: half.texts(words, batch_size=1024)}, len(words), 3)  # fmt: skip


def folder_to_collection(folder: Path, count: int) -> dict[str, Any]:
    """The same folder on the CPU and on the device; how far the vectors are apart, and images per second."""
    paths = photos(folder / "photos", min(count, 200))
    paths = [paths[i % len(paths)] for i in range(count)]
    many = folder / "many"
    many.mkdir()
    for i, path in enumerate(paths):
        (many / f"{i:06}.jpg").hardlink_to(path)
    save(tower("ViT-B/32"), folder / "b32.safetensors")
    found: dict[str, Any] = {"images": count, "side by side": {}}
    for label, source, options in (
        ("clipworks-small fp32", None, {"precision": "fp32", "batch_size": 128}),
        ("ViT-B/32 bf16", str(folder / "b32.safetensors"), {"precision": "bf16", "batch_size": 128}),
        ("ViT-B/32 bf16, fast decoding", str(folder / "b32.safetensors"),
         {"precision": "bf16", "batch_size": 128, "fast": True}),
    ):  # fmt: skip
        out = folder / label.replace("/", "-").replace(" ", "-")
        report = clipworks.embed(many, out, encoder=source, device="cuda", progress=False, **options)
        found["side by side"][label] = {"images_per_s": round(count / report.seconds, 1),
                                        "waiting": round(report.wait_share, 3)}  # fmt: skip
        print(label, found["side by side"][label], flush=True)
    first = folder / "clipworks-small-fp32"
    few = [str(path) for path in sorted(many.iterdir())[:200]]
    home = clipworks.embed(few, folder / "cpu", precision="fp32", device="cpu", progress=False)
    one, two = clipworks.Collection.open(home.path), clipworks.Collection.open(first)
    rows = torch.as_tensor(two.vectors[: len(one)].astype("float32"))
    found["cpu and device"] = {
        "fingerprints alike": one.fingerprint == two.fingerprint,
        "largest difference": float((torch.as_tensor(one.vectors[:].astype("float32")) - rows).abs().max()),
        "bytes alike": float((one.vectors[:] == two.vectors[: len(one)]).mean()),
    }
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=4000)
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--name", default="gpu_speed", help="of the result file")
    given = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    results: dict[str, Any] = {"batch": given.batch, "towers": {}, "texts": {}}
    for name in ("clipworks-small", *TOWERS):
        results["towers"][name] = images(name, given.batch)
        results["texts"][name] = texts(name)
        print(name, results["towers"][name], results["texts"][name], flush=True)
        record(given.name, results, SEED)  # the last part takes minutes
    with tempfile.TemporaryDirectory() as folder:
        results["folder to collection"] = folder_to_collection(Path(folder), given.images)
    print(record(given.name, results, SEED))


if __name__ == "__main__":
    main()
