"""A tiny SAM with random weights, exported in the form of segment-anything: its masks are those of transformers."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from clipworks.errors import BadWeights, ClipworksError
from clipworks.segment.prompts import Sam, open_sam

transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIDE, GRID = 64, 4
SIZES = [(48, 64), (50, 37)]


def tiny():
    vision = dict(hidden_size=12, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE,
                  window_size=0, global_attn_indexes=[0], mlp_dim=16, num_pos_feats=8)  # fmt: skip
    prompt = dict(hidden_size=16, image_size=SIDE, image_embedding_size=GRID, mask_input_channels=8)
    decoder = dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16)
    torch.manual_seed(0)
    model = transformers.SamModel(
        transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )
    for weights in model.parameters():  # the library's start is so small that every mask would be the same
        if weights.ndim > 1:
            nn.init.normal_(weights, std=0.5)
    return model.eval().requires_grad_(False)


class Encoder(nn.Module):
    """The normalised square to embeddings; `raw` takes (height, width, 3) in [0, 255], does both itself."""

    def __init__(self, model, raw=False):
        super().__init__()
        self.model, self.raw = model, raw
        self.eval()

    def forward(self, image):
        if self.raw:
            mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
            image = ((image - mean) / std).permute(2, 0, 1)[None]
            image = nn.functional.pad(image, (0, SIDE - image.shape[-1], 0, SIDE - image.shape[-2]))
        return self.model.get_image_embeddings(image)


class Decoder(nn.Module):
    """The inputs and outputs of segment-anything's export, written from its description."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, image_embeddings, point_coords, point_labels, mask_input, has_mask_input, orig_im_size):
        prompts = self.model.prompt_encoder
        turns = 2 * torch.pi * (2 * (point_coords + 0.5) / SIDE - 1) @ prompts.shared_embedding.positional_embedding
        places = torch.cat([turns.sin(), turns.cos()], -1) * (point_labels != -1)[..., None]
        places = places + prompts.not_a_point_embed.weight * (point_labels == -1)[..., None]
        for label, embedding in enumerate(prompts.point_embed):
            places = places + embedding.weight * (point_labels == label)[..., None]
        nothing = prompts.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense = has_mask_input * prompts.mask_embed(mask_input) + (1 - has_mask_input) * nothing
        decoder, where = self.model.mask_decoder, self.model.get_image_wide_positional_embeddings()
        one = decoder(image_embeddings, where, places[:, None], dense, multimask_output=False)
        more = decoder(image_embeddings, where, places[:, None], dense, multimask_output=True)
        low, scores = (torch.cat(pair, 2)[:, 0] for pair in zip(one, more, strict=True))
        whole = nn.functional.interpolate(low, (SIDE, SIDE), mode="bilinear")
        return whole + 0 * orig_im_size.sum(), scores, low


NAMES = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size")


def write(module, given, path, inputs, outputs, free=None):
    """By the older exporter, as the scripts of the field do; `free` are the axes of any length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, given, path, input_names=inputs, output_names=outputs, dynamic_axes=free, dynamo=False
        )  # fmt: skip


def write_encoder(path, raw=False):
    given = torch.rand(40, 60, 3) if raw else torch.randn(1, 3, SIDE, SIDE)
    free = {"image": {0: "height", 1: "width"}} if raw else None
    write(Encoder(tiny(), raw), (given,), path, ["image"], ["embeddings"], free)


def write_decoder(path):
    coarse = torch.randn(1, 1, 4 * GRID, 4 * GRID)
    given = (
        torch.randn(1, 16, GRID, GRID),
        torch.ones(1, 5, 2),
        torch.ones(1, 5),
        coarse,
        torch.ones(1),
        torch.ones(2),
    )
    free = {"point_coords": {1: "points"}, "point_labels": {1: "points"}}
    write(Decoder(tiny()), given, path, list(NAMES), ["masks", "iou_predictions", "low_res_masks"], free)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same weights as a folder of transformers and as one of ONNX files."""
    root = tmp_path_factory.mktemp("sams")
    tiny().save_pretrained(root / "plain")
    (root / "fast").mkdir()
    write_encoder(root / "fast" / "encoder.onnx")
    write_decoder(root / "fast" / "decoder.onnx")
    return root


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made / "fast", tmp_path / "copy")


def picture(size):
    return 255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(1))


def prompts(size):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(2))
    box, point = (2, 3, 20, 31), (8, 9)
    return [(None, point, None), (box, None, None), (box, point, None), (box, point, scores), (None, point, scores)]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_masks_and_scores_are_those_of_transformers(made, size):
    plain, fast = open_sam(made / "plain"), open_sam(str(made / "fast"))
    assert (type(plain), fast.size, fast.coarse) == (Sam, SIDE, 4 * GRID)
    answers = [[model(picture(size))(*asked) for asked in prompts(size)] for model in (plain, fast)]
    for (expected, sure), (found, quality) in zip(*answers, strict=True):
        assert found.shape == size
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert quality == pytest.approx(sure, abs=1e-5)
    spread = torch.stack([mask for mask, _ in answers[0]]).std(0).mean()
    assert spread > 1e-2, "the prompts must matter, else nothing was compared"


@torch.no_grad()
def test_an_encoder_that_normalises_itself(made, copy):
    write_encoder(copy / "encoder.onnx", raw=True)
    expected, _ = open_sam(made / "fast")(picture(SIZES[0]))(None, (8, 9), None)
    found, _ = open_sam(copy)(picture(SIZES[0]))(None, (8, 9), None)
    np.testing.assert_allclose(found, expected, atol=1e-4)


class Three:
    """A decoder that was exported without the first mask."""

    def __init__(self, session):
        self.session = session

    def run(self, names, given):
        return [answer[:, 1:] for answer in self.session.run(names, given)]


@torch.no_grad()
def test_of_three_masks_the_surest(made):
    plain, fast = open_sam(made / "plain"), open_sam(made / "fast")
    fast._decoder = Three(fast._decoder)
    found, quality = fast(picture((SIDE, SIDE)))(None, (8, 9), None)
    point = {"input_points": torch.tensor([[[[8.0, 9.0]]]]), "input_labels": torch.ones(1, 1, 1, dtype=torch.long)}
    answer = plain.model(pixel_values=plain.padded(picture((SIDE, SIDE))[None] / 255), **point)
    best = int(answer.iou_scores.argmax())
    assert quality == pytest.approx(float(answer.iou_scores[0, 0, best]), abs=1e-5)
    expected = nn.functional.interpolate(answer.pred_masks[0, :, best : best + 1], (SIDE, SIDE), mode="bilinear")[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_file_that_is_missing(copy):
    (copy / "decoder.onnx").unlink()
    with pytest.raises(BadWeights, match=r"decoder.onnx is missing. Found: encoder.onnx"):
        open_sam(copy)


def test_files_that_were_swapped(copy):
    (copy / "encoder.onnx").replace(copy / "other")
    (copy / "decoder.onnx").rename(copy / "encoder.onnx")
    (copy / "other").rename(copy / "decoder.onnx")
    with pytest.raises(BadWeights, match=r"encoder.onnx must take one image, .* Found: image_embeddings .*float"):
        open_sam(copy)


def copies(path, **ends):
    """A graph without weights: each output is a copy of the input beside it; `ends` are (input, output, shape)."""
    make, number = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [make.make_node("Identity", [taken], [given]) for taken, given, _ in ends.values()]
    takes, gives = (
        [make.make_tensor_value_info(end[side], number, end[2]) for end in ends.values()] for side in (0, 1)
    )
    onnx.save(make.make_model(make.make_graph(nodes, "copies", takes, gives), opset_imports=[make.make_opsetid("", 18)],
                              ir_version=9), path)  # fmt: skip


def decoder(path, names=NAMES, outputs=("masks", "iou_predictions", "low_res_masks"), side=4 * GRID):
    shapes = ([1, 16, GRID, GRID], [1, "n", 2], [1, "n"], [1, 1, side, side], [1], [2])
    given = (*outputs, "more", "and more", "and still more")
    copies(path, **{name: ends for name, *ends in zip("abcdef", names, given, shapes, strict=True)})


def test_a_decoder_with_other_inputs(copy):
    decoder(copy / "decoder.onnx", names=(NAMES[0], "input_points", *NAMES[2:]))
    with pytest.raises(BadWeights, match=r"must take .*point_coords.* Found: .*input_points tensor\(float"):
        open_sam(copy)


def test_a_decoder_with_other_outputs(copy):
    decoder(copy / "decoder.onnx", outputs=("masks", "scores", "low"))
    with pytest.raises(BadWeights, match=r"decoder.onnx must give low_res_masks, iou_predictions. Found: .*scores"):
        open_sam(copy)


def test_files_of_two_models(copy):
    copies(copy / "encoder.onnx", image=("image", "embeddings", [1, 3, SIDE, SIDE]))
    with pytest.raises(BadWeights, match=r"must be of one SAM. .*\[1, 3, 64, 64\], .*\[1, 16, 4, 4\]"):
        open_sam(copy)


@pytest.mark.parametrize("side", [1 << 20, "side"])
def test_a_side_that_would_fill_the_memory_or_is_unknown(copy, side):
    decoder(copy / "decoder.onnx", side=side)
    with pytest.raises(BadWeights, match=r"mask_input as a square of a fixed side up to 1024. Found .*1, 1, "):
        open_sam(copy)


def test_a_decoder_that_answers_in_another_form(copy):
    decoder(copy / "decoder.onnx")
    with pytest.raises(BadWeights, match=r"decoder.onnx must give masks of shape .* Got "):
        open_sam(copy)(picture(SIZES[0]))(None, (8, 9), None)


def test_tensors_outside_of_the_folder(copy):
    model = onnx.load(copy / "encoder.onnx")
    tensor = next(t for t in model.graph.initializer if len(t.raw_data) > 32)
    (copy.parent / "secret").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (copy / "encoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadWeights, match=r"lies in '../secret', which is no plain file beside it"):
        open_sam(copy)


def test_what_is_no_model(tmp_path):
    (tmp_path / "encoder.onnx").write_bytes(b"not a model")
    (tmp_path / "decoder.onnx").write_bytes(b"not a model")
    with pytest.raises(BadWeights, match=r"encoder.onnx is not an ONNX model"):
        open_sam(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipworksError, match=r"a SAM must be a name on the hub or a folder .*Got '.*empty': "):
        open_sam(str(tmp_path / "empty"))
