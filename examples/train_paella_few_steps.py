"""
Teach a Paella to draw in one or two steps without guidance, by rectified couplings (ReDi,
https://huggingface.co/papers/2507.15897): it learns which picture many guided steps make of an initial noise.

    paella-diffusers batch prompts.jsonl --out pairs --output tokens --no-prior --model dome272/Paella
    accelerate launch examples/train_paella_few_steps.py --pretrained dome272/Paella --data pairs --output-dir my-few-steps

    PaellaPipeline.from_pretrained("my-few-steps")("a prompt")

With `--rank` an adapter is trained instead: load it with `pipe.load_lora_weights("my-few-steps")`. For a further round, draw
pairs with the result in many steps, and train again from it. The training loop is
`paella_diffusers.training.unet.train_unet`.
"""

from paella_diffusers.training.adapter import Adapter, add_lora_arguments
from paella_diffusers.training.arguments import training_arguments
from paella_diffusers.training.few_steps import (
    PairParts,
    add_few_steps_arguments,
    check_few_steps_arguments,
    publish_adapter,
    publish_pipeline,
)
from paella_diffusers.training.run import TrainingRun
from paella_diffusers.training.unet import add_unet_arguments, train_unet


def parse_args(args=None):
    parser = training_arguments(__doc__, default_steps=10_000)
    add_unet_arguments(parser)
    add_few_steps_arguments(parser)
    add_lora_arguments(parser, rank=None, help="train an adapter of this rank; the whole U-Net unless given")
    # pairs have a picture's randomness in their noise, and all of its conditioning: nothing is smoothed or left out
    parser.set_defaults(label_smoothing=0.0, text_dropout=0.0, clip_text_dropout=0.0, learning_rate=None, warmup_steps=100)
    args = parser.parse_args(args)
    check_few_steps_arguments(parser, args)
    if args.learning_rate is None:
        args.learning_rate = 1e-3 if args.rank else 1e-4
    return args


def main(args):
    run = TrainingRun(args)
    run.load_data()
    frozen = PairParts(run)
    model, config = frozen.pipe.unet, frozen.pipe.unet.config
    levels = frozen.pipe.scheduler.timesteps.tolist() if args.last_round else None
    if args.rank:
        adapter = Adapter({"unet": model}, args)
        unet = run.prepare("unet_lora", model, adapter.write, adapter.read, frozen=False)
    else:
        unet = run.prepare("unet", model.requires_grad_(True))

    train_unet(run, unet, frozen, levels)

    weights = run.finish()
    if weights is not None and args.rank:
        adapter.write(weights, args.output_dir)
        publish_adapter(run, frozen)
    elif weights is not None:
        publish_pipeline(run, config, weights)


if __name__ == "__main__":
    main(parse_args())
