"""What is refused without the model: before torch is imported, in one line, in the option's own name."""

import inspect
import json
import subprocess
import sys

import diffusers
import pytest
from images import animation, grey_png_16, phone_photo
from PIL import Image

import paella_diffusers
from paella_diffusers.cli import main
from paella_diffusers.cli.checks import local_model
from paella_diffusers.cli.options import OPTIONAL_COMPONENTS, make_parser
from paella_diffusers.cli.values import SCHEDULERS, scheduler_settings

# arguments, and what the last line of the error says; a.png is 64 × 64
REFUSED = [
    ("generate", "the following arguments are required: PROMPT"),
    ("generate a --steps 0", "argument --steps: must be an integer from 1 to 10000, got '0'"),
    ("generate a --steps many", "argument --steps: must be an integer from 1 to 10000, got 'many'"),
    ("generate a --guidance-scale nan", "argument --guidance-scale: must be a number, got 'nan'"),
    ("generate a --guidance-scale inf", "argument --guidance-scale: must be a number, got 'inf'"),
    ("generate a --seed 1180591620717411303424", "argument --seed: must be an integer from 0 to 9223372036854775807"),
    ("generate a --seed -1", "argument --seed: must be an integer from 0 to"),
    ("generate a --num-images 0", "argument --num-images: must be an integer from 1 to"),
    ("generate a --size big", "argument --size: 'big' is neither a number of pixels nor WIDTHxHEIGHT"),
    ("generate a --size 0", "argument --size: '0' is neither"),
    ("generate a --size 1x2x3", "argument --size: '1x2x3' is neither"),
    ("generate a --size 100", "--size takes multiples of 16 with this model, not 100x100. Nearest: 96x96 and 112x112."),
    ("generate a --size 64x8", "--size takes multiples of 16 with this model, not 64x8. Nearest: 64x16."),
    ("generate a --size 99968", "--size 99968x99968, 1 at a time, needs more than 1,191 GiB of memory"),
    ("interpolate a b --size 16384 --frames 99", "--size 16384x16384, 99 at a time, needs more than"),
    ("generate a --device meta", "argument --device: meta computes nothing"),
    ("generate a --temperature 0", "argument --temperature: must be a number above 0, got '0'"),
    ("generate a --temperature 1 2 3", "argument --temperature: takes one number or two, got 3"),
    ("generate --temperature 1 heart", "got 'heart'; prompts come before the options"),
    ("generate a --scheduler PaelaScheduler", "there is no 'PaelaScheduler': did you mean PaellaScheduler?"),
    ("generate a --scheduler Karras", "choose one of PaellaScheduler, PaellaConfidenceScheduler"),
    ("generate a --scheduler PaellaScheduler temprature=1", "no setting 'temprature': did you mean temperature?"),
    ("generate --scheduler PaellaScheduler heart", "'heart' is not of the form SETTING=VALUE; prompts come before"),
    ("generate a --model no/such/model", "--model no/such/model: there is no such file or folder"),
    ("generate a --model a.png", "--model a.png is a file"),
    ("generate a --model folder --revision main", "--revision is for Hub repositories"),
    ("generate a --lora no/such/adapter", "--lora no/such/adapter: there is no such file or folder"),
    ("generate a --lora folder --low-memory", "--lora does not go with --low-memory"),
    ("generate a --lora folder --lora-scale 1 --lora-scale 2", "--lora-scale is given 2 times for 1 of --lora"),
    ("generate a --lora-scale nan", "argument --lora-scale: must be a number, got 'nan'"),
    ("generate a b --region-masks a.png", "--region-masks has 1 masks for 2 prompts"),
    ("generate a --region-masks none.png", "--region-masks none.png: No such file or directory"),
    ("generate a --out nowhere/a.png", "--out: the folder nowhere does not exist"),
    ("generate a --out a.xyz", "--out must end in .png, .jpg, .jpeg, .webp, .gif, .bmp, .tif, .tiff to be a picture"),
    ("generate a --out a.psd", "--out must end in .png"),
    ("generate a b --num-images 300 --out a.webp", "the contact sheet would be 19200x128. Choose .png, or generate fewer"),
    ("generate a --out folder.png", "--out: folder.png is a folder"),
    ("generate a --out " + "a" * 255 + ".png", "File name too long"),
    ("generate a b --out " + "a" * 250 + ".png", "File name too long"),
    ("edit a --image none.png", "--image none.png: No such file or directory"),
    ("edit a --image folder.png", "--image folder.png: Is a directory"),
    ("edit a --image text.png", "--image: text.png is not a picture in one of the formats PNG, JPEG"),
    ("edit a --image bomb.png", "--image: bomb.png has more than 89478485 pixels and could be a decompression bomb"),
    ("edit a --image cut.png", "--image: cut.png cannot be decoded"),
    ("edit a --image wide.png --out a.webp", "pictures in this format have at most 16383 pixels a side, not 17000x8"),
    ("edit a --image a.png --strength 2", "argument --strength: must be a number above 0 and up to 1, got '2'"),
    ("edit a --image a.png --strength 0", "argument --strength: must be a number above 0 and up to 1, got '0'"),
    ("edit a --image a.png --source-prompt b --residual-scale nan", "--residual-scale: must be a number of at least 0"),
    ("edit a --image a.png --residual-scale 1", "--residual-scale goes with --source-prompt"),
    ("edit a --image a.png --size 100", "--size takes multiples of 16"),
    ("inpaint a --image a.png --mask text.png", "--mask: text.png is not a picture"),
    ("inpaint a --image a.png", "the following arguments are required: --mask"),
    ("outpaint a --image a.png --padding 3 0 3 0", "--padding takes multiples of 4 with this model, not 3 0 3 0. Nearest"),
    ("outpaint a --image a.png --padding 0 0 0 0", "--padding 0 0 0 0 leaves nothing to draw"),
    ("outpaint a --image a.png --padding -1 0 0 0", "argument --padding: must be an integer of at least 0, got '-1'"),
    ("outpaint a --image a.png --padding 1000000 0 1000000 0", "--padding makes the picture 2000064x64"),
    ("vary --image a.png --weights 1 2", "--weights has 2 numbers for 1 pictures"),
    ("vary --image a.png --weights -1", "argument --weights: must be a number of at least 0"),
    ("interpolate hart.png b", "FROM hart.png: no such file. It is read as a picture's name"),
    ("interpolate a ./heart", "TO ./heart: no such file."),
    ("interpolate a folder.png", "TO folder.png: a folder."),
    ("interpolate a b --frames 1", "argument --frames: must be an integer from 2 to"),
    ("interpolate a b --frame-ms 99999999", "argument --frame-ms: must be an integer from 10 to 60000"),
    ("interpolate a b --out film.jpg", "--out must end in .gif, .webp, .png to be a film, got film.jpg"),
    ("convert no/such/model new", "SOURCE no/such/model: there is no such file or folder"),
    ("convert a.png new", "SOURCE a.png is a file"),
    ("convert folder folder.png", "FOLDER folder.png exists already"),
    ("convert folder nowhere/new", "FOLDER nowhere/new: the folder nowhere does not exist"),
    ("convert folder new --to-original", "SOURCE folder is in the published layout"),
    ("convert folder new --leave-out vqgan", "argument --leave-out: invalid choice: 'vqgan'"),
    ("examples folder.png", "FOLDER folder.png exists already"),
]  # fmt: skip
RUN_ALL = """
import contextlib, io, json, sys
from paella_diffusers.cli import main
results = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code
    results.append((status, error.getvalue()))
print(json.dumps([results, "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    (folder / "folder").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "text.png").write_text("no picture")
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    picture.save(folder / "a.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-40])
    Image.new("1", (17000, 8)).save(folder / "wide.png")
    Image.new("1", (10000, 10000)).save(folder / "bomb.png")
    return folder


@pytest.fixture(scope="module")
def refused(folder):
    """For all of `REFUSED`, run in one process: exit status and what was printed; and whether torch was imported."""
    arguments = json.dumps([line.split() for line, _ in REFUSED])
    before = set(folder.iterdir())
    command = [sys.executable, "-c", RUN_ALL]
    result = subprocess.run(command, input=arguments, cwd=folder, capture_output=True, text=True, check=True)
    assert set(folder.iterdir()) == before  # nothing was written
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=[line[:60] for line, _ in REFUSED])
def test_refused(refused, case):
    status, printed = refused[0][case]
    assert status == 2
    assert REFUSED[case][1] in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_refusing_needs_no_torch(refused):
    assert refused[1] is False


@pytest.mark.parametrize("name", SCHEDULERS)
def test_settings_of_schedulers_are_those_of_their_classes(name):
    scheduler = getattr(paella_diffusers if name in paella_diffusers.__all__ else diffusers, name)
    assert scheduler_settings(name) == list(inspect.signature(scheduler.__init__).parameters)[1:]


def test_optional_components_are_those_of_the_pipelines():
    assert set(OPTIONAL_COMPONENTS) <= set(paella_diffusers.PaellaPipeline._optional_components)


# ------------------------------------------------------------------------------------------------------------ local models


def parse(*arguments):
    return make_parser().parse_args(["generate", "a", *arguments])


def test_sizes_come_from_the_folder(pretrained):
    pipe = paella_diffusers.PaellaPipeline.from_pretrained(pretrained)
    local = local_model(parse("--model", pretrained))
    assert local.patch_size == pipe.vae_scale_factor == 4
    assert local.multiple == pipe.vae_scale_factor * pipe.unet.sample_multiple == 16
    assert (local.side, local.num_tokens) == (32, 32)
    assert local_model(parse("--model", "dome272/Paella")) is None


def test_damaged_folders_are_refused(tmp_path, capsys):
    folder = tmp_path / "model"
    for path, content, message in [
        ("unet/config.json", "{", "config.json is damaged"),
        ("unet/config.json", "[]", "config.json is damaged"),
        ("unet/config.json", None, "there is no config.json"),
        ("model_index.json", "\xff", "model_index.json is damaged"),
        ("model_index.json", "{}", "has no text_encoder and no tokenizer, which `generate` needs"),
    ]:
        (folder / "unet").mkdir(parents=True, exist_ok=True)
        (folder / "vqgan").mkdir(exist_ok=True)
        for name in ("model_index.json", "unet/config.json", "vqgan/config.json"):
            (folder / name).write_text("{}")
        (folder / path).unlink() if content is None else (folder / path).write_text(content, encoding="latin-1")
        assert main(["generate", "a", "--model", str(folder), "--out", str(tmp_path / "a.png")]) == 2
        assert message in capsys.readouterr().err


def test_pictures_of_every_kind_are_read(folder, tmp_path):
    from paella_diffusers.cli.checks import check

    for name, file in {"phone.jpg": phone_photo(40, 30), "grey.png": grey_png_16(), "film.gif": animation()}.items():
        (tmp_path / name).write_bytes(file.getvalue())
        arguments = ["edit", "a", "--image", str(tmp_path / name), "--out", str(tmp_path / "a.png")]
        image = check(make_parser().parse_args(arguments))["image"]
        assert image.mode == "RGB"
        assert image.size == ((30, 40) if name == "phone.jpg" else (64, 48))
