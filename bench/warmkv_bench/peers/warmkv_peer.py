"""WarmKV as one peer among others: its own server, asked with the whole prompt as the others are."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from warmkv import v1 as pb
from warmkv_bench.client import AGENT_PREFIX, BrokenStream, Client, RequestFailed, generation
from warmkv_bench.peers.peer import Completion, PeerFailed
from warmkv_bench.spawn import ServerFailed, ServerProcess


class WarmKVPeer:
    """Adapter of `warmkv serve --model MODEL`."""

    name = "warmkv"

    def __init__(self, model: Path, timeout_s: float) -> None:
        self._data = Path(tempfile.mkdtemp(prefix="warmkv-bench-"))
        self._process = ServerProcess(["--model", str(model)], self._data)
        self._timeout_s = timeout_s
        self.client: Client | None = None

    async def start(self) -> None:
        try:
            await self._process.start()
        except ServerFailed as failure:
            raise PeerFailed(str(failure)) from None
        self.client = await Client(self._process.address, self._timeout_s).__aenter__()
        await self.client.ready()

    async def stop(self) -> None:
        if self.client is not None:
            await self.client.__aexit__()
            self.client = None
        await self._process.stop()

    async def ask(self, session: str, prompt: str, output_tokens: int) -> Completion:
        if self.client is None:
            raise PeerFailed("warmkv is not running")
        request = generation(AGENT_PREFIX + session, pb.Content(text=prompt), output_tokens)
        request.context_mode = pb.CONTEXT_MODE_REPLACE
        try:
            answer = await self.client.generate(request)
        except (RequestFailed, BrokenStream) as failure:
            raise PeerFailed(str(failure)) from None
        report = answer.finished.cache
        return Completion(answer.token_times_ms, report.prompt_tokens, len(answer.token_ids), report.cached_tokens)

    async def close(self) -> None:
        await self.stop()
        shutil.rmtree(self._data, ignore_errors=True)
