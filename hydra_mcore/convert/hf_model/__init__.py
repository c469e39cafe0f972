# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The code that travels with a model exported to Hugging Face (``hydra_mcore.convert.hf_code`` copies it).

The files beside this one need torch and transformers only. They import each other, and the copy of
``hydra_mcore/ops/chunked_delta_rule.py`` that an exported folder holds beside them, relatively, as
``trust_remote_code`` asks for; so they are imported from an exported folder, or from here by ``hf_code.model_class``
alone.
"""
