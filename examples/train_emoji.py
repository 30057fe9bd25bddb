"""
Train the text-to-image Paella that ships inside the package, from nothing to the folder in `pretrained/emoji`.

    pip install ".[emoji]"
    python examples/train_emoji.py --work-dir emoji-training --output-dir my-emoji

It downloads three icon sets and two sets of keywords from npm (`npm` must be installed). It trains (1) a VQGAN, (2) two text
encoders, (3) CLIP's image encoder, (4) the prior and (5) the U-Net. Then it writes pictures to look at, measures the
model and prints a table. The stages are in the folder `emoji_model`.

All is saved to the work folder every few minutes. Run the same command again to resume, whatever stopped it: the model is
the same as without a stop. `log.txt` there has each start, and how long the steps take.
"""

import argparse
import os
from pathlib import Path

import torch
from emoji_model import data, image, scoring, sheets, text, unet, vqgan
from emoji_model.captions import Captions, colours_of, keywords_of
from emoji_model.fit import has_fast_bfloat16, log

from paella_diffusers import PaellaClassifierFreeGuidance, PaellaPipeline, PaellaScheduler
from paella_diffusers.schedulers.scheduling_ddim_wuerstchen import DDIMWuerstchenScheduler
from paella_diffusers.training.lock import FolderLock


def parse_args(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, default=Path("emoji-training"), help="downloads, checkpoints, log, scores, pictures"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("emoji-model"), help="the trained pipeline")
    held_out = "file with the objects of which one style is kept out of training; drawn and written if there is none"
    parser.add_argument("--held-out", type=Path, default=data.HELD_OUT, help=held_out)
    parser.add_argument("--held-out-count", type=int, default=300, help="how many are drawn, at least")
    parser.add_argument("--vqgan-steps", type=int, default=5000)
    parser.add_argument("--text-steps", type=int, default=3000)
    parser.add_argument("--image-steps", type=int, default=4500)
    parser.add_argument("--prior-steps", type=int, default=3000)
    parser.add_argument("--unet-steps", type=int, default=16_000)
    parser.add_argument("--batch-scale", type=float, default=1.0, help="factor on all batch sizes")
    parser.add_argument("--score-limit", type=int, help="measure with at most so many pictures of each kind")
    parser.add_argument("--compile", action="store_true", help="the U-Net, with torch.compile; needs g++")
    return parser.parse_args(args)


def train_parts(args, icons: data.Icons, words: Captions, cells: torch.BoolTensor) -> PaellaPipeline:
    """All stages; those that are done are loaded."""
    work_dir, size = args.work_dir, lambda full: max(2, round(full * args.batch_scale))
    vq_model = vqgan.train(icons, cells, args.vqgan_steps, work_dir, size(16))
    encoders = text.train(icons, words, cells, args.text_steps, work_dir, size(160))
    image_encoder = image.train_encoder(icons, encoders, cells, args.image_steps, work_dir, size(96))
    embeds = image.image_embeds(icons, image_encoder)
    prior = image.train_prior(words, encoders, embeds, cells, args.prior_steps, work_dir, size(128))
    conditioner = unet.Conditioner(words, encoders, embeds, cells)
    model = unet.train(icons, vq_model, conditioner, cells, args.unet_steps, work_dir, size(48), args.compile)
    return PaellaPipeline(
        vq_model,
        model,
        PaellaScheduler(num_vq_embeddings=vq_model.config.num_vq_embeddings),
        encoders.byt5,
        encoders.byt5_tokenizer,
        encoders.clip,
        encoders.clip_tokenizer,
        image_encoder,
        image.processor(),
        prior,
        DDIMWuerstchenScheduler(),
        guider=PaellaClassifierFreeGuidance(guidance_scale=3.0, plausibility_threshold=0.2),
        use_prior=False,
    )


def train(args) -> tuple[data.Icons, Captions, PaellaPipeline]:
    """The data, and the pipeline: from the output folder if it is there."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    log(args.work_dir, f"start: {threads}, {'bfloat16' if has_fast_bfloat16() else 'float32'}")
    icons = data.load(args.work_dir)
    cells = data.training_cells(icons, args.held_out, args.held_out_count)
    words = Captions(icons.names, keywords_of(icons, args.work_dir), colours_of(icons.images(0)))
    words.check()
    log(args.work_dir, f"{len(icons.names)} objects: {cells.sum()} pictures to train on, {(~cells).sum()} held out")
    if not (args.output_dir / "model_index.json").exists():
        pipe = train_parts(args, icons, words, cells)
        pipe.to(torch.float16, silence_dtype_warnings=True).save_pretrained(args.output_dir)
        log(args.work_dir, f"the pipeline is in {args.output_dir}")
    return icons, words, PaellaPipeline.from_pretrained(args.output_dir)


def main(args):
    lock = FolderLock(args.work_dir)
    icons, words, pipe = train(args)
    cells = data.training_cells(icons, args.held_out)
    scorer = scoring.Scorer(pipe, icons, words, cells, args.score_limit)
    sheets.write(pipe, icons, words, cells, args.work_dir, args.score_limit or 100)
    results = scoring.score(scorer, args.work_dir / "scores.json", lambda line: log(args.work_dir, line))
    log(args.work_dir, "done\n" + scoring.table(results, args.output_dir))
    lock.release()


if __name__ == "__main__":
    main(parse_args())
