import torch

from paella_diffusers import DDIMWuerstchenScheduler


def test_with_the_noise_known_a_step_ends_at_the_next_level():
    scheduler = DDIMWuerstchenScheduler()
    scheduler.set_timesteps(4)
    clean, noise = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(1)
    before, after = (scheduler.add_noise(clean, noise, t.expand(2)) for t in scheduler.timesteps[1:3])
    timestep = scheduler.timesteps[1].expand(2)
    stepped = scheduler.step(noise, timestep, before).prev_sample
    torch.testing.assert_close(stepped, after)
    assert torch.equal(scheduler.step(noise, timestep, before, return_dict=False)[0], stepped)
