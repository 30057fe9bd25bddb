"""`pipe.optimize()`: compiled calls of the U-Net that go on working whatever changes."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import logging

from .checks import check_boolean
from .models.unet_paella import PaellaConditioning, PaellaUNet
from .sampling.denoiser import is_offloaded

logger = logging.get_logger(__name__)

BACKEND = "inductor"  # torch's compiler
MANY = 2**20  # compilations: beyond torch's limit of 8, calls would be eager without a word


def optimize(unet: PaellaUNet, enable: bool = True) -> None:
    """
    Compile a U-Net's calls by pipelines from now on, or, with `enable=False`, no longer. See [`~PaellaPipeline.optimize`].

    Raises:
        ValueError: If `enable` is no boolean, or the U-Net is wrapped by `torch.compile` already.
    """
    check_boolean("enable", enable)
    if not isinstance(unet, PaellaUNet):
        raise ValueError(
            f"`pipe.unet` must be a PaellaUNet to be optimized, got {type(unet).__name__}: if it is the result of "
            "`torch.compile`, assign the model itself."
        )
    optimized = isinstance(unet._compiled_call_impl, CompiledCalls)
    if not enable:
        if optimized:
            unet._compiled_call_impl = unet._compiled_call_impl.earlier
        return
    obstacle = _obstacle(unet.device)
    if obstacle is not None:
        logger.warning(f"`optimize` changes nothing, and calls work as before: {obstacle}.")
    elif not optimized:
        unet._compiled_call_impl = CompiledCalls(unet)
        logger.warning(
            "The U-Net will be compiled in the first call of each size, batch size and way of guidance. At full size that "
            "takes up to some minutes, but no copy of the weights; a later process finds the result in torch's cache on "
            "disk. Logits differ by rounding from those before, and so may a few tokens. `optimize(False)` undoes it."
        )


class CompiledCalls:
    """
    What a U-Net is called by while it is optimized, in the place of `torch.nn.Module.compile`, which is neither saved nor
    copied with the model.

    The whole model is one graph for each size and batch, in which equal blocks are compiled once. Its shapes are static, as
    compiled convolutions want them, but for the length of the conditioning. Weights are the graph's inputs: they are not
    copied, and may change. What the compiler cannot follow runs as it is, and says so: caches, offloading, a LoRA scale of
    one call.
    """

    def __init__(self, unet: PaellaUNet):
        self.unet = unet
        self.earlier: Callable[..., Any] | None = unet._compiled_call_impl
        options: dict[str, Any] = {"recompile_limit": MANY, "isolate_recompiles": True}  # torch's stubs lack the second
        self.compiled: Callable[..., Any] = torch.compile(
            unet._call_impl, backend=BACKEND, fullgraph=True, dynamic=False, **options
        )
        self.known: set[tuple[Any, ...]] = set()
        self.said: set[str] = set()
        self.failed = False
        self.compiling = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.failed or self._is_eager(**kwargs):
            return self.unet._call_impl(*args, **kwargs)
        prepared, compiled_kwargs = self._prepare(*args, **kwargs)
        key = _signature(*prepared, **compiled_kwargs)
        is_new, start = key not in self.known, time.perf_counter()
        try:
            with self.compiling if is_new else contextlib.nullcontext(), _own_settings():
                output = self.compiled(*prepared, **compiled_kwargs)
        except _compile_errors() as error:
            output = self.unet._call_impl(*args, **kwargs)  # bad input is refused here, in the model's own words
            self.failed = True
            reason = " ".join(str(error).split("\n\n")[0].split())  # what follows is how to debug torch
            logger.warning(f"The U-Net could not be compiled, and its calls work as before `optimize`: {reason}")
            return output
        if is_new:
            self.known.add(key)
            logger.info(
                f"The first compiled call of the U-Net for {key[0]} tokens took {time.perf_counter() - start:.1f} s."
            )
        return output

    def _is_eager(self, encoder_hidden_states=None, cross_attention_kwargs=None, **kwargs) -> bool:
        """Whether a call is no pipeline's, or is something that compiled code cannot do."""
        unet = self.unet
        reason = None
        if unet.training:
            reason = "the model is in training mode; `pipe.unet.eval()` ends it"
        elif unet.is_cache_enabled:
            reason = "`unet.enable_cache` decides at every step what is computed"
        elif hasattr(unet, "_hf_hook") or is_offloaded(unet):
            reason = "offloading moves weights during calls"
        elif getattr(unet, "peft_config", None) and (cross_attention_kwargs or {}).get("scale", 1) != 1:
            reason = "a LoRA scale in `cross_attention_kwargs` changes the model for a call; `set_adapters` sets it for good"
        if reason is not None and reason not in self.said:
            self.said.add(reason)
            logger.warning(f"This call of the U-Net is not optimized: {reason}.")
        return reason is not None or torch.is_grad_enabled() or not isinstance(encoder_hidden_states, PaellaConditioning)

    def _prepare(self, sample, timestep, *, encoder_hidden_states, mixing_weights=None, **kwargs) -> tuple[tuple, dict]:
        """The arguments of a call, but so that what changes from call to call asks for no other code."""
        from torch._dynamo import maybe_mark_dynamic

        conditioning, device = encoder_hidden_states, sample.device
        if conditioning.attention_mask is None:
            mask = torch.ones(conditioning.sequence.shape[:2], dtype=torch.bool, device=device)
            conditioning = replace(conditioning, attention_mask=mask)
        keys_values = [tensor for block in conditioning.keys_values for pair in block for tensor in pair]
        for tensor in (conditioning.sequence, conditioning.attention_mask, conditioning.weights, *keys_values):
            if tensor is not None:
                maybe_mark_dynamic(tensor, 1)
        if mixing_weights is not None:  # numbers would be part of the code
            dtype = torch.promote_types(self.unet.dtype, torch.float32)
            mixing_weights = torch.tensor(mixing_weights, dtype=dtype, device=device)
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=device)
        kwargs |= {"encoder_hidden_states": conditioning, "mixing_weights": mixing_weights, "run_block": _region()}
        return (sample, timestep), kwargs


def _signature(sample, timestep, *, encoder_hidden_states, mixing_weights, deep_features=None, **kwargs) -> tuple:
    """What decides which code runs, apart from the model itself."""
    sequence, weights = encoder_hidden_states.sequence, encoder_hidden_states.weights
    features = None if deep_features is None else len(deep_features)
    mixed = None if mixing_weights is None else mixing_weights.shape
    what = (sequence.dtype, sequence.device, weights is None, mixed, features, kwargs.get("attention_perturbation"))
    return tuple(sample.shape), len(sequence), *what


@functools.cache
def _region():
    """Calls a block; to the compiler, equal calls are one."""
    return torch.compiler.nested_compile_region(lambda block, *args: block(*args), max_reuse_entries=MANY)


@contextlib.contextmanager
def _own_settings():
    """torch's settings for compiling, of this thread and for one call. Frozen weights would be copies that grow stale."""
    import torch._dynamo.config
    import torch._inductor.config

    limits = torch._dynamo.config.patch(accumulated_recompile_limit=MANY, suppress_errors=False)
    with limits, torch._inductor.config.patch(freezing=False):
        yield


def _compile_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def _obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled in this process."""
    import torch._dynamo.config

    if torch._dynamo.config.disable:
        return "torch's compiler is switched off, as by TORCH_COMPILE_DISABLE in the environment"
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "there is no C++ compiler; install g++, or name one in the environment variable CXX"
    return None
