"""The server's queue and worker, with the embedded model."""

import threading

import pytest
import torch
from conftest import tiny_pipeline

from paella_diffusers import EMOJI_MODEL, PaellaPipeline
from paella_diffusers.apps import batching
from paella_diffusers.apps.batching import Batcher, Job, QueueFullError
from paella_diffusers.apps.rows import Row, draw

CALL = {"num_inference_steps": 2}
PATIENCE = 120  # seconds, of a test that fails


@pytest.fixture(scope="module")
def pipe():
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def make(pipe):
    """Makes a `Batcher` whose worker is kept busy until `release()`; the calls that it made after are in `calls`."""
    batchers, release = [], threading.Event()

    def make(batch_size=4, max_waiting=8, **options):
        calls, busy = [], threading.Event()
        batcher = Batcher(batch_size, max_waiting, on_call=lambda count, seconds: calls.append(count), **options)
        batchers.append(batcher)

        def keep_busy(image):
            busy.set()
            release.wait(PATIENCE)
            calls.clear()

        first = Job(Row("first", "first", 0, CALL), pipe, frozenset([0]), keep_busy)
        batcher.submit([first])
        assert busy.wait(PATIENCE)
        batcher.calls, batcher.release = calls, release.set
        first.result.add_done_callback(lambda result: calls.clear())
        return batcher

    yield make
    release.set()
    for batcher in batchers:
        batcher.close()


def job(pipe, prompt="pizza", seed=0, **arguments):
    return Job(Row(prompt, prompt, seed, CALL | arguments), pipe)


def results(jobs):
    return [one.result.result(PATIENCE) for one in jobs]


def same(image, other):
    return image.tobytes() == other.tobytes()


def test_what_waits_and_fits_is_drawn_together(make, pipe):
    batcher = make()
    jobs = [
        job(pipe, "red heart"),
        job(pipe, "pizza", num_inference_steps=3),
        job(pipe, "rocket", seed=3),
        job(pipe, "guitar"),
    ]
    batcher.submit(jobs)
    batcher.release()
    drawn = results(jobs)
    batcher.close()
    assert batcher.calls == [3, 1]
    for one, result in zip(jobs, drawn):
        alone = draw(pipe, [one.row])[0].image
        difference = torch.tensor(bytearray(alone.tobytes())).int() - torch.tensor(bytearray(result.image.tobytes())).int()
        assert (difference.abs() > 8).float().mean() < 0.05, "it depends on its batch by more than rounding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_pictures_are_those_made_alone(make, dtype):
    pipe = tiny_pipeline(prior=None, prior_scheduler=None).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    batcher = make(batch_size=3, exact=True)
    jobs = [job(pipe, "red heart", 1), job(pipe, "rocket", 2, negative_prompt="blurry"), job(pipe, "dog " * 40, 3)]
    batcher.submit(jobs)
    batcher.release()
    drawn = results(jobs)
    batcher.close()
    assert batcher.calls == [2, 1]  # a long text is padded to another length
    for one, result in zip(jobs, drawn):
        assert same(result.image, draw(pipe, [one.row], 3, exact=True)[0].image)


def test_larger_pictures_are_fewer_in_a_call(make, pipe):
    batcher = make(batch_size=4)
    side = 2 * pipe.default_size
    jobs = [job(pipe, seed=seed, height=side, width=side // 2) for seed in range(3)]
    batcher.submit(jobs)
    batcher.release()
    assert {result.image.size for result in results(jobs)} == {(side // 2, side)}
    batcher.close()
    assert batcher.calls == [2, 1]


def test_the_queue_is_bounded(make, pipe):
    batcher = make(max_waiting=3)
    jobs = [job(pipe), job(pipe)]
    batcher.submit(jobs)
    with pytest.raises(QueueFullError) as refused:
        batcher.submit([job(pipe), job(pipe)])  # all or none
    assert refused.value.retry_after >= 1
    with batcher.reserve(), pytest.raises(QueueFullError), batcher.reserve():
        pass
    assert batcher.num_waiting == 2
    jobs[0].result.cancel()  # makes room
    batcher.submit([job(pipe), job(pipe)])


def test_a_row_that_nobody_waits_for_is_not_drawn(make, pipe):
    batcher = make()
    jobs = [job(pipe, seed=seed) for seed in range(3)]
    batcher.submit(jobs)
    jobs[1].result.cancel()
    batcher.release()
    results([jobs[0], jobs[2]])
    batcher.close()
    assert batcher.calls == [2]


def test_a_call_that_nobody_waits_for_stops(make, pipe):
    batcher, steps = make(), []
    leaving, other = job(pipe, num_inference_steps=50), job(pipe)
    leaving.preview_steps, leaving.on_preview = frozenset(range(50)), lambda image: leaving.result.cancel()
    count = pipe.unet.register_forward_hook(lambda *_: steps.append(1))
    batcher.submit([leaving])
    batcher.release()
    batcher.submit([other])
    results([other])
    batcher.close()
    count.remove()
    assert batcher.calls == [1] and len(steps) < 20  # 50 steps of two passes each, had it gone on


def test_a_call_goes_on_for_who_still_waits(make, pipe):
    batcher = make()
    leaving, staying = job(pipe, "red heart", num_inference_steps=4), job(pipe, "rocket", num_inference_steps=4)
    leaving.preview_steps, leaving.on_preview = frozenset([0]), lambda image: leaving.result.cancel()
    batcher.submit([leaving, staying])
    batcher.release()
    assert results([staying])[0].steps_taken == 4
    assert leaving.result.cancelled()


def test_a_row_that_cannot_be_drawn_takes_no_other_with_it(make, pipe, monkeypatch, caplog):
    def break_down(pipe, rows, *args, **kwargs):
        if any(row.prompt == "refused" for row in rows):
            raise ValueError("refused")
        if any(row.prompt == "broken" for row in rows):
            raise RuntimeError("broken")
        return draw(pipe, rows, *args, **kwargs)

    batcher = make()
    monkeypatch.setattr(batching, "draw", break_down)
    good, refused, broken = job(pipe), job(pipe, "refused"), job(pipe, "broken")
    batcher.submit([refused, good, broken])
    batcher.release()
    assert results([good])[0].image.size == (64, 64)
    with pytest.raises(ValueError, match="refused"):
        results([refused])
    with pytest.raises(RuntimeError, match="broken"):
        results([broken])
    assert len(caplog.records) == 1  # what is the client's fault is not logged
    assert batcher.is_alive


def test_closing_draws_what_waits(make, pipe):
    batcher = make()
    jobs = [job(pipe, seed=seed) for seed in range(6)]
    batcher.submit(jobs)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    batcher.release()
    closing.join(PATIENCE)
    assert not batcher.is_alive and all(one.result.done() for one in jobs)
