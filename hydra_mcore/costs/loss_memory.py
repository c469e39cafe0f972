# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the fused loss of tokens (train/losses.py), worked out without running it.

Peak memory beyond the inputs, in bytes, both gradients wanted (a test measures it), with p
bytes a parameter and f = max(p, 4) a softmax value:

    n * m * p                           gradient of the hidden states
    + w * m * f                         gradient of the weight, while it accumulates
    + the larger of
        c * w * 3 f                     softmaxes; without a teacher c * w * f, and c * w * p more if p < 4
        w * m * p + c * w * p           one chunk's share of the weight's gradient, if p < 4; else c * w * p
    + n * (8 + f) + 32 * c * f          labels and mask in token order, and a chunk's vectors

n tokens, c tokens of a chunk, m model width, w this rank's rows of the vocabulary.
"""

from __future__ import annotations


def peak_bytes(
    tokens: int,
    width: int,
    vocabulary: int,
    tp_size: int,
    bytes_per_value: int,
    chunk_elements: int = 2**26,
    with_teacher: bool = True,
) -> int:
    """Bytes that `token_loss` and its backward pass need at most beyond their inputs: the formula above."""
    rows, wide = vocabulary // tp_size, max(bytes_per_value, 4)
    narrow = bytes_per_value if bytes_per_value < wide else 0
    chunk = min(tokens, max(1, chunk_elements // rows))
    softmaxes = chunk * rows * (3 * wide if with_teacher else wide + narrow)
    products = rows * width * narrow + chunk * rows * bytes_per_value
    vectors = tokens * (8 + wide) + 32 * chunk * wide
    return tokens * width * bytes_per_value + rows * width * wide + max(softmaxes, products) + vectors
