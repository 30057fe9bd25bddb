"""
Teach a Paella one thing from a few pictures of it, by DreamBooth (https://huggingface.co/papers/2208.12242): the U-Net
learns that a rare word in a prompt means this thing. With `--with-prior-preservation` the model first draws pictures of
other things of the same class. It is then trained on these, too, so that it does not forget them.

    accelerate launch examples/train_dreambooth.py --pretrained dome272/Paella --output-dir my-dog --rank 16 \
        --instance-data-dir pictures --instance-prompt "a photo of sks dog" \
        --with-prior-preservation --class-data-dir dogs --class-prompt "a photo of a dog"

With `--rank` an adapter is trained: load it with `pipe.load_lora_weights("my-dog")`. Without it the whole U-Net is trained:
load it with `PaellaPipeline.from_pretrained("my-dog")`. In calls, pass `use_prior=False`: the prior does not know the thing.
The training loop is `paella_diffusers.training.unet.train_unet`.
"""

from paella_diffusers.loaders.lora import WEIGHT_NAMES
from paella_diffusers.training.adapter import add_lora_arguments, add_text_encoder_argument, prepare_adapter
from paella_diffusers.training.arguments import training_arguments
from paella_diffusers.training.card import publish_files
from paella_diffusers.training.dreambooth import add_dreambooth_arguments, check_dreambooth_arguments, load_instances
from paella_diffusers.training.run import TrainingRun
from paella_diffusers.training.unet import FrozenParts, add_unet_arguments, publish_unet, train_unet


def parse_args(args=None):
    defaults = dict(learning_rate=None, warmup_steps=50, batch_size=4, save_every=200, sample_every=200)
    dropouts = dict(text_dropout=0.0, clip_text_dropout=0.5, clip_image_dropout=1.0)
    parser = training_arguments(__doc__, default_steps=400, text_column=None)
    add_unet_arguments(parser)
    add_dreambooth_arguments(parser)
    add_lora_arguments(parser, rank=None, help="train an adapter of this rank; the whole U-Net unless given")
    add_text_encoder_argument(parser)
    parser.set_defaults(**defaults, **dropouts)
    args = parser.parse_args(args)
    check_dreambooth_arguments(parser, args)
    if args.train_text_encoder and not args.rank:
        parser.error("--train-text-encoder trains adapters only: add --rank")
    if args.learning_rate is None:
        args.learning_rate = 1e-3 if args.rank else 1e-5
    return args


def main(args):
    run = TrainingRun(args)
    run.load_data()
    load_instances(run)
    if args.rank:
        frozen, adapter, unet = prepare_adapter(run)
    else:
        frozen = FrozenParts(run)
        config = frozen.pipe.unet.config
        unet = run.prepare("unet", frozen.pipe.unet.requires_grad_(True))

    train_unet(run, unet, frozen)

    weights = run.finish()
    if weights is not None and args.rank:
        adapter.write(weights, args.output_dir)
        publish_files(run, frozen.pipe, WEIGHT_NAMES[:1], is_lora=True)
    elif weights is not None:
        publish_unet(run, config, weights)


if __name__ == "__main__":
    main(parse_args())
