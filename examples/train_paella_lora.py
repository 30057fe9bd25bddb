"""
Teach Paella something new with a LoRA adapter (https://huggingface.co/papers/2106.09685): small matrices beside the U-Net's,
which alone are trained and saved.

    accelerate launch examples/train_paella_lora.py --pretrained dome272/Paella --data pictures --output-dir my-adapter

    pipe.load_lora_weights("my-adapter")

What a step computes is `paella_diffusers.training.unet.PaellaTraining.loss`.
"""

from peft import LoraConfig, get_peft_model_state_dict

from paella_diffusers import PaellaPipeline
from paella_diffusers.training.run import TrainingRun, training_arguments
from paella_diffusers.training.unet import PaellaTraining, add_unet_arguments

# attention, and the pixelwise layers of the other blocks
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]


def parse_args(args=None):
    parser = training_arguments(
        __doc__, learning_rate=1e-3, warmup_steps=100, max_steps=2000, save_every=500, sample_every=500
    )
    add_unet_arguments(parser)
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, default=16)
    add("--alpha", type=float, help="the adapter's weight is alpha / rank; alpha is the rank unless given")
    add("--targets", nargs="+", default=TARGETS, help="names of the layers that are adapted")
    return parser.parse_args(args)


def main(args):
    run = TrainingRun(args)
    run.load_data()
    training = PaellaTraining(run)
    unet = training.pipe.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.alpha or args.rank, target_modules=args.targets))
    model = run.prepare(unet)

    for batch in run.batches(training.draw if args.prompts else None):
        run.update(model, training.loss(model, batch))

    weights = run.finish(model, only="lora_")
    if weights is not None:
        adapter = get_peft_model_state_dict(unet, weights)
        metadata = unet.peft_config["default"].to_dict()
        PaellaPipeline.save_lora_weights(args.output_dir, adapter, unet_lora_adapter_metadata=metadata)
        run.publish("The adapter")


if __name__ == "__main__":
    main(parse_args())
