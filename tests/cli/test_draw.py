"""The commands that draw, from their arguments to the files they write."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import tiny_pipeline
from images import phone_photo, transparent_png
from PIL import Image

from paella_diffusers import PaellaConfidenceScheduler, PaellaInpaintPipeline, PaellaPipeline
from paella_diffusers.cli import draw, main
from paella_diffusers.loaders.atomic import unfinished_path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(path)
    return str(path)


@pytest.fixture
def float64(monkeypatch):
    """As `float64` in conftest.py: for pictures that are drawn in batches of several sizes."""
    load = PaellaPipeline.from_pretrained
    in_float64 = lambda path, dtype=None, **options: load(path, dtype=torch.float64, **options)
    monkeypatch.setattr(PaellaPipeline, "from_pretrained", in_float64)


def run(model, *arguments):
    return main([*arguments, "--model", model, "--steps", "2", "--device", "cpu"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def drawn(pipe, seed: int = 0, **call) -> bytes:
    """The pixels of what a pipeline draws when it is called from Python."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=2, generator=[generator], **call).images[0].tobytes()


# ----------------------------------------------------------------------------------------------------------------- files


def test_one_picture(model, tmp_path, capsys):
    out = tmp_path / "heart.png"
    assert run(model, "generate", "red heart", "--out", str(out)) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    assert names(tmp_path) == ["heart.png"]
    assert pixels(out) == drawn(PaellaPipeline.from_pretrained(model), prompt="red heart")


def test_several_pictures_and_their_sheet(model, tmp_path):
    out = tmp_path / "sheet.png"
    assert run(model, "generate", "a", "b", "c", "--out", str(out), "--size", "48x16") == 0
    assert names(tmp_path) == ["sheet-1.png", "sheet-2.png", "sheet-3.png", "sheet.png"]
    assert Image.open(tmp_path / "sheet-1.png").size == (48, 16)
    assert Image.open(out).size == (96, 32)  # 2 × 2, the last place blank
    assert Image.open(out).crop((48, 16, 96, 32)).getextrema() == ((255, 255),) * 3


def test_a_row_for_each_prompt(model, tmp_path):
    assert run(model, "generate", "a", "b", "--num-images", "3", "--out", str(tmp_path / "s.png")) == 0
    assert Image.open(tmp_path / "s.png").size == (96, 64)


@pytest.mark.usefixtures("float64")
def test_seeds_count_up_whatever_the_batches(model, tmp_path):
    for size in ("1", "2", "8"):
        arguments = ["--num-images", "2", "--seed", "7", "--batch-size", size, "--out", str(tmp_path / f"{size}.png")]
        assert run(model, "generate", "a", "b", *arguments) == 0
    assert run(model, "generate", "a", "--seed", "8", "--out", str(tmp_path / "one.png")) == 0
    for size in ("1", "2", "8"):
        assert pixels(tmp_path / f"{size}-2.png") == pixels(tmp_path / "one.png")
    assert pixels(tmp_path / "1.png") == pixels(tmp_path / "2.png") == pixels(tmp_path / "8.png")


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
def test_what_is_drawn_is_saved_before_an_error(model, tmp_path, capsys, monkeypatch, error):
    calls = []

    def fail_in_the_second_batch(progress, pipe, step, timestep, tensors):
        calls.append(step)
        if len(calls) == 3:
            raise error("out of memory" if "Memory" in error.__name__ else "unforeseen")
        return {}

    monkeypatch.setattr(draw.Progress, "__call__", fail_in_the_second_batch)
    arguments = ["generate", "a", "b", "c", "--batch-size", "2", "--out", str(tmp_path / "a.png")]
    assert run(model, *arguments) == (130 if error is KeyboardInterrupt else 1)
    assert names(tmp_path) == ["a-1.png", "a-2.png"]
    printed = capsys.readouterr().err
    expected = {
        KeyboardInterrupt: "",
        torch.OutOfMemoryError: "paella-diffusers generate: out of memory. Less is needed with",
        RuntimeError: "paella-diffusers generate: RuntimeError: unforeseen (",
    }
    assert expected[error] in printed and "Traceback" not in printed
    if error is RuntimeError:
        calls.clear()
        with pytest.raises(RuntimeError, match="unforeseen"):
            run(model, "--traceback", *arguments)


def test_leftovers_of_a_killed_run_are_removed(model, tmp_path):
    out = tmp_path / "a.png"
    code = f"from paella_diffusers.loaders.atomic import unfinished_path; unfinished_path({str(out)!r}).touch()"
    subprocess.run([sys.executable, "-c", code], check=True)
    mine = unfinished_path(out)
    mine.touch()  # of a process that lives
    assert len(names(tmp_path)) == 2
    assert run(model, "generate", "a", "--out", str(out)) == 0
    assert names(tmp_path) == sorted([mine.name, "a.png"])


def test_ctrl_c_ends_quietly(model, tmp_path):
    options = ["--model", model, "--steps", "10000", "--no-prior"]
    command = [sys.executable, "-m", "paella_diffusers.cli", "generate", "a", *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env=environment, preexec_fn=heed)
    printed = b""
    while b"step/s" not in printed:  # until it draws
        chunk = process.stderr.read(64)
        assert chunk, printed.decode()
        printed += chunk
    process.send_signal(signal.SIGINT)
    printed += process.communicate()[1]
    assert process.returncode == 130
    assert b"Traceback" not in printed and b"KeyboardInterrupt" not in printed
    assert names(tmp_path) == []


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("paella-diffusers")
    assert "generate" in subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout


# --------------------------------------------------------------------------------------------------------------- options


def test_scheduler_and_temperature(model, tmp_path):
    pipe = PaellaPipeline.from_pretrained(model)
    plain = drawn(pipe, prompt="a", temperature=(2.0, 1.5))
    assert run(model, "generate", "a", "--temperature", "2", "1.5", "--out", str(tmp_path / "a.png")) == 0
    assert pixels(tmp_path / "a.png") == plain
    settings = ["PaellaConfidenceScheduler", "choice_temperature=0.5", "temperature=2.0,1.5", "noise_source=fresh"]
    assert run(model, "generate", "a", "--scheduler", *settings, "--out", str(tmp_path / "b.png")) == 0
    pipe.scheduler = PaellaConfidenceScheduler.from_config(
        pipe.scheduler.config, choice_temperature=0.5, temperature=(2.0, 1.5), noise_source="fresh"
    )
    assert pixels(tmp_path / "b.png") == drawn(pipe, prompt="a") != plain
    assert run(model, "generate", "a", "--scheduler", "DiscreteDDIMScheduler", "--out", str(tmp_path / "c.png")) == 0


@pytest.mark.parametrize("setting", ["typical_mass=2", "typical_mass=much", "temperature=0", "t_start=None"])
def test_bad_settings_are_refused_before_the_model_is_loaded(tmp_path, capsys, setting):
    arguments = ["generate", "a", "--model", "owner/name", "--out", str(tmp_path / "a.png")]  # there is no such model
    assert main([*arguments, "--scheduler", "PaellaScheduler", setting]) == 2
    assert "generate: --scheduler PaellaScheduler: " in capsys.readouterr().err


def test_without_the_prior(model, tmp_path):
    pipe = PaellaPipeline.from_pretrained(model)
    for name, arguments in {"with.png": [], "without.png": ["--no-prior"]}.items():
        assert run(model, "generate", "a", *arguments, "--out", str(tmp_path / name)) == 0
        assert pixels(tmp_path / name) == drawn(pipe, prompt="a", use_prior=not arguments)
    assert pixels(tmp_path / "with.png") != pixels(tmp_path / "without.png")


def test_low_memory_draws_the_same(model, tmp_path):
    for name, arguments in {"a.png": [], "b.png": ["--low-memory"]}.items():
        assert run(model, "generate", "a", *arguments, "--out", str(tmp_path / name)) == 0
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")


def test_adapters(model, tmp_path):
    pipe = tiny_pipeline()
    expected = {}
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.add_adapter(config, name)
        weights = peft.get_peft_model_state_dict(pipe.unet, adapter_name=name)
        generator = torch.Generator().manual_seed(len(expected))
        weights = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in weights.items()}
        pipe.save_lora_weights(tmp_path / name, weights, unet_lora_adapter_metadata=config.to_dict())
        expected[name] = tmp_path / name
    plain = PaellaPipeline.from_pretrained(model)
    before = drawn(plain, prompt="a")
    for name, folder in expected.items():
        plain.load_lora_weights(folder, adapter_name=name)
    plain.set_adapters(["one", "two"], [2.0, 0.5])
    arguments = [part for name in expected for part in ("--lora", str(tmp_path / name))]
    arguments += ["--lora-scale", "2", "--lora-scale", "0.5", "--out", str(tmp_path / "a.png")]
    assert run(model, "generate", "a", *arguments) == 0
    assert pixels(tmp_path / "a.png") == drawn(plain, prompt="a") != before


def test_regions(model, tmp_path):
    left, right = Image.new("L", (8, 8)), Image.new("L", (200, 100), 255)
    left.paste(255, (0, 0, 4, 8))
    right.paste(0, (0, 0, 100, 100))
    left.save(tmp_path / "left.png"), right.save(tmp_path / "right.png")
    masks = ["--region-masks", str(tmp_path / "left.png"), str(tmp_path / "right.png")]
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["generate", "a", "b", *masks, "--num-images", "2", "--batch-size", "1", "--out", str(out / "a.png")]
    assert run(model, *arguments) == 0
    assert names(out) == ["a-1.png", "a-2.png", "a.png"]
    masks = [mask.resize((32, 32)) for mask in (left, right)]
    expected = drawn(PaellaPipeline.from_pretrained(model), seed=1, prompt=["a", "b"], region_masks=masks)
    assert pixels(out / "a-2.png") == expected


@pytest.mark.parametrize("device", ["cudaa", "cuda:99"])
def test_devices_that_are_not_there(model, tmp_path, capsys, device):
    assert main(["generate", "a", "--model", model, "--device", device, "--out", str(tmp_path / "a.png")]) == 2
    assert f"generate: --device {device}: not available on this machine (" in capsys.readouterr().err


def test_a_model_in_neither_layout(tmp_path, capsys):
    assert main(["generate", "a", "--model", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert "neither layout" in capsys.readouterr().err


def test_a_model_of_the_hub(hub, model, tmp_path, capsys):
    tiny_pipeline().save_pretrained(hub.repo("me/tiny"), variant="fp32")
    arguments = ["--variant", "fp32", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "a.png")]
    assert run("me/tiny", "generate", "a", *arguments) == 0
    assert any((tmp_path / "cache").iterdir())
    assert run("me/tiny", "generate", "a", "--revision", "v0", *arguments) == 2
    assert "me/tiny has no revision v0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ pictures from pictures


def test_edit(model, picture, tmp_path):
    for name, more in {"a.png": [], "b.png": ["--source-prompt", "b"], "c.png": ["--size", "48x32"]}.items():
        assert run(model, "edit", "a", "--image", picture, "--out", str(tmp_path / name), *more) == 0
    assert pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")
    assert Image.open(tmp_path / "c.png").size == (48, 32)


def test_inpaint(model, picture, tmp_path):
    mask, out = tmp_path / "mask.png", tmp_path / "out.png"
    Image.new("L", (32, 32), 0).save(mask)
    assert run(model, "inpaint", "a", "--image", picture, "--mask", str(mask), "--out", str(out)) == 0
    assert pixels(out) == pixels(picture)


def test_inpaint_with_strength(model, picture, tmp_path):
    mask, pipe = Image.new("L", (32, 32), 255), PaellaInpaintPipeline.from_pretrained(model)
    mask.save(tmp_path / "mask.png")
    for strength in (0.2, 1.0):
        arguments = ["--mask", str(tmp_path / "mask.png"), "--strength", str(strength), "--out", str(tmp_path / "a.png")]
        assert run(model, "inpaint", "a", "--image", picture, *arguments) == 0
        call = {"prompt": "a", "image": Image.open(picture), "mask_image": mask, "strength": strength}
        assert pixels(tmp_path / "a.png") == drawn(pipe, **call)


def test_outpaint(model, picture, tmp_path):
    out = tmp_path / "out.png"
    assert run(model, "outpaint", "a", "--image", picture, "--padding", "16", "0", "0", "32", "--out", str(out)) == 0
    assert Image.open(out).size == (48, 64)


def test_vary(model, picture, tmp_path):
    out = tmp_path / "out.png"
    assert run(model, "vary", "--image", picture, picture, "--num-images", "2", "--out", str(out)) == 0
    assert Image.open(out).size == (64, 32)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_interpolate(model, picture, tmp_path, suffix):
    out = tmp_path / f"film.{suffix}"
    assert run(model, "interpolate", "a", picture, "--frames", "3", "--frame-ms", "200", "--out", str(out)) == 0
    with Image.open(out) as film:
        assert film.n_frames == 4  # there and back
        film.seek(1)
        film.load()  # WebP has the duration of a frame only then
        assert film.info["duration"] == 200


def test_interpolate_between_long_prompts(model, tmp_path):
    long = "a very long prompt " * 20  # no name of a file
    assert run(model, "interpolate", long, "b", "--frames", "2", "--out", str(tmp_path / "long.gif")) == 0


@pytest.mark.parametrize("photo", [phone_photo, transparent_png])
@pytest.mark.parametrize("command", ["edit", "invert", "inpaint", "outpaint", "vary"])
def test_photos_of_any_size(model, tmp_path, photo, command):
    path, out = tmp_path / "photo", tmp_path / "out.png"
    path.write_bytes(photo(75, 50).getvalue())
    upright = (50, 75) if photo is phone_photo else (75, 50)
    arguments, size = {
        "edit": (["edit", "a"], upright),
        "invert": (["edit", "a", "--source-prompt", "b"], upright),
        "inpaint": (["inpaint", "a", "--mask", str(path)], upright),
        "outpaint": (["outpaint", "a", "--padding", "4", "0", "8", "0"], (upright[0] + 12, upright[1])),
        "vary": (["vary", "a"], (32, 32)),
    }[command]
    assert run(model, *arguments, "--image", str(path), "--out", str(out)) == 0
    assert Image.open(out).size == size
