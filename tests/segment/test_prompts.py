"""Coarse regions as prompts of a model that is made up, so that every answer is known; and of a tiny SAM."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.segment.prompts import FAINT, Prompted, Sam


def coarse():
    """Two regions of class 0, one small one of class 1, the rest unsure."""
    scores = torch.full((2, 12, 16), 0.1)
    scores[0, 1:5, 1:5], scores[0, 2, 3] = 0.6, 0.7
    scores[0, 7:11, 8:14] = 0.5
    scores[1, 1:3, 10:12] = 0.9
    return scores


def run(answer, **options):
    asked = []

    def model(image):
        def predict(box, point, scores):
            asked.append((box, point, scores))
            return answer(box)

        return predict

    made = Prompted(model, smallest=options.pop("smallest", 9), **options)(torch.zeros(3, 12, 16), coarse())
    return made, asked


def test_prompts_are_box_surest_pixel_and_faint_scores():
    _, asked = run(lambda box: (torch.ones(12, 16), 0.0))
    assert [(box, point) for box, point, _ in asked] == [((1, 1, 4, 4), (3, 2)), ((8, 7, 13, 10), (8, 7))]
    expected = FAINT * torch.where(coarse()[0] >= 0.2, coarse()[0], 0)
    assert all(torch.equal(scores, expected) for _, _, scores in asked)


def test_a_sure_mask_takes_over_and_an_unsure_one_does_not():
    wider = torch.full((12, 16), -5.0)
    wider[0:6, 0:6] = 3.0
    made, _ = run(lambda box: (wider, 0.9 if box[0] == 1 else 0.5))
    scores = coarse()
    expected = scores.clone()  # pixels that no region reaches keep their scores
    expected[:, 0:6, 0:6] = 0
    expected[0, 0:6, 0:6] = torch.sigmoid(torch.tensor(3.0)) * scores[0, 0:6, 0:6]
    expected[:, 7:11, 8:14] = 0
    expected[0, 7:11, 8:14] = scores[0, 7:11, 8:14]
    torch.testing.assert_close(made, expected)


def test_regions_touch_over_corners_and_small_ones_are_not_asked():
    scores = torch.zeros(1, 6, 6)
    scores[0, 0:3, 0:3], scores[0, 3:6, 3:6] = 0.9, 0.9
    seen = []

    def model(image):
        return lambda box, point, hint: seen.append(box) or (torch.ones(6, 6), 1.0)

    Prompted(model, smallest=18)(torch.zeros(3, 6, 6), scores)
    assert seen == [(0, 0, 5, 5)]
    made = Prompted(model, smallest=19)(torch.zeros(3, 6, 6), scores)
    assert torch.equal(made, scores)
    assert len(seen) == 1


def test_of_two_regions_the_greater_score_counts():
    made, _ = run(lambda box: (torch.full((12, 16), 1.0 if box[0] == 1 else 2.0), 1.0))
    torch.testing.assert_close(made[0], torch.sigmoid(torch.tensor(2.0)) * coarse()[0])


@pytest.mark.parametrize("setting", [{"threshold": 2}, {"smallest": 0}, {"sure": -1}])
def test_messages(setting):
    with pytest.raises(ClipworksError, match=f"{next(iter(setting))} must lie in"):
        Prompted(lambda image: None, **setting)


@pytest.mark.slow
@torch.no_grad()
def test_a_sam_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = dict(hidden_size=12, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                  patch_size=4, window_size=0, global_attn_indexes=[0], mlp_dim=16, num_pos_feats=8)  # fmt: skip
    prompt = dict(hidden_size=16, image_size=32, patch_size=4, mask_input_channels=8)
    decoder = dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16)
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    transformers.SamModel(config).eval().save_pretrained(tmp_path)
    sam = Sam(str(tmp_path))
    image = 255 * torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
    predict = sam(image)
    logits, quality = predict((2, 3, 20, 15), (8, 9), torch.zeros(24, 32))
    mean, std = (torch.tensor(v)[:, None, None] for v in (sam.mean, sam.std))
    pixels = torch.nn.functional.pad((image / 255 - mean) / std, (0, 0, 0, 8))[None]
    answer = sam.model(
        pixel_values=pixels, input_boxes=torch.tensor([[[2.0, 3, 20, 15]]]), multimask_output=False,
        input_points=torch.tensor([[[[8.0, 9.0]]]]), input_labels=torch.ones(1, 1, 1, dtype=torch.long),
        input_masks=torch.zeros(1, 1, 32, 32),
    )  # fmt: skip
    np.testing.assert_allclose(logits, answer.pred_masks[0, 0, 0, :24, :32], atol=1e-5)
    assert quality == pytest.approx(float(answer.iou_scores), abs=1e-6)
