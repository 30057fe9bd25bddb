import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_dreambooth
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from trainers import TINY, Launch

from paella_diffusers import PaellaPipeline, PaellaUNet
from paella_diffusers.training.data import QualityFilter, SampleTransform
from paella_diffusers.training.dreambooth import Instances, draw_class_pictures
from paella_diffusers.training.losses import paella_loss

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def options(pictures, pretrained):
    (Path(pictures) / "metadata.jsonl").unlink()  # pictures need no captions
    options = [*TINY, "--instance_data_dir", pictures, "--pretrained_model_name_or_path", pretrained]
    return [*options, "--train_batch_size", "4", "--instance_prompt", "a photo of qxz"]


@pytest.fixture
def preservation(tmp_path):
    options = ["--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a photo"]
    return [*options, "--num_class_images", "5", "--sample_batch_size", "2"]


def parse(*options):
    return train_dreambooth.parse_args([str(option) for option in options])


def train(options, folder, *more):
    train_dreambooth.main(parse(*options, "--output_dir", folder, *more))


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_whole_model_with_class_pictures_that_it_drew(options, preservation, tmp_path, pretrained):
    train([*options, *preservation], tmp_path / "out", "--max_train_steps", 2, "--validation_prompt", "a photo of qxz")
    drawn = pictures_in(tmp_path / "class")
    assert sorted(drawn) == [f"class-{number:05d}.png" for number in range(5)]
    before = PaellaPipeline.from_pretrained(pretrained)
    image = before("a photo", height=32, width=32, generator=torch.Generator().manual_seed(3)).images[0]
    assert Image.open(tmp_path / "class" / "class-00003.png").tobytes() == image.tobytes()
    after = PaellaPipeline.from_pretrained(tmp_path / "out")
    assert any(not torch.equal(now, then) for now, then in zip(after.unet.parameters(), before.unet.parameters()))
    image = after("a photo of qxz", height=32, width=32, generator=torch.Generator().manual_seed(0)).images[0]
    assert Image.open(tmp_path / "out" / "samples" / "00000002.png").tobytes() == image.tobytes()


def test_class_pictures_are_kept_and_the_missing_ones_are_drawn(options, preservation, tmp_path):
    args = parse(*options, *preservation, "--output_dir", tmp_path / "out")
    run = SimpleNamespace(args=args, part=(0, 1), accelerator=Accelerator(cpu=True))
    draw_class_pictures(run)
    drawn = pictures_in(tmp_path / "class")
    assert len(drawn) == 5
    (tmp_path / "class" / "class-00001.png").unlink()
    draw_class_pictures(run)
    assert pictures_in(tmp_path / "class") == drawn
    # own pictures count
    (tmp_path / "class" / "class-00001.png").unlink()
    Image.new("RGB", (40, 40)).save(tmp_path / "class" / "own.png")
    draw_class_pictures(run)
    assert pictures_in(tmp_path / "class").keys() == (drawn.keys() - {"class-00001.png"}) | {"own.png"}


def test_two_processes_draw_and_train_as_one_with_twice_the_batch(options, preservation, tmp_path, pretrained):
    unet = PaellaUNet.from_pretrained(pretrained, subfolder="unet")  # without dropout, which is each process's own
    PaellaUNet.from_config({**unet.config, "dropout": 0.0}).save_config(f"{pretrained}/unet")
    options = [*options, *preservation, "--rank", "2", "--max_train_steps", "4", "--prior_loss_weight", "0.5"]
    train(options, tmp_path / "one")
    drawn = pictures_in(tmp_path / "class")
    options[options.index("--class_data_dir") + 1] = tmp_path / "again"
    Launch("train_dreambooth", [*options, "--batch-size", "2", "--output_dir", tmp_path / "two"], processes=2).finish()
    assert pictures_in(tmp_path / "again") == drawn
    expected, found = load_file(tmp_path / "one" / LORA), load_file(tmp_path / "two" / LORA)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("rank", [[], ["--rank", "2"]])
def test_resumed_it_ends_as_if_not_interrupted(options, preservation, tmp_path, rank):
    options += [*preservation, *rank, "--dataloader_num_workers", "2"]
    options += ["--max_train_steps", "4"]
    train(options, tmp_path / "whole", "--checkpointing_steps", 2)
    train(options, tmp_path / "parts", "--resume_from_checkpoint", tmp_path / "whole" / "checkpoints" / "00000002")
    name = LORA if rank else "unet/diffusion_pytorch_model.safetensors"
    expected, found = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_prompts_come_to_mean_the_pictures(options, preservation, tmp_path, pretrained):
    """With all noise the same, the loss of the pictures' tokens falls; that of the class's, if its pictures are there."""
    noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
    images = {"a photo of qxz": Image.new("RGB", (32, 32), (255, 0, 0)), "a photo": Image.fromarray(noise)}
    for folder, image in zip((tmp_path / "pictures", tmp_path / "class"), images.values()):
        folder.mkdir(exist_ok=True)
        for number in range(20):
            image.save(folder / f"{number}.png")

    def losses(pipe) -> list[float]:
        found = []
        for prompt, image in images.items():
            pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None] / 255
            text, _, mask, _, clip, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
            condition = dict(clip_text_embeds=clip, encoder_attention_mask=mask)
            with torch.no_grad():
                logits = pipe.unet(torch.full((1, 8, 8), 5), torch.ones(1), text, **condition).sample
            found.append(torch.nn.functional.cross_entropy(logits, pipe.vqgan.encode(pixels).indices).item())
        return found

    before = losses(PaellaPipeline.from_pretrained(pretrained))
    options += ["--lr_scheduler", "constant", "--learning_rate", "3e-3", "--clip_text_dropout", "0", "--max_steps", "20"]
    train(options, tmp_path / "without")
    without = losses(PaellaPipeline.from_pretrained(tmp_path / "without"))
    train([*options, *preservation], tmp_path / "with")
    preserved = losses(PaellaPipeline.from_pretrained(tmp_path / "with"))
    assert without[0] < before[0] - 0.5 and preserved[0] < before[0] - 0.5
    assert preserved[1] < without[1] - 0.05


@pytest.mark.parametrize("options", [{"quality": QualityFilter(min_size=40)}, {"captions": True}])
def test_filters_and_captions_are_not_for_the_class(tmp_path, options):
    """Its pictures are found, although they are small and have no captions."""
    Image.new("RGB", (32, 32)).save(tmp_path / "class.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "instance.png")
    instance = {"image": str(tmp_path / "instance.png"), "text": "a caption"}
    instances = Instances(SampleTransform(32, **options), "a photo of qxz", [tmp_path / "class.png"], "a photo")
    sample = instances(instance, random.Random(0))
    assert (sample["text"], sample["preserved"]["text"]) == ("a photo of qxz", "a photo")
    assert sample["preserved"]["pixels"].shape == (3, 32, 32)


def test_pictures_have_their_weight_in_the_loss():
    logits, tokens, mask = torch.randn(4, 9, 2, 2), torch.randint(9, (4, 2, 2)), torch.ones(4, 2, 2)
    losses = [paella_loss(*(part[i : i + 1] for part in (logits, tokens, mask)), torch.ones(1)) for i in range(4)]
    weights = torch.tensor([1, 1, 0.5, 0.5])
    found = paella_loss(logits, tokens, mask, torch.ones(4), image_weights=weights)
    torch.testing.assert_close(found, (losses[0] + losses[1] + 0.5 * losses[2] + 0.5 * losses[3]) / 3)


def test_the_learning_rate_is_that_of_the_kind(options):
    base = [*options, "--output_dir", "out"]
    rate = lambda *more: parse(*base, *more).learning_rate
    assert (rate(), rate("--rank", 4), rate("--rank", 4, "--learning_rate", 0.5)) == (1e-5, 1e-3, 0.5)


def test_clear_errors(options, preservation, tmp_path, pictures, capsys):
    base = [*options, "--output_dir", tmp_path / "out"]
    for more, message in [
        (["--with_prior_preservation"], "--with-prior-preservation needs --class-data-dir"),
        (["--class_prompt", "a dog"], "--class-data-dir and --class-prompt are of no use without --with-prior-preservation"),
        ([*preservation, "--num_class_images", 0], "--num-class-images must be at least 1, got 0"),
        ([*preservation, "--prior_loss_weight", -1], "--prior-loss-weight must be at least 0, got -1.0"),
        (["--tokenizer_name", "x"], "--tokenizer-name does not apply here: a Paella's tokenizers are those"),
    ]:
        with pytest.raises(SystemExit):
            parse(*base, *more)
        assert message in capsys.readouterr().err
    save_file({"prompt_embeds": torch.zeros(1, 1, 16)}, f"{pictures}/empty.safetensors", {"computed": "prompt_embeds"})
    with pytest.raises(ValueError, match="has computed arrays, but DreamBooth takes pictures: give a folder of them"):
        train(options, tmp_path / "out")
