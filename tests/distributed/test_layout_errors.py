"""Layouts that cannot be are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Launcher
from tiny_models import make_tiny_model

TP, PP = "actor.parallel.tensor=2", "actor.parallel.pipeline=2"


def test_layouts_that_cannot_be_are_refused_on_every_rank(launcher: Launcher, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "three", "llama", num_hidden_layers=3)
    make_tiny_model(tmp_path / "one_head", "llama", num_key_value_heads=1)
    make_tiny_model(tmp_path / "odd_mlp", "llama", intermediate_size=129)
    make_tiny_model(tmp_path / "own_head", "llama_untied")
    settings = json.loads((tmp_path / "own_head" / "config.json").read_text())
    (tmp_path / "own_head" / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    cases = {
        "three a replica": ("three", ["actor.parallel.tensor=3"], r"= 3 \* 1 \* 1 = 3 does not divide the 2 ranks"),
        "four a replica": ("three", [TP, PP], r"= 2 \* 2 \* 1 = 4 does not divide the 2 ranks"),
        "experts": ("three", ["actor.parallel.expert=3"], r"expert_tensor = 3 \* 1 = 3 does not divide the 2 ranks of"),
        "experts of a dense model": ("three", ["actor.parallel.expert=2"], "expert=2, but the model has no experts"),
        "layers": ("three", [PP], "actor.parallel.pipeline=2 does not divide the model's 3 layers"),
        "heads": ("one_head", [TP], "actor.parallel.tensor=2 does not divide the model's 1 key/value heads"),
        "mlp": ("odd_mlp", [TP], "actor.parallel.tensor=2 does not divide the model's 129 rows of the MLP"),
        "head": ("own_head", [PP], r"tie_word_embeddings=true, and its lm_head\.weight is not"),
    }
    asked = {name: {"model": model, "options": options} for name, (model, options, _) in cases.items()}
    for found in launcher.run(2, "errors", {"cases": asked, "folder": str(tmp_path)}):
        for name, (_, _, message) in cases.items():
            kind, text = found[name]
            with pytest.raises(AssertionError, match=message):
                raise AssertionError(text)
            assert kind == ("DataError" if name == "head" else "ConfigError"), name
