"""What stands for the reader's own data, and for weights that would have to be fetched, when examples are tested.

`NAMES` are the variables that a page may use without defining them (`THERE`: of one page alone); `folder` makes the
files and folders that pages speak of; `shorten` and `fewer` bring down how much an example does (steps, epochs,
sizes), never what it calls.
"""

import ast
import csv
import inspect
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipworks.data.item import Item
from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.loading import load, save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer

COUNT = 12
CAPTIONS = [f"a {kind} on the {place}. It is {size}." for place in ("grass", "street") for size in ("big", "small")
            for kind in ("cat", "dog", "bird")]  # fmt: skip
PICTURE = ".jpg", ".png", ".jpeg"
REGIONS = [{"box": [0.1, 0.1, 0.6, 0.9], "text": "a cat"}, {"box": [0.4, 0.2, 0.9, 0.8], "text": "a red car"}]

MOST = {"steps": 2, "epochs": 1, "steps_per_shot": 1, "warmup": 1, "batch_size": 4, "micro_batch": 2, "views": 4,
        "side": 32, "window": 16, "stride": 8, "image_size": 64, "slow_size": 16, "size": 32, "t": 20, "budget": 5,
        "range": 20}  # fmt: skip


def toy(seed: int = 0, dim: int = 16) -> Encoder:
    """A small encoder with the tokenizer of CLIP, random weights."""
    vision = VisionConfig(image_size=32, patch_size=8, width=24, layers=3, heads=3, mlp_width=48)
    text = TextConfig(width=24, layers=2, heads=3, mlp_width=48)
    config = EncoderConfig("toy", dim, vision, text, PreprocessConfig(size=32))
    return Encoder(config, CLIPTokenizer(), seed=seed).eval()


def weights(place: Path) -> Path:
    """A folder with the toy under the name of the bundled model."""
    place.mkdir()
    save(toy(), place / "clipworks-small.safetensors")
    return place


def picture(seed: int) -> Image.Image:
    colour = np.random.default_rng(seed).integers(0, 256, 3)
    noise = np.random.default_rng(seed + 1).normal(0, 20, (36, 48, 3))
    return Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8))


def folder(place: Path) -> None:
    """Make the folders, tables and weights that the pages name as the reader's."""
    for name in ("photos", "good", "new", "pets-unsorted"):
        (place / name).mkdir()
        for i in range(MOST["range"]):
            picture(i).save(place / name / f"{i}.jpg")
    for name in ("flowers", "flowers-held-out", "pets", "objects", "pairs"):
        for i, caption in enumerate(CAPTIONS):
            kind = place / name / ("" if name == "pairs" else caption.split()[1])
            kind.mkdir(parents=True, exist_ok=True)
            picture(i).save(kind / f"{i}.jpg")
            (kind / f"{i}.json").write_text(json.dumps({"caption": caption, "regions": REGIONS}))
    tables(place)
    for i in (1, 2, 3):
        (place / f"run-{i}").mkdir()
        save(toy(seed=i), place / f"run-{i}" / "model.safetensors")
    for name in ("model.json", "small.json"):
        (place / name).write_text(json.dumps(toy().config.to_dict()))
    for name in ("chat.txt", "coco-style.txt"):
        (place / name).write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    language_model(place / "models" / "sentence-encoder")


def tables(place: Path) -> None:
    """Make the lists of images with captions."""
    import pyarrow.csv
    import pyarrow.parquet

    columns = ("title", "about", "enriched", "long_caption")
    for name in ("pairs.csv", "held-out.csv", "captions.csv", "part-000.csv"):
        with open(place / name, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "caption", *columns])
            rows = enumerate(CAPTIONS)
            table.writerows([f"photos/{i}.jpg", caption, *[caption] * len(columns)] for i, caption in rows)
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(place / "pairs.csv"), place / "pairs.parquet")


def collection(place: Path, encoder: str, rows: int) -> None:
    """Make a collection of photos that are not there any more."""
    from clipworks.store.embed import embed

    items = [Item(f"{i}.jpg", picture(i), label=("street", "pets")[i % 2]) for i in range(rows)]
    embed(items, place, encoder=encoder)


def language_model(place: Path) -> None:
    """Save a tiny sentence encoder of transformers."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<end>", "<pad>", *sorted({word for caption in CAPTIONS for word in caption.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<pad>").save_pretrained(place)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=40, **shape)
    transformers.BertModel(config).save_pretrained(place)


def published(monkeypatch) -> None:
    """Let the DINO and SAM models of transformers be tiny ones with random weights; folders are read as ever."""
    import transformers

    def dino(name, **options):
        if not name.startswith("facebook/"):
            return given(name, **options)
        shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **shape))

    def sam(name, **options):
        vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
                  "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48}  # fmt: skip
        prompt = {"hidden_size": 16, "image_size": 64, "image_embedding_size": 4}
        decoder = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.SamModel(
            transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
        )

    def processor(name, **options):
        raise OSError("a folder of weights alone")

    given = transformers.AutoModel.from_pretrained
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", dino)
    monkeypatch.setattr(transformers.SamModel, "from_pretrained", sam)
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", processor)


def pictures_of(text: str) -> None:
    """Make the pictures that an example reads and nobody has made: every name of a picture in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(PICTURE):
            path = Path(node.value)
            if path.suffix and not path.exists() and "://" not in node.value:
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(len(node.value)).save(path)


def paths() -> list[str]:
    return [f"photos/{i}.jpg" for i in range(COUNT)]


def masks() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 3, (36, 48)) for i in range(COUNT)]


def generate(prompt: str, **_: object) -> str:
    return "a cat sits on the grass"


def alternating(*values: object) -> list[object]:
    return [values[i % len(values)] for i in range(COUNT)]


def recipe_base() -> type:
    from clipworks.training.recipe import ContrastiveRecipe

    return ContrastiveRecipe


NAMES = {
    "names": lambda: ["cat", "dog"],
    "labels": lambda: alternating("cat", "dog"),
    "answers": lambda: alternating("cat", "dog"),
    "y": lambda: alternating(0, 1),
    "other_y": lambda: alternating(0, 1),
    "cameras": lambda: alternating(0, 1, 2),
    "sources": lambda: alternating("studio", "web"),
    "people": lambda: alternating(*(f"person {i}" for i in range(3))),
    "validation_labels": lambda: alternating(True, False),
    **dict.fromkeys(["captions", "long_captions", "texts", "alt_texts", "descriptions"], lambda: CAPTIONS),
    **dict.fromkeys(["validation_texts", "rated_captions"], lambda: CAPTIONS),
    **dict.fromkeys(["sentences_without_picture", "rated_without"], lambda: ["This was decided a year later."]),
    **dict.fromkeys(["images", "paths", "good", "marked", "keys", "pairs", "held", "frames", "new"], paths),
    **dict.fromkeys(["other", "others", "more_images", "rated_paths"], paths),
    "masks": masks,
    "queries": lambda: ["a cat", "a dog"],
    "config": lambda: toy().config,
    "encoder": load,
    "teacher": load,
    "student": lambda: toy().config,
    "small": lambda: toy(seed=1),
    "large": lambda: toy(seed=2, dim=24),
    "dino": lambda: torch.nn.AvgPool2d(8),
    "mask_head": lambda: torch.nn.Conv2d(24, 2, 1),
    "generate": lambda: generate,
    "ask_model": lambda: lambda prompts: [generate(prompt) for prompt in prompts],
    "names_of_things": lambda: ["cat", "dog", "bird", "street"],
    "read_shards": lambda: lambda: [CAPTIONS, CAPTIONS[::-1]],
    "accuracy_on_validation": lambda: lambda encoder: 0.5,
    "ContrastiveRecipe": recipe_base,
}
THERE = {  # what the classes are called that a page has of its own
    "docs/methods/tuning/gm_df.md": {"labels": alternating("real face", "fake face")},
    "docs/methods/prompts/biomedcoop.md": {"labels": alternating("glioma", "no tumour")},
}


def shorten(tree: ast.Module, names: dict) -> None:
    """Bring numbers down to `MOST`, and give the names that stand for the reader's data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in MOST:
            node.value = least(node.value, MOST[node.arg])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in MOST:
            node.value = least(node.value, MOST[node.targets[0].id])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            node.args = [least(argument, MOST["range"]) for argument in node.args]
        elif isinstance(node, ast.Name) and node.id in NAMES and node.id not in names:
            names[node.id] = NAMES[node.id]()


def least(node: ast.expr, most: int) -> ast.expr:
    """The number itself, or `most` if it is larger; other expressions stay as they are."""
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value > most:
        return ast.copy_location(ast.Constant(most), node)
    return node


def fewer(function, monkeypatch) -> None:
    """Bring the defaults of a method's keywords down to `MOST`."""
    function = function.__init__ if inspect.isclass(function) else function
    defaults = getattr(function, "__kwdefaults__", None) or {}
    for name in MOST.keys() & defaults.keys():
        if isinstance(defaults[name], int | float) and defaults[name] > MOST[name]:
            monkeypatch.setitem(defaults, name, MOST[name])


def shorter(line: str) -> str:
    """The same for the options of a command."""
    words = line.split(" ")
    for i, word in enumerate(words[:-1]):
        most = MOST.get(word.removeprefix("--").replace("-", "_"))
        if word.startswith("--") and most and words[i + 1].isdigit():
            words[i + 1] = str(min(most, int(words[i + 1])))
    return " ".join(words)
