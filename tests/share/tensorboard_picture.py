"""Takes the README's picture of TensorBoard: `python tests/share/tensorboard_picture.py LOGDIR PICTURE`."""

import shutil
import subprocess
import sys
from time import sleep
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import sync_playwright

ADDRESS = "http://localhost:6123/"


def main(logdir: str, picture: str) -> None:
    server = subprocess.Popen(["tensorboard", "--logdir", logdir, "--port", "6123"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(60):
            try:
                urlopen(ADDRESS).close()
                break
            except URLError:
                sleep(1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            page = browser.new_page(viewport={"width": 1240, "height": 1030})
            page.goto(f"{ADDRESS}?darkMode=false&smoothing=0&tagFilter=(train%7Cval)%2F(loss%7Cacc)#timeseries")
            page.get_by_label("Close side pane").or_(page.locator("settings-view-container button")).first.click()
            sleep(5)  # curves are drawn bit by bit
            page.screenshot(path=picture)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
