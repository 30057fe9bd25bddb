"""The quick attack: few inputs of every subject, the same in every run. `make fuzz` tries thousands."""

import pytest
from hypothesis import given, settings

from .outcomes import Outcome
from .subjects import OPTIONS, SUBJECTS


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_input_gives_the_right_result_or_is_refused_in_clear_words(name):
    subject = SUBJECTS[name]

    @settings(OPTIONS, max_examples=subject.quick, derandomize=True)
    @given(subject.inputs())
    def check(case):
        outcome, what = subject.attempt(case)
        assert outcome in (Outcome.RESULT, Outcome.REFUSED), f"{outcome.value}: {what}"

    check()
