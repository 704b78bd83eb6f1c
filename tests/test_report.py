"""The report: in a browser, from disk, with what it says held against what `eval` says."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import call
from PIL import Image

from uniad_fast import AnomalyDetector
from uniad_fast.data.datasets import load_dataset
from uniad_fast.deploy.report import Shown, write_report
from uniad_fast.detect.evaluation import evaluate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def data(made_up_classes, tmp_path_factory):
    """The made-up classes, of which one has a name that is markup, and an image that is long."""
    root = tmp_path_factory.mktemp("report") / "data"
    shutil.copytree(made_up_classes, root)
    (root / "class4").rename(root / "<img src=x onerror=alert(1)>")
    long = root / "class0/test/good/long.png"
    Image.open(root / "class0/test/good/000.png").resize((40, 300)).save(long)
    (root / "class0/test/good/junk.png").write_text("junk")
    return root


@pytest.fixture(scope="module")
def page_file(bundle, data):
    target = data.parent / "report.html"
    text = call("report", bundle, data, "-o", target, "--engine", "torch", "-q", code=3)
    assert f"wrote {target}: 41 images" in text and "junk.png" in text
    return target


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, page_file):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", offline=True)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(error))
    page.on("console", lambda message: problems.append(message.text))
    page.on("dialog", lambda dialog: problems.append(dialog.message) or dialog.dismiss())
    page.goto(page_file.absolute().as_uri())
    page.wait_for_selector(".cell")
    yield page
    assert not problems
    context.close()


def data_of(path: Path) -> dict:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1]
    return json.loads(found)


def test_the_page_holds_what_eval_says(page_file, bundle, data):
    content = data_of(page_file)
    detector = AnomalyDetector.load(bundle)
    evaluation = evaluate(detector, load_dataset(data).test, quiet=True)
    assert content["threshold"] == detector.calibration.threshold.value
    by_name = {row[0]: row for row in content["images"]}
    assert len(by_name) == len(evaluation.samples) == 41
    for sample, score in zip(evaluation.samples, evaluation.scores, strict=True):
        row = by_name[str(sample.path.relative_to(data))]
        assert row[4] == pytest.approx(score, abs=0.01 * max(1, abs(score)))
        assert content["classes"][row[1]] == sample.class_name and row[3] == int(sample.defective)
    text = page_file.read_text()
    assert "<img src=x" not in text and "http:" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in text
    assert len(text) < 60e6 / 5000 * 41 + 60_000


def numbers(page):
    return [page.inner_text(f"#{name}") for name in ("alarms", "misses", "above")]


def expected(page_file, limit, verdict=None):
    rows = data_of(page_file)["images"]
    alarms = sum(row[4] > limit and row[3] == 0 for row in rows)
    misses = sum(row[4] <= limit and row[3] == 1 for row in rows)
    good, bad = (sum(row[3] == label for row in rows) for label in (0, 1))
    above = sum(row[4] > limit for row in rows)
    return [f"{alarms} of {good}", f"{misses} of {bad}", f"{above} of {len(rows)}"]


@needs_browser
def test_the_line_is_dragged_and_the_numbers_follow(page, page_file):
    assert numbers(page) == expected(page_file, data_of(page_file)["threshold"])
    grip = page.locator("#limit-line circle").bounding_box()
    page.mouse.move(grip["x"] + 6, grip["y"] + 6)
    page.mouse.down()
    seen = []
    for step in range(1, 6):
        page.mouse.move(grip["x"] + 6 - 60 * step, grip["y"] + 30)
        seen.append(numbers(page))
    page.mouse.up()
    limit = page.evaluate("limit")
    assert limit < data_of(page_file)["threshold"]
    assert numbers(page) == expected(page_file, limit) == seen[-1]
    assert page.locator("#confusion tr").nth(1).inner_text().split() == [
        "good",
        str(21 - int(seen[-1][0].split()[0])),
        seen[-1][0].split()[0],
    ]
    page.fill("#limit", "-1000")
    assert numbers(page) == ["21 of 21", "0 of 20", "41 of 41"]
    page.click("#reset")
    assert numbers(page) == expected(page_file, data_of(page_file)["threshold"])


@needs_browser
def test_filters_order_and_search(page, page_file):
    rows = data_of(page_file)["images"]
    assert page.inner_text("#count") == "41 of 41 images"
    first = page.locator(".cell").first.get_attribute("data-name")
    assert first == max(rows, key=lambda row: row[4])[0]
    page.select_option("#class", label="<img src=x onerror=alert(1)>")
    assert page.inner_text("#count") == "8 of 41 images"
    page.select_option("#kind", label="square")
    assert page.inner_text("#count") == "4 of 41 images"
    page.select_option("#class", "-1")
    page.select_option("#kind", "-1")
    page.fill("#limit", "1000000")
    page.select_option("#verdict", label="miss")
    assert page.inner_text("#count") == "20 of 41 images"
    page.select_option("#order", "1")
    defective = [row for row in rows if row[3] == 1]
    assert page.locator(".cell").first.get_attribute("data-name") == min(defective, key=lambda row: row[4])[0]
    page.fill("#search", "no such name")
    assert page.inner_text("#count") == "0 of 41 images" and page.locator(".cell").count() == 0


@needs_browser
def test_keys_enlarge_and_move(page):
    page.focus("#gallery")
    names = [cell.get_attribute("data-name") for cell in page.locator(".cell").all()[:3]]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#large").is_visible() and page.inner_text("#facts").startswith(names[1])
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#facts").startswith(names[2])
    page.keyboard.press("Escape")
    assert not page.locator("#large").is_visible()
    page.locator(".cell").first.click()
    assert page.inner_text("#facts").startswith(names[0])


@needs_browser
def test_maps_lie_over_their_images(page):
    page.fill("#search", "long")
    frame = page.locator(".cell .frame").first.bounding_box()
    assert frame["height"] / frame["width"] == pytest.approx(300 / 40, rel=0.05)
    page.locator("#opacity").fill("0")
    assert page.evaluate("getComputedStyle(document.querySelector('.frame canvas')).opacity") == "0"


@needs_browser
def test_light_dark_narrow_and_paper(page, browser, page_file):
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    dark = page.evaluate(colour)
    assert sum(map(int, re.findall(r"\d+", light)[:3])) > 600 > 200 > sum(map(int, re.findall(r"\d+", dark)[:3]))
    narrow = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
    narrow.goto(page_file.absolute().as_uri())
    narrow.wait_for_selector(".cell")
    assert narrow.evaluate(colour) == dark
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 400
    page.emulate_media(media="print")
    assert not page.locator("#filters").is_visible() and page.locator("#histogram").is_visible()


@needs_browser
def test_without_labels(browser, bundle, data, tmp_path):
    target = tmp_path / "r.html"
    call("report", bundle, data / "class0/test", "--unlabelled", "-o", target, "-q", code=3)
    page = browser.new_page()
    page.goto(target.absolute().as_uri())
    page.wait_for_selector(".cell")
    assert not page.locator("#curves").is_visible() and page.locator("#histogram").is_visible()
    assert re.fullmatch(r"\d of 9", page.inner_text("#above"))
    assert page.locator("#alarms").count() == 0


@needs_browser
def test_five_thousand_images_are_seen_at_once(browser, page_file, tmp_path):
    """Rows again and again, with thumbnails as long as those of so many images may be."""
    text = page_file.read_text()
    content = data_of(page_file)
    rows = [[f"{k} {row[0]}", *row[1:9], row[9] + "A" * (11_000 - len(row[9])), row[10]] for k, row in
            enumerate(content["images"] * 122)]  # fmt: skip
    many = json.dumps(content | {"images": rows}).replace("<", "\\u003c")
    start, end = text.index('id="data">') + len('id="data">'), text.index("</script>", text.index('id="data">'))
    target = tmp_path / "many.html"
    target.write_text(text[:start] + many + text[end:])
    assert 50e6 < target.stat().st_size < 60e6
    page = browser.new_page()
    page.goto(target.absolute().as_uri(), wait_until="commit")
    page.wait_for_selector(".cell", timeout=8_000)  # 0.9 s on a quiet machine; two cores are shared here
    assert page.locator(".cell").count() < 200
    page.evaluate("document.getElementById('gallery').scrollTop = 1e9")
    page.wait_for_function("document.querySelector('.cell:last-child').dataset.name.length > 0")
    assert page.locator(".cell").count() < 200


def test_what_can_not_be_reported(bundle, data, tmp_path):
    assert "has no test images" in call("report", bundle, data / "class0/train", "-o", tmp_path / "r.html", code=2)
    detector = AnomalyDetector.load(bundle)
    (tmp_path / "x.png").write_text("junk")
    with pytest.raises(ValueError, match=r"no image could be read\n  .*x\.png"):
        write_report(detector, [Shown(tmp_path / "x.png")], tmp_path / "r.html", "t", quiet=True)
    assert not (tmp_path / "r.html").exists()
    detector._trained = detector.trained._replace(calibration=None)
    with pytest.raises(ValueError, match="has no threshold"):
        write_report(detector, [Shown(tmp_path / "x.png")], tmp_path / "r.html", "t", quiet=True)


def test_images_of_several_places_and_shapes(bundle, tmp_path):
    for number, shape in enumerate([(1, 1), (3, 400), (200, 100)]):
        picture = np.full((*shape, 3), 90, np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    shown = [Shown(path) for path in sorted(tmp_path.glob("*.png"))] + [Shown(Path("no such.png"))]
    found = write_report(AnomalyDetector.load(bundle), shown, tmp_path / "r.html", "<b>", quiet=True)
    assert found.images == 3 and len(found.unreadable) == 1
    assert "<title>&lt;b&gt;</title>" in (tmp_path / "r.html").read_text()
