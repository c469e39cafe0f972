# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model can do: needle tasks in the manner of RULER, perplexity, and reports that set models side by side."""
