# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
