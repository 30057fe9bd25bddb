"""
Compute tokens and embeddings once, and train many epochs on them: the frozen encoders then take no part in the steps.

    accelerate launch examples/precompute.py --pretrained dome272/Paella --data pictures --output-dir computed
    accelerate launch examples/train_paella.py --pretrained dome272/Paella --data computed --output-dir my-paella

It writes WebDataset shards, each whole or not at all. A sample has `tokens.npy` (int16 or int32), the embeddings as float16,
and the caption. `empty.safetensors` beside the shards has the embeddings of "". Started again, it continues after the last
whole shard.

With `--float8`, `prompt_embeds.npy` has bytes of float8 (e4m3). `prompt_embeds_scales.npy` has a float32 for each token, by
which they are multiplied.
"""

import argparse
import json
from pathlib import Path

import torch
import webdataset
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.utils import logging
from safetensors.torch import save_file
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm

from paella_diffusers import PaellaPipeline
from paella_diffusers.loaders.atomic import atomic_file
from paella_diffusers.training.arguments import HelpFormatter
from paella_diffusers.training.conditioning import Encoder
from paella_diffusers.training.data import SampleTransform, add_filters, collate, load_stream, quality_filter
from paella_diffusers.training.stored import COMPUTED, store

logger = logging.get_logger(__name__)


def parse_args(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="as for train_paella.py: a folder of images, shards, or a dataset of the Hub")
    add("--pretrained", required=True, help="a Paella: a folder or Hub id")
    add("--output-dir", type=Path, required=True)
    add("--parts", nargs="+", choices=COMPUTED, default=list(COMPUTED), help="what to compute")
    add("--float8", action="store_true", help="store `prompt_embeds` in float8 with a scale for each token: half the size")
    add("--resolution", type=int, default=256, help="pixels a side")
    add("--batch-size", type=int, default=16, help="images encoded at a time")
    add("--shard-size", type=int, default=1000, help="samples in a shard, or up to a batch more")
    add("--epochs", type=int, default=1, help="passes over the data, each with other crops and captions")
    add("--num-workers", type=int, default=2, help="processes that read data")
    add("--image-column", default="image", help="the column with the images")
    add("--text-column", default="text", help="the column with a caption, or a list of them")
    add_filters(add)
    add("--seed", type=int, default=0, help="of the crops and of the captions' choice")
    return parser.parse_args(args)


@torch.no_grad()
def compute(encoder: Encoder, batch: dict, parts: list[str], float8: bool = False) -> list[dict]:
    """One dictionary of files for each sample of a batch, without samples whose embeddings are not finite."""
    arrays = {}
    if "tokens" in parts:
        arrays["tokens"] = encoder.tokens(batch)
    if "clip_image_embeds" in parts:
        arrays["clip_image_embeds"] = encoder.clip_image_embeds(batch)
    if "prompt_embeds" in parts or "clip_text_embeds" in parts:
        text = encoder.conditioning(batch, (False, False, True))
        if "clip_text_embeds" in parts:
            arrays["clip_text_embeds"] = text["clip_text_embeds"]
        if "prompt_embeds" in parts:  # without padding
            mask, embeds = text["encoder_attention_mask"], text["encoder_hidden_states"]
            lengths = [None] * len(embeds) if mask is None else mask.sum(1).tolist()
            arrays["prompt_embeds"] = [rows[:length] for rows, length in zip(embeds, lengths)]
    arrays = {name: array for name, array in arrays.items() if array is not None}
    samples = []
    for row, text in enumerate(batch["text"]):
        try:
            files = store({name: array[row] for name, array in arrays.items()}, float8)
        except FloatingPointError as error:
            logger.warning(f"Skipped the sample with the caption {text[:100]!r}: {error}")
            continue
        samples.append(files | {"txt": text})
    return samples


def main(args):
    accelerator = Accelerator()
    index, count = accelerator.process_index, accelerator.num_processes
    args.output_dir.mkdir(parents=True, exist_ok=True)
    progress_path = args.output_dir / f"progress-{index}.json"  # what the whole shards have
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"} | {"processes": count}
    progress = {"shards": 0, "samples": 0, "data": None, "finished": False, "settings": settings}
    if progress_path.exists():
        progress = json.loads(progress_path.read_text())
        if progress["settings"] != settings:
            raise ValueError(
                f"{args.output_dir} was begun with {progress['settings']}, but now it is {settings}: take the same to go "
                "on, or another --output-dir."
            )
    stream = load_stream(
        args.data,
        SampleTransform(args.resolution, quality_filter(args)),
        seed=args.seed,
        process_index=index,
        num_processes=count,
        epochs=args.epochs,
        image_column=args.image_column,
        text_column=args.text_column,
    )
    pipe = PaellaPipeline.from_pretrained(args.pretrained)
    for name, component in (("clip_text_embeds", pipe.text_encoder_2), ("clip_image_embeds", pipe.image_encoder)):
        if component is None:
            args.parts = [part for part in args.parts if part != name]
    encoder = Encoder(pipe)
    encoder.to(accelerator.device, half=accelerator.device.type != "cpu")
    loader = StatefulDataLoader(stream, args.batch_size, num_workers=args.num_workers, collate_fn=collate)
    if progress["data"] is not None:
        loader.load_state_dict(progress["data"])

    def write(samples: list[dict], finished: bool):
        if samples:
            path = args.output_dir / f"{index:04d}-{progress['shards']:06d}.tar"
            with atomic_file(path) as unfinished, webdataset.TarWriter(str(unfinished)) as shard:
                for number, sample in enumerate(samples):
                    shard.write({"__key__": f"{path.stem}-{number:06d}"} | sample)
            progress.update(shards=progress["shards"] + 1, samples=progress["samples"] + len(samples))
        progress.update(data=loader.state_dict(), finished=finished)
        with atomic_file(progress_path) as unfinished:
            unfinished.write_text(json.dumps(progress))

    waiting, skipped = [], 0
    bar = tqdm([] if progress["finished"] else loader, disable=not accelerator.is_local_main_process, unit="batch")
    for batch in bar:
        skipped += batch.pop("unreadable") + batch.pop("filtered")
        batch.pop("epochs")
        computed = compute(encoder, send_to_device(batch, accelerator.device), args.parts, args.float8)
        skipped += len(batch["text"]) - len(computed)
        waiting += computed
        if len(waiting) >= args.shard_size:
            write(waiting, finished=False)
            waiting = []
        bar.set_postfix(samples=progress["samples"] + len(waiting), skipped=skipped)
    write(waiting, finished=True)
    accelerator.wait_for_everyone()  # the next file says that all is there
    if accelerator.is_main_process:
        empty = {name: value.cpu().contiguous() for name, value in encoder.empty.items() if value is not None}
        metadata = {"computed": " ".join(args.parts), "resolution": str(args.resolution)}
        with atomic_file(args.output_dir / "empty.safetensors") as unfinished:
            save_file(empty, unfinished, metadata=metadata)
    print(f"Process {index}: {progress['samples']} samples in {progress['shards']} shards; {skipped} skipped.")


if __name__ == "__main__":
    main(parse_args())
