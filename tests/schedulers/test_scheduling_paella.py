import pytest
import torch

from paella_diffusers import PaellaScheduler
from paella_diffusers.schedulers.scheduling_paella import typical_filter


def logits_and_tokens(batch_size=2, size=6, num_tokens=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, num_tokens, size, size, generator=generator) * 3
    return logits, torch.randint(num_tokens, (batch_size, size, size), generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_golden_typical_filter(golden):
    data = golden.typical_filter
    for mass, min_tokens in ((0.2, 1), (0.5, 1), (0.9, 5)):
        removed = typical_filter(data["logits"], mass, min_tokens)
        assert torch.equal(removed, data[f"removed_mass{mass}_min{min_tokens}"])


def test_golden_inpainting(golden, golden_models):
    """Known tokens are put back after every sampling, and the start, known tokens included, is the initial noise."""
    trace, io, unet = golden.inpaint_trace, golden.paella_io, golden_models.unet
    generator, num_tokens = seeded(trace["seed"].item()), unet.config.num_vq_embeddings
    scheduler = PaellaScheduler()
    scheduler.set_timesteps(8)
    random_tokens = torch.randint(num_tokens, trace["tokens"].shape, generator=generator)
    noise = torch.where(trace["mask"].bool(), random_tokens, trace["tokens"])
    sample, steps = noise, []
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            logits = 8 * unet(sample, t, io["byt5"], io["clip_text"]).sample
            logits -= 7 * unet(sample, t, io["byt5_uncond"], io["clip_text_uncond"]).sample
        output = scheduler.step(logits, t, sample, noise=noise, mask=trace["mask"], generator=generator)
        steps += [output.sampled_tokens, output.prev_sample] if i < 7 else [output.sampled_tokens]
        sample = output.prev_sample
    assert torch.equal(torch.stack(steps), trace["steps"])
    assert torch.equal(sample, trace["final"])


def test_golden_image_to_image_noise(golden):
    traces = golden.sampler_traces
    scheduler = PaellaScheduler(num_vq_embeddings=golden.config["paella"]["num_labels"])
    generator = seeded(golden.config["seeds"]["img2img"])
    noised = scheduler.add_noise(traces["img2img.init_tokens"], None, torch.tensor([0.6, 0.6]), generator)
    assert torch.equal(noised, traces["img2img.noised_tokens"])


def test_timesteps_and_temperatures_are_linear():
    scheduler = PaellaScheduler(t_start=0.8, t_end=0.0, temperature=(1.0, 0.5))
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([0.8, 0.6, 0.4, 0.2]))
    assert scheduler.temperatures == pytest.approx([1.0, 1 - 0.5 / 3, 1 - 1 / 3, 0.5])
    assert scheduler.renoise_steps == 3
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == pytest.approx([0.8])


def test_overrides_hold_for_one_run_only():
    scheduler = PaellaScheduler()
    scheduler.set_timesteps(timesteps=[0.9, 0.3], temperature=1.0, renoise_steps=0)
    assert (scheduler.temperatures, scheduler.renoise_steps) == ([1.0, 1.0], 0)
    assert scheduler.timesteps.tolist() == pytest.approx([0.9, 0.3])
    scheduler.set_timesteps(3)
    assert scheduler.temperatures == pytest.approx([0.7, 0.5, 0.3])
    assert scheduler.renoise_steps == 2
    assert tuple(scheduler.config.temperature) == (0.7, 0.3)


def test_grids_and_sequences_give_the_same():
    scheduler, (logits, tokens) = PaellaScheduler(), logits_and_tokens()
    grid = scheduler.step(logits, 1.0, tokens, noise=tokens, generator=seeded())
    rows = logits.flatten(2).transpose(1, 2)
    sequence = scheduler.step(rows, 1.0, tokens.flatten(1), noise=tokens.flatten(1), generator=seeded())
    assert torch.equal(grid.prev_sample.flatten(1), sequence.prev_sample)
    assert torch.equal(grid.sampled_tokens.flatten(1), sequence.sampled_tokens)
    prev_sample, sampled_tokens = scheduler.step(logits, 1.0, tokens, noise=tokens, generator=seeded(), return_dict=False)
    assert torch.equal(prev_sample, grid.prev_sample) and torch.equal(sampled_tokens, grid.sampled_tokens)


def test_sampling_follows_the_tempered_distribution():
    scheduler = PaellaScheduler()
    scheduler.set_timesteps(1, temperature=0.5)
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(1, 20000, 3)
    tokens = scheduler.step(logits, 1.0, torch.zeros(1, 20000, dtype=torch.long), generator=seeded()).sampled_tokens
    frequency = torch.bincount(tokens.flatten()) / 20000
    torch.testing.assert_close(frequency, (logits[0, 0] / 0.5).softmax(0), atol=0.01, rtol=0)


def test_renoising_hits_the_next_noise_level():
    scheduler = PaellaScheduler(sampling_rule="argmax")
    scheduler.set_timesteps(4)
    tokens = torch.zeros(1, 20000, dtype=torch.long)
    logits = torch.tensor([0.0, 5.0, 0.0]).expand(1, 20000, 3)
    for t, t_next in ((1.0, 0.75), (0.25, 0.0)):
        output = scheduler.step(logits, t, tokens, noise=tokens, generator=seeded())
        assert output.sampled_tokens.eq(1).all()
        assert output.prev_sample.eq(0).float().mean().item() == pytest.approx(t_next, abs=0.02)


@pytest.mark.parametrize("source", ["initial", "fresh", "previous"])
def test_noise_source(source):
    scheduler, (logits, tokens) = PaellaScheduler(noise_source=source, sampling_rule="argmax"), logits_and_tokens()
    noise = torch.full_like(tokens, 15)
    output = scheduler.step(logits, 1.0, tokens, noise=noise, generator=seeded())
    changed = output.prev_sample != output.sampled_tokens
    assert changed.any()
    replaced = output.prev_sample[changed]
    if source == "fresh":
        assert len(replaced.unique()) > 5
    else:
        assert torch.equal(replaced, {"initial": noise, "previous": tokens}[source][changed])


def test_known_tokens_survive_fresh_noise():
    scheduler, (logits, tokens) = PaellaScheduler(noise_source="fresh"), logits_and_tokens()
    mask = torch.zeros_like(tokens)
    mask[:, :, 3:] = 1
    output = scheduler.step(logits, 1.0, tokens, mask=mask, generator=seeded())
    for result in (output.prev_sample, output.sampled_tokens):
        assert torch.equal(result[:, :, :3], tokens[:, :, :3])
    assert not torch.equal(output.prev_sample[:, :, 3:], tokens[:, :, 3:])


def test_quantized_rule_takes_the_nearest_code_of_the_mean():
    codebook = torch.tensor([[0.0], [1.0], [10.0]])
    logits = torch.tensor([1.0, -50.0, 1.0]).expand(1, 4, 3)  # mean 5: nearer to 1 than to 10
    scheduler, tokens = PaellaScheduler(quantized_steps=1), torch.zeros(1, 4, dtype=torch.long)
    scheduler.set_timesteps(2)
    assert scheduler.step(logits, 0.5, tokens, codebook=codebook).sampled_tokens.eq(1).all()
    first = scheduler.step(logits, 1.0, tokens, noise=tokens, codebook=codebook, generator=seeded())
    assert not first.sampled_tokens.eq(1).any()
    with pytest.raises(ValueError, match="needs `codebook`"):
        scheduler.step(logits, 0.5, tokens)


def test_typical_filtering_is_applied():
    logits = torch.tensor([3.0, 0.0, -3.0]).expand(1, 500, 3)
    scheduler, tokens = PaellaScheduler(typical_mass=0.1), torch.zeros(1, 500, dtype=torch.long)
    sampled = scheduler.step(logits, 1.0, tokens, noise=tokens, generator=seeded()).sampled_tokens
    kept = ~typical_filter(logits[0, 0], 0.1)
    assert kept.sum() == 1 and sampled.eq(kept.nonzero().item()).all()


def test_typical_filter_keeps_all_at_mass_one_and_min_tokens():
    logits = torch.randn(50, 30, generator=seeded())
    assert not typical_filter(logits, 1.0).any()
    assert (~typical_filter(logits, 1e-6, min_tokens=4)).sum(-1).ge(4).all()


def test_list_of_generators_separates_images():
    scheduler, (logits, tokens) = PaellaScheduler(noise_source="fresh"), logits_and_tokens()
    both = scheduler.step(logits, 1.0, tokens, generator=[seeded(1), seeded(2)])
    for row in range(2):
        rows = slice(row, row + 1)
        alone = scheduler.step(logits[rows], 1.0, tokens[rows], generator=seeded(row + 1))
        assert torch.equal(both.prev_sample[rows], alone.prev_sample)


def test_add_noise():
    scheduler, tokens = PaellaScheduler(num_vq_embeddings=16), torch.zeros(2, 100, 100, dtype=torch.long)
    noise = torch.ones_like(tokens)
    noised = scheduler.add_noise(tokens, noise, torch.tensor([0.25, 1.0]), seeded())
    assert noised[0].float().mean().item() == pytest.approx(0.25, abs=0.02) and noised[1].eq(1).all()
    assert scheduler.add_noise(tokens, None, 1.0, seeded()).max() == 15
    lists = scheduler.add_noise(tokens, None, 0.5, [seeded(3), seeded(3)])
    assert torch.equal(lists[0], lists[1])


def test_save_and_load(tmp_path):
    scheduler = PaellaScheduler(temperature=(1.2, 0.2), renoise_steps=26, num_inference_steps=32)
    scheduler.save_pretrained(tmp_path)
    loaded = PaellaScheduler.from_pretrained(tmp_path)
    assert loaded.temperatures == scheduler.temperatures and loaded.renoise_steps == 26 and len(loaded) == 32
    changed = PaellaScheduler.from_config(loaded.config, temperature=0.5)
    assert changed.temperatures == [0.5] * 32 and changed.renoise_steps == 26


def test_bad_step_is_refused():
    scheduler, (logits, tokens) = PaellaScheduler(), logits_and_tokens()
    with pytest.raises(ValueError, match="one of `timesteps`"):
        scheduler.step(logits, 0.123, tokens, noise=tokens)
    with pytest.raises(ValueError, match="needs `noise`"):
        scheduler.step(logits, 1.0, tokens)
    with pytest.raises(ValueError, match="list of 1 for a batch of 2"):
        scheduler.step(logits, 1.0, tokens, noise=tokens, generator=[seeded()])
    with pytest.raises(ValueError, match="list of 3 for a batch of 2"):
        scheduler.add_noise(tokens, None, 0.5, [seeded()] * 3)
