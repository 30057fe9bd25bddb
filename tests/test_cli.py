import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_pipeline
from PIL import Image

from paella_diffusers.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(prior=None, prior_scheduler=None).save_pretrained(folder)
    return str(folder)


def generate(model, *arguments):
    return main(["generate", *arguments, "--model", model, "--steps", "2", "--device", "cpu"])


def test_one_picture(model, tmp_path, capsys):
    out = tmp_path / "heart.png"
    assert generate(model, "red heart", "--out", str(out)) == 0
    assert Image.open(out).size == (32, 32)
    assert capsys.readouterr().out.split() == [str(out)]
    assert [path.name for path in tmp_path.iterdir()] == ["heart.png"]


def test_several_pictures_and_their_sheet(model, tmp_path):
    out = tmp_path / "sheet.png"
    assert generate(model, "a", "b", "c", "--out", str(out), "--size", "48x16") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet-1.png", "sheet-2.png", "sheet-3.png", "sheet.png"]
    assert Image.open(tmp_path / "sheet-1.png").size == (48, 16)
    assert Image.open(out).size == (96, 32)  # 2 × 2, the last place blank
    assert Image.open(out).crop((48, 16, 96, 32)).getextrema() == ((255, 255),) * 3


def test_a_row_for_each_prompt(model, tmp_path):
    assert generate(model, "a", "b", "--num-images", "3", "--out", str(tmp_path / "s.png")) == 0
    assert Image.open(tmp_path / "s.png").size == (96, 64)


def test_seeds_count_up(model, tmp_path):
    assert generate(model, "a", "--num-images", "2", "--seed", "7", "--out", str(tmp_path / "two.png")) == 0
    assert generate(model, "a", "--seed", "8", "--out", str(tmp_path / "one.png")) == 0
    assert Image.open(tmp_path / "two-2.png").tobytes() == Image.open(tmp_path / "one.png").tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--size", "20"], "multiples of 16"),
        (["a", "--steps", "0"], "at least 1"),
        (["a", "--num-images", "0"], "--num-images must be at least 1"),
        (["a", "--out", "nowhere/a.png"], "folder nowhere does not exist"),
        (["a", "--out", "a.xyz"], "--out must end in .png"),
        (["a", "--out", "a.psd"], "--out must end in .png"),
        (["a", "--size", "0"], "multiples of 16"),
        (["a", "--device", "cudaa"], "--device cudaa is not to be had here"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    defaults = [] if "--steps" in arguments else ["--steps", "2"]
    assert main(["generate", *arguments, "--model", model, *defaults]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("paella-diffusers generate: ") and message in error
    assert not list(tmp_path.iterdir())


def test_bad_size_shows_the_usage(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "a", "--size", "big"])
    assert "neither a number of pixels nor WIDTHxHEIGHT" in capsys.readouterr().err


def test_missing_model_is_explained(tmp_path, capsys):
    assert main(["generate", "a", "--model", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert "neither layout" in capsys.readouterr().err


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("paella-diffusers")
    assert "generate" in subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------------------------------------ pictures from pictures


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(path)
    return str(path)


def run(model, *arguments):
    return main([*arguments, "--model", model, "--steps", "2", "--device", "cpu"])


def test_edit(model, picture, tmp_path):
    for name, more in {"a.png": [], "b.png": ["--source-prompt", "b"], "c.png": ["--size", "48x32"]}.items():
        assert run(model, "edit", "a", "--image", picture, "--out", str(tmp_path / name), *more) == 0
    assert Image.open(tmp_path / "a.png").tobytes() != Image.open(tmp_path / "b.png").tobytes()
    assert Image.open(tmp_path / "c.png").size == (48, 32)


def test_inpaint(model, picture, tmp_path):
    mask, out = tmp_path / "mask.png", tmp_path / "out.png"
    Image.new("L", (32, 32), 0).save(mask)
    assert run(model, "inpaint", "a", "--image", picture, "--mask", str(mask), "--out", str(out)) == 0
    assert Image.open(out).tobytes() == Image.open(picture).tobytes()


def test_outpaint(model, picture, tmp_path):
    out = tmp_path / "out.png"
    assert run(model, "outpaint", "a", "--image", picture, "--padding", "16", "0", "0", "32", "--out", str(out)) == 0
    assert Image.open(out).size == (48, 64)


def test_vary(model, picture, tmp_path):
    out = tmp_path / "out.png"
    assert run(model, "vary", "--image", picture, picture, "--num-images", "2", "--out", str(out)) == 0
    assert Image.open(out).size == (64, 32)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_interpolate(model, picture, tmp_path, suffix):
    out = tmp_path / f"film.{suffix}"
    assert run(model, "interpolate", "a", picture, "--frames", "3", "--out", str(out)) == 0
    assert Image.open(out).n_frames == 4  # there and back


def test_bad_pictures_are_refused(model, picture, tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert run(model, "edit", "a", "--image", str(text)) == 2
    assert "text.png is not a picture" in capsys.readouterr().err
    assert run(model, "edit", "a", "--image", "nowhere.png") == 2
    assert "nowhere.png" in capsys.readouterr().err
    assert run(model, "interpolate", "a", "b", "--out", "film.jpg") == 2
    long = "a very long prompt " * 20  # no name of a file
    assert run(model, "interpolate", long, "b", "--frames", "2", "--out", str(tmp_path / "long.gif")) == 0
    assert "--out must end in .gif, .webp, .png to be a film" in capsys.readouterr().err
