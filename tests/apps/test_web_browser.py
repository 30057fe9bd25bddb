"""The page in a browser: `make test-web`. PAELLA_BROWSER is the browser's path; without one these tests fail."""

import io
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

from paella_diffusers import EMOJI_MODEL, PaellaPipeline
from paella_diffusers.apps.web import launch, make_page
from paella_diffusers.apps.web_calls import Call

pytestmark = pytest.mark.browser

TABS = ["Text to image", "Variations", "Image to image", "Inpainting", "Outpainting", "Regions", "Editing", "Interpolation"]
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
PATIENCE = 240_000  # milliseconds


@pytest.fixture(scope="module")
def pipe() -> PaellaPipeline:
    return PaellaPipeline.from_pretrained(EMOJI_MODEL)


@pytest.fixture(scope="module")
def address(pipe):
    page = make_page(pipe)
    yield launch(page, quiet=True, prevent_thread_lock=True)[1]
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = os.environ.get("PAELLA_BROWSER") or "/usr/bin/chromium"
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as another visitor; at the end, nobody has asked anything of another machine."""
    contexts, asked = [], []

    def visit(width: int = 1280, height: int = 900, **options) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.goto(address)
        page.get_by_role("button", name="Draw", exact=True).first.wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert asked and hosts == {"127.0.0.1"}


@pytest.fixture(scope="module")
def heart(pipe, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "heart.png"
    Call("PaellaPipeline", {"prompt": "red heart"}).run(pipe)[0].save(path)
    return str(path)


def open_tab(page: Page, name: str) -> Locator:
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def open_editor(page: Page, name: str) -> Locator:
    tab = open_tab(page, name)
    tab.locator("canvas").first.wait_for()
    page.wait_for_timeout(3000)  # until it listens
    return tab


def set_seed(page: Page, seed: int):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("New seed each time").uncheck()
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_label("Seed", exact=True).press("Tab")


def picture_of(locator: Locator) -> Image.Image:
    """The picture that is shown, as it came from the server."""
    locator.wait_for()
    return Image.open(io.BytesIO(locator.page.request.get(locator.get_attribute("src")).body())).convert("RGB")


def result(page: Page) -> Image.Image:
    return picture_of(page.locator(".result img:visible").last)


def paint(page: Page, editor: Locator, start: tuple[float, float], end: tuple[float, float]):
    """Move the pressed mouse over the picture in an editor, in shares of the shorter side from its middle."""
    box = editor.locator("canvas").first.bounding_box()
    middle, side = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2), min(box["width"], box["height"])
    (x, y), (to_x, to_y) = ([m + share * side for m, share in zip(middle, point)] for point in (start, end))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(to_x, to_y, steps=8)
    page.mouse.up()


def test_a_typed_prompt_becomes_a_picture(visit, pipe):
    page = visit()
    set_seed(page, 7)
    tab = open_tab(page, "Text to image")
    tab.get_by_label("Prompt", exact=True).fill("dog face")
    tab.get_by_role("button", name="Draw").click()
    page.get_by_text("Done: dog face (seed 7).").wait_for()
    assert result(page).tobytes() == Call("PaellaPipeline", {"prompt": "dog face"}, 7).run(pipe)[0].tobytes()
    shown = page.locator(".result img:visible").bounding_box()
    assert min(shown["width"], shown["height"]) > 300  # 64 pixels are shown enlarged
    page.get_by_role("button", name="The Python call").click()
    page.get_by_text("torch.Generator().manual_seed(7)").wait_for()
    assert page.get_by_role("button", name=re.compile("Thumbnail")).count() == 1


def test_the_browser_asks_nobody_else(visit):
    page = visit()
    for name in TABS:
        open_tab(page, name)
    refused = "fetch('https://example.org').then(() => 'answered', () => 'refused')"  # `visit` would see the request
    assert page.evaluate(refused) == "refused"
    links = page.eval_on_selector_all("a, link, script, img, iframe", "all => all.map(one => one.href || one.src || '')")
    assert not [link for link in links if link.startswith("http") and urlsplit(link).hostname != "127.0.0.1"]


def test_a_painted_mask_limits_the_change(visit, heart):
    page = visit()
    tab = open_editor(page, "Inpainting")
    tab.locator("input[type=file]").first.set_input_files(heart)
    tab.get_by_text("Upload an image").wait_for(state="hidden")
    page.wait_for_timeout(3000)  # until the editor has laid the picture out
    paint(page, tab, (-0.2, -0.2), (0.0, -0.2))
    tab.get_by_label("Prompt for the whole picture").fill("blue heart")
    tab.get_by_role("button", name="Draw").click()
    page.get_by_text("Done: blue heart").wait_for()
    before, after = (np.asarray(image, int) for image in (Image.open(heart).convert("RGB"), result(page)))
    rows, columns = np.nonzero((before != after).any(-1))
    assert after.shape == before.shape and len(rows) > 0
    # half of the shorter side is 32 pixels; around the stroke there are the brush, and tokens of 4 pixels
    assert rows.max() < 36 and columns.max() < 48


def test_regions_are_painted(visit):
    page = visit()
    tab = open_editor(page, "Regions")
    paint(page, tab, (-0.2, 0.0), (0.2, 0.0))
    tab.get_by_label("Prompt where nothing is painted").fill("sun")
    tab.get_by_label("Prompt for orange").fill("red heart")
    tab.get_by_role("button", name="Draw").click()
    page.get_by_text("Done: sun, red heart").wait_for()
    page.get_by_role("button", name="The Python call").click()
    page.get_by_text("region_masks-1.png").first.wait_for()


def test_editing_shows_before_and_after(visit, heart):
    page = visit()
    tab = open_tab(page, "Editing")
    tab.locator("input[type=file]").set_input_files(heart)
    tab.get_by_label("Prompt for the picture as it is").fill("red heart")
    tab.get_by_label("Prompt for the result").fill("blue heart")
    tab.get_by_role("button", name="Draw").click()
    page.get_by_text("Done: red heart, blue heart").wait_for()
    page.locator(".result img:visible").nth(1).wait_for()
    both = {picture_of(image).tobytes() for image in page.locator(".result img:visible").all()}
    assert len(both) == 2 and Image.open(heart).convert("RGB").tobytes() in both


def test_cancel(visit):
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Steps", exact=True).fill("1000")
    tab = open_tab(page, "Text to image")
    tab.get_by_label("Prompt", exact=True).fill("dog face")
    tab.get_by_role("button", name="Draw").click()
    page.get_by_text(re.compile(r"Step \d+ of 1000")).wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    page.get_by_label("Steps", exact=True).fill("2")
    tab.get_by_role("button", name="Draw").click()
    page.get_by_text("Done: dog face").wait_for()  # the only place in the queue is free again


def test_two_visitors_do_not_mix(visit, pipe):
    pages = {"sun": visit(), "red heart": visit()}
    for name, page in pages.items():
        set_seed(page, len(name))
        page.get_by_label("Prompt", exact=True).first.fill(name)
    for page in pages.values():  # both at once: the second one waits
        page.get_by_label("Prompt", exact=True).first.press("Enter")
    for name, page in pages.items():
        page.get_by_text(f"Done: {name} (seed {len(name)}).").wait_for()
        expected = Call("PaellaPipeline", {"prompt": name}, len(name)).run(pipe)[0]
        assert result(page).tobytes() == expected.tobytes()
        assert page.get_by_role("button", name=re.compile("Thumbnail")).count() == 1


def test_errors_are_read(visit):
    page = visit()
    tab = open_tab(page, "Image to image")
    tab.get_by_role("button", name="Draw").click()
    page.locator(".status[role=status]").get_by_text("There is no picture yet").wait_for()


def test_the_keyboard_is_enough(visit):
    page = visit()
    focused = "document.activeElement"
    for _ in range(20):
        page.keyboard.press("Tab")
        assert page.evaluate(f"parseFloat(getComputedStyle({focused}).outlineWidth)") > 0  # where it is can be seen
        if page.evaluate(f"{focused}.tagName") in ("TEXTAREA", "INPUT"):
            break
    page.keyboard.type("sun")
    page.keyboard.press("Enter")
    page.get_by_text("Done: sun").wait_for()
    assert page.get_by_label("Prompt", exact=True).first.input_value() == "sun"


def test_everything_has_a_name_to_be_read_aloud(visit):
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="The Python call").click()
    tree = page.context.new_cdp_session(page)
    roles = {"button", "checkbox", "combobox", "listbox", "progressbar", "slider", "spinbutton", "tab", "textbox"}
    nameless = set()
    for name in TABS:
        open_tab(page, name)
        page.wait_for_timeout(1000)
        nodes = tree.send("Accessibility.getFullAXTree")["nodes"]
        nodes = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
        assert len(nodes) > 15
        nameless |= {(name, node["role"]["value"]) for node in nodes if not node.get("name", {}).get("value", "").strip()}
    assert not nameless


@pytest.mark.parametrize("width", [1280, 390])
def test_light_and_dark(visit, width):
    brightness = {}
    for scheme in ("light", "dark"):
        page = visit(width, color_scheme=scheme)
        page.get_by_label("Prompt", exact=True).first.fill("dog face")
        page.keyboard.press("Enter")
        page.get_by_text("Done: dog face").wait_for()
        page.wait_for_timeout(1000)
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")  # nothing sticks out
        shot = page.screenshot(full_page=True)
        brightness[scheme] = np.asarray(Image.open(io.BytesIO(shot)).convert("L"))[:, :10].mean()
        if folder := os.environ.get("PAELLA_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"page-{width}-{scheme}.png").write_bytes(shot)
    assert brightness["dark"] < 64 < 192 < brightness["light"]
