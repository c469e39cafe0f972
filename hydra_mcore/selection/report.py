# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One page about a head selection: what was chosen, from which evidence, and how far that can be trusted.

Every sentence with a number is made from the numbers at hand; none is written for an expected outcome.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hydra_mcore.figures import short
from hydra_mcore.files import write_text
from hydra_mcore.heads import Head
from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.selection import figures
from hydra_mcore.selection.choose import Choice, linear_words
from hydra_mcore.selection.evidence import ESTIMATES, Evidence, KnockOut, gather, gini, role_effects
from hydra_mcore.selection.html_page import facts_table, page, paragraph, picture, section, table
from hydra_mcore.selection.imitation_section import imitations
from hydra_mcore.selection.score import CRITICAL, MIN_GAP, MIN_SHARE, SCORES, HeadScores

REPORT_NAME, FIGURES_NAME = "report.html", "figures"


def write_report(
    folder: str | Path,
    scores: HeadScores,
    choice: Choice,
    *,
    model_name: str,
    knock_out: KnockOut | None = None,
    by_length: Mapping[int, HeadScores] | None = None,
) -> Path:
    """Write ``report.html``, one file with its pictures inside, and the pictures beside it as ``figures/*.png``.

    A map that needs no scores has no report; ``figures.heat_map`` draws it.

    Args:
        folder: made if need be; an older report in it is replaced, the page last.
        by_length: scores of the same heads from prompts of other lengths, by tokens.

    Returns:
        The path of the page.
    """
    evidence = gather(scores, choice.head_map.num_fa, choice.linear, by_length)
    pictures = Path(folder) / FIGURES_NAME
    pictures.mkdir(parents=True, exist_ok=True)
    figures.heat_map(pictures / "heads.png", choice.head_map, scores, model_name)
    figures.role_maps(pictures / "roles.png", scores, evidence.critical_lh)
    figures.stability(pictures / "stability.png", evidence)
    figures.intervals(pictures / "intervals.png", scores, evidence)
    figures.layers(pictures / "layers.png", evidence)
    figures.budgets(pictures / "budgets.png", evidence)
    if knock_out:
        figures.knock_out_curves(pictures / "knock_out.png", knock_out)
    sections = [
        _chosen(pictures, scores, choice),
        _pairs(scores),
        _roles(pictures, scores, choice, evidence),
        _removed(pictures, knock_out),
        _stable(pictures, scores, evidence),
        _certain(pictures, scores, evidence),
        _by_layer(pictures, evidence),
        _costs(pictures, scores, choice, evidence),
        imitations(pictures, scores, choice),
        _observed(evidence),
        _caveats(scores, choice),
        _origin(scores, choice),
    ]
    path = Path(folder) / REPORT_NAME
    write_text(path, page(f"Head selection: {model_name}", sections))
    return path


def _chosen(pictures: Path, scores: HeadScores, choice: Choice) -> str:
    kept, total = choice.head_map.num_fa, scores.scores_lh.size
    by_layer = [len(layer[FA]) for layer in choice.head_map.layers]
    passed = sum(head not in choice.head_map.layers[layer][FA] for layer, head in scores.ranking()[:kept])
    senders = " and by way of the heads that read it (sender)" if _has_senders(scores) else ""
    facts = [
        ("full attention", f"{kept} of {total} heads ({kept / total:.1%}), {min(by_layer)} to {max(by_layer)} a layer"),
        ("objective", choice.objective),
        ("score kept", f"{_share(choice.kept)} of all heads' scores"),
        ("score given up", f"{_share(choice.given_up)} of what the best {kept} heads hold"),
        (
            "KV cache left",
            (
                f"{_share(choice.kv_fraction)}: {choice.kv_groups} of"
                f" {scores.shape.num_layers * scores.shape.num_kv_groups} kv groups"
            ),
        ),
        ("weights", scores.fingerprint or "not recorded"),
    ]
    return "\n".join(
        (
            paragraph(
                f"{kept} of {total} attention heads keep full attention (FA); the other {total - kept} become"
                f" {linear_words(choice.linear)}.",
                "A head's score says how much of the answer it carries: its output is replaced by the one that it"
                " gives when another answer stands in the prompt, and the change of the answer's logits is measured,"
                f" directly (receiver){senders}.",
                *([] if scores.score == "causal" else [f"Heads were chosen by {SCORES[scores.score]}."]),
                *([f"{passed} of the {kept} best heads are not kept under this objective."] if passed else []),
            ),
            facts_table(facts),
            picture(pictures / "heads.png", "scores of all heads, the kept ones framed"),
        )
    )


def _pairs(scores: HeadScores) -> str:
    used = sum(probe.used for probe in scores.probes.values() if probe.usable)
    every = sum(len(probe.solved_b) for probe in scores.probes.values())
    unsolved, unmoved = (
        sum(getattr(probe, name) for probe in scores.probes.values()) for name in ("unsolved", "unmoved")
    )
    text = [f"{used} of {every} pairs of prompts were used."]
    if unsolved:
        text.append(
            f"Left out because the teacher's own answer is wrong, so that its heads cannot be judged there: {unsolved}."
        )
    if unmoved:
        text.append(
            f"Left out because the other answer moves the logits by less than {MIN_GAP}, which would blow up noise:"
            f" {unmoved}."
        )
    if few := [name for name, probe in scores.probes.items() if not probe.usable]:
        text.append(
            f"Probes with fewer than {MIN_SHARE:.0%} of their pairs left do not count at all: {', '.join(few)}."
        )
    rows = []
    for name, probe in scores.probes.items():
        gap = f"{(probe.clean_b - probe.corrupt_b)[probe.used_b].mean():.2f}" if probe.used else "-"
        critical = str(int((abs(probe.mean_rlh()) >= CRITICAL).any(0).sum())) if probe.usable else "-"
        rows.append(
            [name, probe.capability, len(probe.solved_b), probe.used, probe.unsolved, probe.unmoved, gap, critical]
        )
    header = ["probe", "capability", "pairs", "used", "teacher wrong", "hardly moved", "mean gap (logits)"]
    header += [f"heads with effect >= {CRITICAL}"]
    return section("Which pairs counted", paragraph(*text), table(header, rows))


def _roles(pictures: Path, scores: HeadScores, choice: Choice, evidence: Evidence) -> str:
    critical_lh, convertible_lh = evidence.critical_lh, evidence.convertible_lh
    kept_lh = np.zeros(critical_lh.shape, dtype=bool)
    for head in choice.head_map.heads_of(FA):
        kept_lh[head] = True
    receives_lh = np.any([effect_lh >= CRITICAL for effect_lh in role_effects(scores)["receiver"].values()], axis=0)
    text = [
        (
            f"{critical_lh.sum()} of {critical_lh.size} heads ({critical_lh.mean():.1%}) are critical: their effect is"
            f" {CRITICAL} or more in some capability; {(critical_lh & kept_lh).sum()} of them are kept,"
            f" {(critical_lh & ~kept_lh).sum()} are not."
        ),
        (
            f"{convertible_lh.sum()} ({convertible_lh.mean():.1%}) reach {CRITICAL} in no probe and no role, so as far"
            " as patching tells they can be converted."
        ),
    ]
    blocks = [picture(pictures / "roles.png", "effects by role and capability")]
    if _has_senders(scores):
        text.append(
            f"{(critical_lh & ~receives_lh).sum()} heads are critical as senders only; the direct effect alone would"
            " have missed them."
        )
        rounds = max(len(probe.receivers) for probe in scores.probes.values())
        rows = [
            [name, *(_heads(found) for found in probe.receivers), *["-"] * (rounds - len(probe.receivers))]
            for name, probe in scores.probes.items()
        ]
        blocks += [
            paragraph("The receivers that the senders of each round were measured by, as layer.head:"),
            table(["probe", *(f"round {number + 1}" for number in range(rounds))], rows),
        ]
    return section("Roles and capabilities", paragraph(*text), *blocks)


def _removed(pictures: Path, knock_out: KnockOut | None) -> str:
    title = "What removing heads does"
    if knock_out is None:
        return section(title, paragraph("Not measured for this report."))
    error = 100 * math.sqrt(0.25 / max(knock_out.prompts, 1))
    text = [
        (
            f"Heads of the teacher are removed in {len(knock_out.accuracy)} orders and {knock_out.prompts} prompts are"
            " asked again."
        ),
        f"{figures.knock_out_finding(knock_out)}.",
        f"With so many prompts an accuracy is known to about {error:.0f} points (standard error, at most).",
    ]
    rows = [[order, *(f"{100 * value:.0f}" for value in knock_out.spread(order)[0])] for order in knock_out.accuracy]
    return section(
        title,
        paragraph(*text),
        picture(pictures / "knock_out.png", "accuracy against heads removed"),
        table(["accuracy (%), heads removed:", *map(str, knock_out.heads)], rows),
    )


def _stable(pictures: Path, scores: HeadScores, evidence: Evidence) -> str:
    control, text = evidence.control, []
    if evidence.halves:
        count, last = list(evidence.halves.items())[-1]
        better = last.overlap.mean > control.overlap.high and last.spearman.mean > control.spearman.high
        verdict = "So the ranking is not chance." if better else "That is no better than chance: use more pairs."
        text += [
            (
                f"Scored from two disjoint sets of {count} pairs a probe, the two rankings of all heads have a Spearman"
                f" correlation of {_number(last.spearman.mean)}, and the two choices of {evidence.budget} heads overlap"
                f" to {last.overlap.mean:.2f} (Jaccard index: heads in both over heads in either)."
            ),
            (
                f"With shuffled heads these are {_number(control.spearman.mean)} and {control.overlap.mean:.2f} on"
                f" average, {control.spearman.high:.2f} and {control.overlap.high:.2f} at the 95th percentile; two"
                f" random choices overlap to {evidence.random_overlap:.2f}. {verdict}"
            ),
        ]
    else:
        text.append("No probe has two usable pairs, so the ranking cannot be checked against itself; use more pairs.")
    text.append(
        "A part against all pairs reaches 1 in the end by itself: it is made of the same pairs. All parts keep the"
        " receivers found on all."
    )
    blocks = [picture(pictures / "stability.png", "agreement of scores by pairs and by prompt length")]
    if evidence.by_length:
        likes = evidence.by_length
        rows = [[short(length), _number(like.spearman), _number(like.overlap)] for length, like in likes.items()]
        text.append(
            f"Prompts of other lengths choose heads that overlap to {min(like.overlap for like in likes.values()):.2f}"
            " or more."
        )
        blocks.append(table(["prompt length (tokens)", "Spearman", f"overlap of the {evidence.budget} best"], rows))
    return section("Would other pairs choose the same heads?", paragraph(*text), *blocks)


def _certain(pictures: Path, scores: HeadScores, evidence: Evidence) -> str:
    sure, near = figures.sure_heads(scores, evidence)
    text = [
        (
            f"Pairs are drawn anew with replacement within each probe, {evidence.bootstrap.draws} times, and all heads"
            " are scored each time."
        ),
        (
            f"{sure} of the {evidence.budget} best heads are among the best in {figures.SURE:.0%} of the draws or more;"
            f" {near} heads below the cut are there in more than {1 - figures.SURE:.0%}."
        ),
        (
            "Bars are the middle nine tenths of a head's scores. The choice of probes and of the prompt length is not"
            " drawn, so not judged."
        ),
    ]
    if max(probe.used for probe in scores.probes.values() if probe.usable) == 1:
        text.append(
            "With one usable pair a probe there is nothing to draw from: intervals without width do not mean certainty."
        )
    return section(
        "How certain is each head?",
        paragraph(*text),
        picture(pictures / "intervals.png", "intervals of the scores of the best heads"),
    )


def _by_layer(pictures: Path, evidence: Evidence) -> str:
    both = int((evidence.critical_lh.any(1) & evidence.convertible_lh.any(1)).sum())
    none = int((~evidence.critical_lh.any(1)).sum())
    layers = len(evidence.gini_l)
    text = [
        (
            f"Within a layer the Gini coefficient of the scores is {evidence.gini_l.mean():.2f} on average"
            f" ({evidence.gini_l.min():.2f} to {evidence.gini_l.max():.2f}); over the layers' sums it is"
            f" {gini(evidence.share_l):.2f}. 0 means all alike, near 1 that one has it all."
        ),
        f"{both} of {layers} layers hold critical and convertible heads side by side; {none} hold no critical head.",
        f"{figures.half_of(evidence.share_l)} layers make up half of the whole score.",
    ]
    return section(
        "Where the score lies",
        paragraph(*text),
        picture(pictures / "layers.png", "Gini and share of the score by layer"),
    )


def _costs(pictures: Path, scores: HeadScores, choice: Choice, evidence: Evidence) -> str:
    contexts, d = list(evidence.costs[0].decode), scores.shape.head_dim
    kinds = [kind for kind in KINDS if kind in choice.linear]
    linear = [f"{KINDS[kind].decode_flops(d, 0) / d**2:.3g} d d for a {KINDS[kind].label} head" for kind in kinds]
    rows = [[cost.ratio, cost.num_fa, _share(cost.kept), _share(cost.kv_fraction)] for cost in evidence.costs]
    flops = []
    for cost in evidence.costs:
        parts = itertools.product((cost.decode, cost.prefill), contexts)
        flops.append([cost.ratio, *(_share(part[context]) for part, context in parts)])
    names = [f"{part} {short(context)}" for part, context in itertools.product(("decode", "prefill"), contexts)]
    return section(
        "What each budget keeps and costs",
        paragraph(
            "For the best heads of the whole model at each ratio of linear to FA heads, as shares of the teacher's."
        ),
        picture(pictures / "budgets.png", "score kept and KV cache left by ratio"),
        table(["linear:FA", "FA heads", "score kept", "KV cache left"], rows),
        paragraph(
            "Attention FLOPs a token, predicted by counting: 4 d n for an FA head at the end of a context of n tokens"
            f" and 2 d n on average over a prompt of n; at any length {', '.join(linear)} (d: dimension of a head)."
            " Left out is what no context makes larger: projections, gates and MLPs, and in the KV cache the states of"
            " linear heads."
        ),
        table(["linear:FA", *names], flops),
    )


def _observed(evidence: Evidence) -> str:
    title = "Cheaper scores"
    if not evidence.observed:
        return section(title, paragraph("None were recorded."))
    control = evidence.control
    text = [
        "They look at attention, or estimate the effects from one gradient. Where they disagree with patching, patching"
        " was followed."
    ]
    if looks := {name: like for name, like in evidence.observed.items() if name not in ESTIMATES}:
        name, best = max(looks.items(), key=lambda item: item[1].overlap)
        text.append(
            f"Of those that only look the nearest is {name}: its {evidence.budget} best heads overlap with those of the"
            f" causal score to {best.overlap:.2f} (chance: {evidence.random_overlap:.2f})."
        )
    if chance := [name for name, like in evidence.observed.items() if like.overlap <= control.overlap.high]:
        text.append(f"No better than shuffled heads (95th percentile {control.overlap.high:.2f}): {', '.join(chance)}.")
    rows = [
        [
            name,
            f"exact effect as {ESTIMATES[name]}" if name in ESTIMATES else "causal score",
            _number(like.spearman),
            _number(like.overlap),
        ]
        for name, like in evidence.observed.items()
    ]
    return section(
        title,
        paragraph(*text),
        table(["score", "compared with", "Spearman", f"overlap of the {evidence.budget} best"], rows),
    )


def _caveats(scores: HeadScores, choice: Choice) -> str:
    share = choice.head_map.num_fa / scores.scores_lh.size
    notes = [
        (
            "Heads that can stand in for each other are under-scored: with one patched, the other still carries the"
            " answer."
        ),
        (
            "HydraHead's paper (arXiv 2606.20097) found that keeping about 10% of the heads already costs accuracy"
            f" although only 6.5% are critical. This choice keeps {share:.1%}."
        ),
        "Scores tell what the teacher needs. How well a converted head learns its part is seen only after training.",
    ]
    if len(scores.by_capability) == 1:
        notes.append(
            f"Only one capability was probed ({next(iter(scores.by_capability))}); heads that others need may look"
            " useless."
        )
    return section("What the scores do not tell", *map(paragraph, notes))


def _origin(scores: HeadScores, choice: Choice) -> str:
    weights = {name: scores.weights.get(name, 1.0) for name in scores.by_capability}
    rows = [("weights of capabilities", weights), ("strategy", choice.head_map.strategy)]
    rows += [(f"map: {name}", value) for name, value in choice.head_map.made_by.items()]
    rows += [(name, value) for name, value in scores.settings.items()]
    rows += [(f"version of {name}", value) for name, value in scores.versions.items()]
    return section("Made by", facts_table(rows))


def _has_senders(scores: HeadScores) -> bool:
    return any(probe.receivers for probe in scores.probes.values())


def _heads(found: Sequence[Head]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in found) or "-"


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no -0.00


def _share(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.1%}"
