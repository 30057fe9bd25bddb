"""
What an attack on the library came to: one attempt is classified, and many make a table.

Invariant: every input gives the right result, or is refused with a ValueError, a TypeError or, for files, an OSError, in the
project's own words, before any model runs.
"""

import dis
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from torch.nn.modules.module import register_module_forward_pre_hook

import paella_diffusers

PACKAGE = Path(paella_diffusers.__file__).parent
SECONDS = 60  # an attempt that takes longer hangs
PAYLOAD = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn")  # audit events; the attacks' payloads use the first


class Outcome(Enum):
    RESULT = "right results"
    REFUSED = "refused"
    OBSCURE = "obscure errors"  # of another type, in another library's words, after a model ran, or for good input
    SILENT = "silent errors"  # a result where the oracle expects a refusal or another result
    LOST = "lost"  # what was there before is gone: a file, or a pipeline that can be called
    EXECUTED = "executed"


class WrongResult(Exception):
    """What an oracle raises."""


class Lost(Exception):
    """What a check of the state afterwards raises."""


class TooSlow(BaseException):
    """Raised by the clock; nothing catches it but `attempt`."""


def expect(condition, what: str):
    """The oracle's assertion."""
    if not condition:
        raise WrongResult(what)


def attempt(
    action: Callable[[], object],
    *,
    judge: Callable[[object], None] = lambda result: None,
    must_be_refused: str = "",
    may_be_refused: bool = False,
    errors: tuple[type[Exception], ...] = (ValueError, TypeError),
    named: tuple[str, ...] = (),
    models_may_run: bool = False,
    afterwards: Callable[[], None] = lambda: None,
) -> tuple[Outcome, str]:
    """
    Run an action and say what it came to, in an outcome and a line that is the same for the same defect.

    Args:
        judge (`Callable`): The oracle: it gets the result, and raises [`WrongResult`] if it is wrong.
        must_be_refused (`str`, *optional*): Which input is bad; without one, the input is good.
        may_be_refused (`bool`): Whether good input may be refused, too: the oracle only knows that results must be right.
        errors (`tuple`): The types of a clear refusal.
        named (`tuple[str]`, *optional*): Another library's message is clear if it has one of these: the damaged file's name.
        models_may_run (`bool`): Whether it may be refused after a model ran, such as for what a callback returns.
        afterwards (`Callable`): Checks that nothing was lost, and raises [`Lost`].
    """
    found = _try(action, judge, must_be_refused, may_be_refused, errors, named, models_may_run)
    if found[0] is Outcome.EXECUTED:
        return found
    try:
        afterwards()
    except Exception as error:
        return Outcome.LOST, f"{must_be_refused}: {describe(error)}"
    return found


def _try(action, judge, must_be_refused, may_be_refused, errors, named, models_may_run) -> tuple[Outcome, str]:
    with _watching() as seen:
        try:
            result = action()
        except TooSlow:
            return Outcome.OBSCURE, f"{must_be_refused}: took more than {SECONDS} seconds"
        except Exception as error:
            found = _judge_error(
                error, must_be_refused, may_be_refused, errors, named, seen.models_ran and not models_may_run
            )
        else:
            try:
                expect(not must_be_refused, f"{must_be_refused}: accepted")
                judge(result)
                found = Outcome.RESULT, ""
            except WrongResult as error:
                found = Outcome.SILENT, str(error)
            except Exception as error:
                found = Outcome.SILENT, f"a result that cannot be judged: {describe(error)}"
    return (Outcome.EXECUTED, f"{must_be_refused}: {seen.executed}") if seen.executed else found


def _judge_error(error, must_be_refused, may_be_refused, errors, named, too_late) -> tuple[Outcome, str]:
    clear = isinstance(error, errors) and (is_own(error) or any(name in str(error) for name in named))
    if not clear:
        return Outcome.OBSCURE, f"{must_be_refused}: {describe(error)}"
    if too_late:
        return Outcome.OBSCURE, f"{must_be_refused}: refused after a model ran, {describe(error)}"
    if not must_be_refused and not may_be_refused:
        return Outcome.OBSCURE, f"good input refused: {describe(error)}"
    return Outcome.REFUSED, ""


def is_own(error: BaseException) -> bool:
    """Whether the package raised it by a `raise` of its own: neither another library nor an operator, as in `len(5)`."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    is_raise = code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_raise and PACKAGE in Path(code.co_filename).parents


def describe(error: BaseException) -> str:
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    text = " ".join(str(error).split())[:120]
    return f"{type(error).__name__} in {Path(code.co_filename).name}:{code.co_name}: {text}"


# ------------------------------------------------------------------------------------------------------------ watching


@dataclass
class _Seen:
    models_ran: bool = False
    executed: str = ""


_seen: _Seen | None = None


def _on_forward(module, arguments):
    if _seen is not None:
        _seen.models_ran = True


def _on_event(event, arguments):
    if _seen is not None and event in PAYLOAD:
        _seen.executed = f"{event}{arguments!r:.80}"


register_module_forward_pre_hook(_on_forward)
sys.addaudithook(_on_event)


def _too_slow(*_):
    raise TooSlow


@contextmanager
def _watching() -> Iterator[_Seen]:
    """What happens inside: whether models run, whether something is executed. After `SECONDS`, it is interrupted."""
    global _seen
    timed = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if timed:
        earlier = signal.signal(signal.SIGALRM, _too_slow)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _seen = seen = _Seen()
    try:
        yield seen
    finally:
        _seen = None
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, earlier)


# --------------------------------------------------------------------------------------------------------------- table


@dataclass
class Report:
    """Outcomes by subject, and the distinct defects among them with the first input that showed each."""

    counts: dict[str, Counter] = field(default_factory=dict)
    defects: dict[tuple[str, Outcome, str], tuple[int, str]] = field(default_factory=dict)

    def add(self, subject: str, outcome: Outcome, what: str = "", case: object = "", times: int = 1):
        self.counts.setdefault(subject, Counter())[outcome] += times
        if outcome not in (Outcome.RESULT, Outcome.REFUSED):
            key = (subject, outcome, what)
            count, first = self.defects.get(key, (0, f"{case!r:.300}"))
            self.defects[key] = (count + times, first)

    def table(self) -> str:
        """In Markdown."""
        lines = ["| subject | inputs tried | " + " | ".join(one.value for one in Outcome) + " |", "|---" * 8 + "|"]
        total = Counter()
        for subject, counts in self.counts.items():
            total += counts
            lines.append(self._row(subject, counts))
        lines.append(self._row("**all**", total))
        for (subject, outcome, what), (times, first) in sorted(self.defects.items(), key=str):
            lines.append(f"\n{subject}, {outcome.value}, {times} times: {what}\n    such as {first}")
        return "\n".join(lines)

    @staticmethod
    def _row(subject: str, counts: Counter) -> str:
        return f"| {subject} | {counts.total():,} | " + " | ".join(f"{counts[one]:,}" for one in Outcome) + " |"

    def failed(self) -> list[str]:
        """Why the invariant does not hold: something was executed, lost or silently wrong, or over 0.1 % is obscure."""
        total = sum(self.counts.values(), Counter())
        found = [f"{total[one]} {one.value}" for one in (Outcome.EXECUTED, Outcome.LOST, Outcome.SILENT) if total[one]]
        if total[Outcome.OBSCURE] > total.total() / 1000:
            found.append(f"{total[Outcome.OBSCURE]} {Outcome.OBSCURE.value} of {total.total()}")
        return found
