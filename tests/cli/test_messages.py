import logging

import pytest
import torch

from paella_diffusers.cli.messages import Warnings, in_options, is_out_of_memory, one_line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`height` and `width` must be multiples of 16", "--size must be multiples of 16"),
        ("`num_inference_steps` must be an integer", "--steps must be an integer"),
        ("`height` and `width` set another size, for both.", "--size sets another size, for both."),
        ("turn it off with `guidance_scale=None`.", "turn it off with --guidance-scale 1."),
        ("log in with `hf auth login`, or pass `token`.", "log in with `hf auth login`, or pass HF_TOKEN."),
        ("has no component `text_encoder`", "has no component `text_encoder`"),
    ],
)
def test_arguments_become_options(message, expected):
    assert in_options(message) == expected


def test_warnings_name_options_too(capsys):
    logger = logging.getLogger("paella_diffusers.pipelines.some_module")
    handler = Warnings(logging.WARNING)
    logger.addHandler(handler)
    logger.warning("use `low_memory`")
    logger.info("nothing of interest")
    logger.removeHandler(handler)
    assert capsys.readouterr().err.strip() == "use --low-memory"


def test_an_error_is_one_line():
    assert one_line(ValueError("one\n  two")) == "one two"
    assert one_line(FileNotFoundError(2, "No such file or directory", "a.png")) == "a.png: No such file or directory"


def test_out_of_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
