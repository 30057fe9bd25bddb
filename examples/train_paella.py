"""
Train Paella's U-Net, from scratch or onwards (https://huggingface.co/papers/2211.07292, section 3.2; the released recipe).

    accelerate launch examples/train_paella.py --pretrained dome272/Paella --data pictures --output-dir my-paella

`--pretrained` gives the VQGAN, the encoders and, without `--from-scratch`, the U-Net to begin with. `--data` may be what
`precompute.py` wrote: then the encoders that it stands in for are not needed. What a step computes is
`paella_diffusers.training.unet.PaellaTraining.loss`.
"""

import json

from paella_diffusers import PaellaPipeline, PaellaUNet
from paella_diffusers.training.run import TrainingRun, training_arguments
from paella_diffusers.training.unet import PaellaTraining, add_unet_arguments


def parse_args(args=None):
    parser = training_arguments(__doc__)
    add_unet_arguments(parser)
    parser.add_argument("--from-scratch", action="store_true", help="begin with a new U-Net of the same sizes")
    parser.add_argument("--unet-config", type=json.loads, default={}, help="sizes of it that shall differ, as JSON")
    args = parser.parse_args(args)
    if args.unet_config and not args.from_scratch:
        parser.error("--unet-config is a new U-Net's: add --from-scratch")
    return args


def main(args):
    run = TrainingRun(args)
    run.load_data()
    training = PaellaTraining(run)
    if args.from_scratch:
        training.pipe.unet = PaellaUNet.from_config({**training.pipe.unet.config, **args.unet_config})
    unet = training.pipe.unet.requires_grad_(True)
    model = run.prepare(unet)

    for batch in run.batches(training.draw if args.prompts else None):
        run.update(model, training.loss(model, batch))

    weights = run.finish(model)
    if weights is not None:
        trained = PaellaUNet.from_config(unet.config)
        trained.load_state_dict(weights)
        run.publish(PaellaPipeline.from_pretrained(args.pretrained, unet=trained))


if __name__ == "__main__":
    main(parse_args())
