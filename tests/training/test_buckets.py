import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
import train_paella
from PIL import Image
from safetensors.torch import load_file, save_file
from torchdata.stateful_dataloader import StatefulDataLoader
from trainers import TINY, Launch

from paella_diffusers.training.buckets import Buckets
from paella_diffusers.training.data import RowStream, SampleTransform, collate, load_stream

SIZES = [(64, 32)] * 9 + [(32, 64)] * 6 + [(40, 40)] * 5


def picture(number: int, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 10, 100, 50)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(params=["folder", "shards"])
def data(request, tmp_path) -> str:
    folder = tmp_path / "data"
    folder.mkdir()
    if request.param == "folder":
        for number, size in enumerate(SIZES):
            (folder / f"{number}.png").write_bytes(picture(number, size))
        lines = [json.dumps({"file_name": f"{number}.png", "text": f"no. {number}"}) for number in range(len(SIZES))]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return str(folder)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(shard, len(SIZES), 2):
                for name, content in ((".png", picture(number, SIZES[number])), (".txt", f"no. {number}".encode())):
                    member = tarfile.TarInfo(f"{number}{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(folder)


def loader(data: str, batch_size: int = 4, workers: int = 0, **kwargs) -> StatefulDataLoader:
    stream = load_stream(data, SampleTransform(32), **kwargs)
    stream.use_buckets(Buckets(32, 8, batch_size))
    return StatefulDataLoader(stream, batch_size, num_workers=workers, collate_fn=collate)


@pytest.mark.parametrize("resolution, multiple", [(256, 32), (512, 32), (64, 8)])
def test_sizes_fit_the_model_and_have_about_as_many_pixels(resolution, multiple):
    sizes = Buckets(resolution, multiple, 1).sizes
    assert (resolution, resolution) in sizes and len(sizes) >= 5
    for width, height in sizes:
        assert width % multiple == height % multiple == 0 and max(width, height) <= 2 * min(width, height)
        assert 0.87 < width * height / resolution**2 < 1.13 and (height, width) in sizes


def test_the_size_is_the_nearest_shape():
    buckets = Buckets(256, 32, 1)
    sizes = {size: buckets.size_for(size) for size in ((500, 500), (1000, 90), (640, 480), (480, 640))}
    assert sizes == {(500, 500): (256, 256), (1000, 90): (352, 192), (640, 480): (288, 224), (480, 640): (224, 288)}


def test_pictures_that_are_turned_by_exif_are_in_the_turned_bucket():
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(buffer, "jpeg", exif=exif)
    buckets = Buckets(32, 8, 1)
    assert buckets._size_of(buffer.getvalue()) == buckets.size_for((32, 64))
    transform = SampleTransform(32)
    transform.buckets = buckets
    sample = transform({"image": buffer.getvalue(), "text": ""}, random.Random(0))
    assert sample["pixels"].shape[:0:-1] == buckets.size_for((32, 64))


def test_in_the_long_run_all_are_seen_equally_often():
    images = [picture(number, size) for number, size in enumerate(SIZES)]
    buckets, counts = Buckets(32, 8, 4), Counter()
    for seed in range(1000):
        places = buckets.arrange(images, random.Random(seed))
        assert places and len(places) % 4 == 0
        counts.update(index for index, _ in places)
    assert all(850 < counts[index] < 1150 for index in range(len(SIZES)))
    # one picture alone fills a batch
    assert [index for index, _ in buckets.arrange(images[:1], random.Random(0))] == [0] * 4


def test_each_batch_has_one_size_and_all_sizes_come(data):
    stream = iter(loader(data))
    shapes = {tuple(next(stream)["pixels"].shape) for _ in range(30)}
    assert shapes == {(4, 3, height, width) for width, height in map(Buckets(32, 8, 4).size_for, set(SIZES))}


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_exactly_after_any_batch(data, workers):
    whole = iter(loader(data, 3, workers))
    expected = [next(whole) for _ in range(14)]
    for at in (1, 4, 9):
        first = loader(data, 3, workers)
        begun = iter(first)
        for _ in range(at):
            next(begun)
        again = loader(data, 3, workers)
        again.load_state_dict(first.state_dict())
        rest = iter(again)
        for batch in expected[at:]:
            found = next(rest)
            assert found["text"] == batch["text"] and torch.equal(found["pixels"], batch["pixels"])


def test_processes_have_samples_of_their_own(data):
    streams = [iter(loader(data, 1, process_index=index, num_processes=2)) for index in range(2)]
    texts = [text for stream in streams for _ in range(10) for text in next(stream)["text"]]
    assert len(set(texts)) == len(SIZES)  # all of an epoch, each once


def test_unreadable_samples_are_replaced_within_their_batch(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        content = picture(number, size)
        (folder / f"{number}.png").write_bytes(content if number % 4 else content[:45])  # its header is whole
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"no. {number}"}) for number in range(len(SIZES))]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    stream, unreadable = iter(loader(str(folder))), 0
    for _ in range(20):
        batch = next(stream)
        unreadable += batch["unreadable"]
        assert len(batch["text"]) == 4 and all(int(text.split()[-1]) % 4 for text in batch["text"])
    assert unreadable


def test_rows_without_a_picture_are_skipped_and_counted():
    rows = [{"image": {"bytes": picture(number, SIZES[number]), "path": None}, "text": str(number)} for number in range(20)]
    for number in (3, 8, 12):
        rows[number]["image"] = None
    image = datasets.Image(decode=False)
    features = datasets.Features({"image": image, "text": datasets.Value("string")})
    stream = RowStream(datasets.Dataset.from_list(rows, features=features), SampleTransform(32), epochs=3)
    stream.use_buckets(Buckets(32, 8, 2))
    samples = list(stream)
    assert not {"3", "8", "12"} & {sample["text"] for sample in samples}
    assert sum(sample["unreadable"] for sample in samples) > 0


@pytest.mark.parametrize("data, processes", [("shards", 1), ("folder", 2)], indirect=["data"])
def test_training_resumes_exactly(data, pretrained, tmp_path, processes):
    options = [*TINY, "--resolution", "64", "--data", data, "--pretrained", pretrained, "--batch-size", "2"]
    options += ["--aspect-ratio-buckets", "--save-every", "3", *(["--prompts", "red"] if processes == 1 else [])]
    options += ["--max-steps", "6"]
    for folder, more in (("whole", []), ("parts", ["--resume", str(tmp_path / "whole" / "checkpoints" / "00000003")])):
        arguments = [*options, "--output-dir", str(tmp_path / folder), *more]
        if processes == 1:
            train_paella.main(train_paella.parse_args(arguments))
        else:
            Launch("train_paella", arguments, processes).finish()
    name = Path("unet", "diffusion_pytorch_model.safetensors")
    expected, found = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert processes > 1 or Image.open(tmp_path / "whole" / "samples" / "00000006.png").size == (64, 64)


def test_computed_arrays_are_refused(pictures, pretrained, tmp_path):
    save_file({"prompt_embeds": torch.zeros(1, 1, 16)}, f"{pictures}/empty.safetensors", {"computed": "tokens"})
    options = [
        *TINY,
        "--data",
        pictures,
        "--pretrained",
        pretrained,
        "--output-dir",
        str(tmp_path),
        "--aspect-ratio-buckets",
    ]
    with pytest.raises(ValueError, match="--aspect-ratio-buckets needs pictures, but .* has computed arrays of one size"):
        train_paella.main(train_paella.parse_args(options))
