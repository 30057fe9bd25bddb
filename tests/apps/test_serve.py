"""The server, called by OpenAI's own client."""

import http.client
import io
import json
import logging
import threading
import time
import urllib.request

import openai
import pytest
import torch
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
)
from PIL import Image, ImageDraw
from serving import PATIENCE, busy, picture, png, serving

from paella_diffusers import EMOJI_MODEL, PaellaImg2ImgPipeline, PaellaInpaintPipeline, PaellaPipeline, PaellaPsiScheduler
from paella_diffusers.apps import serve
from paella_diffusers.apps.openai_images import Limits
from paella_diffusers.apps.serve import Settings, create_app, preview_steps

OURS = {"seed": 7, "steps": 2}


@pytest.fixture(scope="module")
def pipe():
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def server(pipe):
    with serving(pipe, limits=Limits(body_bytes=200_000, side=128)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def face(pipe):
    return pipe("grinning face", num_inference_steps=4, generator=seed(1)).images[0]


def seed(number):
    return torch.Generator().manual_seed(number)


def same(image, other):
    return image.size == other.size and image.tobytes() == other.tobytes()


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------- tasks


def test_generation_draws_what_the_pipeline_draws(client, pipe):
    answer = client.images.generate(prompt="red heart", model="emoji", extra_body=OURS)
    assert same(picture(answer.data[0]), pipe("red heart", num_inference_steps=2, generator=[seed(7)]).images[0])
    assert (answer.size, answer.output_format, answer.data[0].seed) == ("64x64", "png", 7)
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (9, 256, 265)


def test_several_pictures_have_consecutive_seeds(client):
    several = client.images.generate(prompt="red heart", n=2, extra_body=OURS).data
    again = client.images.generate(prompt="red heart", extra_body=OURS | {"seed": several[1].seed}).data[0]
    assert [one.seed for one in several] == [7, 8]
    assert same(picture(several[1]), picture(again))


def test_a_seed_is_chosen_where_none_is_given(client):
    seeds = {client.images.generate(prompt="a", extra_body={"steps": 1}).data[0].seed for _ in range(2)}
    assert len(seeds) == 2


def test_settings_reach_the_pipeline(client, pipe):
    ours = {"guidance_scale": 3.0, "negative_prompt": "blue", "scheduler": "PaellaPsiScheduler"}
    answer = client.images.generate(prompt="heart", size="96x64", extra_body=OURS | ours)
    other = PaellaPipeline.from_pipe(pipe, scheduler=PaellaPsiScheduler.from_config(pipe.scheduler.config))
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blue", "width": 96, "height": 64}
    assert same(picture(answer.data[0]), other("heart", generator=[seed(7)], **call).images[0])


@pytest.mark.parametrize("kind", ["transparent", "white"])
def test_edits_draw_where_the_mask_is_transparent_or_white(client, pipe, face, kind):
    white = Image.new("L", face.size)
    ImageDraw.Draw(white).rectangle((0, 0, 31, 63), fill=255)
    mask = white
    if kind == "transparent":
        mask = Image.new("RGBA", face.size, "white")
        mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = client.images.edit(image=png(face), mask=png(mask), prompt="pizza", extra_body=OURS)
    edited = picture(answer.data[0])
    assert same(edited.crop((32, 0, 64, 64)), face.crop((32, 0, 64, 64)))
    inpaint = PaellaInpaintPipeline.from_pipe(pipe)
    expected = inpaint("pizza", image=face, mask_image=white, num_inference_steps=2, generator=[seed(7)]).images[0]
    assert same(edited, expected)
    assert answer.usage.input_tokens_details.image_tokens == 256


def test_edits_without_a_mask_change_the_whole_picture(client, pipe, face):
    answer = client.images.edit(image=[png(face)], prompt="blue face", extra_body=OURS | {"strength": 0.6})
    whole = PaellaImg2ImgPipeline.from_pipe(pipe)
    expected = whole("blue face", image=face, strength=0.6, num_inference_steps=2, generator=[seed(7)]).images[0]
    assert same(picture(answer.data[0]), expected)


def test_edits_have_the_pictures_size(client, face):
    answer = client.images.edit(image=png(face.resize((90, 50))), prompt="blue face", extra_body=OURS)
    assert picture(answer.data[0]).size == (90, 50) and answer.size == "90x50"


def test_variations(client, pipe, face):
    with pytest.warns(DeprecationWarning):  # OpenAI's own server no longer has them
        answer = client.images.create_variation(image=png(face), n=2, size="64x64", extra_body=OURS)
    expected = pipe(condition_image=[[face], [face]], num_inference_steps=2, generator=[seed(7), seed(8)]).images
    assert all(same(picture(one), image) for one, image in zip(answer.data, expected, strict=True))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_output_formats(client, output_format):
    options = {"output_format": output_format, "output_compression": 90}
    assert picture(client.images.generate(prompt="a", extra_body=OURS, **options).data[0]).format == output_format.upper()


def test_an_address_holds_the_picture_itself(client):
    data = client.images.generate(prompt="a", response_format="url", extra_body=OURS).data[0]
    with urllib.request.urlopen(data.url) as answer:
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.read())).size == (64, 64)
    assert data.b64_json is None


# ------------------------------------------------------------------------------------------------------------- previews


def test_generations_stream_previews(client):
    call = {"prompt": "red heart", "extra_body": OURS | {"steps": 4}}
    *previews, last = client.images.generate(stream=True, partial_images=3, **call)
    assert [type(event) for event in previews] == [ImageGenPartialImageEvent] * 3 and type(last) is ImageGenCompletedEvent
    assert [event.type for event in previews] == ["image_generation.partial_image"] * 3
    assert last.type == "image_generation.completed"
    assert [event.partial_image_index for event in previews] == [0, 1, 2]
    assert {picture(event).size for event in [*previews, last]} == {(64, 64)}
    assert same(picture(last), picture(client.images.generate(**call).data[0]))
    assert last.seed == 7 and last.usage.output_tokens == 256 and last.created_at > 0


def test_edits_stream_previews(client, face):
    options = {"stream": True, "partial_images": 1, "output_format": "webp"}
    first, last = client.images.edit(image=png(face), prompt="blue face", extra_body=OURS, **options)
    assert (type(first), first.type) == (ImageEditPartialImageEvent, "image_edit.partial_image")
    assert (type(last), last.type) == (ImageEditCompletedEvent, "image_edit.completed")
    assert picture(last).format == "WEBP"


def test_previews_are_spread_over_the_steps():
    assert preview_steps(12, 3) == {2, 5, 8} and preview_steps(12, 0) == set()
    assert preview_steps(2, 3) == {0} and preview_steps(1, 3) == set()


def test_errors_within_a_stream(client, pipe, server):
    with busy(pipe, server.batcher):
        stream = client.images.generate(prompt="a", stream=True, extra_body=OURS)
        wait_until(lambda: server.batcher.num_waiting == 1)
        server.batcher._waiting[0].result.set_exception(RuntimeError("a secret"))
        with pytest.raises(openai.APIError, match="The server failed") as error:
            list(stream)
    assert "secret" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("param", "value", "message"),
    [
        ("prompt", "", "at least 1 character"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 11, "at most 10 on this server"),
        ("size", "large", "It is auto, or WIDTHxHEIGHT in pixels, got 'large'"),
        ("size", "63x64", "multiples of 16 with this model, got 63x64: the nearest is 64x64"),
        ("size", "144x64", "at most 128 pixels a side"),
        ("steps", 101, "at most 100 on this server"),
        ("steps", "many", "valid integer"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63 - 1, "at most 9223372036854775806 for 2 pictures"),
        ("guidance_scale", "NaN", "finite number"),
        ("output_format", "gif", "'png', 'jpeg' or 'webp'"),
        ("background", "transparent", "'auto' or 'opaque'"),
        ("partial_images", 4, "less than or equal to 3"),
        ("scheduler", "DDIMScheduler", "one of PaellaScheduler, "),
        ("promt", "a", "Did you mean 'prompt'?"),
    ],
)
def test_bad_values_are_refused_by_name(client, param, value, message):
    body = {"n": 2} | {param: value} if param == "seed" else {param: value}
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.images.generate(prompt="a", extra_body=body)
    assert error.value.param == param and error.value.type == "invalid_request_error" and error.value.code


def test_streams_are_of_one_picture(client):
    with pytest.raises(openai.BadRequestError, match="must be 1 with 'stream'"):
        client.images.generate(prompt="a", n=2, stream=True)


def test_a_lone_surrogate_is_refused(server):
    status, answer, _ = post(server, b'{"prompt": "\\ud800"}')
    assert (status == 400 and "Unicode" in answer["error"]["message"]) or "unicode" in answer["error"]["message"]


def test_other_models_are_not_there(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'emoji'"):
        client.images.generate(prompt="a", model="dall-e-3")
    assert [model.id for model in client.models.list()] == ["emoji"]
    assert client.models.retrieve("emoji").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")


def test_uploads_are_read_with_care(client, face, tmp_path):
    def refused(message, image=png(face), **files):  # noqa: B008
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.edit(image=image, prompt="a", extra_body=OURS, **files)

    refused("is not a picture", b"no picture")
    refused("cannot be decoded", png(face)[:-200])
    refused("at most 128 pixels a side on this server, got 200x20", png(Image.new("RGB", (200, 20))))
    face.save(tmp_path / "face.eps")
    refused("is not a picture", (tmp_path / "face.eps").read_bytes())
    refused("must be as large as 'image': it has 32x32 and not 64x64", mask=png(Image.new("L", (32, 32), "white")))
    refused("leaves nothing to edit", mask=png(Image.new("L", (64, 64))))
    refused("One picture is needed as 'image', got 2", [png(face), png(face)])
    with pytest.raises(openai.APIStatusError, match="more than 200000 bytes") as error:
        client.images.edit(image=bytes(300_000), prompt="a")
    assert error.value.status_code == 413


def post(server, body, headers={}, path="/v1/images/generations"):
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=PATIENCE)
    connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_json = answer.headers["content-type"] == "application/json"
    return answer.status, json.loads(content) if is_json else content, answer.headers


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"[1]", {}, 400, "must be a JSON object"),
        (b"[" * 100_000, {}, 400, "not JSON"),
        (b"{}", {}, 400, "Missing required parameter: 'prompt'"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "must be application/json"),
        (b" " * 300_000, {}, 413, "more than 200000 bytes"),
    ],
)
def test_bodies_that_are_no_requests(server, body, headers, status, message):
    answered, answer, _ = post(server, body, headers)
    assert answered == status and message in answer["error"]["message"]


def test_bodies_without_a_length_are_bounded(server):
    chunks = (b" " * 50_000 for _ in range(10))
    status, answer, _ = post(server, chunks)
    assert status == 413 and answer["error"]["code"] == "too_large"


def test_a_form_that_is_none(server, face):
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (b"", b"--x\r\nnonsense", b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\ntext\r\n--x--\r\n'):
        status, answer, _ = post(server, body, form, "/v1/images/edits")
        assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_addresses_that_are_not_there(server):
    assert post(server, b"{}", path="/v1/images/nothing")[0] == 404
    assert post(server, b"{}", path="/v1/chat/completions")[1]["error"]["type"] == "invalid_request_error"


# -------------------------------------------------------------------------------------------------- many requests at once


def test_requests_that_wait_are_drawn_together(client, pipe, server):
    answers = [None] * 4

    def ask(index):
        answers[index] = client.images.generate(prompt="red heart", extra_body=OURS | {"seed": index})

    with busy(pipe, server.batcher):  # by now, earlier calls have been counted
        calls = metric(server, 'paella_call_pictures_bucket{le="2.0"}'), metric(server, "paella_call_pictures_count")
        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        [thread.start() for thread in threads]
        wait_until(lambda: server.batcher.num_waiting == 4)
        assert metric(server, "paella_waiting_pictures") == 4
    [thread.join() for thread in threads]
    # a call of one, that which kept it busy, and one of four
    assert metric(server, 'paella_call_pictures_bucket{le="2.0"}') == calls[0] + 1
    assert metric(server, "paella_call_pictures_count") == calls[1] + 2
    for index, answer in enumerate(answers):
        assert answer.data[0].seed == index
        alone = pipe("red heart", num_inference_steps=2, generator=[seed(index)]).images[0]
        pixels = [torch.tensor(bytearray(image.tobytes())).int() for image in (alone, picture(answer.data[0]))]
        assert ((pixels[0] - pixels[1]).abs() > 8).float().mean() < 0.05


def metric(server, name):
    with urllib.request.urlopen(f"{server.address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_exact_answers_do_not_depend_on_who_else_asks(pipe):
    with serving(pipe, batch_size=3, exact=True) as server:
        ask = lambda **call: picture(server.client.images.generate(prompt="rocket", extra_body=OURS, **call).data[0])
        alone, together = ask(), []
        with busy(pipe, server.batcher):
            mine = threading.Thread(target=lambda: together.append(ask()))
            other = threading.Thread(target=lambda: server.client.images.generate(prompt="pizza", n=2, extra_body=OURS))
            other.start(), mine.start()
            wait_until(lambda: server.batcher.num_waiting == 3)
        mine.join(), other.join()
    assert same(alone, together[0])


def test_a_full_queue_is_answered_429_with_retry_after(pipe):
    with serving(pipe, max_waiting=1, limits=Limits(pictures=1)) as server:
        waiting = threading.Thread(target=lambda: server.client.images.generate(prompt="a", extra_body=OURS))
        with busy(pipe, server.batcher):
            waiting.start()
            wait_until(lambda: server.batcher.num_waiting == 1)
            with pytest.raises(openai.RateLimitError) as error:
                server.client.images.generate(prompt="a")
        waiting.join()
    assert int(error.value.response.headers["retry-after"]) >= 1
    assert error.value.code == "rate_limit_exceeded"


def test_a_request_has_a_time_limit(pipe):
    with serving(pipe, limits=Limits(seconds=0.5)) as server, busy(pipe, server.batcher):
        with pytest.raises(openai.InternalServerError, match="longer than allowed") as error:
            server.client.images.generate(prompt="a")
        assert error.value.status_code == 504 and error.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match="longer than allowed"):
            list(server.client.images.generate(prompt="a", stream=True))
        wait_until(lambda: server.batcher.num_waiting == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_request_with_it(pipe, server, stream):
    with busy(pipe, server.batcher):
        leaving = http.client.HTTPConnection(server.address.removeprefix("http://"))
        body = json.dumps({"prompt": "a", "n": 1 if stream else 3, "stream": stream})
        leaving.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        wait_until(lambda: server.batcher.num_waiting > 0)
        leaving.close()
        wait_until(lambda: server.batcher.num_waiting == 0)


def test_a_client_that_leaves_a_running_stream_stops_it(pipe):
    steps = []
    hook = pipe.unet.register_forward_hook(lambda *_: steps.append(1))
    with serving(pipe, limits=Limits(steps=5000)) as server:
        stream = server.client.images.generate(prompt="a", stream=True, extra_body={"steps": 5000})
        wait_until(lambda: steps)
        stream.close()
        server.client.images.generate(prompt="a", extra_body=OURS)  # comes after it
    hook.remove()
    assert len(steps) < 5000  # of two passes a step, had it gone on


def test_stopping_finishes_what_has_begun(pipe):
    with serving(pipe) as server:
        answers = []
        ask = lambda: answers.append(server.client.images.generate(prompt="a", extra_body=OURS))
        with busy(pipe, server.batcher):
            threads = [threading.Thread(target=ask) for _ in range(2)]
            [thread.start() for thread in threads]
            wait_until(lambda: server.batcher.num_waiting == 2)
            server.server.should_exit = True  # what SIGTERM sets
            wait_until(lambda: not server.server.servers[0].is_serving())
        [thread.join() for thread in threads]
        server.stop()
        assert len(answers) == 2 and not server.batcher.is_alive
        with pytest.raises(openai.APIConnectionError):
            ask()


# ------------------------------------------------------------------------------------------------------ who may call it


def test_with_a_key_it_must_be_sent(pipe):
    with serving(pipe, api_key="a-key-of-some-length") as server:
        assert [model.id for model in server.client.models.list()] == ["emoji"]
        for key in ("another", "a-key-of-some-lengt"):
            with pytest.raises(openai.AuthenticationError) as error:
                openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0).images.generate(prompt="a")
            assert error.value.code == "invalid_api_key"
        assert post(server, b"{}")[0] == post(server, b"{}", {"Authorization": "Bearer \xe9"})[0] == 401
        for path, status in {"/health": 200, "/metrics": 401}.items():
            connection = http.client.HTTPConnection(server.address.removeprefix("http://"))
            connection.request("GET", path, headers={"Host": "example.org"})
            assert connection.getresponse().status == status
            connection.close()


def test_without_a_key_pages_of_others_are_refused(server):
    body = json.dumps({"prompt": "a", **OURS})
    assert post(server, body, {"Origin": "https://example.org"})[0] == 403
    assert post(server, body, {"Host": "example.org"})[0] == 400
    status, _, headers = post(server, body)
    assert status == 200 and not any(name.lower().startswith("access-control") for name in headers)


def test_browsers_may_call_from_pages_that_are_named(pipe):
    with serving(pipe, cors_origins=("https://example.org",)) as server:
        status, _, headers = post(server, json.dumps({"prompt": "a", **OURS}), {"Origin": "https://example.org"})
        assert status == 200 and headers["access-control-allow-origin"] == "https://example.org"
        assert post(server, b"{}", {"Origin": "https://example.com"})[0] == 403


def test_requests_have_numbers_and_their_text_is_not_logged(server, caplog):
    with caplog.at_level(logging.INFO, "paella_diffusers"):
        _, _, headers = post(server, json.dumps({"prompt": "a secret wish", **OURS}))
        post(server, b'{"prompt": "a secret wish", "n": "no number"}')
        wait_until(lambda: len(caplog.records) == 2)
    assert headers["x-request-id"] in caplog.text and "200" in caplog.text and "400" in caplog.text
    assert "secret" not in caplog.text


def test_an_unforeseen_error_is_answered_counted_and_logged_as_500(server, monkeypatch, caplog):
    async def fail(*args):
        raise RuntimeError("a fault")

    monkeypatch.setattr(serve, "read_body", fail)
    counter = 'paella_requests_total{path="/v1/images/generations",status="500"}'
    before = metric(server, counter)
    with caplog.at_level(logging.INFO, "paella_diffusers"):
        status, answer, headers = post(server, b"{}")
        logged = lambda: [record for record in caplog.records if headers["x-request-id"] in record.getMessage()]
        wait_until(lambda: len(logged()) == 2)
    assert status == 500 and answer["error"]["code"] == "internal_error" and "fault" not in str(answer)
    wait_until(lambda: metric(server, counter) == before + 1)
    error, request = logged()
    assert error.exc_info[0] is RuntimeError and " 500 " in request.getMessage()


def test_health_and_metrics(server):
    with urllib.request.urlopen(f"{server.address}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    before = metric(server, 'paella_requests_total{path="other",status="404"}')
    for path in ("/nothing", "/nothing/else"):
        post(server, b"{}", path=path)
    assert metric(server, 'paella_requests_total{path="other",status="404"}') == before + 2
    assert metric(server, "paella_pictures_total") > 0


def test_more_pictures_than_the_queue_holds_are_refused_at_the_start(pipe):
    with pytest.raises(ValueError, match="`max_waiting` must be at least"):
        create_app(pipe, Settings("emoji", max_waiting=5))
