import pytest
import torch
import torch.nn.functional as F

from paella_diffusers.training import corrupt, draw_timesteps, loss_weights, paella_loss
from paella_diffusers.training.losses import SmoothedCrossEntropy


def test_golden_step(golden, golden_models):
    io, unet = golden.paella_io, golden_models.unet
    noised = torch.where(io["train_mask"].bool(), io["train_random_tokens"], io["tokens"])
    assert torch.equal(noised, io["train_noised"])
    torch.testing.assert_close(loss_weights(io["train_mask"], io["t"]), io["train_weight"], atol=1e-6, rtol=0)
    logits = unet(noised, io["t"], io["byt5"], io["clip_text"], io["clip_image"]).sample
    loss = paella_loss(logits, io["tokens"], io["train_mask"], io["t"])
    torch.testing.assert_close(loss, io["train_loss"], atol=0, rtol=1e-5)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    torch.testing.assert_close(norm, io["train_grad_norm"], atol=0, rtol=1e-5)


def test_corrupt_replaces_the_wanted_fraction():
    tokens = torch.zeros(3, 64, 64, dtype=torch.long)
    noised, mask = corrupt(tokens, torch.tensor([0.0, 0.5, 1.0]), 1000, torch.Generator().manual_seed(0))
    fraction = mask.float().mean((1, 2))
    assert fraction[0] < 0.001 and abs(fraction[1] - 0.5) < 0.03 and fraction[2] == 1
    assert torch.equal(noised.ne(0) & mask.eq(0), torch.zeros_like(mask, dtype=torch.bool))
    assert noised.max() > 900


def test_timesteps_are_the_published_ones():
    timestep = draw_timesteps(10_000, torch.Generator().manual_seed(0))
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(timestep, (1.001 - uniform).clamp(0.001, 1))
    assert timestep.min() >= 0.001 and timestep.max() == 1


def test_corrupt_with_given_noise():
    tokens, noise = torch.randint(50, (2, 4, 8, 8))
    noised, mask = corrupt(tokens, torch.tensor([0.2, 0.4, 0.8, 1.0]), 50, noise=noise)
    assert torch.equal(noised, torch.where(mask.bool(), noise, tokens)) and mask.bool().any()
    assert torch.equal(noised[3], noise[3])
    parts = [
        corrupt(tokens[i::2], torch.full((2,), 0.5), 50, torch.Generator().manual_seed(0), (i, 2), noise[i::2])[0]
        for i in (0, 1)
    ]
    whole, _ = corrupt(tokens, torch.full((4,), 0.5), 50, torch.Generator().manual_seed(0), noise=noise)
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_timesteps_of_given_levels():
    timestep = draw_timesteps(300, torch.Generator().manual_seed(0), levels=[1.0, 0.5, 0.25])
    assert timestep.unique(return_counts=True)[1].min() > 70 and timestep.unique().tolist() == [0.25, 0.5, 1.0]


def test_processes_have_the_noise_of_one():
    tokens, t = torch.randint(50, (6, 8, 8)), torch.rand(6)
    whole = corrupt(tokens, t, 50, torch.Generator().manual_seed(0))
    times = draw_timesteps(6, torch.Generator().manual_seed(0))
    for index in range(2):
        part = corrupt(tokens[index::2], t[index::2], 50, torch.Generator().manual_seed(0), (index, 2))
        assert all(torch.equal(mine, all_of_them[index::2]) for mine, all_of_them in zip(part, whole))
        assert torch.equal(draw_timesteps(3, torch.Generator().manual_seed(0), (index, 2)), times[index::2])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(SmoothedCrossEntropy, "PART", 7 * 50)  # in parts, the last of which is smaller
    rows, targets, weights = torch.randn(20, 50) * 4, torch.randint(50, (20,)), torch.rand(20)
    rows = rows.to(dtype).float()  # the same numbers
    expected = F.cross_entropy(rows.requires_grad_(), targets, label_smoothing=smoothing, reduction="none")
    (expected * weights).sum().backward()
    own = rows.detach().to(dtype).requires_grad_()
    losses = SmoothedCrossEntropy.apply(own, targets, smoothing)
    (losses * weights).sum().backward()
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own.grad.float(), rows.grad, atol=tolerance, rtol=tolerance)
