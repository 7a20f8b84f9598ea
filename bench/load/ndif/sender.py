"""A raw client of NDIF: one open websocket a user, requests that were serialized before, and answers as bytes.

The protocol is that of nnsight 0.8.1 (`nnsight.intervention.backends.remote`): the socket gives a session's id, the
request goes by HTTP with that id, and the result comes on the socket.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import aiohttp


@dataclass(slots=True, kw_only=True)
class NdifUser:
    """One user's connection; asks for one thing at a time."""

    session: aiohttp.ClientSession
    url: str
    model_key: str
    socket: aiohttp.ClientWebSocketResponse
    session_id: str

    @staticmethod
    async def open(session: aiohttp.ClientSession, url: str, model_key: str) -> NdifUser:
        socket = await session.ws_connect(f"{url}/subscribe", max_msg_size=0)
        session_id = (await socket.receive_json())["session_id"]
        return NdifUser(session=session, url=url, model_key=model_key, socket=socket, session_id=session_id)

    async def ask(self, payload: bytes) -> bytes:
        """The answer's bytes. Raises RuntimeError when the job failed."""
        form = aiohttp.FormData()
        envelope = {"model_key": self.model_key, "session_id": self.session_id, "compress": True, "env": {}}
        form.add_field("data", json.dumps(envelope))
        form.add_field("blob", payload, filename="request", content_type="application/octet-stream")
        async with self.session.post(f"{self.url}/request", data=form) as response:
            if response.status != 200:
                raise RuntimeError(f"NDIF answered {response.status}: {(await response.text())[:300]}")
            await response.read()
        while True:
            message = await self.socket.receive()
            if message.type is aiohttp.WSMsgType.BINARY:
                return bytes(message.data)
            if message.type is not aiohttp.WSMsgType.TEXT:
                raise RuntimeError(f"NDIF closed the socket: {message.type.name}")
            told = json.loads(message.data)
            if told["status"] in ("ERROR", "COMPLETED"):
                raise RuntimeError(f"NDIF: {told['status']}: {told['description'][:300]}")

    async def close(self) -> None:
        await self.socket.close()
