"""A headless Chromium for tests: pages on their own from its command line, those behind a login by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

_WORDS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
_PATIENCE_S = 120.0
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Chromium:
    """The program, and the folder of what it remembers."""

    program: str
    profile: Path

    def browse(self, url: str, picture: Path, *more: str) -> str:
        """A page as it is shown: a picture of it, and its text."""
        words = [self.program, *_WORDS, f"--user-data-dir={self.profile}", "--virtual-time-budget=20000", *more]
        subprocess.run([*words, f"--screenshot={picture}", url], check=True, capture_output=True, timeout=240)
        shown = subprocess.run([*words, "--dump-dom", url], check=True, capture_output=True, timeout=240)
        return shown.stdout.decode()

    def browse_as(self, token: str, site: str, page: str, wanted: Sequence[str], picture: Path) -> tuple[str, str]:
        """What a page of the Ray dashboard at `site` shows to somebody without the token, and then with it, once that has all
        `wanted` words; a picture of the latter."""
        return asyncio.run(self._browse_as(token, site + page, wanted, picture))

    async def _browse_as(self, token: str, url: str, wanted: Sequence[str], picture: Path) -> tuple[str, str]:
        async with _tab(self.program, self.profile) as tab:
            await tab.ask("Page.navigate", url=url)
            before = await tab.text_with(["oken"])
            assert await tab.run(_LOGIN % token) == 200
            await tab.ask("Page.reload")
            after = await tab.text_with(wanted)
            shot = await tab.ask("Page.captureScreenshot")
            picture.write_bytes(base64.b64decode(shot["data"]))
            return before, after


# What the dashboard's own dialog does.
_LOGIN = "fetch('/api/authenticate', {method: 'POST', headers: {Authorization: 'Bearer %s'}}).then(answer => answer.status)"


@dataclass
class _Tab:
    """A page that is steered."""

    socket: aiohttp.ClientWebSocketResponse
    asked: int = 0

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.asked += 1
        await self.socket.send_json({"id": self.asked, "method": method, "params": parameters})
        while (answer := await self.socket.receive_json(timeout=_PATIENCE_S)).get("id") != self.asked:
            pass  # an event
        assert "result" in answer, answer
        return answer["result"]

    async def run(self, script: str) -> Any:
        """What JavaScript comes to, promises kept."""
        answer = await self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value")

    async def text_with(self, words: Sequence[str]) -> str:
        """The page's visible text as soon as all `words` are in it."""
        text = ""
        for _ in range(int(_PATIENCE_S / _LOOK_EVERY_S)):
            text = await self.run("document.body ? document.body.innerText : ''") or ""
            if all(word in text for word in words):
                return text
            await asyncio.sleep(_LOOK_EVERY_S)
        raise AssertionError(f"expected {words} on the page, got: {text[:2000]}")


@asynccontextmanager
async def _tab(program: str, profile: Path) -> AsyncIterator[_Tab]:
    """While inside, a browser with one empty tab."""
    words = [*_WORDS, f"--user-data-dir={profile}", "--remote-debugging-port=0", "--window-size=1400,1000", "about:blank"]
    process = await asyncio.create_subprocess_exec(program, *words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as session:
            address = await _tab_address(session, profile / "DevToolsActivePort")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                yield _Tab(socket)
    finally:
        process.terminate()
        await process.wait()


async def _tab_address(session: aiohttp.ClientSession, said: Path) -> str:
    for _ in range(int(_PATIENCE_S / _LOOK_EVERY_S)):
        if said.exists() and (port := said.read_text().partition("\n")[0]):
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            if tabs:
                return tabs[0]["webSocketDebuggerUrl"]
        await asyncio.sleep(_LOOK_EVERY_S)
    raise AssertionError("Chromium did not say where it listens")
