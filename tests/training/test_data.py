import gzip
import io
import json
import random
import tarfile

import numpy as np
import pytest
import torch
from images import animation, grey_png_16, phone_photo, photo, saved, transparent_png
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.data import simulate
from paella_diffusers.pipelines.image_reading import load_image
from paella_diffusers.training.data import QualityFilter, SampleTransform, ShardStream, collate, load_stream
from paella_diffusers.training.stored import StoredArrays


def picture(value: int, size=(20, 16), **save) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, **{"format": "PNG"} | save)
    return buffer.getvalue()


def write_tar(path, samples: list[dict[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for index, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{path.stem}-{index:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    """21 pictures, which `datasets` by itself would take apart by their names; their red says which they are."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = ["train.png", "test.png", *(f"{i}.png" for i in range(2, 21))]
    for index, name in enumerate(names):
        (folder / name).write_bytes(picture(index * 10))
    lines = [{"file_name": name, "text": f"caption {index}"} for index, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def shards(tmp_path):
    """21 samples in three shards."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        samples = [{"png": picture(i * 10), "txt": f"caption {i}".encode()} for i in range(shard * 7, shard * 7 + 7)]
        write_tar(folder / f"{shard:02d}.tar", samples)
    return folder


@pytest.fixture(params=["folder", "shards"])
def data(request):
    return request.getfixturevalue(request.param)


def take(stream, count: int) -> list[int]:
    samples = [sample for _, sample in zip(range(count), stream)]
    for sample in samples:  # pictures and captions belong together
        assert sample["text"] == f"caption {round(sample['pixels'][0].mean().item() * 25.5)}"
    return [int(sample["text"].split()[1]) for sample in samples]


def test_every_epoch_has_all_samples_in_another_order(data):
    drawn = take(load_stream(str(data), SampleTransform(8), seed=1), 63)
    epochs = [drawn[:21], drawn[21:42], drawn[42:]]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert take(load_stream(str(data), SampleTransform(8), seed=1), 63) == drawn
    assert take(load_stream(str(data), SampleTransform(8), seed=2), 21) != epochs[0]
    in_order = load_stream(str(data), SampleTransform(8), shuffle=False, epochs=1)
    assert take(in_order, 100) == list(range(21))


@pytest.mark.parametrize("processes", [2, 4])  # as many as shards, or more
def test_processes_share_the_samples(data, processes):
    streams = [
        load_stream(str(data), SampleTransform(8), process_index=i, num_processes=processes, epochs=1)
        for i in range(processes)
    ]
    assert sorted(number for stream in streams for number in take(stream, 100)) == list(range(21))


def test_two_processes_have_the_batches_of_one(folder):
    one = take(load_stream(str(folder), SampleTransform(8)), 60)  # of epochs with 21
    two = [take(load_stream(str(folder), SampleTransform(8), process_index=i, num_processes=2), 30) for i in range(2)]
    assert two == [one[0::2], one[1::2]]


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_two_processes_have_the_batches_of_one_also_with_workers(folder, num_workers):
    def batches(index, count, batch_size):
        stream = load_stream(str(folder), SampleTransform(8), process_index=index, num_processes=count)
        loader = StatefulDataLoader(stream, batch_size, num_workers=num_workers, collate_fn=collate)
        return [batch["text"] for _, batch in zip(range(12), loader)]

    one, first, second = batches(0, 1, 6), batches(0, 2, 3), batches(1, 2, 3)
    assert [[batch[0::2], batch[1::2]] for batch in one] == [list(pair) for pair in zip(first, second)]


def test_more_processes_than_samples(data):
    """Each has a sample now and then, and none gives up."""
    for index in range(30):
        stream = load_stream(str(data), SampleTransform(8), process_index=index, num_processes=30)
        assert len(take(stream, 3)) == 3


@pytest.mark.parametrize("parts, split", [(2, 1), (3, 1), (4, 2), (12, 4)])
def test_readers_share_shards_evenly(shards, parts, split, monkeypatch):
    """With more readers than shards a shard is read by as few as can be, and nobody reads long for its first sample."""
    opened, read = [], ShardStream._read

    def noted(self, shard):
        opened.append(shard)
        return read(self, shard)

    monkeypatch.setattr(ShardStream, "_read", noted)
    drawn = []
    for part in range(parts):
        stream = load_stream(str(shards), SampleTransform(8), process_index=part, num_processes=parts, epochs=split)
        drawn += take(stream, 1000)
    assert sorted(drawn) == sorted([*range(21)] * split)
    assert len(opened) == 3 * split * split  # in as many epochs, each shard as many times
    assert ShardStream.sharing(3, parts)[0] == split


def test_no_sample_is_left_out_or_repeated_for_long(shards):
    """Of readers that cannot have as many shards each, others have one more in the next epoch."""
    streams = [load_stream(str(shards), SampleTransform(8), process_index=i, num_processes=2) for i in range(2)]
    drawn = [take(stream, 21 * 10 // 2) for stream in streams]  # ten epochs
    counts = [sum(part.count(number) for part in drawn) for number in range(21)]
    assert min(counts) >= 9 and max(counts) <= 11


@pytest.mark.parametrize(
    "shards, readers, split, twice", [(8, 64, 8, 0), (1000, 1024, 2, 0.023), (10_000, 1024, 1, 0.018), (10, 4, 1, 0.1)]
)
def test_what_sharing_costs(shards, readers, split, twice):
    assert ShardStream.sharing(shards, readers) == (split, pytest.approx(twice, abs=1e-3))


@pytest.mark.parametrize("readers, shards", [(4, 40), (16, 50), (24, 7)])
def test_the_simulation_agrees_with_what_sharing_promises(readers, shards):
    """Many readers: the shares of samples that come twice, and not yet, after as many samples as there are."""
    result = simulate(readers, shards, size=24, epochs=1)
    split, twice = ShardStream.sharing(shards, readers)
    assert (result["counts"] > 1).mean() == pytest.approx(twice, abs=0.02)
    assert result["read"].sum() >= split * shards * 24 * 0.8 and result["again"].max() < 2 * 24


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (3, 2)])
def test_a_stream_begins_where_another_number_of_parts_was(folder, before, after):
    streams = [load_stream(str(folder), SampleTransform(8), process_index=i, num_processes=before) for i in range(before)]
    samples = [sample for stream in streams for _, sample in zip(range(12 // before), stream)]
    epochs = max(sample["epochs"] for sample in samples)
    first = [int(sample["text"].split()[1]) for sample in samples]
    rest = []
    for i in range(after):
        stream = load_stream(str(folder), SampleTransform(8), process_index=i, num_processes=after, epochs=1)
        stream.start(epochs)
        rest += take(stream, 100)
    assert sorted(first + rest) == list(range(21))


def test_shards_that_were_read_are_not_read_again_by_another_number_of_parts(shards):
    stream = load_stream(str(shards), SampleTransform(8))
    first = [sample for _, sample in zip(range(8), stream)]  # the first shard, and one sample of the second
    rest = []
    for i in range(2):
        stream = load_stream(str(shards), SampleTransform(8), process_index=i, num_processes=2, epochs=1)
        stream.start(first[-1]["epochs"])
        rest += take(stream, 100)
    assert len(rest) == 14 and set(range(21)) == set(rest) | {int(sample["text"].split()[1]) for sample in first}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("consumed", [1, 4, 7])
def test_a_stream_goes_on_where_it_was(data, num_workers, consumed):
    def batches():
        stream = load_stream(str(data), SampleTransform(8), seed=3)
        return StatefulDataLoader(stream, batch_size=5, num_workers=num_workers, collate_fn=collate)

    def read(loader, count):
        return [(batch["text"], batch["pixels"].sum().item()) for _, batch in zip(range(count), loader)]

    loader = batches()
    expected = read(batches(), consumed + 3)
    iterator = iter(loader)
    for _ in range(consumed):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = batches()
    resumed.load_state_dict(state)
    assert read(resumed, 3) == expected[consumed:]


def test_two_thousand_samples_of_which_two_percent_are_corrupt(tmp_path):
    rng, corrupt = random.Random(0), 0
    good = picture(100, (32, 24), format="JPEG")
    for shard in range(10):
        samples = []
        for _ in range(200):
            sample = {"jpg": good, "txt": b"a picture", "json": b"{}"}
            if rng.random() < 0.02:
                corrupt += 1
                sample |= rng.choice(
                    [{"jpg": good[: len(good) // 2]}, {"jpg": b"no picture"}, {"json": b"{"}, {"txt": b"\xff"}]
                )
            samples.append(sample)
        write_tar(tmp_path / f"{shard:02d}.tar", samples)
    assert 20 < corrupt < 60
    stream = load_stream(str(tmp_path / "{00..09}.tar"), SampleTransform(16, QualityFilter(min_size=20)), epochs=1)
    loader = StatefulDataLoader(stream, batch_size=50, num_workers=2, collate_fn=collate)
    batches = [(len(batch["text"]), batch["unreadable"]) for batch in loader]
    read, unreadable = (sum(column) for column in zip(*batches))
    assert read == 2_000 - corrupt
    # those after a worker's last readable sample of an epoch are counted in the next one
    assert corrupt - 4 <= unreadable <= corrupt


def headers(path) -> list[int]:
    """Where the headers of an archive's files are."""
    with tarfile.open(path) as archive:
        return [member.offset for member in archive]


@pytest.mark.parametrize("file", range(2, 14))  # a damaged first file of a shard is an error of tarfile's already
@pytest.mark.parametrize("damage", ["another byte", "zeros", "cut before", "cut within"])
def test_what_a_damaged_shard_loses_is_counted_and_said(shards, caplog, file, damage):
    """A header that cannot be read ends an archive, as its end marker does, and so does a block of zeros."""
    path = shards / "01.tar"
    content, at = bytearray(path.read_bytes()), headers(path)[file]
    if damage == "another byte":
        content[at + 3] ^= 1
    elif damage == "zeros":
        content[at : at + 512] = bytes(512)
    else:
        del content[at + (100 if damage == "cut within" else 0) :]
    path.write_bytes(content)
    samples = list(load_stream(str(shards), SampleTransform(8), shuffle=False, epochs=1))
    numbers = {int(sample["text"].split()[1]) for sample in samples}
    assert numbers == set(range(21)) - set(range(7 + file // 2, 14))
    # the rest, and before it the picture whose caption is in the rest
    assert sum(sample["unreadable"] for sample in samples) == 1 + file % 2
    assert f"Skipped the rest of {path}, which counts as one unreadable sample" in caplog.text


def test_a_shard_that_is_cut_off_within_a_file(shards, caplog):
    whole = (shards / "01.tar").read_bytes()
    (shards / "01.tar").write_bytes(whole[:2600])  # within its second sample
    numbers = take(load_stream(str(shards), SampleTransform(8), epochs=1), 100)
    assert sorted(set(range(21)) - set(numbers)) == [*range(8, 14)]
    samples = list(load_stream(str(shards), SampleTransform(8), shuffle=False, epochs=1))
    assert sum(sample["unreadable"] for sample in samples) == 1


def test_whole_shards_are_not_said_to_be_damaged(shards, caplog):
    """Also if the end marker is as short as can be, or they are compressed."""
    path = shards / "01.tar"
    with tarfile.open(path) as archive:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in archive)
    path.write_bytes(path.read_bytes()[: end + 512])
    with gzip.open(shards / "03.tar", "wb") as compressed:  # tarfile knows by its content
        compressed.write((shards / "02.tar").read_bytes())
    (shards / "02.tar").unlink()
    for data in (str(shards), f"pipe:cat {shards}/{{00,01,03}}.tar"):
        samples = list(load_stream(data, SampleTransform(8), epochs=1))
        assert len(samples) == 21 and not any(sample["unreadable"] for sample in samples) and not caplog.text


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


GOOD = {"tokens": np.full((4, 4), 7, np.int16), "prompt_embeds": np.ones((3, 5), np.float16)}
GOOD |= {"clip_text_embeds": np.ones(6, np.float16)}
BAD_ARRAYS = {
    "shape": ("tokens", np.zeros((4, 5), np.int16)),
    "dimensions": ("prompt_embeds", np.ones(5, np.float16)),
    "channels": ("prompt_embeds", np.ones((3, 4), np.float16)),
    "nothing": ("prompt_embeds", np.ones((0, 5), np.float16)),
    "type": ("tokens", np.zeros((4, 4), np.float32)),
    "integers": ("clip_text_embeds", np.ones(6, np.int64)),
    "too high": ("tokens", np.full((4, 4), 8, np.int16)),
    "negative": ("tokens", np.full((4, 4), -1, np.int16)),
    "nan": ("clip_text_embeds", np.full(6, np.nan, np.float16)),
    "infinite": ("prompt_embeds", np.full((3, 5), np.inf, np.float16)),
    "missing": ("tokens", None),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_stored_array_that_does_not_fit_is_skipped_and_counted(tmp_path, case, caplog):
    name, array = BAD_ARRAYS[case]
    samples = [{f"{key}.npy": npy(value) for key, value in GOOD.items()} | {"txt": b"good"} for _ in range(4)]
    del samples[1][f"{name}.npy"]
    samples[1] |= {"txt": b"bad"} if array is None else {"txt": b"bad", f"{name}.npy": npy(array)}
    write_tar(tmp_path / "0.tar", samples)
    transform = SampleTransform(8)
    shapes = {"tokens": (4, 4), "prompt_embeds": (None, 5), "clip_text_embeds": (6,)}
    transform.arrays = StoredArrays(shapes, num_tokens=8, required=["tokens"])
    read = list(load_stream(str(tmp_path), transform, shuffle=False, epochs=1))
    assert [sample["text"] for sample in read] == ["good"] * 3
    assert sum(sample["unreadable"] for sample in read) == 1
    assert collate(read)["tokens"].shape == (3, 4, 4)


@pytest.mark.parametrize("broken", ["a shard", "a picture"])
def test_a_reader_whose_only_sample_of_an_epoch_is_damaged_goes_on(shards, folder, broken):
    """Two readers of two shards, or of two pictures, of which one is damaged: in each epoch one reader has nothing else."""
    if broken == "a shard":
        data, usable = shards, set(range(7))
        (shards / "01.tar").write_bytes(b"no archive")
        (shards / "02.tar").unlink()
    else:
        data, usable = folder, {3}
        lines = [{"file_name": f"{number}.png", "text": f"caption {number}"} for number in (2, 3)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "2.png").write_bytes(b"no picture")
        for path in folder.glob("*.png"):
            if path.name not in ("2.png", "3.png"):
                path.unlink()
    for index in range(2):
        stream = load_stream(str(data), SampleTransform(8), process_index=index, num_processes=2)
        samples = [sample for _, sample in zip(range(40), stream)]
        assert {int(sample["text"].split()[1]) for sample in samples} == usable
        assert sum(sample["unreadable"] for sample in samples) > 0


def test_a_reader_gives_up_if_nothing_is_usable(shards, monkeypatch):
    """After many epochs' parts of the samples, or after very many samples."""
    nothing = SampleTransform(8, QualityFilter(min_size=1000))
    stream = load_stream(str(shards), nothing, num_processes=2)
    with pytest.raises(ValueError, match="could be used: 0 are unreadable"):
        next(iter(stream))
    assert stream.epoch == 20
    monkeypatch.setattr("paella_diffusers.training.data.ENOUGH", 20)
    stream = load_stream(str(shards), nothing, num_processes=2)
    with pytest.raises(ValueError, match="could be used: 0 are unreadable"):
        next(iter(stream))
    assert stream.epoch == 1


def test_arrays_that_nobody_needs_are_not_read(tmp_path):
    write_tar(tmp_path / "0.tar", [{f"{key}.npy": npy(value) for key, value in GOOD.items()} | {"txt": b""}])
    transform = SampleTransform(8)
    transform.arrays = StoredArrays({"clip_text_embeds": (6,)})
    sample = next(iter(load_stream(str(tmp_path), transform)))
    assert "clip_text_embeds" in sample and "prompt_embeds" not in sample


def test_nothing_usable(shards, folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"No sample of 3 shards.* could be used: 0 are unreadable and 21 were filtered out"
    ):
        next(iter(load_stream(str(shards), SampleTransform(8, QualityFilter(min_size=1000)))))
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"21 are unreadable \(the last: row \d+: UnidentifiedImageError"):
        next(iter(load_stream(str(folder), SampleTransform(8))))
    with pytest.raises(ValueError, match=r"no column 'caption', but \['image', 'text'\]"):
        load_stream(str(folder), SampleTransform(8), text_column="caption")
    with pytest.raises(FileNotFoundError, match=r'neither `.tar` shards nor `metadata.jsonl`, with a line as {"file_name"'):
        load_stream(str(tmp_path), SampleTransform(8))
    with pytest.raises(FileNotFoundError, match=r"2 shards, but .*03.tar is not there"):
        load_stream(str(shards / "{02,03}.tar"), SampleTransform(8))


def test_errors_name_the_folder_and_the_line(folder, shards, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="`data` is /not/there, but there is no such folder"):
        load_stream("/not/there", SampleTransform(8))

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach it")

    import datasets

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(
            FileNotFoundError, match="`data` is pictures: there is no such folder in .*, and no dataset of this"
        ):
            load_stream("pictures", SampleTransform(8))
    with pytest.raises(ValueError, match="--max-train-samples 5: the samples of shards are not counted"):
        load_stream(str(shards), SampleTransform(8), max_samples=5)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[3] = '{"file_name": "2.png", "text": "not closed}'
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 4 is no JSON object: b'\{\"file_name"):
        load_stream(str(folder), SampleTransform(8))


def test_prepared_data_are_kept_in_the_given_folder(folder, tmp_path):
    assert len(take(load_stream(str(folder), SampleTransform(8), epochs=1, cache_dir=str(tmp_path / "cache")), 100)) == 21
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_a_folder_of_images_may_be_called_like_shards(folder):
    renamed = folder.rename(folder.with_name("pictures.tar.d"))
    assert set(take(load_stream(str(renamed), SampleTransform(8), epochs=1), 100)) == set(range(21))


def test_some_samples_only(folder):
    drawn = take(load_stream(str(folder), SampleTransform(8), max_samples=5), 10)
    assert len(set(drawn)) == 5 and sorted(drawn[:5]) == sorted(drawn[5:])
    assert set(take(load_stream(str(folder), SampleTransform(8), max_samples=5, seed=1), 5)) != set(drawn)


@pytest.mark.parametrize(
    "limits, metadata, wanted",
    [
        ((256, None, None, None), {"original_width": 256, "original_height": 300}, True),
        ((256, None, None, None), {"original_width": 255, "original_height": 300}, False),
        ((256, None, None, None), {}, False),
        ((None, 0.5, None, None), {"pwatermark": 0.0}, True),
        ((None, 0.5, None, None), {"pwatermark": 0.6}, False),
        ((None, 0.5, None, None), {"pwatermark": None}, False),
        ((None, None, 5.0, None), {"AESTHETIC_SCORE": 5.0}, True),
        ((None, None, 5.0, None), {"aesthetic": 6.0, "AESTHETIC_SCORE": 1.0}, True),
        ((None, None, 5.0, None), {"aesthetic": 4.9}, False),
        ((None, None, None, 0.99), {"punsafe": 0.98}, True),
        ((None, None, None, 0.99), {}, False),
        ((None, None, None, None), {}, True),
    ],
)
def test_quality_filter(limits, metadata, wanted):
    assert QualityFilter(*limits)(metadata) == wanted


def test_pictures_become_squares():
    def pixels(image, resolution=8, seed=0, **options):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        raw = {"image": buffer.getvalue(), "text": "", "metadata": {}}
        return SampleTransform(resolution, **options)(raw, random.Random(seed))["pixels"]

    assert pixels(Image.new("RGBA", (8, 8), (255, 0, 0, 0))).min() == 1  # transparent is white
    assert pixels(Image.new("L", (5, 4), 255)).shape == (3, 8, 8)  # small ones grow
    wide = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (8, 1)))
    middle = torch.arange(80, 160, 10) / 255
    assert torch.equal(pixels(wide, center_crop=True)[0, 0], middle)
    flips = [pixels(wide, center_crop=True, random_flip=True, seed=seed)[0, 0] for seed in range(20)]
    assert {tuple(flip.tolist()) for flip in flips} == {tuple(middle.tolist()), tuple(middle.flip(0).tolist())}
    grown = [pixels(wide, resolution=16, center_crop=True, interpolation=kind) for kind in ("nearest", "bicubic")]
    assert not torch.equal(*grown)
    left = round(pixels(wide)[0, 0, 0].item() * 25.5)
    assert torch.equal(pixels(wide)[0, 0], torch.arange(left * 10, left * 10 + 80, 10) / 255)


@pytest.mark.parametrize(
    "file",
    [
        phone_photo(48, 48),
        transparent_png(48, 48),
        grey_png_16(48, 48),
        animation(48, 48),
        saved(photo(48, 48).convert("CMYK"), "JPEG"),
    ],
    ids=["EXIF", "transparent", "16 bits", "animation", "CMYK"],
)
def test_pictures_of_any_kind_are_read_as_pipelines_do(file):
    raw = {"image": file.getvalue(), "text": "", "metadata": {}}
    pixels = SampleTransform(48)(raw, random.Random(0))["pixels"]
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(load_image(file), np.float32) / 255).all()


def test_captions():
    raw = {"image": picture(0), "text": ["one", "two"], "metadata": {}}
    drawn = {SampleTransform(8)(raw, random.Random(seed))["text"] for seed in range(20)}
    assert drawn == {"one", "two"}
    with pytest.raises(ValueError, match="no caption"):
        SampleTransform(8)(raw | {"text": None}, random.Random(0))
    assert SampleTransform(8, captions=False)(raw | {"text": None}, random.Random(0))["text"] == ""


def test_the_prompt_of_the_batch_command_is_a_caption(tmp_path):
    picture_of = {"png": picture(3), "json": b'{"prompt": "red"}'}
    write_tar(tmp_path / "0.tar", [picture_of, picture_of | {"txt": b"blue"}])
    read = load_stream(str(tmp_path), SampleTransform(8), shuffle=False, epochs=1)
    assert [sample["text"] for sample in read] == ["red", "blue"]


def test_embeddings_of_several_lengths_are_padded():
    counts = {"unreadable": 1, "filtered": 2, "epochs": 0.5}
    samples = [{"text": "", **counts, "prompt_embeds": torch.ones(n, 4)} for n in (2, 3)]
    batch = collate(samples)
    assert batch["prompt_embeds"].shape == (2, 3, 4) and batch["prompt_embeds"][0, 2].abs().sum() == 0
    assert batch["prompt_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["unreadable"] == 2 and batch["filtered"] == 4
    assert "prompt_attention_mask" not in collate(samples[:1])
