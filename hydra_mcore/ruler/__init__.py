# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""RULER's synthetic long-context tasks (Hsieh et al., arXiv:2404.06654), made here for any tokenizer, without a
network.
"""
