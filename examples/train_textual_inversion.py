"""
Teach a Paella a new word from a few pictures, by textual inversion (https://huggingface.co/papers/2208.01618): only the
word's vectors in the text encoders are trained and saved.

    accelerate launch examples/train_textual_inversion.py --pretrained dome272/Paella --data pictures --output-dir my-horse \
        --placeholder-token "<horse>" --initializer-token horse

    pipe.load_textual_inversion("my-horse")
    pipe.load_textual_inversion("my-horse", weight_name="learned_embeds_2.safetensors", text_encoder=pipe.text_encoder_2)
    pipe("a photo of <horse>")

`--data` is a folder of pictures, which needs no captions. The training loop is `paella_diffusers.training.unet.train_unet`.
"""

from paella_diffusers.loaders.textual_inversion import WEIGHT_NAMES
from paella_diffusers.training.arguments import training_arguments
from paella_diffusers.training.card import publish_files
from paella_diffusers.training.inversion import TEMPLATES, InversionParts, LearnedTokens
from paella_diffusers.training.run import TrainingRun
from paella_diffusers.training.unet import add_unet_arguments, train_unet


def parse_args(args=None):
    defaults = dict(learning_rate=5e-2, lr_scheduler="cosine", warmup_steps=50, weight_decay=0.0)
    defaults |= dict(batch_size=4, save_every=500, sample_every=500)
    dropouts = dict(text_dropout=0.0, clip_text_dropout=0.5, clip_image_dropout=1.0)
    parser = training_arguments(__doc__, default_steps=1000, text_column=None)
    add_unet_arguments(parser)
    parser.set_defaults(**defaults, **dropouts)
    add = parser.add_argument_group("textual inversion").add_argument
    add("--placeholder-token", required=True, help='the new word, such as "<horse>"')
    add("--initializer-token", required=True, help="a known word to begin with, such as horse")
    add(
        "--num-vectors",
        type=int,
        default=4,
        help="vectors of the word, 4 unless given; ByT5 has one for each byte of other words",
    )
    add(
        "--initializer-scale",
        type=float,
        default=1.0,
        help="how many times as large as the known word's the vectors are at first; larger ones pass through the text "
        "encoders less changed, and can mean what no sentence means",
    )
    add("--learnable-property", choices=list(TEMPLATES), default="object", help="whether the word is an object or a style")
    args = parser.parse_args(args)
    if args.num_vectors < 1:
        parser.error(f"--num-vectors must be at least 1, got {args.num_vectors}")
    if not 0 < args.initializer_scale < float("inf"):
        parser.error(f"--initializer-scale must be a number above 0, got {args.initializer_scale}")
    return args


def main(args):
    run = TrainingRun(args)
    run.load_data()
    frozen = InversionParts(run)
    learned = LearnedTokens(
        frozen.pipe, args.placeholder_token, args.initializer_token, args.num_vectors, args.initializer_scale
    )
    frozen.leave_captions_of(learned, TEMPLATES[args.learnable_property])
    vectors = run.prepare("learned_embeds", learned, learned.write, learned.read, shard=False)

    train_unet(run, vectors, frozen)

    weights = run.finish()
    if weights is not None:
        learned.write(weights, args.output_dir)
        publish_files(run, frozen.pipe, list(WEIGHT_NAMES.values()), inversion_token=args.placeholder_token)


if __name__ == "__main__":
    main(parse_args())
