"""examples/app.py: started, clicked and looked at in a browser."""

import base64
import importlib.util
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import tiny
import transformers
from adapters.adapter_tiny_detectors import LABELS, tiny_detector
from PIL import Image

from hf_bcd.adapters import adapt, image_processor
from hf_bcd.figures.segmentation import palette
from hf_bcd.runs.predicting import predict_pictures


APP = Path(__file__).parent.parent / "examples" / "app.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gradio") is None, reason="gradio is missing: pip install 'hf_bcd[app]'"
    ),
]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"student{seed}")
        model = tiny.tiny_segformer(seed=seed)
        model.save_pretrained(folder)
        image_processor(adapt(model), shortest_edge=None).save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    Image.fromarray(np.asarray(tiny.scenes()["validation"][0]["image"])).save(path)
    return path


@pytest.fixture(scope="module")
def address(students: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log.txt"
    quiet = {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": str(APP.parents[1]), "no_proxy": "127.0.0.1,localhost"}
    command = [sys.executable, str(APP), *map(str, students), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **quiet})
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urlopen(f"http://127.0.0.1:{port}/", timeout=20).close()
                break
            except (URLError, TimeoutError):
                time.sleep(1)
        else:
            pytest.fail(f"the app does not answer: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1500"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def image_of(browser: Any, element: str) -> np.ndarray:
    """The picture that an element shows, drawn once more by the browser itself."""
    script = """
        const image = document.querySelector(arguments[0] + " img"), done = arguments[1];
        const canvas = Object.assign(document.createElement("canvas"), {width: image.naturalWidth, height: image.naturalHeight});
        canvas.getContext("2d").drawImage(image, 0, 0);
        done(canvas.toDataURL("image/png"));
    """
    data = browser.execute_async_script(script, element).partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_two_students_are_run_and_compared(address: str, picture: Path, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 180)
    browser.get(address)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]").send_keys(str(picture))
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#picture img"))
    browser.find_element(By.CSS_SELECTOR, "#run").click()
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#slider img") and "ms a pass" in b.page_source)
    text = browser.find_element(By.CSS_SELECTOR, "#numbers").text
    browser.save_screenshot(str(tmp_path / "app.png"))

    pixels = np.asarray(Image.open(picture))
    mask, overlay, boundary = (image_of(browser, f"#{name}") for name in ("mask", "overlay", "boundary"))
    assert mask.shape == overlay.shape == boundary.shape == pixels.shape
    colours = {tuple(colour) for colour in palette(tiny.tiny_segformer().config.num_labels).tolist()}
    assert {tuple(colour) for colour in mask.reshape(-1, 3).tolist()} <= colours
    assert np.abs(overlay - (0.5 * pixels + 0.5 * mask)).max() <= 1
    assert text.count("student0") == text.count("student1") == 1
    assert len(browser.find_elements(By.CSS_SELECTOR, "#slider img")) == 2
    shown = np.asarray(Image.open(tmp_path / "app.png").convert("RGB"))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 50, "the page is blank"


PROCESSORS = {
    "retinanet": transformers.DeformableDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}),
    "rf_detr-masks": transformers.RfDetrImageProcessor(size={"height": 64, "width": 64}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_boxes_and_masks_of_objects_are_drawn_as_predict_draws_them(
    kind: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_detector(kind, LABELS).save_pretrained(tmp_path)
    PROCESSORS[kind].save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("app", APP)
    assert spec is not None and spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    monkeypatch.setattr(app, "LEAST_SCORE", 0.0)  # weights are random
    mask, overlay, boundary, (left, right), table = app.show(str(tmp_path), "", Image.open(picture), False)
    pixels = np.asarray(Image.open(picture))
    assert mask is None and boundary is None and overlay.shape == pixels.shape
    assert np.array_equal(left, pixels) and np.array_equal(right, overlay) and not np.array_equal(overlay, pixels)
    out = tmp_path / "out"
    predict_pictures(str(tmp_path), picture, out, least_score=0.0, quiet=True)
    np.testing.assert_array_equal(overlay, np.asarray(Image.open(out / "overlays" / picture.name)))
    assert any(label in table for label in LABELS.values())


def test_a_mistake_is_a_message_on_the_page(address: str, picture: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(address)
    wait = WebDriverWait(browser, 180)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#run"))
    browser.find_element(By.CSS_SELECTOR, "#run").click()
    wait.until(lambda b: "Choose a picture first." in b.page_source)
