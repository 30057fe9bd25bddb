"""What is attacked: for every subject, inputs and what tries one."""

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from . import calls, files, pictures, steps
from .outcomes import Report


@dataclass
class Subject:
    """
    Args:
        quick (`int`): Inputs that the test suite tries.
        at_once (`int`): Inputs that the long run tries before the next subject's turn: about two seconds of work.
    """

    inputs: Callable[[], st.SearchStrategy]
    attempt: Callable
    quick: int
    at_once: int


SUBJECTS = {
    **{
        f"{task}, {kind}": Subject(lambda task=task, make=make: make(task), calls.attempt_call, quick, 50)
        for task in calls.TASKS
        for kind, make, quick in (("good calls", calls.good_calls, 8), ("bad calls", calls.bad_calls, 25))
    },
    "scheduler steps": Subject(steps.steps, steps.attempt_step, 80, 100),
    "random draws": Subject(steps.draws, steps.attempt_draw, 6, 15),
    "configurations": Subject(files.configurations, files.attempt_configuration, 30, 30),
    "damaged weights": Subject(lambda: files.damages(sorted(files.WEIGHTS)), files.attempt_weights, 30, 40),
    "hostile files": Subject(files.hostile_files, files.attempt_hostile_file, 25, 30),
    "LoRA adapters": Subject(files.adapters, files.attempt_adapter, 10, 15),
    "damaged shards": Subject(lambda: files.damages(["shard/0.tar"]), files.attempt_shard, 15, 50),
    "pictures": Subject(pictures.pictures, pictures.attempt_picture, 30, 40),
}


def run(name: str, report: Report, number: int):
    """Try some inputs of a subject, the same for the same `number`."""
    subject = SUBJECTS[name]

    @seed(number)
    @settings(OPTIONS, max_examples=subject.at_once, phases=[Phase.generate])
    @given(subject.inputs())
    def go(case):
        report.add(name, *subject.attempt(case), case)

    go()


OPTIONS = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
