"""A tiny vision-language model with random weights, and a prompt for it."""

from __future__ import annotations

import pytest
import torch

from corelib.models.vlm import TinyVLM
from corelib.vision_language.shared import make_prompt


@pytest.fixture(scope="session")
def make_setting():
    """``make_setting(config)``: a model, images, ids, and the prompt that they make."""

    def build(config):
        generator = torch.Generator().manual_seed(0)
        model = TinyVLM(config).double().eval()
        size = 2, 8 * config.rows, 8 * config.columns
        images = torch.rand(size, generator=generator, dtype=torch.float64)
        ids = torch.randint(0, 64, (2, 6), generator=generator)
        x = model.embed(ids).detach()
        return model, images, ids, make_prompt(x[:, :1], model.see(images).detach(), x[:, 1:])

    return build
