"""The page of a run in a real browser without a network: one tiny run of each modality."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmssl.data import DataArguments, Samples
from mmssl.data.builtin import BUILTIN
from mmssl.discovery import names
from mmssl.encoder import EncoderConfig
from mmssl.modeling import make_modality
from mmssl.objectives.contrastive import Contrastive
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import TrainArguments, load_objective, pretrain
from tests.matrix.cases import MODALITIES

pytestmark = pytest.mark.slow
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("there is no Chromium", allow_module_level=True)

CLASSES = ["<script>window.hacked = 1</script>", '<img src=x onerror="window.hacked = 1">']
COUNT = 40
CASES = [*names("modalities"), "views"]


def train(case: str, folder: Path) -> Path:
    """A run of a few steps on 40 samples of two classes; "views" is one that reconstructs nothing."""
    name = "image" if case == "views" else case
    options, make = MODALITIES[name]
    labels = np.arange(COUNT) % 2

    def masked(model: Any) -> MaskedReconstruction:
        return MaskedReconstruction(model, views=False, decoder_layers=1, decoder_hidden_size=16)

    def contrast(model: Any) -> Contrastive:
        return Contrastive(model, projector_hidden_size=16, projector_size=8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILTIN, "tiny", lambda split: Samples(make(COUNT), "</script> {}".format, labels, CLASSES))
        from mmssl.evaluation.report import write_report

        run = pretrain(
            make_modality(name, options),
            contrast if case == "views" else masked,
            EncoderConfig(16, 2, 2, class_token=name != "speech"),
            DataArguments("tiny"),
            TrainArguments(
                str(folder), max_train_steps=4, per_device_train_batch_size=8, logging_steps=1, health_steps=2
            ),
        )
        return write_report(run, load_objective(run))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    software = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, headless=True, args=software)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports by case, each made when it is first asked for."""

    class Made(dict):
        def __missing__(self, case: str) -> Path:
            for package, modality in (("torchaudio", "speech"), ("torch_geometric", "graph"), ("kornia", "views")):
                if case == modality:
                    pytest.importorskip(package, reason=f"{package} is not installed")
            self[case] = train(case, tmp_path_factory.mktemp(case))
            return self[case]

    return Made()


class Opened:
    """A page in the browser; what went wrong in it, and what it asked the network for."""

    def __init__(self, browser: Any, path: Path, width: int = 1200):
        self.wrong: list[str] = []
        self.asked: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
        context.set_offline(True)
        context.route("**/*", self.route)
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.goto(path.as_uri())

    def route(self, route: Any) -> None:
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: Any, *error: object) -> None:
        hacked = self.page.evaluate("window.hacked")
        self.page.context.close()
        if kind is None:
            assert not self.wrong and not self.asked and hacked is None


@pytest.mark.parametrize("case", CASES)
def test_everything_is_drawn_without_a_network(case: str, pages: dict[str, Path], browser: Any) -> None:
    with Opened(browser, pages[case]) as page:
        assert page.query_selector_all("section") and "Left out" not in page.inner_text("main")
        plots = page.query_selector_all(".plot")
        assert len(plots) > 8
        for plot in plots:
            plot.scroll_into_view_if_needed()
            plot.wait_for_selector(".js-plotly-plot .main-svg", state="attached", timeout=20_000)
        assert page.evaluate("""[...document.images].every((image) => image.complete && image.naturalWidth > 0)""")
        # What looks like elements in names and classes is text.
        assert CLASSES[0] in page.inner_text("main") and "</script>" in page.inner_text("main")
        if case in ("image", "video"):
            assert page.query_selector_all(".samples img") and page.query_selector_all(".attended img")
        for sound in page.query_selector_all("audio"):
            assert (
                sound.evaluate("""(sound) => new Promise((done) => {
                sound.addEventListener("loadedmetadata", () => done(sound.duration)); sound.load(); })""")
                > 0.1
            )
        assert bool(page.query_selector("audio")) == (case == "speech")


@pytest.mark.parametrize("case", CASES)
def test_a_narrow_window_needs_no_sideways_scrolling(case: str, pages: dict[str, Path], browser: Any) -> None:
    with Opened(browser, pages[case], width=500) as page:
        page.wait_for_selector(".js-plotly-plot")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 500


def test_buttons_change_the_map_and_clicks_show_neighbours(pages: dict[str, Path], browser: Any) -> None:
    with Opened(browser, pages["image"]) as page:
        page.locator(".map").scroll_into_view_if_needed()
        facts = json.loads(page.text_content(".map script.facts"))
        assert {"PCA", "t-SNE"} <= set(facts["maps"])

        def where() -> list[list[float]]:
            """(x, y) of each sample as the plot has them."""
            found = page.evaluate("""() => document.querySelector(".map .canvas").data.slice(0, -2).map(
                (trace) => [trace.customdata, trace.x, trace.y].map((each) => Array.from(each)))""")
            places = {i: [x, y] for trace in found for i, x, y in zip(*trace, strict=True)}
            return [places[i] for i in range(COUNT)]

        for name in ("PCA", "t-SNE", "PCA"):
            page.click(f'.map button[data-map="{name}"]')
            page.wait_for_timeout(100)
            np.testing.assert_allclose(np.transpose(where()), facts["maps"][name], atol=1e-3)
            assert page.get_attribute(f'.map button[data-map="{name}"]', "aria-pressed") == "true"
            assert page.locator('.map button[aria-pressed="true"]').count() == 1

        spot = page.evaluate("""() => {
            const canvas = document.querySelector(".map .canvas"), box = canvas.getBoundingClientRect();
            const { xaxis, yaxis } = canvas._fullLayout, [trace] = canvas.data;
            return [box.x + xaxis._offset + xaxis.d2p(trace.x[0]), box.y + yaxis._offset + yaxis.d2p(trace.y[0])]; }""")
        page.mouse.move(*spot)
        page.mouse.click(*spot)
        page.wait_for_selector(".neighbors .chosen")
        chosen = facts["names"].index(page.locator(".neighbors .chosen small").last.inner_text())
        shown = [each.inner_text() for each in page.locator(".neighbors .neighbor small:last-child").all()]
        assert shown == [facts["names"][i] for i in facts["neighbors"][chosen]] and len(shown) == 8
        assert page.locator(".neighbors img").count() == 9

        def rings() -> list[list[float]]:
            found = page.evaluate("""() => document.querySelector(".map .canvas").data.slice(-2).map(
                ({ x, y }) => [Array.from(x), Array.from(y)])""")
            return np.transpose(np.concatenate(found, axis=1)).tolist()

        for name in ("PCA", "t-SNE"):  # rings go with their points
            page.click(f'.map button[data-map="{name}"]')
            page.wait_for_timeout(100)
            wanted = np.transpose(facts["maps"][name])[[*facts["neighbors"][chosen], chosen]]
            np.testing.assert_allclose(rings(), wanted, atol=1e-3)
        page.locator(".neighbors .neighbor").first.click()  # a neighbour's own neighbours
        assert page.locator(".neighbors .chosen small").last.inner_text() == shown[0]


def test_curves_are_zoomed_together(pages: dict[str, Path], browser: Any) -> None:
    with Opened(browser, pages["image"]) as page:
        for plot in page.query_selector_all(".plot.curve"):
            plot.scroll_into_view_if_needed()
            plot.wait_for_selector(".js-plotly-plot")
        zoom = """(change) => Plotly.relayout(document.querySelector(".plot.curve .canvas"), change)"""
        ranges = """() => [...document.querySelectorAll(".plot.curve .canvas")].map(
            (canvas) => canvas._fullLayout.xaxis.range)"""
        before = page.evaluate(ranges)
        page.evaluate(zoom, {"xaxis.range[0]": 1.5, "xaxis.range[1]": 2.5})
        page.wait_for_timeout(500)
        after = page.evaluate(ranges)
        assert len(after) > 8 and all(each == [1.5, 2.5] for each in after) and before[1] != [1.5, 2.5]
        page.evaluate(zoom, {"xaxis.autorange": True})
        page.wait_for_timeout(500)
        assert page.evaluate(ranges) == before


def test_a_clip_plays_pauses_and_can_be_moved(pages: dict[str, Path], browser: Any) -> None:
    with Opened(browser, pages["video"]) as page:
        sample = page.locator(".samples .sample").first
        sample.scroll_into_view_if_needed()
        pictures, button, slider = (
            sample.locator("img.frames"),
            sample.locator(".player button"),
            sample.locator("input"),
        )
        assert pictures.count() == 3

        def shown() -> list[str]:
            return [picture.get_attribute("src") for picture in pictures.all()]

        first = shown()
        button.click()
        assert button.inner_text() == "Pause"
        page.wait_for_function("(slider) => slider.value !== '0'", arg=slider.element_handle())
        assert shown()[0] != first[0]
        button.click()
        assert button.inner_text() == "Play"
        paused = shown()
        page.wait_for_timeout(500)
        assert shown() == paused
        slider.fill("0")
        assert shown() == first
        slider.fill("3")
        assert "frame 4 of 4" in sample.inner_text() and shown()[0] != first[0]


def test_a_scene_can_be_turned(pages: dict[str, Path], browser: Any) -> None:
    with Opened(browser, pages["point_cloud"]) as page:
        scene = page.locator(".samples .plot.space").first
        scene.scroll_into_view_if_needed()
        scene.locator(".gl-container canvas").first.wait_for(timeout=20_000)
        page.wait_for_timeout(1000)
        eye = """(plot) => Object.values(plot.querySelector(".canvas")._fullLayout.scene._scene.getCamera().eye)"""
        before, box = scene.evaluate(eye), scene.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 60, y + 20, steps=8)
        page.mouse.up()
        page.wait_for_timeout(500)
        assert np.abs(np.subtract(scene.evaluate(eye), before)).max() > 0.1
