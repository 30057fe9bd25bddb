"""
Teach Paella something new with a LoRA adapter (https://huggingface.co/papers/2106.09685): small matrices beside the U-Net's,
which alone are trained and saved.

    accelerate launch examples/train_paella_lora.py --pretrained dome272/Paella --data pictures --output-dir my-adapter

    pipe.load_lora_weights("my-adapter")

The training loop is `paella_diffusers.training.unet.train_unet`.
"""

from peft import LoraConfig

from paella_diffusers.loaders.lora import WEIGHT_NAMES
from paella_diffusers.training.adapter import Adapter
from paella_diffusers.training.arguments import training_arguments
from paella_diffusers.training.card import publish_files
from paella_diffusers.training.run import TrainingRun
from paella_diffusers.training.unet import FrozenParts, add_unet_arguments, train_unet

# attention, and the pixelwise layers of the other blocks
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]


def parse_args(args=None):
    defaults = dict(learning_rate=1e-3, warmup_steps=100, save_every=500, sample_every=500)
    parser = training_arguments(__doc__, default_steps=2000, **defaults)
    add_unet_arguments(parser)
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, default=16)
    add("--alpha", "--lora-alpha", type=float, help="the adapter's weight is alpha / rank; alpha is the rank unless given")
    add("--dropout", "--lora-dropout", type=float, default=0.0, help="share of an adapter's inputs left out")
    add(
        "--use-dora",
        action="store_true",
        help="also learn the matrices' magnitudes (https://huggingface.co/papers/2402.09353)",
    )
    add("--targets", nargs="+", default=TARGETS, help="names of the layers that are adapted")
    return parser.parse_args(args)


def main(args):
    run = TrainingRun(args)
    run.load_data()
    frozen = FrozenParts(run)
    options = dict(lora_dropout=args.dropout, use_dora=args.use_dora, target_modules=args.targets)
    adapter = Adapter(frozen.pipe.unet, LoraConfig(r=args.rank, lora_alpha=args.alpha or args.rank, **options))
    unet = run.prepare("unet_lora", frozen.pipe.unet, adapter.write, adapter.read, frozen=False)

    train_unet(run, unet, frozen)

    weights = run.finish()
    if weights is not None:
        adapter.write(weights, args.output_dir)
        publish_files(run, frozen.pipe, WEIGHT_NAMES[:1], is_lora=True)


if __name__ == "__main__":
    main(parse_args())
