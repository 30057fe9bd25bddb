"""
Endless streams of training samples, from an image folder, a dataset of the Hub or WebDataset shards.

What a sample looks like, its crop and its caption among several, depends on the seed, the epoch and the sample alone, so
that runs can be repeated, continued and spread over processes. Samples that cannot be read are skipped and counted.
"""

import argparse
import io
import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ..pipelines.image_reading import open_image, to_rgb
from .buckets import Buckets
from .stored import ARRAYS, SCALES, StoredArrays

logger = logging.get_logger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
WINDOW = 1000  # samples that are shuffled, or put into buckets, together
ENOUGH = 100_000  # samples after which a reader that could use none of them gives up
# of Pillow; it has no other "nearest" than what torchvision calls so
INTERPOLATIONS = ("nearest", "nearest_exact", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass
class QualityFilter:
    """
    Which samples are good enough, by their metadata with the names of LAION's. As published, a sample that lacks an entry is
    rejected; only for the size, the image's own is taken then. None turns a condition off. The published training had
    `QualityFilter(256, 0.5, 5.0, 0.99)`.

    Args:
        min_size (`int`, *optional*): Pixels that `original_width` and `original_height` must have at least.
        max_watermark (`float`, *optional*): Highest probability of a watermark, `pwatermark`.
        min_aesthetic (`float`, *optional*): Lowest aesthetic score, `aesthetic` or `AESTHETIC_SCORE`, of about 0 to 10.
        max_unsafe (`float`, *optional*): Highest probability of unsafe content, `punsafe`.
    """

    min_size: int | None = None
    max_watermark: float | None = None
    min_aesthetic: float | None = None
    max_unsafe: float | None = None

    def __call__(self, metadata: dict[str, Any]) -> bool:
        def within(name, lowest=None, highest=None):
            value = metadata.get(name)
            return value is not None and (lowest is None or value >= lowest) and (highest is None or value <= highest)

        return (
            (self.min_size is None or all(within(f"original_{side}", self.min_size) for side in ("width", "height")))
            and (self.max_watermark is None or within("pwatermark", highest=self.max_watermark))
            and (
                self.min_aesthetic is None
                or any(within(name, self.min_aesthetic) for name in ("aesthetic", "AESTHETIC_SCORE"))
            )
            and (self.max_unsafe is None or within("punsafe", highest=self.max_unsafe))
        )


def add_filters(add: Callable) -> None:
    """Add the filter's arguments by `add`, a parser's `add_argument`."""
    add("--min-size", type=int, help="take images of at least so many pixels a side")
    add("--max-watermark", type=float, help="take images with at most this `pwatermark` (published: 0.5)")
    add("--min-aesthetic", type=float, help="take images with at least this `aesthetic` score (published: 5)")
    add("--max-unsafe", type=float, help="take images with at most this `punsafe` (published: 0.99)")


def quality_filter(args: argparse.Namespace) -> QualityFilter | None:
    """The filter that these arguments ask for."""
    limits = (args.min_size, args.max_watermark, args.min_aesthetic, args.max_unsafe)
    return None if all(limit is None for limit in limits) else QualityFilter(*limits)


class SampleTransform:
    """
    Raw samples to tensors. `pixels`, `(3, resolution, resolution)`, are float32 in [0, 1]. As in pipelines, pictures are
    turned upright, and transparent ones are put on white. The shorter side is resized; then the picture is cropped at
    random, as published. `text` is one of the captions. Samples with computed arrays have these in place of the picture.

    Args:
        resolution (`int`): Pixels a side.
        quality (`QualityFilter`, *optional*): Which samples to take.
        captions (`bool`, defaults to `True`): Whether samples must have captions; otherwise all have "".
        center_crop (`bool`, defaults to `False`): Crop the middle.
        random_flip (`bool`, defaults to `False`): Mirror half of the pictures, left to right.
        interpolation (`str`, defaults to `"bicubic"`): How pictures are resized; one of `INTERPOLATIONS`.

    Attributes:
        arrays ([`StoredArrays`]): What computed arrays must be; set once the model is known.
        buckets ([`Buckets`], *optional*): Sizes to crop to instead of the square one; set by [`SampleStream.use_buckets`].
    """

    def __init__(
        self,
        resolution: int,
        quality: QualityFilter | None = None,
        captions: bool = True,
        center_crop: bool = False,
        random_flip: bool = False,
        interpolation: str = "bicubic",
    ):
        self.resolution = resolution
        self.quality = quality
        self.captions = captions
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.interpolation: Image.Resampling = Image.Resampling[interpolation.removesuffix("_exact").upper()]
        self.arrays = StoredArrays()
        self.buckets: Buckets | None = None

    def __call__(self, raw: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
        """The sample, or None if it is not wanted. Raises anything if it cannot be read."""
        arrays = self.arrays.read(raw)
        sample: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        image = raw["image"]
        if not arrays:
            image = open_image(io.BytesIO(image) if isinstance(image, bytes) else image, "the image")
        metadata = raw.get("metadata") or {}
        if isinstance(metadata, bytes) and (self.quality is not None or raw["text"] is None):
            metadata = json.loads(metadata)
        if self.quality is not None:
            known = cast(dict, metadata)
            if isinstance(image, Image.Image):
                known = {"original_width": image.width, "original_height": image.height} | known
            if not self.quality(known):
                return None
        text = raw["text"] if self.captions else ""
        text = metadata.get("prompt") if text is None else text  # of what `paella-diffusers batch` wrote
        text = text.decode() if isinstance(text, bytes) else rng.choice(text) if isinstance(text, list) else text
        if not isinstance(text, str):
            raise ValueError("it has no caption")
        sample["text"] = text
        if not arrays:
            sample["pixels"] = self._pixels(image, rng)
        return sample

    def _pixels(self, image: Image.Image, rng: random.Random) -> torch.Tensor:
        image = to_rgb(image, "the image")
        if self.buckets is None:
            image = self._square(image, rng)
        else:
            place = (0.5, 0.5) if self.center_crop else (rng.random(), rng.random())
            image = self.buckets.crop(image, self.interpolation, place)
        if self.random_flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def _square(self, image: Image.Image, rng: random.Random) -> Image.Image:
        scale = self.resolution / min(image.size)
        if scale != 1:
            size = [max(self.resolution, round(side * scale)) for side in image.size]
            image = image.resize(size, self.interpolation)
        free = [side - self.resolution for side in image.size]
        left, top = (side // 2 if self.center_crop else rng.randint(0, side) for side in free)
        return image.crop((left, top, left + self.resolution, top + self.resolution))


class SampleStream(IterableDataset):
    """
    Samples without end, for [`~torchdata.stateful_dataloader.StatefulDataLoader`], whose state dict then holds the position
    of every worker. Subclasses know where raw samples come from.

    Each sample also has three numbers. `unreadable` and `filtered` count the samples that were skipped just before it.
    `epochs` is the number of epochs that are over with it, with a fraction, as `start` takes it.

    Args:
        transform (`Callable`): From a raw sample and a `random.Random` to a sample, as [`SampleTransform`].
        seed (`int`, defaults to 0): Of the order and of the transforms.
        shuffle (`bool`, defaults to `True`): Whether each epoch has an order of its own.
        process_index (`int`, defaults to 0): Which of `num_processes` parts of the samples to give.
        num_processes (`int`, defaults to 1): Number of parts.
        epochs (`int`, *optional*): The number of epochs after which the stream ends; it never ends unless given.

    Raises:
        ValueError: When an endless stream could use no sample of an epoch. A reader that has only a part of the samples
            first looks at many epochs' parts, which differ: one of them may be a single damaged shard.
    """

    def __init__(
        self,
        transform: Callable,
        seed: int = 0,
        shuffle: bool = True,
        process_index: int = 0,
        num_processes: int = 1,
        epochs: int | None = None,
    ):
        self.transform = transform
        self.seed = seed
        self.shuffle = shuffle
        self.epochs = epochs
        self.process_index = process_index
        self.num_processes = num_processes
        self.epoch = 0
        self.position: Any = None  # the position is None, or what a subclass gave with the last sample
        self.begin = 0.0  # the share of this epoch that is left out
        self.buckets: Buckets | None = None  # with buckets, each `batch_size` samples from the first on have one size
        self.skipped: dict[str, int] = {"unreadable": 0, "filtered": 0}  # since the last sample

    def raw_samples(self, part: int, parts: int) -> Iterator[tuple[Any, float, str, Callable[..., Any]]]:
        """
        The part's samples of this epoch after `position`: position, the share of the epoch that is over with it, a name that
        only it has, and what reads it.
        """
        raise NotImplementedError

    def use_buckets(self, buckets: Buckets) -> None:
        """Give batches of one size each."""
        self.buckets = self.transform.buckets = buckets

    def start(self, epochs: float) -> None:
        """Begin after so many epochs, whatever the number of parts was before."""
        self.epoch, self.begin, self.position = int(epochs), epochs % 1, None

    def turns(self, count: int, part: int, parts: int) -> range:
        """The part's turns among `count` of this epoch. The next epoch goes on with the next part, so all have as many."""
        first, begin = (part - self.epoch * count) % parts, round(self.begin * count)
        return range(first + max(0, -(-(begin - first) // parts)) * parts, count, parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        # the n-th samples of a worker in all processes are together the samples of that worker in one process
        part, parts = self.process_index * workers + index, self.num_processes * workers
        empty_epochs, limit = 0, 0 if parts == 1 else 10 * parts
        while self.epochs is None or self.epoch < self.epochs:
            samples = 0
            self.error: str | None = None
            whole_epoch = self.position is None and not self.begin
            raw = self.raw_samples(part, parts)
            while group := list(islice(raw, 1 if self.buckets is None else self.buckets.batch_size)):
                self.position, share, *_ = group[-1]
                found = [sample for _, _, name, read in group if (sample := self._sample(name, read)) is not None]
                for number in range(len(group) if found else 0):  # a batch's readable samples stand in for the others
                    samples += 1
                    skipped, self.skipped = self.skipped, dict.fromkeys(self.skipped, 0)
                    yield found[number % len(found)] | skipped | {"epochs": self.epoch + share}
            empty_epochs = 0 if samples else empty_epochs + whole_epoch
            enough = empty_epochs > limit or (empty_epochs and sum(self.skipped.values()) >= ENOUGH)
            if enough and self.epochs is None:
                raise ValueError(
                    f"No sample of {self} could be used: {self.skipped['unreadable']} are unreadable"
                    + (f" (the last: {self.error})" if self.error else "")
                    + f" and {self.skipped['filtered']} were filtered out."
                )
            self.epoch, self.position, self.begin = self.epoch + 1, None, 0.0

    def _sample(self, name: str, read: Callable) -> dict | None:
        """A sample, or None if it cannot be read or is not wanted, which is counted."""
        try:
            sample = self.transform(read(), random.Random(f"{self.seed} {self.epoch} {name}"))
        except Exception as problem:  # whatever it is: a decoder's errors are of any kind
            self.skipped["unreadable"] += 1
            self.error = f"{name}: {type(problem).__name__}: {problem}"
            logger.info(f"Skipped a sample that cannot be read, {self.error}")
            return None
        if sample is None:
            self.skipped["filtered"] += 1
        return sample

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "begin": self.begin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.begin = state["epoch"], state["position"], state["begin"]


class RowStream(SampleStream):
    """
    Samples of a dataset with random access, as `datasets.load_dataset` gives for a folder of images with `metadata.jsonl`
    (https://huggingface.co/docs/datasets/image_dataset) and for datasets of the Hub. Every epoch has a random order.

    Args:
        rows (`datasets.Dataset`): Its images must not be decoded: `rows.cast_column("image", datasets.Image(decode=False))`.
        image_column (`str`, defaults to `"image"`): Where the images are.
        text_column (`str`, *optional*, defaults to `"text"`): Where the captions are: one for an image, or a list of them.
    """

    def __init__(self, rows: Any, *args: Any, image_column: str = "image", text_column: str | None = "text", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rows = rows
        self.image_column = image_column
        self.text_column = text_column
        for column in (image_column, text_column):
            if column is not None and column not in rows.column_names:
                raise ValueError(f"The data have no column {column!r}, but {rows.column_names}.")

    def __str__(self) -> str:
        return f"{len(self.rows)} rows"

    def raw_samples(self, part: int, parts: int) -> Iterator[tuple[Any, float, str, Callable[..., Any]]]:
        order = np.arange(len(self.rows))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.rows))
        turns = self.turns(len(order), part, parts)  # all processes together have the batches of one
        if self.buckets is not None:
            yield from self._bucketed(order, turns, part)
            return
        for position in turns if self.position is None else range(self.position + parts, len(order), parts):
            number = int(order[position])
            yield position, (position + 1) / len(order), f"row {number}", partial(self._read, number)

    def _bucketed(self, order: np.ndarray, turns: range, part: int):
        """As `raw_samples`, in batches of one size, which are made of windows of this part's turns."""
        first_window, first = self.position or (0, -1)
        for window in range(first_window, -(-len(turns) // WINDOW)):
            places = turns[window * WINDOW : (window + 1) * WINDOW]
            images = [self._image_or_none(int(order[place])) for place in places]
            rng = random.Random(f"{self.seed} {self.epoch} {part} {window}")
            arranged = self.buckets.arrange(images, rng)
            for index in range(first + 1, len(arranged)):
                number, again = arranged[index]
                row = int(order[places[number]])
                share = (places[-1] + 1) / len(order)
                yield (window, index), share, f"row {row}{f' {again}' * bool(again)}", partial(self._read, row)
            first = -1

    def _image(self, row: dict) -> bytes | str:
        return row[self.image_column]["bytes"] or row[self.image_column]["path"]

    def _image_or_none(self, number: int) -> bytes | str | None:
        try:
            return self._image(self.rows[number])
        except Exception:  # whatever it is, reading the sample will say so
            return None

    def _read(self, number: int) -> dict:
        row = self.rows[number]
        image = self._image(row)
        row.pop(self.image_column)
        return {"image": image, "text": row.pop(self.text_column, None), "metadata": row}


class _Member(tarfile.TarInfo):
    """A file in an archive. It also notes why an archive ends: to `tarfile` a damaged header is an end like any other."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            archive.end = error
            raise


class ShardStream(SampleStream):
    """
    Samples of WebDataset shards, local or remote, streamed: pictures as `.jpg`, `.png` or `.webp`, captions as `.txt` or as
    `prompt` in the `.json`, metadata as `.json`, arrays as `.npy`. The order of shards is random, and so is that of samples
    within windows.

    With more readers (processes × workers) than shards, several readers share a shard: with 64 readers and 8 shards, 8
    readers read all of a shard, and each takes every eighth sample. `sharing` says what that costs.

    Args:
        shards (`list[str]`): Paths or addresses, as `webdataset` opens them.
        window (`int`, defaults to 1000): Samples that are in memory, still compressed, to be shuffled.
    """

    def __init__(self, shards: list[str], *args: Any, window: int = WINDOW, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shards: list[str] = sorted(shards)
        self.window = window

    def __str__(self) -> str:
        return f"{len(self.shards)} shards, {self.shards[0]} first,"

    @staticmethod
    def sharing(shards: int, readers: int) -> tuple[int, float]:
        """
        How often every shard is read in an epoch, and the share of the samples that come a second time before as many others
        have come once, as the shards cannot be dealt out evenly. In the next epochs other readers have one more.
        """
        split = -(-readers // shards)
        more = shards * split % readers  # readers that have one turn more than the others
        return split, more * (1 - more / readers) / (shards * split)

    def raw_samples(self, part: int, parts: int) -> Iterator[tuple[Any, float, str, Callable[..., Any]]]:
        split, _ = self.sharing(len(self.shards), parts)
        units = [(shard, offset) for shard in self.shards for offset in range(split)]
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(units)
        turns = self.turns(len(units), part, parts)
        at, first_window, first = self.position or (None, 0, -1)
        for number in turns if at is None else range(at, len(units), parts):
            shard, offset = units[number]
            samples = islice(self._read(shard), offset, None, split)
            if number != at:
                first_window, first = 0, -1
            for _ in islice(samples, first_window * self.window):
                pass
            count = first_window
            while window := list(islice(samples, self.window)):
                if self.shuffle:
                    random.Random(f"{self.seed} {self.epoch} {shard} {offset} {count}").shuffle(window)
                places = [(place, 0) for place in range(len(window))]
                if self.buckets is not None:
                    images = [self._parse(sample)["image"] for sample in window]
                    rng = random.Random(f"{self.seed} {self.epoch} {shard} {offset} {count} buckets")
                    places = self.buckets.arrange(images, rng)
                for index in range(first + 1, len(places)):
                    sample, again = window[places[index][0]], places[index][1]
                    name = f"{sample['__key__']} of {shard}{f' {again}' * bool(again)}"
                    yield (number, count, index), number / len(units), name, partial(self._parse, sample)
                count, first = count + 1, -1

    def _read(self, shard: str) -> Iterator[dict]:
        """The samples of a shard: their files' contents by extensions. What is wrong with it is counted and said."""
        from webdataset.tariterators import group_by_keys

        def repeated(error):
            self._skip(f"a file of {shard}", error)
            return True  # go on with the next

        return group_by_keys(self._files(shard), handler=repeated)

    def _files(self, shard: str) -> Iterator[dict]:
        from webdataset.gopen import gopen

        try:  # a shard that is missing or damaged must not end a training of weeks
            with gopen(shard) as file, tarfile.open(fileobj=cast(Any, file), mode="r|*", tarinfo=_Member) as archive:
                for member in archive:
                    if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):  # which are WebDataset's own
                        yield {"fname": member.name, "data": archive.extractfile(member).read(), "__url__": shard}
                    archive.members = []  # else it keeps all of them
                self._check_end(archive)
        except Exception as error:
            self._skip(f"the rest of {shard}, which counts as one unreadable sample", error)

    @staticmethod
    def _check_end(archive: tarfile.TarFile):
        """Raise a `ReadError` if an archive that was read has more than that, or had."""
        if not isinstance(archive.end, tarfile.EOFHeaderError):
            raise tarfile.ReadError(f"it ends without its end marker, at byte {archive.offset}: {archive.end}")
        while rest := archive.fileobj.read(tarfile.RECORDSIZE):
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"its end marker, at byte {archive.offset}, is not the end")

    def _skip(self, what: str, error: Exception):
        self.skipped["unreadable"] += 1
        logger.warning(f"Skipped {what}: {error}")

    @staticmethod
    def _parse(sample: dict) -> dict:
        image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
        raw = {name: sample[f"{name}.npy"] for name in (*ARRAYS, SCALES) if f"{name}.npy" in sample}
        text, metadata = sample.get("txt"), sample.get("json")
        return raw | {"image": image, "text": text, "metadata": metadata}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """
    A batch: tensors stacked, texts in a list, counts added up, the greatest `epochs`. `prompt_embeds` of several lengths are
    padded, and `prompt_attention_mask`, `(batch_size, length)`, says where. Samples within others, `preserved`, come last.
    """
    batch: dict[str, Any] = {name: sum(sample[name] for sample in samples) for name in ("unreadable", "filtered")}
    batch["epochs"] = max(sample["epochs"] for sample in samples)
    samples = samples + [sample["preserved"] for sample in samples if "preserved" in sample]
    batch["text"] = [sample["text"] for sample in samples]
    for name in {"pixels", "weight", *ARRAYS} & set.intersection(*(set(sample) for sample in samples)):
        values = [sample[name] for sample in samples]
        if name == "prompt_embeds":
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
            lengths = torch.tensor([len(value) for value in values])
            if lengths.min() < lengths.max():
                batch["prompt_attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        else:
            batch[name] = torch.stack(values)
    return batch


def load_stream(
    data: str,
    *args: Any,
    image_column: str = "image",
    text_column: str | None = "text",
    config_name: str | None = None,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> SampleStream:
    """
    The stream for `data`: WebDataset shards, if it is a folder with `.tar` files or a pattern as `{00000..00999}.tar`, also
    of a URL or a `pipe:`; else a folder of images with `metadata.jsonl`; or else a dataset of the Hub, its `train` split.

    Args:
        data (`str`): Where the data are.
        config_name (`str`, *optional*): The configuration of a dataset of the Hub.
        max_samples (`int`, *optional*): Take so many, chosen at random by the seed; not of shards.
        cache_dir (`str`, *optional*): Folder for downloads and prepared data, instead of that of `datasets`.
        args, kwargs: Of [`SampleStream`].

    Raises:
        FileNotFoundError: If there is nothing of the kind.
        ValueError: If `metadata.jsonl` has a broken line, or shards shall be cut to `max_samples`.
    """
    kwargs["seed"] = seed
    folder = Path(data)
    # without unfinished ones, whose names begin with a dot
    shards = sorted(str(path) for path in folder.glob("[!.]*.tar")) if folder.is_dir() else []
    if shards or (".tar" in data and not folder.is_dir()):
        from webdataset.shardlists import expand_urls

        shards = shards or expand_urls(data)
        missing = [shard for shard in shards if ":" not in shard and not Path(shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"`data` names {len(shards)} shards, but {missing[0]} is not there, nor {len(missing) - 1} more."
            )
        if max_samples is not None:
            raise ValueError(f"--max-train-samples {max_samples}: the samples of shards are not counted; name fewer shards.")
        return ShardStream(shards, *args, **kwargs)

    import datasets

    if folder.is_dir():
        rows = _load_folder(folder, text_column, cache_dir)
    elif data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise FileNotFoundError(f"`data` is {data}, but there is no such folder.")
    else:
        try:
            rows = datasets.load_dataset(data, config_name, split="train", cache_dir=cache_dir)
        except Exception as error:
            raise FileNotFoundError(
                f"`data` is {data}: there is no such folder in {Path.cwd()}, and no dataset of this name could be loaded "
                f"from the Hub: {error}"
            ) from error
    if max_samples is not None:
        rows = rows.shuffle(seed=seed).select(range(min(max_samples, len(rows))))
    if image_column in rows.column_names:
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return RowStream(rows, *args, image_column=image_column, text_column=text_column, **kwargs)


def _load_folder(folder: Path, text_column: str | None, cache_dir: str | None):
    import datasets

    metadata = folder / "metadata.jsonl"
    if text_column is not None and not metadata.is_file():
        raise FileNotFoundError(
            f"`data` is the folder {folder}, which has neither `.tar` shards nor `metadata.jsonl`, with a line as "
            '{"file_name": "a.png", "text": "a caption"} for each image.'
        )
    try:
        # all files: by itself it takes a picture called train.png for the training split, and leaves out the others
        options = dict(data_dir=str(folder), data_files={"train": "**"}, split="train", cache_dir=cache_dir)
        return datasets.load_dataset("imagefolder", **options)
    except Exception as error:
        for number, line in enumerate(metadata.read_bytes().splitlines(), 1) if metadata.is_file() else ():
            try:
                valid = not line.strip() or isinstance(json.loads(line), dict)
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"{metadata}, line {number} is no JSON object: {line[:100]!r}") from error
        raise ValueError(f"The folder {folder} cannot be read as a dataset: {error}") from error
