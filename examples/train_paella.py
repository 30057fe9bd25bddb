"""
Train Paella's U-Net, from scratch or from a trained one (https://huggingface.co/papers/2211.07292, section 3.2). The
defaults are the released recipe.

    accelerate launch examples/train_paella.py --pretrained dome272/Paella --data pictures --output-dir my-paella

`--pretrained` gives the VQGAN, the encoders and, without `--from-scratch`, the U-Net to begin with. `--data` may be what
`precompute.py` wrote: then the encoders whose results it has are not needed. The training loop is
`paella_diffusers.training.unet.train_unet`.
"""

import json

from paella_diffusers import PaellaUNet
from paella_diffusers.training.arguments import training_arguments
from paella_diffusers.training.run import TrainingRun
from paella_diffusers.training.unet import FrozenParts, add_unet_arguments, publish_unet, stored_config, train_unet


def parse_args(args=None):
    parser = training_arguments(__doc__)
    add_unet_arguments(parser)
    parser.add_argument("--from-scratch", action="store_true", help="begin with a new U-Net of the pretrained one's sizes")
    parser.add_argument("--unet-config", type=json.loads, default={}, help="its sizes that shall differ, as JSON")
    args = parser.parse_args(args)
    if args.unet_config and not args.from_scratch:
        parser.error("--unet-config is a new U-Net's: add --from-scratch")
    return args


def main(args):
    run = TrainingRun(args)
    run.load_data()
    new = {}
    if args.from_scratch:
        new = {"unet": PaellaUNet.from_config({**stored_config(PaellaUNet, "unet", args), **args.unet_config})}
    frozen = FrozenParts(run, **new)
    config = frozen.pipe.unet.config
    unet = run.prepare("unet", frozen.pipe.unet.requires_grad_(True))

    train_unet(run, unet, frozen)

    weights = run.finish()
    if weights is not None:
        publish_unet(run, config, weights)


if __name__ == "__main__":
    main(parse_args())
