"""The state of a running call, apart from the pipeline, which several threads may share."""

import contextlib
import threading
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..sampling.plan import Step, linear_ramp

_STATES: ContextVar[weakref.WeakKeyDictionary] = ContextVar("paella_diffusers_call_states")
_LOCKS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by U-Net, which pipelines share
_LOCKS_LOCK = threading.Lock()


@dataclass
class CallState:
    """
    What a call may change while it runs, and what callbacks read of it.

    Args:
        guidance ([`GuidanceMixin`] or [`DiffusersGuidance`]): This call's copy of the pipeline's guider.
        guidance_scale (`float`, `tuple[float, float]` or `None`): Read anew at every step.
        guided_steps (`tuple[int, int]`): The first guided step, and the one after the last.
        plan ([`Plan`], *optional*): The steps, once they are known.
        interrupt (`bool`, defaults to `False`): Whether to stop after the current step.
        timestep (`torch.Tensor`, *optional*): The scheduler's, of the current step.
        is_running (`bool`, defaults to `True`): Until the call returns.
    """

    guidance: Any
    guidance_scale: float | tuple[float, float] | None
    guided_steps: tuple[int, int]
    plan: Any = None
    interrupt: bool = False
    timestep: torch.Tensor | None = None
    is_running: bool = True

    def scale_at(self, step: Step) -> float | None:
        """The guidance scale of a step, None where it is not guided."""
        self.timestep = step.timestep
        first, end = self.guided_steps
        if not first <= step.index < end:
            return None
        return linear_ramp(self.guidance_scale, step.num_steps)[step.index]

    @property
    def is_guided(self) -> bool:
        """Whether any step may need the unconditional branch."""
        return self.guidance_scale is not None and self.guidance.needs_unconditional(self.guidance_scale)


class CallStateMixin:
    """
    What diffusers' callbacks read and set on a pipeline: properties of the running call in this thread, or of the last one.
    """

    @property
    def _state(self) -> CallState:
        state = _STATES.get({}).get(self)
        if state is None:
            raise AttributeError("No call of this pipeline runs, or ran, in this thread.")
        return state

    @contextlib.contextmanager
    def running(self, state: CallState):
        """
        Make `state` that of the running call, and, once it returns, leave it to be read. A call within a callback gives way
        to the outer one again. Calls that would change the models' own state for its time wait for each other.
        """
        outer = _STATES.get({}).get(self)
        self._set_state(state)
        try:
            with self._exclusive_if_needed():
                try:
                    yield state
                finally:
                    self.maybe_free_model_hooks()
        finally:
            state.is_running = False
            if outer is not None and outer.is_running:
                self._set_state(outer)

    def _set_state(self, state: CallState):
        # a copy: contexts made from this one keep theirs
        states: weakref.WeakKeyDictionary[Any, CallState] = weakref.WeakKeyDictionary(_STATES.get({}))
        states[self] = state
        _STATES.set(states)

    def _exclusive_if_needed(self):
        """A lock where hooks move weights about or adapters are scaled in place; nothing else is shared between calls."""
        models = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        parts = (part for model in models for part in model.modules())  # some hooks are on a model's parts only
        hooked = any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in parts)
        if not hooked and not getattr(self.unet, "peft_config", None):
            return contextlib.nullcontext()
        with _LOCKS_LOCK:
            return _LOCKS.setdefault(self.unet, threading.RLock())

    @property
    def guidance_scale(self) -> float | tuple[float, float] | None:
        return self._state.guidance_scale

    _guidance_scale = property(
        lambda self: self._state.guidance_scale, lambda self, value: setattr(self._state, "guidance_scale", value)
    )

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._state.is_guided

    @property
    def num_timesteps(self) -> int:
        return len(self._state.plan or ())

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._state.timestep

    @property
    def interrupt(self) -> bool:
        return self._state.interrupt

    _interrupt = property(lambda self: self._state.interrupt, lambda self, value: setattr(self._state, "interrupt", value))
