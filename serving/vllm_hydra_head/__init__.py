# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""HydraHead models in vLLM: ``pip install`` it beside vLLM, and ``vllm serve EXPORT_DIR`` works."""

from __future__ import annotations

ARCHITECTURE = "HydraHeadForCausalLM"


def register() -> None:
    """Tell vLLM of the model; it calls this in each of its processes, more than once in some."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_hydra_head.export.configuration_hydra_head import HydraHeadConfig
    from vllm_hydra_head.settings import ServingSettings

    AutoConfig.register(HydraHeadConfig.model_type, HydraHeadConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"vllm_hydra_head.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServingSettings
