# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The part of the report that sets a head's effect beside how well a linear head could imitate it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hydra_mcore.heads import Head
from hydra_mcore.kinds import KINDS
from hydra_mcore.selection.choose import Choice
from hydra_mcore.selection.evidence import overlap, spearman
from hydra_mcore.selection.figures import statistic_maps
from hydra_mcore.selection.html_page import paragraph, picture, section, table
from hydra_mcore.selection.score import SCORES, HeadScores

PICTURE = "replaceability.png"


def imitations(pictures: Path, scores: HeadScores, choice: Choice) -> str:
    """Maps of both scores, and the heads over which they disagree; draws its picture into ``pictures``."""
    title = "Which heads could a linear head imitate?"
    if not scores.replaceability:
        return section(title, paragraph("Not measured; --replaceable-by measures it."))
    maps = {"causal score": scores.causal_lh}
    maps |= {f"left by {KINDS[kind].label}": found.residual for kind, found in scores.replaceability.items()}
    statistic_maps(pictures / PICTURE, "Effect of a head, and what a linear head leaves of it", maps, choice.head_map)
    blocks = [
        paragraph(
            "Each head's output was fitted by a linear head with the head's own queries and keys and the best value"
            " projection, in closed form. What is left on other tokens, as a share of the output's square, no value"
            " projection can repair: near 0 a linear head does the same, near 1 it does nothing of it."
            " Training can still improve queries, keys and gates."
        ),
        picture(pictures / PICTURE, "causal score and residual of every head"),
    ]
    if set(choice.linear) <= set(scores.replaceability):
        blocks += _compared(dataclasses.replace(scores, become=choice.linear), choice.head_map.num_fa)
    return section(title, *blocks)


def _compared(scores: HeadScores, budget: int) -> list[str]:
    """How the rankings by effect and by the product differ."""
    ranked = {name: dataclasses.replace(scores, score=name).ranking() for name in SCORES}
    rank = spearman(scores.causal_lh.ravel(), scores.residual_lh.ravel())
    causal, product = ranked["causal"][:budget], ranked["product"][:budget]
    text = [
        f"Effect and residual have a Spearman correlation of {rank:.2f}.",
        f"The {budget} best heads by effect and by product overlap to {overlap(causal, product, budget):.2f} (Jaccard"
        f" index), by effect and by residual to {overlap(causal, ranked['replaceable'], budget):.2f}.",
    ]
    out, new = [at for at in causal if at not in product], [at for at in product if at not in causal]
    if not out:
        return [paragraph(*text)]
    text.append(
        "Heads that only the effect would keep are those that a linear head imitates best; heads that only the product"
        " would keep are harder to imitate."
    )
    header = ["head", "kept by", "causal score", "residual", "with inherited values", "half-life (tokens)"]
    rows = [_row(scores, at, "effect") for at in out] + [_row(scores, at, "product") for at in new]
    return [paragraph(*text), table(header, rows)]


def _row(scores: HeadScores, at: Head, kept_by: str) -> list[object]:
    found = scores.replaceability[scores.become[at[0]]]
    return [
        f"{at[0]}.{at[1]}",
        kept_by,
        f"{scores.causal_lh[at]:.2f}",
        f"{found.residual[at]:.2f}",
        f"{found.inherited[at]:.2f}",
        f"{found.half_life[at]:.0f}",
    ]
