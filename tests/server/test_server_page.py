"""The page in a real browser: Chromium of the system, or the one that CLIPWORKS_CHROMIUM names."""

import os
import re
import shutil
import socket
import threading
import time

import pytest
from small_server import COUNT, picture

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CLIPWORKS_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SLOW = 60_000  # milliseconds: the machine may have other work


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


class Running:
    """The application on a port, in a thread; it can go away and come back."""

    def __init__(self, collection, port=0, **options):
        import uvicorn

        from clipworks.server.app import create_app

        line = socket.socket()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        line.bind(("127.0.0.1", port))
        line.listen(100)
        self.port = line.getsockname()[1]
        self.app = create_app(collection, **options)
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, ws="none", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [line]}, daemon=True)
        self.thread.start()
        self.line = line

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        self.line.close()


@pytest.fixture(scope="module")
def served(place):
    made = Running(place / "kept")
    yield made
    made.stop()


@pytest.fixture
def page(browser, served):
    with opened(browser, served.url) as made:
        yield made


class opened:
    """A page of its own, whose errors and outside requests fail the test."""

    def __init__(self, browser, url, expect=(), **options):
        self.browser, self.url, self.expect, self.options, self.troubles = browser, url, expect, options, []

    def __enter__(self):
        self.context = self.browser.new_context(**self.options)
        page = self.context.new_page()
        page.set_default_timeout(SLOW)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("console", lambda m: self.troubles.append(m.text) if m.type == "error" else None)
        page.on(
            "request", lambda r: None if re.match(rf"({self.url}|data:|blob:)", r.url) else self.troubles.append(r.url)
        )
        page.goto(self.url)
        return page

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert [t for t in self.troubles if not any(e in t for e in self.expect)] == []


def until(page, script, wanted=True):
    """Wait for what a script says; the page's policy forbids the library's own way."""
    end = time.monotonic() + SLOW / 1000
    while (found := page.evaluate(script)) != wanted:
        assert time.monotonic() < end, f"{script} is {found!r}, not {wanted!r}"
        time.sleep(0.05)


def names(page):
    return page.locator(".tile .open").evaluate_all("all => all.map((e) => e.getAttribute('aria-label'))")


def ready(page, count=COUNT):
    until(page, "document.querySelectorAll('.tile').length", count)


def look(page, words):
    page.fill("#words", words)
    page.press("#words", "Enter")
    until(page, "(document.querySelector('.tile figcaption .quiet') || {}).textContent > ''")
    ready(page)


def test_search_by_words_and_without_words(page, kept):
    ready(page)
    assert names(page) == kept.keys
    look(page, "stripes")
    first = names(page)
    assert sorted(first) == sorted(kept.keys)
    assert first != kept.keys
    page.fill("#minus", "noise, stripes")
    page.click("#query button.main")
    until(page, "location.hash.includes('minus')")
    page.go_back()
    until(page, "document.getElementById('minus').value", "")
    ready(page)
    assert names(page) == first
    page.locator(".tile img").first.evaluate("e => e.decode()")  # pictures are shown


def test_filters(page):
    ready(page)
    page.click("#add-filter")
    page.locator(".filter select").nth(0).select_option("label")
    page.locator(".filter select").nth(2).select_option("odd")
    ready(page, COUNT // 2)
    assert all(name.startswith("odd/") for name in names(page))
    page.locator(".filter select").nth(1).select_option("contains")
    page.get_by_label("Remove the filter").click()
    ready(page)


def test_search_by_an_image_and_by_likeness(page, tmp_path):
    ready(page)
    picture(6).resize((360, 240), 0).save(tmp_path / "given.png")
    page.set_input_files("#file", tmp_path / "given.png")
    page.wait_for_selector(".chip img")
    until(page, "(document.querySelector('.tile figcaption .quiet') || {}).textContent > ''")
    assert "even/06.png" in names(page)[:8]  # twice enlarged
    page.locator(".tile .open").first.click()
    chosen = page.text_content("#detail-name")
    page.click("#do-similar")
    ready(page, COUNT - 1)
    assert chosen not in names(page)
    page.get_by_label("Remove like").click()
    ready(page)


def test_an_image_is_dropped(page, tmp_path):
    ready(page)
    picture(3).save(tmp_path / "given.png")
    code = (tmp_path / "given.png").read_bytes().hex()
    page.evaluate("""(code) => {
        const data = new DataTransfer();
        const bytes = Uint8Array.from(code.match(/../g), (x) => parseInt(x, 16));
        data.items.add(new File([bytes], "given.png", { type: "image/png" }));
        dispatchEvent(new DragEvent("dragenter", { dataTransfer: data }));
        window.shown = !document.getElementById("drop").hidden;
        dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
    }""", code)  # fmt: skip
    assert page.evaluate("window.shown")
    page.wait_for_selector(".chip img")
    until(page, "(document.querySelector('.tile .open') || {}).ariaLabel", "odd/03.png")
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File(["no image"], "a.png", { type: "image/png" }));
        dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
    }""")  # fmt: skip
    until(page, "document.getElementById('status').textContent.includes('no image')")


def test_with_the_keyboard_alone(page):
    ready(page)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "words"
    page.keyboard.type("stripes")
    page.keyboard.press("Enter")
    until(page, "(document.querySelector('.tile figcaption .quiet') || {}).textContent > ''")
    page.locator(".tile .open").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.ariaLabel") == names(page)[1]
    page.keyboard.press("x")
    assert page.text_content("#bar strong") == "1 selected"
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[open]")
    page.keyboard.press("Escape")
    until(page, "document.getElementById('detail').open", False)
    page.keyboard.press("s")
    ready(page, COUNT - 1)


def test_lasso_compare_and_labels(page, tmp_path, place, capsys):
    page.goto(page.url.split("#")[0] + "#map")
    until(page, "document.getElementById('map-status').textContent.includes('variance')")
    box = page.locator("#canvas").bounding_box()
    left, top, right, bottom = box["x"] + 2, box["y"] + 2, box["x"] + box["width"] - 2, box["y"] + box["height"] - 2
    middle = (left + right) / 2
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((middle, top), (middle, (top + bottom) / 2), (middle, bottom), (left, bottom), (left, top + 5)):
        page.mouse.move(x, y, steps=3)
    page.mouse.up()
    data = page.evaluate("fetch('/map').then((r) => r.json())")
    centre = (min(data["x"]) + max(data["x"])) / 2
    half = sorted(i for i, x in zip(data["ids"], data["x"], strict=True) if x < centre)
    assert 0 < len(half) < COUNT
    assert page.text_content("#bar strong") == f"{len(half)} selected"
    page.click("#as-a")
    page.click("#compare")
    page.wait_for_selector("#words-a li")
    assert page.locator("#strip-a img").count() == min(12, len(half))

    page.goto(page.url.split("#")[0] + "#search")
    ready(page)
    for label in ("even", "odd, or so"):
        for name in [n for n in names(page) if n.startswith(label[:3])][:4]:
            page.get_by_label(f"Select {name}").click()
        page.fill("#label", label)
        page.press("#label", "Enter")
    assert page.locator(".given").count() == 8
    page.click("nav a[href='#labels']")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(place / "photos" / "labels.csv")
    try:
        from clipworks.cli.main import main

        model = str(place / "toy.safetensors")
        command = [
            "classify",
            str(place / "kept"),
            "--shots",
            str(place / "photos" / "labels.csv"),
            "--method",
            "ridge",
        ]
        assert main([*command, "--encoder", model, "--counts", "--csv"]) == 0
        assert re.search(r"even,\d+", capsys.readouterr().out)
    finally:
        (place / "photos" / "labels.csv").unlink()
    page.reload()
    until(page, "document.querySelectorAll('#label-list img').length", 8)  # they are kept


def test_classes_masks_and_defects(page):
    ready(page)
    page.locator(".tile .open").first.click()
    page.click("#do-mask")
    page.wait_for_selector("#mask-result img")
    page.locator("#mask-result img").evaluate("e => e.decode()")
    page.click("nav a[href='#classify']")
    page.fill("#names", "stripes, noise")
    page.click("#classify button.main")
    page.wait_for_selector(".answer h2")
    assert page.text_content(".answer h2") in ("stripes", "noise", "none of these")
    page.fill("#names", "one, one , ,one")  # a name counts once
    page.click("#classify button.main")
    until(page, "document.querySelector('.answer .bars').children.length == 1")
    assert page.text_content(".answer .bars").startswith("one")
    page.click("nav a[href='#defects']")
    page.click("#defects button.main")
    page.wait_for_selector("#defect-result img")
    assert page.text_content("#defect-result h2") in ("Good", "Defective")


def test_a_server_that_goes_away_and_comes_back(browser, place):
    first = Running(place / "kept")
    with opened(browser, first.url, expect=["ERR_CONNECTION", "Failed to load"]) as page:
        ready(page)
        first.stop()
        page.fill("#words", "stripes")
        page.press("#words", "Enter")
        page.wait_for_selector("#away:not([hidden])")
        second = Running(place / "kept", first.port)
        try:
            until(page, "document.getElementById('away').hidden")
            until(page, "(document.querySelector('.tile figcaption .quiet') || {}).textContent > ''")
            assert page.input_value("#words") == "stripes"  # what was asked meanwhile is still there, and answered
            assert page.locator(".tile").count() > 0
        finally:
            second.stop()


def test_a_token_is_asked_for(browser, place):
    server = Running(place / "kept", token="a-token-of-24-characters")
    try:
        with opened(browser, server.url, expect=["401"]) as page:
            page.fill("#token", "not the right one")
            page.press("#token", "Enter")
            until(page, "document.getElementById('login-status').textContent.includes('not the server')")
            page.fill("#token", "a-token-of-24-characters")
            page.press("#token", "Enter")
            ready(page)
            page.locator(".tile img").first.evaluate("e => e.decode()")
            assert page.locator(".tile img").first.evaluate("e => e.naturalWidth") > 0
    finally:
        server.stop()


def test_an_empty_collection(browser, tmp_path):
    from clipworks.server.service import Settings
    from clipworks.store.collection import Collection

    Collection.create(tmp_path / "empty", dim=4)
    server = Running(tmp_path / "empty", settings=Settings(preload=False))
    try:
        with opened(browser, server.url) as page:
            until(page, "document.getElementById('status').textContent.includes('empty')")
            page.goto(server.url + "/#map")
            until(page, "document.getElementById('map-status').textContent.includes('empty')")
            assert page.locator(".tile").count() == 0
    finally:
        server.stop()


def test_endless_results_and_hostile_names(browser, tmp_path):
    import numpy as np

    from clipworks.server.service import Settings
    from clipworks.store.collection import Collection
    from clipworks.types import Features

    keys = [f"<img src=x onerror=alert(1)> {i:04}" for i in range(600)]
    vectors = np.random.default_rng(0).standard_normal((600, 4)).astype(np.float32)
    made = Collection.create(tmp_path / "many", features=Features(vectors, keys, texts=["<b>bold</b>"] * 600))
    server = Running(made.path, settings=Settings(preload=False))
    try:
        with opened(browser, server.url, expect=["404"]) as page:
            until(page, "document.querySelectorAll('.tile').length >= 60")
            assert page.locator(".tile").count() < 600
            end = time.monotonic() + SLOW / 1000
            while page.locator(".tile").count() < 600:
                assert time.monotonic() < end
                page.evaluate("scrollTo(0, document.body.scrollHeight)")
                time.sleep(0.1)
            assert names(page) == keys
            assert page.locator("main b, main img[src=x]").count() == 0
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_selector(".gone")
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser, served, scheme):
    with opened(browser, served.url, viewport={"width": 360, "height": 720}, has_touch=True, is_mobile=True,
                color_scheme=scheme) as page:  # fmt: skip
        ready(page)
        for view in ("search", "map", "compare", "classify", "masks", "defects", "labels"):
            page.goto(f"{served.url}/#{view}")
            page.wait_for_selector(f"#view-{view}:not([hidden])")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ink, paper)]
        assert abs(lightness[0] - lightness[1]) > 0.6
        assert (lightness[1] > 0.5) == (scheme == "light")
        page.tap("#theme")
        assert page.evaluate("document.documentElement.className") == ("dark" if scheme == "light" else "light")
