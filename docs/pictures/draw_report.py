"""Draws docs/pictures/report.png: the report of a detector of `uniad-fast data objects`, in a browser.

    pip install -e '.[dev]' && apt-get install chromium && python docs/pictures/draw_report.py

The pictures are photographs of scikit-image's wheel, which their authors have given away (CC0, or NASA's).
"""

import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from uniad_fast import AnomalyDetector
from uniad_fast.data.datasets import load_dataset
from uniad_fast.deploy.report import Shown, write_report
from uniad_fast.studies.objects import write_objects

WIDTH, HEIGHT = 1180, 900


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, page = Path(folder, "objects"), Path(folder, "report.html")
        write_objects(data)
        dataset = load_dataset(str(data))
        detector = AnomalyDetector("tf_efficientnet_lite0", 128).fit(dataset)
        write_report(detector, [Shown.of(sample) for sample in dataset.test], page, "objects")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
            tab.goto(page.as_uri())
            tab.wait_for_selector(".cell")
            tab.evaluate("for (const id of ['curves', 'tables']) document.getElementById(id).style.display = 'none'")
            tab.screenshot(path=str(Path(folder, "shot.png")))
        with Image.open(Path(folder, "shot.png")) as shot:
            shot.convert("RGB").quantize(200).save(Path(__file__).with_name("report.png"), optimize=True)


if __name__ == "__main__":
    main()
