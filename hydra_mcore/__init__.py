# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""hydra_mcore: full attention and Gated DeltaNet mixed head by head, on Megatron-Core."""
