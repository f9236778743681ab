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
    """One tab at a time. Use it in a `with`; what the console and the network complain of is in
    `complaints`.
    """

    def __init__(self, folder: Path) -> None:
        port = f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"
        self.process = subprocess.Popen(
            [CHROMIUM, *OPTIONS, *port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.loop, self.numbers, self.complaints = asyncio.new_event_loop(), itertools.count(1), []
        self.sockets, self.visitor = [], None
        try:
            self.host, path = self._address(folder / "DevToolsActivePort")
            self._connect(path)
        except BaseException:
            self.__exit__()
            raise

    def _address(self, file: Path) -> tuple[str, str]:
        for _ in range(600):
            if file.exists() and "/devtools" in (said := file.read_text()):
                lines = said.split("\n")
                return f"ws://127.0.0.1:{lines[0]}", lines[1]
            time.sleep(0.1)
        raise TimeoutError("chromium did not start")

    def _connect(self, path: str) -> None:
        """What is sent from here on goes to the browser, or to this tab of it."""
        connect = lambda: websocket_connect(self.host + path, max_message_size=2**28)
        self.sockets.append(self._wait(connect))

    def _visit(self) -> None:
        """A tab of a visitor who was never here, in the place of the one before: what a page stores
        is written behind its end, so that clearing it can come too early.
        """
        while len(self.sockets) > 1:
            self.sockets.pop().close()
        if self.visitor:
            self.send("Target.disposeBrowserContext", browserContextId=self.visitor)
        self.visitor = self.send("Target.createBrowserContext")["browserContextId"]
        tab = self.send("Target.createTarget", url="about:blank", browserContextId=self.visitor)[
            "targetId"
        ]
        self._connect(f"/devtools/page/{tab}")
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _wait(self, begin):
        async def within():
            return await asyncio.wait_for(begin(), 60)

        return self.loop.run_until_complete(within())

    def send(self, method: str, **options):
        """One command, and its result; what happens meanwhile is heard."""
        number = next(self.numbers)
        self._wait(
            lambda: self.sockets[-1].write_message(
                json.dumps({"id": number, "method": method, "params": options})
            )
        )
        while True:
            message = json.loads(self._wait(self.sockets[-1].read_message))
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
        self._visit()
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
        if self.sockets:
            for socket in self.sockets:
                socket.close()
            self.loop.run_until_complete(asyncio.sleep(0.1))
        self.process.terminate()
        self.process.wait(30)
        self.loop.close()
