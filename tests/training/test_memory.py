"""What `benchmarks/training.py --memory` computes for docs/training.md, against a training that is counted."""

import pytest
import torch
from conftest import TINY_UNET

from benchmarks import training as benchmark
from paella_diffusers import PaellaUNet
from paella_diffusers.training import unet

SIZES = TINY_UNET | dict(
    sample_size=16, num_vq_embeddings=512, token_embed_dim=32, cross_attention_dim=64, block_out_channels=(32, 64)
)


def test_alive_bytes_are_counted_once_and_until_they_are_freed():
    outside = torch.zeros(1000)
    with benchmark.AliveBytes() as alive:
        first = torch.zeros(100)
        view = first.view(10, 10)[2:]
        second = first + 1
        assert alive.now == alive.peak == 800
        del first, second
        assert alive.now == 400  # of which `view` is a part
        del view
        assert (alive.now, alive.peak) == (0, 800)
        outside.add_(1)


@pytest.mark.parametrize(
    "case, batch_size", [("one process", 1), ("one process", 8), ("gradient checkpointing", 8), ("averages", 1)]
)
def test_what_is_computed_is_what_a_training_has(case, batch_size, tmp_path, monkeypatch):
    """With real tensors, in three steps of the trainer's own loop. With one picture most of it is weights."""
    peaks, train_unet = [], unet.train_unet

    def counted(run, trained, frozen):
        with benchmark.AliveBytes() as alive:
            for tensor in [*trained.parameters, *(trained.average.shadow_params if trained.average else ())]:
                alive.count(tensor)
            train_unet(run, trained, frozen)
        peaks.append(alive.peak)

    monkeypatch.setattr(unet, "train_unet", counted)
    benchmark.write_inputs(tmp_path, batch_size, SIZES)
    options, arguments = benchmark.MEMORY[case]
    benchmark.our_steps(tmp_path, batch_size, 3, arguments)
    assert benchmark.step_bytes(SIZES, batch_size, clip=False, **options) == pytest.approx(peaks[0], rel=0.02)


def test_what_is_alive_for_longer_is_added():
    """Averages and, as views of DDP's buckets, gradients are there when the logits are."""
    size = lambda **options: benchmark.step_bytes(SIZES, 4, clip=False, **options)
    parameters = sum(parameter.nbytes for parameter in PaellaUNet(**SIZES).parameters())
    assert size(average=True) - size() == parameters
    assert parameters <= size(ddp=True) - size() < 1.1 * parameters
