"""Conditioning of several branches in one batch."""

import torch
from conftest import tiny_unet

from paella_diffusers.pipelines.conditioning import Conditioning


def test_any_number_of_branches_in_one_batch():
    """Each with text of its own length, with and without padding, CLIP text, images and weights: as each alone."""
    unet, normal = tiny_unet().double(), lambda *shape: torch.randn(*shape, dtype=torch.float64)
    branches = [
        Conditioning(2, normal(2, 5, 16), normal(2, 12), normal(2, 2, 12), conditioning_weights=torch.rand(2, 3).double()),
        Conditioning(2, normal(2, 3, 16), normal(2, 12)),
        Conditioning(2, normal(2, 7, 16), None, normal(2, 1, 12), torch.arange(7) < torch.tensor([[7], [4]])),
        Conditioning(2, normal(1, 1, 16), normal(1, 12)).repeat(2),
    ]
    sample = torch.randint(32, (2, 8, 8))
    first, *others = branches
    with torch.no_grad():
        together = unet(sample, 0.6, **first.cat(*others).arguments()).sample.chunk(4)
        alone = [unet(sample, 0.6, **branch.arguments()).sample for branch in branches]
    for one, other in zip(together, alone):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
