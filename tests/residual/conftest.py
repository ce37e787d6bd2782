"""The small UNet that residuals are trained on."""

import pytest
import torch

from profusion.models.unet import UNet
from tests.residual.trainings import SMALL


@pytest.fixture(scope="module")
def unet(device):
    torch.manual_seed(3)
    return UNet(SMALL).eval().requires_grad_(False).to(device)
