"""The receptive field by counting layers against the one that gradients reach."""

import numpy as np
import pytest
import torch

from cbir.features.deep import Deep
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.receptive_field import receptive_field

SIDE = 224


def reached(backbone: Backbone, stage: int, row: int, column: int) -> np.ndarray:
    """First and last row and column of the pixels on which a place of the map depends."""
    pixels = torch.rand((1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).requires_grad_()
    maps = backbone.network.forward_intermediates(pixels, indices=[stage], intermediates_only=True, output_fmt="NCHW")[
        0
    ]
    maps[0, :, row, column].sum().backward()
    touched = pixels.grad[0].abs().sum(0).numpy() > 0
    return np.array(
        [[line.nonzero()[0][0], line.nonzero()[0][-1]] for line in (touched.any(axis=1), touched.any(axis=0))]
    )


# Residual branches that begin as zeros would be seen by nothing.
@pytest.mark.parametrize(
    ("name", "stage", "arguments"),
    [
        ("test_resnet", -2, {"zero_init_last": False}),
        ("resnet18", -3, {"zero_init_last": False}),
        ("mobilenetv2_050", -3, {}),
        ("mobilenetv2_050", -3, {"pad_type": "same"}),
        ("test_convnext", -3, {}),
    ],
)
def test_it_is_what_gradients_reach(name, stage, arguments):
    backbone = Backbone(Deep(backbone=name, weights="none", backbone_args=arguments), None, stage)
    field = receptive_field(backbone, torch.device("cpu"))
    place = SIDE // field.stride // 2
    centre = field.first + place * field.stride
    expected = [centre - (field.size - 1) / 2, centre + (field.size - 1) / 2]
    assert np.abs(reached(backbone, stage, place, place) - expected).max() <= 0.01


def test_that_of_a_transformer_is_its_patch():
    backbone = Backbone(Deep(backbone="test_vit", weights="none"), None, -1)
    field = receptive_field(backbone, torch.device("cpu"))
    assert (field.size, field.stride, field.first) == (16, 16, 7.5)


def test_that_of_a_resnet50_is_known():
    backbone = Backbone(Deep(backbone="resnet50", weights="none"), None, -2)
    field = receptive_field(backbone, torch.device("cpu"))
    assert (field.size, field.stride, field.first) == (267, 16, 0)
