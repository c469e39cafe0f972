# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Which heads keep full attention: counterfactual probes, exact patching scores, a choice by budget."""
