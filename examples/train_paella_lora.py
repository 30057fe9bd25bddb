"""
Teach Paella something new with a LoRA adapter (https://huggingface.co/papers/2106.09685): small matrices beside those of the
U-Net and, with `--train-text-encoder`, beside those of ByT5 and CLIP. They alone are trained and saved.

    accelerate launch examples/train_paella_lora.py --pretrained dome272/Paella --data pictures --output-dir my-adapter

    pipe.load_lora_weights("my-adapter")

The training loop is `paella_diffusers.training.unet.train_unet`.
"""

from paella_diffusers.loaders.lora import WEIGHT_NAMES
from paella_diffusers.training.adapter import add_lora_arguments, add_text_encoder_argument, prepare_adapter
from paella_diffusers.training.arguments import training_arguments
from paella_diffusers.training.card import publish_files
from paella_diffusers.training.run import TrainingRun
from paella_diffusers.training.unet import add_unet_arguments, train_unet


def parse_args(args=None):
    defaults = dict(learning_rate=1e-3, warmup_steps=100, save_every=500, sample_every=500)
    parser = training_arguments(__doc__, default_steps=2000, **defaults)
    add_unet_arguments(parser)
    add_lora_arguments(parser, rank=16)
    add_text_encoder_argument(parser)
    return parser.parse_args(args)


def main(args):
    run = TrainingRun(args)
    run.load_data()
    frozen, adapter, unet = prepare_adapter(run)

    train_unet(run, unet, frozen)

    weights = run.finish()
    if weights is not None:
        adapter.write(weights, args.output_dir)
        publish_files(run, frozen.pipe, WEIGHT_NAMES[:1], is_lora=True)


if __name__ == "__main__":
    main(parse_args())
