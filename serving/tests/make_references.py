# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Small random exports of every option and kind of heads, and what transformers' own generate says of them.

Runs in the project's environment; the tests beside it read what it wrote in vLLM's.

example:
  .venv/bin/python serving/tests/make_references.py serving/tests/references
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hydra_mcore.compat import install

install()

from hydra_mcore.commands import one_line_errors  # noqa: E402  the patches come first
from hydra_mcore.config import HydraOptions  # noqa: E402
from hydra_mcore.convert.hf_code import AUTO_MAP, copy_model_code, model_class  # noqa: E402
from hydra_mcore.convert.hf_export import export_hf  # noqa: E402
from hydra_mcore.convert.hf_import import import_hf  # noqa: E402
from hydra_mcore.convert.inherit import hybridize  # noqa: E402
from hydra_mcore.heads import HeadMap  # noqa: E402
from hydra_mcore.model.runtime import process_groups  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 24
PROMPTS = (1, 2, 5, 33, 64, 130, 300, 7)  # tokens
SHAPE = {
    **{"vocab_size": 199, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4},
    **{"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 1024},
    **{"initializer_range": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
}
GDN = [{"fa": [1, 4, 5]}, {}, {"fa": range(6)}, {"fa": [0]}]  # living groups 2, 0, 3, 1
GDN = [{**layer, "gdn": [h for h in range(6) if h not in layer.get("fa", ())]} for layer in GDN]
EVERY_KIND = [
    {"fa": [4], "gdn": [1, 2], "kda": [0], "lightning": [3, 5]},
    {"kda": [0, 2, 3], "lightning": [1, 4, 5]},
    {"fa": range(6)},
    {"fa": [0, 1], "kda": [2, 3, 4, 5]},
]
ONE_GDN = [{"fa": range(5), "gdn": [5]}] * 4  # on two ranks, one of them has no linear head
ALL_LIGHTNING = [{"fa": [0, 5], "lightning": [1, 2, 3, 4]}] * 4
CASES: dict[str, dict[str, Any]] = {
    "gdn": {"heads": GDN},
    "every kind": {"heads": EVERY_KIND},
    "lightning alone": {"heads": ALL_LIGHTNING, "lightning_gate": "none"},
    "shared qkv, competition": {"heads": EVERY_KIND, "qkv": "shared", "fusion": "competition"},
    "values by group, no convolution": {
        **{"heads": EVERY_KIND, "gdn_kv": "per_group", "kda_kv": "per_group", "lightning_kv": "per_group"},
        **{"gdn_conv_kernel": 0, "kda_conv_kernel": 0, "gdn_qk_norm": "none", "lightning_qk_norm": "none"},
    },
    "rotary, biases, untied": {
        **{"heads": GDN, "fa_position": "rope", "fa_log_scale": "never", "fa_gate": "none", "qkv_bias": True},
        **{"qk_norm": False, "tie_word_embeddings": False, "gdn_position": "nope"},
    },
    "gates by head, after the norm": {
        **{"heads": EVERY_KIND, "fa_gate": "headwise", "gdn_gate": "elementwise", "kda_gate": "headwise"},
        **{"lightning_gate": "headwise", "gate_order": "after_norm", "gate_activation": "silu", "fusion": "norm"},
    },
    "no fusion, negative eigenvalues": {
        **{"heads": GDN, "fusion": "none", "gdn_write_max": 2.0, "gdn_conv_activation": "silu", "gdn_conv_kernel": 2},
    },
    "yarn, wide heads": {
        **{"heads": GDN, "head_dim": 32, "fusion_norm_weight": "none", "fa_position": "rope"},
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0},
            "original_max_position_embeddings": 256,
        },
    },
    "no linear heads": {"heads": [{"fa": range(6)}] * 4},
    "no full attention": {"heads": [{"gdn": range(6)}, {"kda": range(6)}, {"lightning": range(6)}, {"gdn": range(6)}]},
    "one linear head": {"heads": ONE_GDN},
}


@one_line_errors("make_references")
def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="make_references", description=__doc__, formatter_class=layout)
    parser.add_argument("out", type=Path, help="folder for the exports and references")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    for number, (name, options) in enumerate(CASES.items()):
        for dtype in ("float32", "bfloat16") if name in ("gdn", "every kind") else ("float32",):
            folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{dtype}"
            if (folder / "reference.json").exists():
                continue
            model = random_model(options, seed=number).to(getattr(torch, dtype))
            model.save_pretrained(folder)
            copy_model_code(folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
            (folder / "reference.json").write_text(json.dumps([reference(model, n) for n in PROMPTS]))
            print(folder)
    tiny_student(out / "tiny")


def tiny_student(out: Path) -> None:
    """The tiny example's teacher with a quarter of its heads kept, untrained: a checkpoint, and its export."""
    if (out / "export").exists():
        return
    teacher, options = out / "teacher", HydraOptions()
    with process_groups():
        shape = import_hf(ROOT / "examples" / "tiny" / "teacher", teacher).shape
        kept = [(layer_idx, head) for layer_idx in range(shape.num_layers) for head in (layer_idx, layer_idx + 3)]
        head_map = HeadMap.from_fa(kept, shape.num_layers, shape.num_heads, shape.num_kv_groups)
        hybridize(teacher, head_map, options, out / "student")
        export_hf(out / "student", out / "export")


def random_model(options: dict[str, Any], seed: int) -> PreTrainedModel:
    """A model whose gates, decays and convolutions are random too."""
    torch.manual_seed(seed)
    cls = model_class()
    heads = [{kind: list(own) for kind, own in layer.items()} for layer in options["heads"]]
    model = cls(cls.config_class(**{**SHAPE, **options, "heads": heads})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def reference(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Greedy tokens after a random prompt, their log-probabilities, and those of the prompt, in float32 too."""
    generator = torch.Generator().manual_seed(length)
    ids_bs = torch.randint(1, model.config.vocab_size, (1, length), generator=generator)
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    found = model.generate(ids_bs, max_new_tokens=NEW_TOKENS, **settings)
    log_probs = torch.cat(found.logits).float().log_softmax(-1)
    tokens_s = found.sequences[0, length:]
    prompt, exact = (log_probs_of(ids_bs, each) for each in (model, copy.deepcopy(model).float()))
    return {
        "prompt": ids_bs[0].tolist(),
        "tokens": tokens_s.tolist(),
        "log_probs": log_probs.gather(1, tokens_s[:, None])[:, 0].tolist(),
        "prompt_log_probs": prompt,
        "exact_prompt_log_probs": exact,
    }


def log_probs_of(ids_bs: Tensor, model: PreTrainedModel) -> list[float]:
    """Of each token after the first."""
    log_probs = model(ids_bs).logits[0, :-1].float().log_softmax(-1)
    return log_probs.gather(1, ids_bs[0, 1:, None])[:, 0].tolist()


if __name__ == "__main__":
    main()
