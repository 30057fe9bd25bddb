"""Batches: what is written, the same with any number of processes and after kills, and what happens to bad rows."""

import csv
import functools
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from conftest import tiny_pipeline
from kills import contents, killed_before, leftovers
from PIL import Image

from paella_diffusers import PaellaPipeline
from paella_diffusers.apps import batch as batch_module
from paella_diffusers.apps.batch import Job, TooManyErrors, Worker, run
from paella_diffusers.apps.batch_input import BatchInput, ShardReader, seed_of

ROWS = [
    {"prompt": "red heart", "key": "heart"},
    {"prompt": "a pizza " * 10, "negative_prompt": "blue"},
    {"prompt": "dog", "seed": 5},
    {"prompt": "rocket", "num_inference_steps": 3},
    {"prompt": "sun"},
    {"prompt": "cat", "height": 16},
    {"prompt": "sun"},
]
DEFAULTS = {"num_inference_steps": 2, "use_prior": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """How to load a tiny pipeline, in any process."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return functools.partial(quiet_pipeline, str(folder))


def quiet_pipeline(folder: str, dtype=torch.float32) -> PaellaPipeline:
    pipe = PaellaPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def load(model):
    pipe = model()
    return lambda: pipe


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def write_rows(path: Path, rows=ROWS) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def make_job(source, out, **options) -> Job:
    return Job(BatchInput(source, defaults=DEFAULTS), str(out), **{"shard_size": 3, "batch_size": 2} | options)


@pytest.fixture(scope="module")
def undisturbed(load, source, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(make_job(source, out), load) == (3, 3, 0)
    return contents(out)


def test_what_is_written(undisturbed, source, tmp_path):
    shards = [f"00000{index}" for index in range(3)]
    assert sorted(undisturbed) == sorted(["job.json", *(f"{shard}{end}" for shard in shards for end in (".tar", ".json"))])
    for shard in shards:
        (tmp_path / f"{shard}.tar").write_bytes(undisturbed[f"{shard}.tar"])
    urls = [str(tmp_path / f"{shard}.tar") for shard in shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(7)]
    assert [sample["json"]["prompt"] for sample in samples] == [row["prompt"] for row in ROWS]
    assert [sample["json"]["key"] for sample in samples] == ["heart", "1", "2", "3", "4", "5", "6"]
    assert [sample["json"]["seed"] for sample in samples[:3]] == [seed_of("heart"), seed_of("1"), 5]
    assert [sample["png"].size for sample in samples] == [(32, 32)] * 5 + [(32, 16), (32, 32)]
    assert samples[3]["json"]["arguments"] == {"num_inference_steps": 3, "use_prior": False}
    assert samples[3]["json"]["steps_taken"] == 3
    assert {"torch", "diffusers", "scheduler", "processor"} <= set(samples[3]["json"]["made_with"])
    assert samples[4]["png"].tobytes() != samples[6]["png"].tobytes()  # two rows, two seeds


def test_pictures_are_what_the_pipeline_draws_from_the_json(model, source, tmp_path):
    pipe = model(dtype=torch.float64)
    run(make_job(source, tmp_path / "out", output="tokens", layout="files"), lambda: pipe)
    for number in range(7):
        shard = tmp_path / "out" / f"{number // 3:06d}"
        made = json.loads((shard / f"{number:09d}.json").read_text())
        tokens, noise = (np.load(shard / f"{number:09d}.{name}.npy") for name in ("tokens", "noise"))
        generator = torch.Generator().manual_seed(made["seed"])
        again = pipe(made["prompt"], **made["arguments"], generator=generator, output_type="latent")
        assert np.array_equal(again.images[0], tokens) and tokens.dtype == np.int32
        assert np.array_equal(again.initial_noise[0], noise)


def test_the_seed_is_a_hash_of_the_key():
    digest = hashlib.sha256(b"0:heart").hexdigest()
    assert seed_of("heart") == int(digest[:16], 16) // 2
    assert seed_of("heart", 1) == int(hashlib.sha256(b"1:heart").hexdigest()[:16], 16) // 2


# ------------------------------------------------------------------------------------------------- processes and restarts


@pytest.mark.parametrize("processes", [2, 3])
def test_the_same_bytes_with_several_calls_as_with_one(load, source, tmp_path, undisturbed, processes):
    for rank in reversed(range(processes)):
        run(make_job(source, tmp_path / "out"), load, rank=rank, world_size=processes)
    assert contents(tmp_path / "out") == undisturbed


def test_the_same_bytes_after_a_restart_with_another_number(load, source, tmp_path, undisturbed):
    assert run(make_job(source, tmp_path / "out"), load, rank=1, world_size=3).shards_done == 1
    for rank in range(2):
        result = run(make_job(source, tmp_path / "out"), load, rank=rank, world_size=2)
    assert result == (3, 3, 0)
    assert contents(tmp_path / "out") == undisturbed


def test_the_same_bytes_with_processes(model, source, tmp_path, undisturbed):
    assert run(make_job(source, tmp_path / "out"), model, processes=2) == (3, 3, 0)
    assert contents(tmp_path / "out") == undisturbed
    assert not leftovers(tmp_path)


def no_pipeline():
    raise ValueError("no such device")


def test_a_process_that_cannot_load_the_model_says_why(source, tmp_path):
    with pytest.raises(ValueError, match="no such device"):
        run(make_job(source, tmp_path / "out", shard_size=7), no_pipeline, processes=2)


def test_what_is_done_is_not_drawn_again(load, source, tmp_path, undisturbed, monkeypatch):
    run(make_job(source, tmp_path / "out"), load)
    monkeypatch.setattr(batch_module, "draw", None)
    assert run(make_job(source, tmp_path / "out"), load) == (3, 3, 0)


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_two_that_draw_the_same_shard_at_once(load, source, tmp_path, undisturbed, layout):
    job = make_job(source, tmp_path / "out", layout=layout)
    store = job.begin()
    one, other = Worker(job, load), Worker(job, load)
    files, errors = one.draw(0, lambda count: None)
    other(0)
    before = contents(tmp_path / "out")
    store.write_shard(0, files, errors, layout)
    assert contents(tmp_path / "out") == before
    assert not leftovers(tmp_path)


def check_kills(load, source, out, undisturbed, operations, layout="webdataset"):
    """Kill before the operations of these numbers, each time in a new folder, and start again."""
    for operation in operations:
        folder = out / str(operation)
        folder.mkdir()
        job = make_job(source, folder / "out", layout=layout)
        was_killed = killed_before(operation, folder, lambda: run(job, load))  # noqa: B023
        for rank in range(2):
            run(job, load, rank=rank, world_size=2)
        assert contents(folder / "out") == undisturbed, operation
        assert not leftovers(folder)
        if not was_killed:
            return operation
    return None


def test_killed_and_started_again(load, source, tmp_path, undisturbed):
    check_kills(load, source, tmp_path, undisturbed, range(3, 30, 8))


@pytest.mark.kills
@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_killed_before_every_file_operation(load, source, tmp_path, layout):
    run(make_job(source, tmp_path / "whole", layout=layout), load)
    count = check_kills(load, source, tmp_path, contents(tmp_path / "whole"), range(1000), layout)
    print(f"{layout}: killed before each of {count} file operations")
    assert count > 20


# --------------------------------------------------------------------------------------------------------- bad rows and jobs

BAD_ROWS = [
    ROWS[0],
    "no JSON",
    '"text"',
    {"key": "a"},
    {"prompt": "dog", "steps": 3},
    {"prompt": "dog", "height": 33},
    ROWS[2],
]


def test_bad_rows_are_recorded_and_the_others_drawn(load, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", BAD_ROWS)
    assert run(make_job(rows, tmp_path / "out", shard_size=7), load) == (1, 1, 5)
    errors = [json.loads(line) for line in (tmp_path / "out/000000.errors.jsonl").read_text().splitlines()]
    assert [error["row"] for error in errors] == [1, 2, 3, 4, 5]
    said = [
        "Expecting value",
        "must be a JSON object, got str",
        "`prompt` is missing",
        "no argument `steps`",
        "multiples of",
    ]
    assert all(text in error["error"] for text, error in zip(said, errors))
    assert json.loads((tmp_path / "out/000000.json").read_text()) == {"pictures": 2, "errors": 5}
    good = write_rows(tmp_path / "good.jsonl", [ROWS[0], ROWS[2] | {"key": "6"}])
    run(make_job(good, tmp_path / "good", shard_size=7), load)
    pictures = [read_tar((tmp_path / name / "000000.tar").read_bytes()) for name in ("out", "good")]
    assert pictures[0]["000000000.png"] == pictures[1]["000000000.png"]
    assert pictures[0]["000000006.png"] == pictures[1]["000000001.png"]


def read_tar(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_too_many_errors_end_the_job_and_its_next_start(load, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", BAD_ROWS)
    job = make_job(rows, tmp_path / "out", shard_size=2, max_errors=2)
    for _ in range(2):
        with pytest.raises(TooManyErrors, match="3 rows were refused, more than 2"):
            run(job, load)
        assert (tmp_path / "out/000001.json").exists() and not (tmp_path / "out/000002.json").exists()
    assert run(replace(job, max_errors=5), load) == (4, 4, 5)


def test_a_row_that_fails_in_a_batch_does_not_take_others_with_it(load, source, tmp_path, undisturbed, monkeypatch):
    draw = batch_module.draw

    def fail_on_dogs(pipe, rows, *args, **kwargs):
        if any(row.prompt == "dog" for row in rows):
            raise ValueError("no dogs")
        return draw(pipe, rows, *args, **kwargs)

    monkeypatch.setattr(batch_module, "draw", fail_on_dogs)
    assert run(make_job(source, tmp_path / "out"), load) == (3, 3, 1)
    whole = read_tar(undisturbed["000000.tar"])
    for name in ("000000002.png", "000000002.json"):
        del whole[name]
    written = contents(tmp_path / "out")
    assert read_tar(written["000000.tar"]) == whole
    assert written["000001.tar"] == undisturbed["000001.tar"]


def test_a_folder_of_something_else_is_refused(load, source, tmp_path):
    run(make_job(source, tmp_path / "out"), load)
    with pytest.raises(ValueError, match="output of another job: batch_size was 2, not 4"):
        run(make_job(source, tmp_path / "out", batch_size=4), load)
    with pytest.raises(ValueError, match="output of another job: input was"):
        run(make_job(write_rows(tmp_path / "rows.jsonl", ROWS[:3]), tmp_path / "out"), load)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(ValueError, match=r"has files, but no job\.json"):
        run(make_job(source, tmp_path / "other"), load)
    with pytest.raises(ValueError, match="`output` must be one of"):
        make_job(source, tmp_path / "out", output="bmp")


# ---------------------------------------------------------------------------------------------------------- inputs, outputs


def test_the_same_rows_from_every_format(load, source, tmp_path, undisturbed):
    columns = list(dict.fromkeys(name for row in ROWS for name in row))
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(ROWS)
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({name: [row.get(name) for row in ROWS] for name in columns})
    dataset.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "dataset").mkdir()
    dataset.to_json(tmp_path / "dataset/train.jsonl")
    for name in ("rows.csv", "rows.parquet", "dataset"):
        out = tmp_path / f"out-{name}"
        run(make_job(str(tmp_path / name), out), load)
        written = contents(out)
        assert written.keys() == undisturbed.keys()
        assert all(written[file] == undisturbed[file] for file in written if file != "job.json"), name


def test_columns_by_name_and_the_others_ignored(tmp_path):
    rows = BatchInput("rows.jsonl", columns={"prompt": "caption", "key": "id", "seed": "number"}, defaults={"width": 32})
    row = rows.row(7, {"caption": "dog", "id": 3, "url": "x", "prompt": "y"})
    assert (row.key, row.prompt, row.seed, row.arguments) == ("3", "dog", seed_of("3"), {"width": 32})
    assert rows.row(7, {"caption": "dog", "number": 4}).seed == 4
    with pytest.raises(ValueError, match="`prompt` is missing"):
        rows.row(7, {"id": 3})


def test_cells_of_csv(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b'\xef\xbb\xbfprompt,guidance_scale,use_prior\n12,"[8, 4]",true\n\xff,,\n')
    rows = BatchInput(str(tmp_path / "rows.csv"))
    first, second = rows.records()
    assert rows.row(0, first).prompt == "12"
    assert rows.row(0, first).arguments == {"guidance_scale": [8, 4], "use_prior": True}
    with pytest.raises(ValueError, match="lone surrogate"):
        rows.row(1, second)


def test_long_cells_of_csv(tmp_path):
    (tmp_path / "rows.csv").write_text(f"prompt\n{'a' * 200_000}\nb\n")
    assert [len(record["prompt"]) for record in BatchInput(str(tmp_path / "rows.csv")).records()] == [200_000, 1]


def test_shards_in_any_order(tmp_path):
    (tmp_path / "rows.jsonl").write_text("1\n\n2\n3\n4\n5\n")
    reader = ShardReader(BatchInput(str(tmp_path / "rows.jsonl")), 2)
    assert [reader[index] for index in (1, 2, 0, 0, 2)] == [
        [b"3\n", b"4\n"],
        [b"5\n"],
        [b"1\n", b"2\n"],
        [b"1\n", b"2\n"],
        [b"5\n"],
    ]


def test_other_file_systems(load, source, undisturbed):
    files = fsspec.filesystem("memory")
    with open(source, "rb") as file:
        files.pipe("/rows/rows.jsonl", file.read())
    assert run(make_job("memory://rows/rows.jsonl", "memory://out/job"), load) == (3, 3, 0)
    assert {path.rpartition("/")[2]: files.cat_file(path) for path in files.find("/out")} == undisturbed


@pytest.mark.parametrize("output, format", [("jpg", "JPEG"), ("webp", "WEBP")])
def test_formats_of_pictures(load, source, tmp_path, output, format):
    run(make_job(source, tmp_path / "out", output=output, layout="files"), load)
    with Image.open(tmp_path / f"out/000000/000000000.{output}") as picture:
        assert (picture.format, picture.size) == (format, (32, 32))
