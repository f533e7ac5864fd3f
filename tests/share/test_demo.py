import base64
import copy
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import prepare
from PIL import Image

from mnist_lightning.digits import interpretation, pictures, synthetic
from mnist_lightning.digits.ink import Array
from mnist_lightning.model import MLP
from mnist_lightning.share import demo

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

TRAINED_ON = "<digits> & {{ network }} (0 iterations)"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(CHROMIUM)}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])  # which root may not have
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def mlp(root: Path) -> MLP:
    """A network that classifies most synthetic digits correctly, trained for a second."""
    torch.manual_seed(0)
    pixels, labels = prepare("synthetic", root).train
    images = pixels.float() / 255
    mlp = MLP(hidden_dim=50, init_std=0.05)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(mlp(images), labels).backward()
        optimizer.step()
    return mlp


@pytest.fixture(scope="module")
def file(mlp: MLP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.html"
    path.write_text(demo.page(mlp, TRAINED_ON), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def opened(browser: "Browser", file: Path) -> tuple["Page", list[str]]:
    """The page, and what it said on the console and requested so far."""
    page = browser.new_context(viewport={"width": 1000, "height": 800}, has_touch=True).new_page()
    events: list[str] = []
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.on("request", lambda request: events.append(request.url))
    page.goto(file.as_uri())
    return page, events


@pytest.fixture
def page(opened: tuple["Page", list[str]]) -> "Page":
    """The page with nothing drawn."""
    page, _ = opened
    page.set_viewport_size({"width": 1000, "height": 800})
    page.emulate_media(color_scheme="light", reduced_motion="no-preference")
    page.keyboard.press("Escape")
    return page


Strokes = list[list[tuple[float, float]]]


def strokes_of(digit: int) -> Strokes:
    """The first way of writing a digit among the synthetic ones, on a surface of 280 by 280."""
    path = next(path for glyph, _, path in synthetic.GLYPHS if glyph == digit)
    return [
        [(80 + 2 * float(x), 40 + 2 * float(y)) for x, y in (point.rstrip("^").split(",") for point in stroke.split())]
        for stroke in path.split(";")
    ]


def draw(page: "Page", strokes: Strokes) -> None:
    """Draw with the mouse."""
    box = page.locator("#surface").bounding_box()
    assert box is not None
    for stroke in strokes:
        points = [(box["x"] + x * box["width"] / 280, box["y"] + y * box["height"] / 280) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=3)
        page.mouse.up()


def ink_of(page: "Page") -> Array:
    """(280, 280) from 0 to 1, as the network's picture is made of."""
    png = base64.b64decode(page.evaluate("inkCanvas.toDataURL()").partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(png)).convert("L")) / 255


def count(page: "Page") -> int:
    return page.locator("#strokes path").count()


def normalised(page: "Page", ink: Array) -> Array | None:
    """What `normalise` of the page makes of (H, W) ink."""
    height, width = ink.shape
    # As text, because Playwright takes a second for as long a list.
    pixels = page.evaluate(
        """([text, width, height]) => {
            const ink = new Float64Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
            const pixels = normalise(ink, width, height);
            return pixels && Array.from(pixels);
        }""",
        [base64.b64encode(ink.astype("<f8").tobytes()).decode(), width, height],
    )
    return None if pixels is None else np.array(pixels)


INKS = [np.random.default_rng(0).random(size) ** 2 for size in [(1, 9), (300, 2), (37, 61), (113, 45), (280, 280)]]
INKS += [np.ones((1, 1)), np.pad([[0.3]], 40), np.ones((50, 7))]


@pytest.mark.parametrize("ink", INKS)
def test_normalises_as_pictures_are(page: "Page", ink: Array) -> None:
    expected, found = pictures.normalise(ink), normalised(page, ink)
    assert expected is not None
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ink", [0, pictures.EDGE])
def test_blank_stays_blank(page: "Page", ink: float) -> None:
    blank = np.full((9, 30), ink)
    assert pictures.normalise(blank) is None
    assert normalised(page, blank) is None


def test_classifies_test_digits_as_the_network_does(page: "Page", root: Path, mlp: MLP) -> None:
    expected, found = [], []
    for image in prepare("synthetic", root).test[0][:10].float() / 255:
        large = Image.fromarray(image.view(28, 28).numpy()).resize((280, 280), Image.Resampling.BICUBIC)
        ink = np.asarray(large, dtype=np.float64).clip(0, 1)
        expected.append(pictures.normalise(ink))
        pixels = normalised(page, ink)
        assert pixels is not None
        found.append(page.evaluate("logits", pixels.tolist()))
    logits = copy.deepcopy(mlp).double()(torch.tensor(np.array(expected)))
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), logits, rtol=0, atol=1e-3)
    assert torch.equal(torch.tensor(found).argmax(1), logits.argmax(1))
    assert len(logits.argmax(1).unique()) >= 5


def test_pixels_and_constant_add_up_to_the_logits(page: "Page", root: Path, mlp: MLP) -> None:
    class_weights = [*torch.eye(10).tolist(), [0, 0, 1, 0, 0, 0, -1, 0, 0, 0]]
    for image in prepare("synthetic", root).test[0][:3].float() / 255:
        logits = torch.tensor(page.evaluate("logits", image.tolist()), dtype=torch.float64)
        plain = "([pixels, weights]) => (({ points, constant }) => ({ points: [...points], constant }))"
        code = f"{plain}(attributions(pixels, weights))"
        found = [page.evaluate(code, [image.tolist(), weights]) for weights in class_weights]
        points = torch.tensor([row["points"] for row in found], dtype=torch.float64)
        constants = torch.tensor([row["constant"] for row in found], dtype=torch.float64)
        sums = torch.tensor(class_weights, dtype=torch.float64) @ logits
        torch.testing.assert_close(points.sum(1) + constants, sums, rtol=0, atol=1e-4)
        expected, expected_constants = interpretation.attributions(
            mlp, image.repeat(len(class_weights), 1), torch.tensor(class_weights)
        )
        torch.testing.assert_close(points.float(), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(constants.float(), expected_constants, rtol=0, atol=1e-4)


def test_shows_attributions(page: "Page") -> None:
    section = page.locator("#attribution")
    assert section.is_hidden()
    draw(page, strokes_of(3))
    assert section.is_visible()
    best, second = re.fullmatch(r"Attribution: (\d) against (\d)", section.get_by_role("heading").inner_text()).groups()  # type: ignore[union-attr]
    assert page.get_by_role("region", name=f"Attribution: {best} against {second}").count() == 1
    assert page.get_by_role("img", name=f"ink for {best} in full squares, ink for {second} in rings").count() == 1
    scores = page.evaluate("logits(normalise(readInk(), inkCanvas.width, inkCanvas.height))")
    assert [str(digit) for digit in np.argsort(scores)[:-3:-1]] == [best, second] == ["3", second]
    terms, numbers = (section.locator(tag).all_inner_texts() for tag in ("dt", "dd"))
    assert terms == [
        f"Ink that speaks for {best}",
        f"Ink that speaks for {second}",
        "A constant, whatever the ink",
        f"{best} is ahead by",
    ]
    gained, lost, constant, lead = (float(number.replace("\u2212", "-")) for number in numbers)
    assert gained > 0 > lost
    assert lead == pytest.approx(gained + lost + constant, abs=0.21)
    assert lead == pytest.approx(scores[int(best)] - scores[int(second)], abs=0.06)
    kinds = {kind: page.locator(f"#marks .{kind}").count() for kind in ("ink", "for", "against")}
    assert kinds["ink"] >= kinds["for"] + kinds["against"]
    assert min(kinds.values()) > 5
    page.keyboard.press("Escape")
    assert section.is_hidden()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_holds_networks_of_any_width_and_type(browser: "Browser", tmp_path: Path, dtype: torch.dtype) -> None:
    mlp = MLP(hidden_dim=3, init_std=0.5).to(dtype)
    path = tmp_path / "demo.html"
    path.write_text(demo.page(mlp, "noise"), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    pixels = torch.rand(784, dtype=torch.float64)
    found = page.evaluate("logits", pixels.tolist())
    page.close()
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), mlp.double()(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("digit", [0, 1, 3, 7])
def test_classifies_what_is_drawn(page: "Page", mlp: MLP, tmp_path: Path, digit: int) -> None:
    draw(page, strokes_of(digit))
    assert page.locator("#guess").inner_text() == str(digit)
    bars = page.locator("#bars li")
    percents = [float(text.rstrip("%")) for text in bars.locator("span:last-child").all_inner_texts()]
    assert sum(percents) == pytest.approx(100, abs=5)
    assert percents.index(max(percents)) == digit
    lengths = page.evaluate("[...bars.children].map(bar => Number(bar.style.getPropertyValue('--probability')))")
    np.testing.assert_allclose(np.array(lengths) * 100, percents, atol=0.5)

    # The same drawing as a file, dark on light, goes the way of strangers' pictures.
    Image.fromarray((255 * (1 - ink_of(page))).round().astype(np.uint8)).save(tmp_path / "drawn.png")
    pixels = pictures.preprocess(tmp_path / "drawn.png")
    assert pixels is not None
    shown = page.evaluate("Array.from(picture.getContext('2d').getImageData(0, 0, 28, 28).data)")[::4]
    np.testing.assert_allclose(np.array(shown) / 255, pixels, rtol=0, atol=0.01)
    probabilities = mlp(torch.from_numpy(pixels).float()).softmax(0)
    np.testing.assert_allclose(lengths, probabilities.detach().numpy(), rtol=0, atol=0.02)


def test_shows_where_one_draws(page: "Page") -> None:
    draw(page, strokes_of(3))
    shown = Image.open(io.BytesIO(page.locator("#surface").screenshot())).convert("L").resize((280, 280))
    # The shown ink is not quite black, and the surface has round corners and a shadow.
    assert np.abs(1 - np.asarray(shown) / 255 - ink_of(page)).mean() < 0.03


def test_says_what_to_do_while_nothing_is_drawn(page: "Page") -> None:
    hint = page.get_by_text("Draw a digit from 0 to 9").first
    assert hint.is_visible()
    assert page.locator("#guess").inner_text() == ""
    assert not any(page.locator("#bars li span:last-child").all_inner_texts())
    draw(page, strokes_of(1))
    assert hint.is_hidden()


def test_says_what_the_network_learned_from(page: "Page") -> None:
    assert f"The network learned from {TRAINED_ON}." in page.locator("footer").inner_text()


def test_a_tap_is_a_dot(page: "Page") -> None:
    draw(page, [[(140, 140)]])
    assert ink_of(page).sum() == pytest.approx(np.pi * 12.5**2, rel=0.02)


def press(page: "Page", name: str) -> None:
    """Press the button of this name, or the key."""
    button = page.get_by_role("button", name=name, exact=True)
    if button.count():
        button.click()
    else:
        page.keyboard.press(name)


@pytest.mark.parametrize("name", ["Undo", "Control+z", "Meta+z"])
def test_undo_takes_the_last_stroke(page: "Page", name: str) -> None:
    draw(page, strokes_of(1))
    one = ink_of(page)
    draw(page, [[(20, 20), (260, 20)]])
    assert count(page) == 2
    press(page, name)
    assert count(page) == 1
    np.testing.assert_array_equal(ink_of(page), one)
    assert page.locator("#guess").inner_text() == "1"


@pytest.mark.parametrize("name", ["Clear", "Escape", "Delete", "Backspace"])
def test_clear_takes_all(page: "Page", name: str) -> None:
    buttons = page.get_by_role("button")
    assert [button.is_enabled() for button in buttons.all()] == [False, False]
    draw(page, [*strokes_of(1), [(20, 20), (260, 20)]])
    assert [button.is_enabled() for button in buttons.all()] == [True, True]
    press(page, name)
    assert count(page) == 0
    assert not ink_of(page).any()
    assert page.locator("#guess").inner_text() == ""
    assert [button.is_enabled() for button in buttons.all()] == [False, False]


def test_the_keyboard_reaches_everything(page: "Page") -> None:
    draw(page, strokes_of(1))
    for key, expected in [("Tab", "undo"), ("Shift+Tab", "surface"), ("Tab", "undo"), ("Tab", "clear")]:
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == expected
        assert "solid 3px" in page.evaluate("getComputedStyle(document.activeElement).outline")
    page.keyboard.press("Enter")
    assert count(page) == 0
    # The button is off, and has handed on the focus that it would have lost.
    assert page.evaluate("document.activeElement.id") == "surface"


def test_draws_by_keyboard(page: "Page") -> None:
    page.reload()
    page.keyboard.press("Tab")
    assert page.locator("#pen").is_visible()
    for _ in range(11):
        page.keyboard.press("ArrowUp")
    assert not ink_of(page).any()
    page.keyboard.press("Space")
    for _ in range(22):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    one = ink_of(page)
    page.keyboard.press("ArrowLeft")
    np.testing.assert_array_equal(ink_of(page), one)
    assert page.locator("#guess").inner_text() == "1"
    rows, columns = np.nonzero(one > 0.9)
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == [51, 228, 128, 151]

    page.keyboard.down("ArrowLeft")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowUp")
    page.keyboard.up("ArrowLeft")
    assert page.locator("#strokes path").last.get_attribute("d") == "M126 217h.01L119 210"


@pytest.fixture
def dispatch(page: "Page") -> Callable[..., None]:
    """Touch at points, or move a pen, on the drawing surface of 280 by 280."""
    session = page.context.new_cdp_session(page)
    box = page.locator("#surface").bounding_box()
    assert box is not None

    def dispatch(kind: str, *points: tuple[float, float]) -> None:
        places = [
            {"x": box["x"] + x * box["width"] / 280, "y": box["y"] + y * box["height"] / 280, "id": index}
            for index, (x, y) in enumerate(points)
        ]
        if kind.startswith("touch"):
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})
        else:
            pen = {"pointerType": "pen", "button": "left", "buttons": 1, "clickCount": 1}
            session.send("Input.dispatchMouseEvent", {"type": kind, "x": places[0]["x"], "y": places[0]["y"], **pen})

    return dispatch


def test_draws_by_touch_with_one_finger(page: "Page", dispatch: Callable[..., None]) -> None:
    dispatch("touchStart", (140, 40))
    for y in range(50, 220, 10):
        dispatch("touchMove", (140, y))
    dispatch("touchStart", (140, 210), (30, 30))
    dispatch("touchMove", (140, 210), (50, 50))
    dispatch("touchEnd")
    assert count(page) == 1
    assert not ink_of(page)[:, :100].any()
    assert page.locator("#guess").inner_text() == "1"
    assert page.evaluate("scrollY") == 0


def test_the_pen_draws_where_a_palm_rests(page: "Page", dispatch: Callable[..., None]) -> None:
    dispatch("touchStart", (230, 250))  # the palm, first
    dispatch("mousePressed", (100, 40))
    for y in range(50, 220, 10):
        dispatch("mouseMoved", (100, y))
        dispatch("touchMove", (230, 250 - y / 10))
    dispatch("mouseReleased", (100, 220))
    dispatch("touchEnd")
    assert count(page) == 1
    one = ink_of(page)
    assert not one[:, 150:].any()
    assert page.locator("#guess").inner_text() == "1"
    dispatch("touchStart", (230, 250))  # again, before the next stroke
    dispatch("touchEnd")
    np.testing.assert_array_equal(ink_of(page), one)
    page.reload()  # and forget the pen


def test_tells_screen_readers_once_a_digit_is_drawn(browser: "Browser", file: Path) -> None:
    page = browser.new_page()
    page.clock.install(time=0)
    page.goto(file.as_uri())
    page.clock.pause_at(10)
    live = page.locator("[aria-live=polite]")
    draw(page, strokes_of(7))
    page.clock.run_for(500)
    assert "probability" not in live.inner_text()
    page.clock.run_for(500)
    assert re.fullmatch(r"7, probability \d+%", live.inner_text())
    page.close()


@pytest.mark.parametrize("width", [320, 768])
def test_never_scrolls_sideways(page: "Page", width: int) -> None:
    page.set_viewport_size({"width": width, "height": 600})
    draw(page, strokes_of(1))
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_is_readable_by_day_and_by_night(page: "Page") -> None:
    grounds = []
    draw(page, strokes_of(3))
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        paper, *marks = page.evaluate(
            """[["#marks", "backgroundColor"], ["#marks .for", "fill"], ["#marks .against", "stroke"]]
            .map(([element, property]) => getComputedStyle(document.querySelector(element))[property])"""
        )
        for mark in marks:
            low, high = sorted([luminance(paper), luminance(mark)])
            assert (high + 0.05) / (low + 0.05) >= 3, (scheme, mark)
        ground, *texts = page.evaluate(
            """[["html", "backgroundColor"], ["html", "color"], ["#guess", "color"], ["h2", "color"], ["#hint", "fill"]]
            .map(([element, property]) => getComputedStyle(document.querySelector(element))[property])"""
        )
        grounds.append(luminance(ground))
        for text in texts:
            low, high = sorted([luminance(ground), luminance(text)])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, text)
    light, dark = grounds
    assert light > 0.8
    assert dark < 0.05


def test_bars_are_seen_in_forced_colours(page: "Page") -> None:
    page.emulate_media(forced_colors="active", reduced_motion="reduce")
    draw(page, strokes_of(3))
    lengths = page.evaluate("[...bars.children].map(bar => Number(bar.style.getPropertyValue('--probability')))")
    least, most = (
        Image.open(io.BytesIO(page.locator(".bar").nth(lengths.index(length)).screenshot())).convert("L")
        for length in (min(lengths), max(lengths))
    )
    page.emulate_media(forced_colors="none")
    assert abs(least.getpixel((10, 5)) - most.getpixel((10, 5))) > 60  # type: ignore[operator]


def test_without_scripts_it_says_so(browser: "Browser", file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("body").inner_text().split("\n\n") == [
        "Draw a digit",
        "To draw here, open this page in a browser that runs JavaScript.",
    ]
    context.close()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `rgb(r, g, b)`, from 0 to 1."""
    values = np.array(re.findall(r"\d+", colour), dtype=float) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_moves_nothing_for_those_who_ask_for_it(page: "Page") -> None:
    duration = "getComputedStyle(document.querySelector('.bar'), '::before').transitionDuration"
    assert page.evaluate(duration) == "0.15s"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(duration) == "0s"


def test_asks_for_nothing_but_itself(opened: tuple["Page", list[str]], file: Path) -> None:
    page, events = opened
    events.clear()
    page.reload()
    draw(page, strokes_of(7))
    page.keyboard.press("Escape")
    # A browser that shows icons loads this one.
    assert page.evaluate(
        "icon => new Promise(done => Object.assign(new Image(), {src: icon, onload: () => done(true)}))",
        page.locator("link[rel=icon]").get_attribute("href"),
    )
    assert [event for event in events if not event.startswith("data:")] == [file.as_uri()]


ATTEMPTS = {
    "connect-src": "fetch('https://example.org').catch(() => {})",
    "img-src": "new Image().src = 'https://example.org/a.png'",
    "script-src-elem": "add('script', {text: '1'})",
    "style-src-elem": "add('style', {textContent: 'p {}'})",
    "base-uri": "add('base', {href: 'https://example.org'})",
    "form-action": "add('form', {action: 'https://example.org'}).submit()",
}


def test_may_not_ask_for_more(browser: "Browser", file: Path) -> None:
    page = browser.new_page()
    page.goto(file.as_uri())
    for directive, attempt in ATTEMPTS.items():
        refused = page.evaluate(
            f"""new Promise((done) => {{
                const options = {{ once: true }};
                addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective), options);
                setTimeout(done, 3000);
                const add = (tag, properties) =>
                    document.body.appendChild(Object.assign(document.createElement(tag), properties));
                {attempt};
            }})"""
        )
        assert refused == directive
    page.close()
