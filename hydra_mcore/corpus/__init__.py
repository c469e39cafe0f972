# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""From text to the token shards that training reads (``tools/prepare_data.py``)."""
