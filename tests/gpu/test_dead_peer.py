"""A server that dies in a weight update over NCCL: the trainer's side of the collective ends."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_mapo.errors import RolloutError
from megatron_mapo.rollout.weight_transport import _Group

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

URL = "http://127.0.0.1:1"
PEER = """
import json, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper

body = json.loads(sys.argv[1])
if body["backend"] == "nccl":
    torch.cuda.set_device(1)
store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], is_master=False)
_new_process_group_helper(
    body["world_size"], body["rank_offset"], [], Backend(body["backend"]), PrefixStore(body["group_name"], store),
    group_name=body["group_name"], timeout=timedelta(seconds=60),
)
print("joined", flush=True)
time.sleep(600)
"""


class Server:
    """In the place of a client: its one server joins a group, and is killed when the broadcast has begun."""

    def __init__(self) -> None:
        self.peer: subprocess.Popen | None = None

    async def request(self, url: str, path: str, body: dict[str, Any], timeout: float) -> None:
        if path == "/init_weights_update_group":
            command = [sys.executable, "-c", PEER, json.dumps(body)]
            self.peer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert self.peer.stdout is not None
            assert await asyncio.to_thread(self.peer.stdout.readline) == "joined\n"
            return
        await asyncio.sleep(2)  # the trainer waits in the collective by now
        self.kill()
        raise RolloutError(f"{url}{path}: ServerDisconnectedError")

    async def on_each(self, urls: object, path: str, body: object, timeout: float) -> tuple[dict, dict]:
        return {}, {URL: RolloutError(f"{path}: ClientConnectorError")}

    def kill(self) -> None:
        if self.peer is not None:
            self.peer.kill()
            self.peer.wait()


@pytest.mark.timeout(300)
def test_a_collective_whose_peer_is_dead_ends_with_the_group() -> None:
    device = torch.device("cuda", 0)
    server = Server()

    async def update() -> dict[str, RolloutError]:
        group = _Group(server, {URL: 1}, device, timeout=120.0)  # type: ignore[arg-type]
        await group.join()
        with pytest.raises(RolloutError, match="Disconnected"):
            await group.broadcast({}, torch.zeros(1 << 20, dtype=torch.uint8, device=device))
        return await group.leave()

    try:
        assert URL in asyncio.run(update())  # which waits for the thread that is in the collective
    finally:
        server.kill()
