"""Networks whose normalisation is folded into their convolutions, against themselves."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cbir.features.deep import Deep
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.folding import fold_normalisation
from cbir.features.networks.vision import exactly

TINY = {"backbone": "test_resnet", "weights": "none", "size": 64}


def lively(backbone: Backbone) -> Backbone:
    """With statistics as of a trained network."""
    generator = torch.Generator().manual_seed(3)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 2.0)):
                values.copy_(low + (high - low) * torch.rand(values.shape, generator=generator))
            module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
            module.bias.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return backbone


def folded(spec: Deep) -> tuple[int, list[Tensor], list[Tensor]]:
    """How many were folded; outputs before and after."""
    backbone = lively(Backbone(spec, None, *spec.layers))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    with exactly():
        before = backbone.outputs(images)
        num = fold_normalisation(backbone.network, lambda: backbone.outputs(images[:1]))
        return num, before, backbone.outputs(images)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_folded_networks_give_the_same(backbone):
    num, before, after = folded(Deep(**{**TINY, "backbone": backbone}))
    network = Backbone(Deep(**{**TINY, "backbone": backbone}), None)
    assert num == sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert torch.allclose(after[0], before[0], rtol=1e-3, atol=1e-4)
    assert not torch.equal(after[0], before[0])


def test_a_convolution_that_is_read_itself_is_not_folded():
    num, before, after = folded(Deep(**TINY, layers=("layer1.0.conv2", "layer2")))
    assert num == 0
    assert all(map(torch.equal, after, before))
