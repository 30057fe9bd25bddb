"""The rewards that ship."""

import PIL.Image
import pytest
import torch
from conftest import tiny_pipeline

from paella_diffusers import ClassifierReward, ClipReward, LayoutReward, PaellaPipeline, RewardSum
from paella_diffusers.sampling.rewards import Reward


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(prior=None, prior_scheduler=None)


def test_clip_similarity_is_that_of_the_pipelines_towers(pipe):
    pictures = torch.rand(2, 3, 16, 16, generator=seeded())
    values = ClipReward(pipe)(pictures, ["a", "bc"])
    pil = [PIL.Image.fromarray((picture.movedim(0, -1) * 255).round().byte().numpy()) for picture in pictures]
    seen = torch.cat([pipe.encode_image(image)[0] for image in pil])
    said = pipe.encode_prompt(["a", "bc"], do_classifier_free_guidance=False)[4]
    torch.testing.assert_close(values, 100 * torch.cosine_similarity(seen, said), atol=1.0, rtol=0)
    own = ClipReward(pipe, "bc", scale=1.0)(pictures, None)
    assert own[1] == pytest.approx(values[1].item() / 100, abs=1e-5) and own.shape == (2,)


def test_clip_needs_its_models_and_a_prompt(pipe):
    with pytest.raises(ValueError, match="needs the pipeline's components \\['image_encoder'\\]"):
        ClipReward(PaellaPipeline(**pipe.components | {"image_encoder": None}))
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt("a")))
    with pytest.raises(ValueError, match="the call has none: give it its own"):
        pipe(**embeds, reward=RewardSum([ClipReward(pipe)]))
    output = pipe(**embeds, reward=ClipReward(pipe, "a"), num_particles=2, num_inference_steps=2)
    assert output.rewards.shape == (1, 2)


def test_layouts(pipe):
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(1, 3, 8, 8)
    halves = torch.cat([red[..., :4], 1 - red[..., 4:]], dim=3)
    assert LayoutReward("red")(red, None) == 0
    assert LayoutReward("#ff0000", sigma=0.5)(halves, None) == pytest.approx(-0.25 / (2 * 0.25))
    target = halves[0, :, :1, ::4]  # two cells side by side
    assert LayoutReward(target)(halves, None) == 0 > LayoutReward(target)(halves.flip(3), None)
    picture = PIL.Image.fromarray((halves[0].movedim(0, -1) * 255).byte().numpy())
    assert LayoutReward(picture, grid=(2, 2))(halves, None) == 0
    for bad in (5, torch.zeros(3), torch.zeros(3, 4, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match="`target` must be a colour"):
            LayoutReward(bad)


def test_classifiers():
    classifier = lambda images: torch.stack([images.mean((1, 2, 3)), 1 - images.mean((1, 2, 3))], dim=1)
    pictures = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    values = ClassifierReward(classifier, 1)(pictures, None)
    torch.testing.assert_close(values, torch.tensor([[0.0, 1.0], [1.0, 0.0]]).log_softmax(1)[:, 1])
    with pytest.raises(ValueError, match="`label`"):
        ClassifierReward(classifier, -1)


def test_sums():
    one, two = (lambda images, prompts: images.mean((1, 2, 3))), (lambda images, prompts: torch.arange(len(images)))
    pictures = torch.rand(2, 3, 4, 4, generator=seeded())
    expected = 2 * one(pictures, None) - 0.5 * torch.arange(2)
    torch.testing.assert_close(RewardSum([one, two], [2.0, -0.5])(pictures, None), expected)
    torch.testing.assert_close(RewardSum([one, one])(pictures, None), 2 * one(pictures, None))
    with pytest.raises(ValueError, match="`weights` must have one entry"):
        RewardSum([one], [1.0, 2.0])


def test_a_sum_asks_those_of_its_rewards_that_may_refuse():
    class Refusing(Reward):
        def check(self, has_prompts):
            raise ValueError("not this call")

    plain = lambda images, prompts: torch.zeros(len(images))
    RewardSum([plain, LayoutReward("red")]).check(has_prompts=False)
    with pytest.raises(ValueError, match="not this call"):
        RewardSum([plain, Refusing()]).check(has_prompts=True)
