"""Updates reach a real server, are verified there, and a failed one never serves."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
import time

import psutil
import pytest
import torch
from server_support import API_KEY, EOS, changed, load, model_config, reference_logprobs, server_config, tensors
from tiny_models import make_tiny_model
from transformers import PreTrainedModel

from megatron_mapo.config import SyncConfig, SyncMode
from megatron_mapo.errors import RolloutError, WeightSyncError
from megatron_mapo.rollout.checksum import Expected
from megatron_mapo.rollout.client import RolloutClient, Sampling
from megatron_mapo.rollout.server import ServerGroup
from megatron_mapo.rollout.weight_sync import WeightSync
from megatron_mapo.rollout.weight_transport import _listener

PROMPT = [11, 12, 13, 14]
GREEDY = Sampling(12, 0.0, (EOS,))


def assert_serves(call, model: PreTrainedModel, version: int) -> None:
    response = call(lambda c: c.generate(PROMPT, 1, GREEDY))[0]
    reference = reference_logprobs(model, PROMPT, response.token_ids)
    torch.testing.assert_close(torch.tensor(response.logprobs), reference, atol=1e-3, rtol=0)
    assert set(response.weight_versions) == {version}
    assert call(lambda c: c.weight_versions()) == [version]


def make_sync(servers, model_path, folder, **options) -> WeightSync:
    config = SyncConfig(**{"timeout": 60.0, "bucket_mb": 1} | options)
    return WeightSync(config, servers.urls, API_KEY, model_path, folder, torch.device("cpu"))


def test_distributed_updates_are_verified_and_effective(call, sync, model_path):
    for version in (3, 4):
        model = changed(model_path, version)
        report = sync.update(tensors(model), version)
        assert report.nbytes == sum(p.nbytes for p in model.parameters())
        assert report.tensors == len(list(model.parameters()))
        assert len(report.checksum) == 16
        assert_serves(call, model, version)


def test_the_meeting_place_is_open_on_the_servers_interface_alone(call, sync, model_path):
    sync.update(tensors(changed(model_path, 5)), 5)
    mine = psutil.Process().net_connections("inet")
    ports = {c.laddr.port for c in mine if c.status == psutil.CONN_LISTEN}
    assert ports
    for port in ports:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)


@pytest.mark.parametrize(
    ("addresses", "host"),
    [
        (["127.0.0.1", "127.0.0.1"], "127.0.0.1"),
        (["127.0.0.1", "127.0.0.3"], "127.0.0.3"),
        (["127.0.0.3", "127.0.0.4"], "0.0.0.0"),
    ],
)
def test_one_address_is_enough_unless_servers_are_in_several_networks(addresses, host):
    with _listener(addresses) as listener:
        assert listener.getsockname()[0] == host


def test_buckets_are_cut_at_the_limit(call, servers, model_path, sync, monkeypatch):
    monkeypatch.setattr("megatron_mapo.rollout.weight_sync.MIB", 20_000)
    log = servers.servers[0].log
    before = log.read_text().count("/update_weights_from_distributed")
    model = changed(model_path, 8)
    sync.update(tensors(model), 8)  # the embedding alone is larger than a bucket
    assert log.read_text().count("/update_weights_from_distributed") - before > 5
    assert_serves(call, model, 8)


def test_disk_updates_are_verified_and_effective(call, servers, model_path, tmp_path):
    disk = make_sync(servers, model_path, tmp_path, mode=SyncMode.disk)
    for version in (10, 11):
        model = changed(model_path, version)
        disk.update(tensors(model), version)
        assert_serves(call, model, version)
    assert len(list((tmp_path / "weights").iterdir())) == 1
    torch.testing.assert_close(
        load(next((tmp_path / "weights").iterdir())).state_dict(), model.state_dict(), atol=0, rtol=0
    )
    disk.close()


def test_a_running_request_goes_on_with_the_new_weights(call, sync, model_path, servers):
    model = changed(model_path, 20)
    sync.update(tensors(model), 20)
    newer = changed(model_path, 21)  # not while the request runs, which may be over by then
    found = []
    long = Sampling(900, 1.0)
    thread = threading.Thread(target=lambda: found.extend(call(lambda c: c.generate(PROMPT, 1, long, seeds=[1]))))
    thread.start()
    log = servers.servers[0].log
    before = log.read_text().count("Decode batch")
    while thread.is_alive() and log.read_text().count("Decode batch") == before:
        time.sleep(0.005)
    sync.update(tensors(newer), 21)
    thread.join()
    versions = found[0].weight_versions
    assert set(versions) == {20, 21}
    assert versions == sorted(versions)
    assert len(versions) == len(found[0].token_ids)


def test_other_weights_than_the_trainers_are_found_and_do_not_serve(call, sync, model_path, monkeypatch):
    model = changed(model_path, 30)
    add = Expected.add
    # what the trainer holds differs in one element from what arrives at the server
    broken = "model.layers.1.self_attn.k_proj.weight"

    def other(self, name, tensor):
        tensor = tensor.clone()
        if name == broken:
            tensor[3, 5] += 1e-3
        add(self, name, tensor)

    monkeypatch.setattr(Expected, "add", other)
    with pytest.raises(WeightSyncError, match=r"'verify'.*model\.layers\.1\.self_attn\.qkv_proj\.weight \(1 of 14"):
        sync.update(tensors(model), 30)
    with pytest.raises(RolloutError, match="no answer within"):
        call(lambda c: c.generate(PROMPT, 1, GREEDY), timeout=1.0, retries=0)
    monkeypatch.undo()
    sync.update(tensors(model), 31)
    assert_serves(call, model, 31)


@pytest.mark.parametrize("missing", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_that_was_not_sent_is_found(call, sync, model_path, missing):
    model = changed(model_path, 40)
    with pytest.raises(WeightSyncError, match=r"mlp\.gate_up_proj\.weight|model\.norm\.weight"):
        sync.update(((n, t) for n, t in tensors(model) if n != missing), 40)
    sync.update(tensors(model), 41)
    assert_serves(call, model, 41)


def test_after_a_failure_the_iterator_is_run_to_its_end(call, sync, model_path, monkeypatch):
    model = changed(model_path, 50)
    seen = []

    def stream():
        for name, tensor in tensors(model):
            seen.append(name)
            # a shape that the server refuses
            yield name, tensor[:100] if name == "model.embed_tokens.weight" else tensor

    monkeypatch.setattr("megatron_mapo.rollout.weight_sync.MIB", 20_000)
    with pytest.raises(WeightSyncError, match=r"'send'.*status 400"):
        sync.update(stream(), 50)
    assert len(seen) == len(list(model.parameters()))
    sync.update(tensors(model), 51)
    assert_serves(call, model, 51)


def test_an_error_of_the_trainer_is_not_disguised(call, sync, model_path):
    model = changed(model_path, 60)

    def stream():
        yield next(tensors(model))
        raise ZeroDivisionError("the trainer's own")

    with pytest.raises(ZeroDivisionError, match="own"):
        sync.update(stream(), 60)
    sync.update(tensors(model), 61)
    assert_serves(call, model, 61)


def test_a_broken_process_group_is_made_again(call, sync, model_path):
    sync.update(tensors(changed(model_path, 70)), 70)
    name = sync._transport._groups[0].name
    call(lambda c: c.request(c.urls[0], "/destroy_weights_update_group", {"group_name": name}))
    model = changed(model_path, 71)
    sync.update(tensors(model), 71)
    assert sync._transport._groups[0].name != name
    assert_serves(call, model, 71)


def test_a_trainer_that_starts_anew_takes_over_an_unfinished_update(call, servers, sync, model_path, tmp_path):
    call(lambda c: c.pause())
    call(lambda c: c.on_all("/begin_weight_update", {}))
    fresh = make_sync(servers, model_path, tmp_path)
    model = changed(model_path, 80)
    fresh.update(tensors(model), 80)
    assert_serves(call, model, 80)
    fresh.close()


def test_a_full_disk_is_a_clear_error(call, servers, sync, model_path, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        disk = make_sync(servers, model_path, tmp_path, mode=SyncMode.disk, disk_dir=str(mount / "weights"))
        with pytest.raises(WeightSyncError, match=r"disk is full.*rollout\.sync\.disk_dir"):
            disk.update(tensors(load(model_path)), 90)
        disk.close()
    finally:
        subprocess.run(["umount", mount], check=True)
    model = changed(model_path, 91)
    sync.update(tensors(model), 91)
    assert_serves(call, model, 91)


def test_no_verification_when_it_is_off(call, servers, model_path, tmp_path):
    plain = make_sync(servers, model_path, tmp_path, verify=False)
    model = changed(model_path, 95)
    report = plain.update(tensors(model), 95)
    assert report.checksum == ""
    assert_serves(call, model, 95)
    plain.close()


@pytest.mark.parametrize(
    ("arch", "count", "shape"),
    [
        ("qwen2", 2, {}),
        ("qwen3", 1, {}),
        ("llama_untied", 1, {}),
        pytest.param("mistral", 1, {"sliding_window": None}, marks=pytest.mark.slow),
        # On a CPU the server leaves the cap on attention scores out.
        pytest.param("gemma2", 1, {"attn_logit_softcapping": None}, marks=pytest.mark.slow),
        # The server does not pad this vocabulary.
        pytest.param("gemma3_text", 1, {"vocab": 320}, marks=pytest.mark.slow),
    ],
)
def test_other_architectures_and_several_servers(tmp_path, arch, count, shape):
    """Biases, q/k norms, an untied head, a vocabulary that is padded; one broadcast for all servers."""
    path = make_tiny_model(tmp_path / "model", arch, **{"vocab": 300} | shape)
    with ServerGroup(server_config(count=count), model_config(path), tmp_path, API_KEY) as servers:
        sync = make_sync(servers, path, tmp_path)
        model = changed(path, 1)
        sync.update(tensors(model), 1)
        sync.close()
        for url in servers.urls:

            async def generate(url: str = url):
                client = RolloutClient([url], API_KEY)
                try:
                    return (await client.generate(PROMPT, 1, GREEDY))[0]
                finally:
                    await client.close()

            response = asyncio.run(generate())
            reference = reference_logprobs(model, PROMPT, response.token_ids)
            torch.testing.assert_close(torch.tensor(response.logprobs), reference, atol=1e-3, rtol=0)
            assert set(response.weight_versions) == {1}
