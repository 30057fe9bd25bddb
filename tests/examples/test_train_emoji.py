"""The script that trains the embedded model: whole, on twelve objects and for a few steps, and its parts."""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import train_emoji
from conftest import tiny_pipeline
from emoji_model import captions, data, fit, prompt_sets, scoring, text, unet, vqgan
from trainers import FORKS, start_server

from paella_diffusers import PaellaPipeline, VQModel
from paella_diffusers.training.lock import FolderLock

STEPS = ["--vqgan-steps", "3", "--text-steps", "2", "--image-steps", "2", "--prior-steps", "2", "--unet-steps", "3"]
COLOURS = ["#f8312f", "#ff822d", "#fcd53f", "#00a6ed", "#8d65c5", "#6d4534"]


def write_packages(work_dir: Path):
    """What npm would have been asked for: twelve objects, circles and squares in six colours, and keywords."""
    names = [f"{shape}-{i}" for shape in ("circle", "square") for i in range(6)]
    bodies = {0: {}, 1: {}, 2: {}}
    for name in names:
        shape, i = name.split("-")
        for style, paint in enumerate((COLOURS[int(i)], "url(#g)", "currentColor")):
            gradient = f'<linearGradient id="g"><stop stop-color="{COLOURS[int(i)]}"/><stop offset="1"/></linearGradient>'
            place = (
                f'x="{4 + 2 * int(i)}" y="6" width="9" height="20"'
                if shape == "square"
                else f'cx="{8 + 3 * int(i)}" cy="16" r="7"'
            )
            tag = "rect" if shape == "square" else "circle"
            bodies[style][name] = {"body": f'{gradient if style == 1 else ""}<{tag} {place} fill="{paint}"/>'}
    bodies[0]["circle-0-dark"] = bodies[0]["circle-0"]  # a skin tone
    bodies[0]["hidden"] = bodies[1]["hidden"] = bodies[2]["hidden"] = bodies[0]["circle-0"] | {"hidden": True}
    chars = {f"{ord('🐀') + i:x}-fe0f": name for i, name in enumerate(names)}
    emoji = {chr(ord("🐀") + i): [name, f"word_{i}", f"pair {i // 2}", "toy"] for i, name in enumerate(names)}
    cldr = {character: {"default": [f"thing {i}"], "tts": [f"name {i}"]} for i, character in enumerate(emoji)}
    files = {
        (package, "icons.json"): {"icons": bodies[i], "width": 32, "height": 32} for i, package in enumerate(data.ICONS)
    }
    files[data.ICONS[0], "chars.json"] = chars
    files["emojilib@4.0.3", "emoji-en-US.json"] = emoji
    files["cldr-annotations-full@48.2.0", "annotations.json"] = {"annotations": {"annotations": cldr}}
    files["cldr-annotations-derived-full@48.2.0", "annotations.json"] = {"annotationsDerived": {"annotations": {}}}
    for (package, name), content in files.items():
        path = work_dir / "npm" / re.sub("[@/]", "-", package).strip("-") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def arguments(folder: Path) -> list[str]:
    options = ["--work-dir", folder, "--output-dir", folder / "model", "--held-out", folder / "held_out.json"]
    return [*map(str, options), *STEPS, "--held-out-count", "3", "--batch-scale", "0.05", "--score-limit", "2"]


def die_in_the_last_stage(options: list[str]):
    """In a process of its own: it is killed when two steps of the U-Net are saved."""
    torch.set_num_threads(1)
    whole, calls = unet.paella_loss, itertools.count(1)

    def loss(*args, **kwargs):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    fit.SAVE_SECONDS, unet.paella_loss = 0, loss
    train_emoji.main(train_emoji.parse_args(options))


draw_tokens = scoring.draw_tokens


def draw_in_one_step(*args, **kwargs) -> torch.LongTensor:
    return draw_tokens(*args, **kwargs | {"num_inference_steps": 1, "prior_num_inference_steps": 1})


def test_from_nothing_killed_and_resumed(tmp_path, monkeypatch, capsys):
    """A run that is killed within the last stage and started again makes the same model as one that was not."""
    for folder in ("whole", "killed"):
        write_packages(tmp_path / folder)
    whole, killed = (train_emoji.parse_args(arguments(tmp_path / name)) for name in ("whole", "killed"))
    start_server()
    process = FORKS.Process(target=die_in_the_last_stage, args=(arguments(tmp_path / "killed"),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        icons, _, pipe = train_emoji.train(whole)
        monkeypatch.setattr(scoring, "draw_tokens", draw_in_one_step)
        train_emoji.main(killed)
    finally:
        torch.set_num_threads(threads)

    resumed = PaellaPipeline.from_pretrained(killed.output_dir)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for one, other in zip(part.parameters(), resumed.components[name].parameters(), strict=True):
                assert torch.equal(one.half().float(), other.float()), name
    assert len(icons.names) == 12
    held_out = json.loads(killed.held_out.read_text())
    assert len(held_out) >= 3 and held_out == json.loads(whole.held_out.read_text())
    log = (tmp_path / "killed" / "log.txt").read_text()
    assert log.count(" start: ") == 2 and "unet: resumed at step 2 of 3" in log
    assert {"names.png", "styles.png", "canvas.png"} <= {path.name for path in (tmp_path / "killed").iterdir()}
    # the last lines are the table, as in the output
    lines = capsys.readouterr().out.strip().splitlines()
    table = lines[lines.index("| | measured | aim |") :]
    assert any(line.startswith("| 80 sentences") for line in table) and table[-1].startswith("| all files")
    assert resumed("circle 0", num_inference_steps=2).images[0].size == (64, 64)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    lock = FolderLock(tmp_path)
    lock.release()
    parent = psutil.Process().parent()  # which runs
    owner = lock.owner | {"pid": parent.pid, "started": parent.create_time()}
    (tmp_path / "run.lock").write_text(json.dumps(owner))
    with pytest.raises(RuntimeError, match="is training in"):
        train_emoji.main(train_emoji.parse_args(arguments(tmp_path)))


def make_icons(pictures: torch.Tensor, names: list[str]) -> data.Icons:
    return data.Icons(names, [""] * len(names), (pictures * 255).byte())


def test_an_icon_is_drawn_in_its_own_view_box_and_in_black():
    """A square in the lower right quarter of a view box that does not begin at 0 and is not 32 × 32."""
    icon = {"body": '<path fill="currentColor" d="M18 20h16v16h-16z"/>', "left": 2, "top": 4}
    picture = data.rasterise(data.svg_of(icon, {"width": 32, "height": 32}))
    assert picture.shape == (64, 64, 3)
    assert (picture[32:, 32:] == 0).all() and (picture[:32] == 255).all() and (picture[:, :32] == 255).all()
    tall = data.rasterise(data.svg_of({"body": '<path d="M0 0h16v33h-16z"/>', "height": 33}, {"width": 32, "height": 32}))
    assert (tall[32] == 0).any(-1).sum() in (31, 32)  # it is fitted, not cut off or stretched


def test_what_is_hidden_or_a_skin_tone_is_no_object():
    icons = {name: {} for name in ("wave", "wave-dark", "wave-medium-light", "flashlight", "moon-dark", "knot")}
    icons["knot"]["hidden"] = True
    assert data.visible(icons) == {"wave", "flashlight", "moon-dark"}


def test_a_wrong_download_is_refused(tmp_path, monkeypatch):
    def pack(command, cwd, **kwargs):
        (cwd / "package.tgz").write_bytes(b"not what it was")
        return subprocess.CompletedProcess(command, 0, stdout="package.tgz\n")

    monkeypatch.setattr(data.subprocess, "run", pack)
    with pytest.raises(ValueError, match="checksum"):
        data.npm_file("emojilib@4.0.3", "dist/emoji-en-US.json", tmp_path)


def test_twins_are_on_one_side_of_the_split():
    generator = torch.Generator().manual_seed(0)
    names = ["man cook", "woman cook", "one oclock", "two thirty", "box", "crate", "cat", "dog", "pen", "cup"]
    pictures = torch.rand(3, 10, 3, 64, 64, generator=generator)
    pictures[2, 5] = pictures[2, 4]  # a box and a crate look the same in one style
    pictures[1, 6] = pictures[0, 6]  # the cat looks the same flat and shaded
    icons = make_icons(pictures, names)
    groups = {frozenset(names[i] for i in group) for group in data.twin_groups(icons)}
    assert {frozenset(pair) for pair in (names[:2], names[2:4], names[4:6])} <= groups
    for seed in range(5):
        held_out = data.draw_held_out(icons, count=6, seed=seed)
        assert len(held_out) >= 6 and "cat" not in held_out
        for one, other in (names[:2], names[2:4], names[4:6]):
            assert held_out.get(one) == held_out.get(other)
    assert data.draw_held_out(icons, 4, seed=1) == data.draw_held_out(icons, 4, seed=1)
    with pytest.raises(ValueError, match="can be held out"):
        data.draw_held_out(icons, count=10)


def test_the_committed_split():
    """Of at least 300 objects one style each, and as many of each style."""
    held_out = list(json.loads(data.HELD_OUT.read_text()).values())
    assert len(held_out) >= 300 and set(held_out) == set(data.STYLES)
    assert max(map(held_out.count, data.STYLES)) - min(map(held_out.count, data.STYLES)) <= 4


@pytest.mark.parametrize(
    ("caption", "leaks"),
    [
        ("a slice of pizza", True),
        ("the big slice of hot pizza, in 3d", True),  # what stands between does not matter
        ("pizza, slice", False),
        ("pizza", False),
        ("", False),
    ],
)
def test_captions_that_contain_a_benchmark_sentence_are_found(caption, leaks):
    check = captions.LeakCheck(["a slice of pizza", "a very angry face"])
    assert check(caption) is leaks


@pytest.fixture
def some_captions():
    names = [f"icon {i}" for i in range(20)] + ["rain cloud"]
    words = [[f"word {i}", f"other {i}", "common"] for i in range(21)]
    return captions.Captions(names, words, [["red"]] * 21, ["a icon of word 3", "a rain cloud"])


def test_captions_are_of_the_object_and_never_a_benchmark_sentence(some_captions):
    rng = random.Random(0)
    drawn = {some_captions.draw([3], 0, rng, name_share=0.3) for _ in range(1000)}
    assert "icon 3" in drawn and len(drawn) > 100
    assert all(re.search(r"\b(icon|word|other) 3\b|common", caption) for caption in drawn)
    assert "common" not in drawn and any("common" in caption for caption in drawn)  # said of too many to stand alone
    assert not any(re.search("icon.* word 3", caption) for caption in drawn)
    named = {some_captions.draw([20], 0, rng, name_share=0.5) for _ in range(200)}
    assert named and not any(re.search("rain.*cloud", caption) for caption in named)
    some_captions.check(500)


def test_captions_name_the_style(some_captions):
    rng = random.Random(0)
    for style, name in enumerate(data.STYLES):
        drawn = [some_captions.draw([1], style, rng, name_share=0.5) for _ in range(300)]
        styled = [any(phrase in caption for phrase in captions.STYLE_PHRASES[name]) for caption in drawn]
        assert 0.1 < sum(styled) / 300 < 0.4 if style == 0 else all(styled)
    assert some_captions.draw([1], 2, rng, name_share=1.0, styled=False) == "icon 1"


def test_captions_of_several_objects_name_them_in_order(some_captions):
    rng = random.Random(0)
    for _ in range(100):
        caption = some_captions.draw([5, 7, 1], 0, rng, name_share=0.3)
        assert re.search("icon 5.*icon 7.*icon 1", caption)


def test_colours_of_icons():
    images = torch.ones(3, 3, 8, 8)
    images[0, :, 2:6] = torch.tensor([0.9, 0.2, 0.2])[:, None, None]
    images[1, :, :4] = torch.tensor([0.2, 0.5, 0.9])[:, None, None]
    images[1, :, 6:] = torch.tensor([0.2, 0.6, 0.25])[:, None, None]
    assert captions.colours_of(images) == [["red"], ["green", "blue"], []]


def test_the_tokenizer_knows_every_letter(some_captions, tmp_path):
    tokenizer = text.train_tokenizer(some_captions, tmp_path / "tokenizer", size=600, count=500)
    assert len(tokenizer) <= 600
    assert tokenizer.tokenize("icon") == ["icon</w>"]
    ids = tokenizer("Ünknown ž!", padding="max_length", max_length=24).input_ids
    assert ids.index(tokenizer.eos_token_id) > 4  # not at an unknown letter
    again = text.train_tokenizer(some_captions, tmp_path / "tokenizer")
    assert again("an icon").input_ids == tokenizer("an icon").input_ids


def test_codes_cover_the_latents_evenly():
    rows = torch.cat([torch.zeros(1000, 2) + torch.randn(1000, 2) * 0.01, torch.eye(2) * 5])
    chosen = vqgan.farthest_points(rows, 3)
    assert {tuple(row.round().int().tolist()) for row in chosen} == {(0, 0), (5, 0), (0, 5)}


def test_icons_are_pasted_side_by_side():
    images = torch.stack([torch.zeros(3, 64, 64), torch.full((3, 64, 64), 0.5)])[None]
    canvas = unet.paste(images, 32, 48)
    assert canvas.shape == (1, 3, 128, 192)
    assert (canvas[..., 32:96, 32:96] == 0).all() and (canvas[..., 32:96, 96:160] == 0.5).all()
    assert canvas.sum() == canvas.numel() - 3 * 64 * 64 * 1.5  # white elsewhere
    assert (unet.paste(images[:, :1], 24, 24, (8, 0))[..., 32:96, :64] == 0).all()


def test_vectors_of_objects_that_look_alike_begin_alike():
    pictures, cells = torch.rand(3, 40, 3, 64, 64), torch.ones(3, 40, dtype=torch.bool)
    pictures[:, 1], cells[1, 5] = pictures[:, 0], False
    torch.manual_seed(0)
    vectors = text.looks(make_icons(pictures, [""] * 40), cells)
    assert vectors.shape == (40, text.CLIP_DIM - text.STYLE_CHANNELS)
    similarity = vectors @ vectors.T
    torch.testing.assert_close(similarity.diagonal(), torch.ones(40))
    assert 0.7 < similarity[0, 1] < 0.99  # the same pictures, but not the same object
    assert similarity[2:, :2].max() < 0.5
    pictures[1, 5] = 0  # not trained on
    torch.manual_seed(0)
    torch.testing.assert_close(text.looks(make_icons(pictures, [""] * 40), cells), vectors)


def test_targets_have_a_part_for_the_object_and_one_for_the_style(some_captions, tmp_path):
    """So that a style learned from some objects can be asked of others; and a target itself is without loss."""
    tokenizer = text.train_tokenizer(some_captions, tmp_path / "tokenizer", size=600, count=500)
    targets = text.TextEncoders(torch.randn(21, text.CLIP_DIM - text.STYLE_CHANNELS), tokenizer).targets().detach()
    objects, styles = targets.split([text.CLIP_DIM - text.STYLE_CHANNELS, text.STYLE_CHANNELS], dim=2)
    assert torch.equal(objects[0], objects[2]) and torch.equal(styles[:, 0], styles[:, 20])
    torch.testing.assert_close(objects.square().mean(2), torch.ones(3, 21))
    torch.testing.assert_close(styles.square().mean(2), torch.ones(3, 21))
    style, row = torch.tensor([0, 2]), torch.tensor([5, 7])
    right = text.loss_to_targets(targets[style, row], targets, style, row, 4.0)
    assert right < text.loss_to_targets(targets[style.flip(0), row], targets, style, row, 4.0) - 1
    assert right < text.loss_to_targets(targets[style, row.flip(0)], targets, style, row, 4.0) - 1
    longer = 2 * targets[style, row]  # as near by its direction
    torch.testing.assert_close(text.loss_to_targets(longer, targets, style, row, 4.0), right + 4)


@pytest.mark.parametrize("kind", list(unet.KINDS))
def test_rows_have_the_conditionings_of_their_kind(kind, some_captions, tmp_path, monkeypatch):
    """What a row is trained without is the encoders' "", or masked."""
    monkeypatch.setattr(unet, "KINDS", {kind: 1.0})
    monkeypatch.setattr(unet, "autocast", contextlib.nullcontext)  # rounding differs between processors
    tokenizer = text.train_tokenizer(some_captions, tmp_path / "tokenizer", size=600, count=500)
    encoders = text.TextEncoders(torch.randn(21, text.CLIP_DIM - text.STYLE_CHANNELS), tokenizer).requires_grad_(False)
    embeds, cells = torch.full((3, 21, text.CLIP_DIM), 5.0), torch.ones(3, 21, dtype=torch.bool)
    conditioner = unet.Conditioner(some_captions, encoders, embeds, cells)
    inputs = conditioner([2] * 12, [[i] for i in range(12)], random.Random(0))
    states, mask, clip = (inputs[name] for name in ("encoder_hidden_states", "encoder_attention_mask", "clip_text_embeds"))
    assert states.shape[:2] == (12, unet.TEXT_LENGTH) and mask.shape == (12, unet.TEXT_LENGTH + 2 * unet.CLIP_LENGTH)
    parts = mask.split([unet.TEXT_LENGTH, unet.CLIP_LENGTH, unet.CLIP_LENGTH], dim=1)
    assert parts[2].all() if kind in unet.WITH_IMAGE else not parts[2].any()
    assert (inputs["clip_image_embeds"].mean() > 4) == (kind in unet.WITH_IMAGE)
    empty = encoders.clip_embeds([""])
    assert parts[1].all() or kind not in unet.WITH_CLIP
    assert ((clip - empty).abs().amax(1) < 1e-4).any() == (kind not in unet.WITH_CLIP)
    assert (parts[0].sum(1) > 1).all() if kind in unet.WITH_BYT5 else (parts[0].sum(1) == 1).all()
    if kind == "both":  # of one caption, for CLIP and ByT5
        all_states, all_masks, all_clip = (part[2, 3] for part in conditioner.encoded)
        drawn = (all_clip == clip[3]).all(1).nonzero()[0, 0]
        assert torch.equal(states[3].half(), all_states[drawn]) and torch.equal(parts[0][3], all_masks[drawn])
    plain = conditioner([2] * 12, [[i] for i in range(12)], random.Random(0), plain=True)["clip_text_embeds"]
    named = encoders.clip_embeds([some_captions.in_style(name, 2) for name in some_captions.names[:12]])
    torch.testing.assert_close(plain, named, atol=1e-4, rtol=1e-4)  # the batch is padded otherwise
    several = conditioner([0] * 4, [[1, 2]] * 4, random.Random(0))["encoder_attention_mask"]
    assert not several[:, -unet.CLIP_LENGTH :].any()  # no picture is of several objects


def test_canvases_have_their_objects_and_what_is_known(monkeypatch):
    """Tokens are those of the canvas; one icon of which all is known may lie anywhere."""
    icons = make_icons(torch.rand(3, 5, 3, 64, 64), list("abcde"))
    model = VQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16, scale_factor=1.0).eval()
    cells, long = torch.ones(3, 5, dtype=torch.bool), "a name too long for a pair"
    words = captions.Captions(["rocket", "ship", "moon", long, long + "s"], [[]] * 5, [[]] * 5, sentences=["rocket ship"])
    assert not words.together([0, 1]) and words.together([1, 0])
    for seed in range(20):
        rng = random.Random(seed)
        styles, rows, tokens, known = unet.draw_canvas(icons, model, cells, words, 8, rng)
        height, width = tokens.shape[1:]
        assert known.shape == (height, width) and (height, width, len(rows[0])) in unet.CANVASES
        assert len(tokens) == len(rows) == len(styles) == max(1, 8 * 256 // (height * width))
        if len(rows[0]) > 1:
            assert all(index < 3 for row in rows for index in row)
            # of a benchmark sentence's words: no caption could be drawn of them
            assert not any(0 in row and 1 in row[row.index(0) :] for row in rows)
        elif known.any():
            assert known.sum() == 256
        if not known.any():
            images = torch.stack([icons.images(style, torch.tensor(row)) for style, row in zip(styles, rows)])
            assert torch.equal(tokens, unet.encode(model, unet.paste(images, height, width)))


def test_noise_levels():
    timestep = unet.draw_timesteps(4000)
    assert timestep.min() > 0 and timestep.max() <= 1
    assert 0.65 < (timestep > 0.8).float().mean() < 0.75


def test_a_stage_that_diverges_stops_before_it_is_saved(tmp_path):
    model = torch.nn.Linear(2, 1)
    with pytest.raises(FloatingPointError, match="step 1"):
        loss = lambda step, rng: model.weight.sum() * (float("nan") if step == 1 else 1.0)
        fit.fit("stage", model, fit.adamw(model, 1e-3), loss, 4, tmp_path)
    assert not (tmp_path / "stage.pt").exists()


def test_kept_scores_are_those_of_the_model_and_the_limit(tmp_path):
    measured = []
    measure = lambda: measured.append(1) or {"count": len(measured)}
    scorer = SimpleNamespace(pipe=tiny_pipeline(), limit=3, measurements=lambda: {"names": measure})
    score = lambda: scoring.score(scorer, tmp_path / "scores.json", lambda line: None)["names"]["count"]
    assert [score(), score()] == [1, 1]
    scorer.limit = None
    assert [score(), score()] == [2, 2]
    with torch.no_grad():
        next(scorer.pipe.unet.parameters()).add_(1)
    assert [score(), score()] == [3, 3]


def test_a_picture_is_right_if_none_is_nearer():
    images = torch.rand(4, 3, 8, 8)
    images[3] = images[2]  # these two look the same
    apart = data.distances(images[[0, 1, 2, 2]], images)
    assert data.is_nearest(apart, [[0], [2, 3], [0, 3], [2]]).tolist() == [True, False, True, True]


def test_prompts_ask_for_a_style_and_are_measured_in_it(tmp_path):
    write_packages(tmp_path)
    icons = data.load(tmp_path)
    cells = data.training_cells(icons, tmp_path / "held_out.json", 3)
    for asked in (prompt_sets.names(icons, cells, 5), prompt_sets.new_styles(icons, cells, 9)):
        pairs = [(style, row) for style, (row,) in zip(asked.styles, asked.objects)]
        assert all(icons.names[row] in prompt for prompt, (_, row) in zip(asked.prompts, pairs))
        pictures = torch.stack([icons.images(*pair) for pair in pairs])
        right, psnr = asked.measure(pictures)
        assert right.all() and (psnr > 50).all()
        right, psnr = asked.measure(torch.stack([icons.images(style, row - 1) for style, row in pairs]))
        assert not right.any() and (psnr < 30).all()
    assert {(style, row) for style, row in pairs} == set(map(tuple, (~cells).nonzero().tolist()))
