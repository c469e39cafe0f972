# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The code of exported models: links to the project's own files, which every export has a copy of."""
