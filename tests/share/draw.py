"""Draw a 3 on the page that `demo` writes, for the README: `python tests/share/draw.py demo.html page.png`."""

import shutil
import sys
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

# On the drawing surface, in percent along both axes.
POINTS = "30,22 52,14 66,27 57,43 44,48 62,53 70,68 54,85 28,80"

page_file, picture_file = map(Path, sys.argv[1:])
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1000, "height": 720})
    page.goto(page_file.resolve().as_uri())
    surface = page.locator("#surface").bounding_box()
    assert surface
    curve = np.array([point.split(",") for point in POINTS.split()], dtype=float) / 100
    for _ in range(4):  # cut the corners, as Chaikin did
        one, other = curve[:-1], curve[1:]
        cut = np.stack([0.75 * one + 0.25 * other, 0.25 * one + 0.75 * other], 1).reshape(-1, 2)
        curve = np.concatenate([curve[:1], cut, curve[-1:]])
    for index, (across, down) in enumerate(curve.tolist()):
        page.mouse.move(surface["x"] + across * surface["width"], surface["y"] + down * surface["height"])
        if index == 0:
            page.mouse.down()
    page.mouse.up()
    page.wait_for_timeout(500)
    page.screenshot(path=picture_file, full_page=True)
    browser.close()
