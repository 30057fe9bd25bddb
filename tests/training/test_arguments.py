"""The trainers' command line, and diffusers' names in it."""

import sys

import pytest
import train_dreambooth
import train_paella
import train_paella_lora
import train_prior
import train_vqgan

from paella_diffusers.training.arguments import check_arguments
from paella_diffusers.training.data import SampleTransform
from paella_diffusers.training.dreambooth import PRECISIONS

BASE = ["--data", "pictures", "--pretrained", "model", "--output-dir", "out"]
# every argument of diffusers' examples/text_to_image/train_text_to_image.py, and a value where it takes one
DIFFUSERS = {
    "input_perturbation": "0.1", "pretrained_model_name_or_path": "model", "revision": "main", "variant": "fp16",
    "dataset_name": "owner/data", "dataset_config_name": "small", "train_data_dir": "pictures", "image_column": "image",
    "caption_column": "caption", "max_train_samples": "10", "validation_prompts": "red", "output_dir": "out",
    "cache_dir": "cache", "seed": "1", "resolution": "64", "center_crop": None, "random_flip": None, "train_batch_size": "2",
    "num_train_epochs": "3", "max_train_steps": "5", "gradient_accumulation_steps": "2", "gradient_checkpointing": None,
    "learning_rate": "1e-5", "scale_lr": None, "lr_scheduler": "constant", "lr_warmup_steps": "0", "snr_gamma": "5",
    "dream_training": None, "dream_detail_preservation": "1", "use_8bit_adam": None, "allow_tf32": None, "use_ema": None,
    "offload_ema": None, "foreach_ema": None, "non_ema_revision": "main", "dataloader_num_workers": "1", "adam_beta1": "0.8",
    "adam_beta2": "0.9", "adam_weight_decay": "0.1", "adam_epsilon": "1e-7", "max_grad_norm": "1", "push_to_hub": None,
    "hub_token": "secret", "prediction_type": "epsilon", "hub_model_id": "me/model", "logging_dir": "logs",
    "mixed_precision": "bf16", "report_to": "wandb", "local_rank": "0", "checkpointing_steps": "7",
    "checkpoints_total_limit": "3", "resume_from_checkpoint": "latest",
    "enable_xformers_memory_efficient_attention": None, "noise_offset": "0.1", "validation_epochs": "5",
    "tracker_project_name": "name", "image_interpolation_mode": "lanczos",
}  # fmt: skip
REFUSED = {
    "input_perturbation",
    "snr_gamma",
    "dream_training",
    "dream_detail_preservation",
    "offload_ema",
    "non_ema_revision",
}
REFUSED |= {"prediction_type", "enable_xformers_memory_efficient_attention", "noise_offset", "validation_epochs"}


@pytest.mark.parametrize("hyphens", [False, True])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_every_argument_of_diffusers_is_accepted_or_refused_with_a_reason(name, hyphens, capsys):
    option, value = "--" + (name.replace("_", "-") if hyphens else name), DIFFUSERS[name]
    # what it stands for in the base is left out
    left_out = {"dataset_name": "--data", "train_data_dir": "--data", "pretrained_model_name_or_path": "--pretrained"}
    at = BASE.index(left_out.get(name, "--output-dir"))
    base = BASE if name not in left_out and name != "output_dir" else BASE[:at] + BASE[at + 2 :]
    for given in [[option] if value is None else [option, value], [option] if value is None else [f"{option}={value}"]]:
        if name in REFUSED:
            with pytest.raises(SystemExit):
                train_paella.parse_args([*base, *given])
            assert f"{option.replace('_', '-')} does not apply here: " in capsys.readouterr().err
        else:
            train_paella.parse_args([*base, *given])


@pytest.mark.parametrize("mode", ["nearest", "nearest_exact", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_every_interpolation_of_diffusers(mode):
    args = train_paella.parse_args([*BASE, "--image_interpolation_mode", mode])
    resampling = SampleTransform(8, interpolation=args.image_interpolation_mode).interpolation
    assert resampling.name == mode.partition("_")[0].upper()


@pytest.mark.parametrize("precision", ["no", "fp32", "fp16", "bf16"])
def test_every_precision_of_diffusers_dreambooth(precision):
    command = [*BASE, "--instance_prompt", "a", "--prior_generation_precision", precision]
    assert train_dreambooth.parse_args(command).prior_generation_precision in PRECISIONS


def test_they_mean_the_same():
    def parsed(*options):
        args = vars(train_paella.parse_args([*BASE, *options]))
        return {name: value for name, value in args.items() if name != "command"}

    for theirs, own in [
        (["--train_batch_size=2", "--max_train_steps=5"], ["--batch-size", "2", "--max-steps", "5"]),
        (["--lr_warmup_steps", "3", "--checkpointing_steps", "7"], ["--warmup-steps", "3", "--save-every", "7"]),
        (["--checkpoints_total_limit", "3", "--logging_steps", "2"], ["--keep", "3", "--log-every", "2"]),
        (["--resume_from_checkpoint", "latest"], ["--resume", "latest"]),
        (["--validation_prompts", "a_b", "c"], ["--prompts", "a_b", "c"]),
        (["--validation_prompt", "a b"], ["--prompts", "a b"]),
        (["--validation_steps", "4", "--dataloader_num_workers", "0"], ["--sample-every", "4", "--num-workers", "0"]),
        (["--adam_weight_decay", "0", "--use_8bit_adam"], ["--weight-decay", "0", "--adam-8bit"]),
        (["--ema_update_after_step", "9", "--caption_column", "words"], ["--ema-start", "9", "--text-column", "words"]),
    ]:
        assert parsed(*theirs) == parsed(*own) != parsed()


# those of its examples/dreambooth/train_dreambooth.py and train_dreambooth_lora.py that are not among them
DREAMBOOTH = {
    "instance_data_dir": "pictures", "class_data_dir": "class", "instance_prompt": "a photo of sks dog",
    "class_prompt": "a photo of a dog", "with_prior_preservation": None, "prior_loss_weight": "0.5", "num_class_images": "7",
    "sample_batch_size": "2", "prior_generation_precision": "bf16", "validation_prompt": "a dog", "validation_steps": "5",
    "lr_num_cycles": "2", "lr_power": "2.0", "set_grads_to_none": None, "rank": "4", "lora_dropout": "0.1",
    "tokenizer_name": "x", "num_validation_images": "2", "pre_compute_text_embeddings": None, "tokenizer_max_length": "77",
    "text_encoder_use_attention_mask": None, "skip_save_text_encoder": None, "validation_images": "a.png",
    "class_labels_conditioning": "timesteps", "validation_scheduler": "DDPMScheduler", "offset_noise": None,
}  # fmt: skip
DREAMBOOTH_REFUSED = list(DREAMBOOTH)[list(DREAMBOOTH).index("tokenizer_name") :]


@pytest.mark.parametrize("name", DREAMBOOTH)
def test_those_of_dreambooth(name, capsys):
    options = {key: DREAMBOOTH[key] for key in ("with_prior_preservation", "class_data_dir", "class_prompt")}
    options |= {
        "pretrained_model_name_or_path": "model",
        "output_dir": "out",
        "instance_data_dir": "a",
        "instance_prompt": "b",
    }
    command = [
        f"--{key}" if value is None else f"--{key}={value}" for key, value in (options | {name: DREAMBOOTH[name]}).items()
    ]
    if name not in DREAMBOOTH_REFUSED:
        train_dreambooth.parse_args(command)
        return
    with pytest.raises(SystemExit):
        train_dreambooth.parse_args(command)
    assert f"--{name.replace('_', '-')} does not apply here: " in capsys.readouterr().err


@pytest.mark.parametrize("script", [train_paella, train_paella_lora, train_prior, train_vqgan])
def test_all_scripts_have_them(script):
    args = script.parse_args(
        ["--train_data_dir", "a", *BASE[2:], "--max_train_steps", "5", "--use_ema", "--lr_warmup_steps=1"]
    )
    check_arguments(args)
    assert (args.data, args.max_steps, args.warmup_steps) == ("a", 5, 1)
    assert args.ema_decay == (0.999 if script is train_prior else 0.9999)


def test_the_help_gives_defaults(capsys):
    with pytest.raises(SystemExit):
        train_paella.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the highest of the schedule (default: 0.0001)" in text
    assert not any(f"(default: {value})" in text for value in ("None", "False", "==SUPPRESS==", "{}"))


def test_data_are_given_once_and_what_is_unknown_is_refused(capsys):
    for options, message in [
        (["--train_data_dir", "a"], "argument --train-data-dir/--instance-data-dir: not allowed with argument --data"),
        (["--lr_scheduler", "foo"], "argument --lr-scheduler: invalid choice: 'foo' (choose from "),
        (["--lr_scheduler", "piecewise_constant"], "argument --lr-scheduler: invalid choice: 'piecewise_constant'"),
        (["--batch", "2"], "unrecognized arguments: --batch 2"),
        (["--learning_rates", "2"], "unrecognized arguments: --learning-rates 2"),
    ]:
        with pytest.raises(SystemExit):
            train_paella.parse_args([*BASE, *options])
        assert message in capsys.readouterr().err


def test_what_cannot_work_is_refused_by_name(monkeypatch):
    for options, error, message in [
        (["--max-steps", "0"], ValueError, "--max-steps must be at least 1, got 0"),
        (["--num-workers", "-1"], ValueError, "--num-workers must be at least 0, got -1"),
        (["--seed", "-1"], ValueError, "--seed must be from 0 to 4000000000, got -1"),
        (["--seed", "4294967296"], ValueError, "--seed must be from 0 to 4000000000, got 4294967296"),
        (["--ema-decay", "1.5"], ValueError, "--ema-decay must be between 0 and 1, got 1.5"),
        (["--report-to", "nothing"], ValueError, "--report-to nothing: not a tracker; there are aim, "),
        (["--report-to", "tensorboard,aim"], ImportError, "--report-to aim: not installed. pip install aim, or give"),
        (["--adam-8bit"], ImportError, "--adam-8bit needs bitsandbytes"),
    ]:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        monkeypatch.setattr("paella_diffusers.training.arguments.get_available_trackers", lambda: ["tensorboard"])
        with pytest.raises(error, match=message):
            check_arguments(train_paella.parse_args([*BASE, *options]))
