"""A page in a headless chromium, by its debugging protocol: enough to open, to ask, to type and to
look.
"""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

from tornado.websocket import websocket_connect

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
)


class Browser:
    """One tab. Use it in a `with`; what the console and the network complain of is in
    `complaints`.
    """

    def __init__(self, folder: Path) -> None:
        port = f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"
        self.process = subprocess.Popen(
            [CHROMIUM, *OPTIONS, *port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.loop, self.numbers, self.complaints = asyncio.new_event_loop(), itertools.count(1), []
        try:
            address = self._address(folder / "DevToolsActivePort")
            self.socket = self._wait(lambda: websocket_connect(address, max_message_size=2**28))
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise

    def _address(self, file: Path) -> str:
        for _ in range(600):
            if file.exists() and (port := file.read_text().split("\n")[0]):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=20) as answer:
                    return next(
                        tab["webSocketDebuggerUrl"]
                        for tab in json.load(answer)
                        if tab["type"] == "page"
                    )
            time.sleep(0.1)
        raise TimeoutError("chromium did not start")

    def _wait(self, begin):
        async def within():
            return await asyncio.wait_for(begin(), 60)

        return self.loop.run_until_complete(within())

    def send(self, method: str, **options):
        """One command, and its result; what happens meanwhile is heard."""
        number = next(self.numbers)
        self._wait(
            lambda: self.socket.write_message(
                json.dumps({"id": number, "method": method, "params": options})
            )
        )
        while True:
            message = json.loads(self._wait(self.socket.read_message))
            self._hear(message)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _hear(self, message) -> None:
        method, said = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(said["exceptionDetails"].get("text", "exception"))
        if method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
            self.complaints.append(" ".join(str(part.get("value")) for part in said["args"]))
        if method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        if method == "Network.loadingFailed" and not said.get("canceled"):
            self.complaints.append(said["errorText"])

    def ask(self, expression: str):
        """The value of an expression of JavaScript."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60):
        """Ask until the answer is true."""
        end = time.monotonic() + seconds
        while not (answer := self.ask(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)
        return answer

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Go to an address, with a window of this size, and wait until it is loaded."""
        # the page before would hear of the change, and remember it
        self.send("Page.navigate", url="about:blank")
        self.until("location.href === 'about:blank'")
        self.complaints.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        # a visitor who was never here: no color scheme is remembered
        if address.startswith("http"):
            origin = "/".join(address.split("/")[:3])
            self.send("Storage.clearDataForOrigin", origin=origin, storageTypes="local_storage")
        self.send("Page.navigate", url=address)
        self.until(
            f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'"
        )
        time.sleep(0.3)  # scripts that run behind the load
        self.ask("1")

    def picture(self, file: Path, *, whole: bool = False) -> None:
        """A screenshot."""
        file.write_bytes(
            base64.b64decode(
                self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
            )
        )

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if hasattr(self, "socket"):
            self.socket.close()
            self.loop.run_until_complete(asyncio.sleep(0.1))
        self.process.terminate()
        self.process.wait(30)
        self.loop.close()
