"""A browser on a leash: the few calls of the W3C WebDriver protocol that the tests need, over HTTP.

https://www.w3.org/TR/webdriver2/
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, by the standard
KEYS = {"Home": "\ue011", "End": "\ue010", "PageUp": "\ue00e", "PageDown": "\ue00f", "Delete": "\ue017",
        "Left": "\ue012", "Right": "\ue014", "Shift": "\ue008"}  # fmt: skip


class Browser:
    """Debian's chromium without a window, by its chromedriver.

    Args:
        profile: folder of its profile, which keeps what pages store.
        downloads: folder in which it saves files.
        size: of the window, in pixels.
        dark: whether pages are asked to be dark.
    """

    def __init__(self, profile: Path, downloads: Path, size: tuple[int, int] = (1280, 900), dark: bool = False) -> None:
        self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(
            found[1] for line in self.process.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        self.url = f"http://127.0.0.1:{port}/session"
        switches = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars "
            f"--disable-component-update --disable-sync --user-data-dir={profile} --window-size={size[0]},{size[1]} "
            f"--blink-settings=preferredColorScheme={int(not dark)}"
        ).split()
        options = {"args": switches, "prefs": {"download.default_directory": str(downloads)}}
        logs = {"browser": "ALL"}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        self.url += "/" + self._call("POST", "", {"capabilities": capabilities})["sessionId"]

    def _call(self, verb: str, path: str, body: dict | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"}, method=verb)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self._call("POST", "/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        """Runs a script in the page and returns its value."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def text(self, selector: str) -> str:
        return self.run(f"return document.querySelector({json.dumps(selector)}).textContent")

    def _find(self, selector: str) -> str:
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def choose_file(self, selector: str, file: Path) -> None:
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": str(file)})

    def press(self, *keys: str) -> None:
        """Presses keys one after the other; `Shift+End` holds the first while it presses the last."""
        actions = []
        for key in keys:
            held = [KEYS.get(part, part) for part in key.split("+")]
            actions += [{"type": "keyDown", "value": one} for one in held]
            actions += [{"type": "keyUp", "value": one} for one in reversed(held)]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def complaints(self) -> list[str]:
        """What the browser has logged since the last call: errors of scripts, and what the page's policy forbade."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def picture(self, file: Path) -> Path:
        file.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))
        return file

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.communicate()
