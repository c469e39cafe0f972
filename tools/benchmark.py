#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What HydraHead costs beside others: bytes sent, balance, memory, head scores, decoding, data, evaluation. Markdown tables on stdout."""

from __future__ import annotations

import argparse
import random
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra_mcore.config import ModelShape
    from hydra_mcore.heads import HeadMap
    from tools.benchmark_decode import Decoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VALUE_BYTES = 2  # bf16
RATIOS = ("3:1", "7:1", "15:1")
RANDOM_MAPS = 1000
DECODE_SHAPE = {"layers": 4, "heads": 16, "kv_groups": 8, "head_dim": 64, "hidden": 512, "ffn": 1536, "vocabulary": 1024}
DECODE_FA_HEADS = [4, 2]

EXAMPLES = """\
The shape is that of Qwen3-1.7B: 28 layers, 16 heads of 128 channels in 8 kv groups, width 2048, bf16.

examples:
  bytes sent under context parallelism, beside Megatron's all-to-all
      python tools/benchmark.py communication
      python tools/benchmark.py communication --fa-heads 2 --cp 2 4 --lengths 32768
  attention work of tensor-parallel ranks, for a head map of your own too
      python tools/benchmark.py balance --head-map runs/heads/head_map.json
  the seconds of every rank's layer on this machine (minutes, one process)
      python tools/benchmark.py balance --measure
  peak memory of align and distill beside end-to-end backpropagation (a minute, a small model)
      python tools/benchmark.py memory
  seconds of the exact scores of all heads beside a forward pass for every head (minutes, random models)
      python tools/benchmark.py selection
      python tools/benchmark.py selection --models 28x16 --naive-heads 448
  seconds and cache bytes of a decoded token, teacher beside HydraHead (minutes, random models or your own)
      MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 python tools/benchmark.py decode --figure decode.png
      python tools/benchmark.py decode --teacher-hf Qwen3-1.7B --hf runs/a/hf --lengths 1024 4096
  tokens/s and memory of prepare_data beside the tokenizers library alone (minutes)
      python tools/benchmark.py data --tokenizers examples/tiny/teacher
  how fast evaluation makes prompts, and how fast models read them (minutes)
      python tools/benchmark.py evaluation --lengths 4096 131072 1048576 --read 4096 65536
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="benchmark", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    c = commands.add_parser("communication", help="MiB that a rank sends for a layer, by context parallel size and length")
    c.add_argument("--fa-heads", type=int, default=4, metavar="N", help="FA heads of the layer's 16 (default 4, that is 3:1)")
    c.add_argument("--cp", nargs="+", type=positive, default=[2, 4, 8, 16], metavar="N", help="context parallel sizes (default 2 4 8 16)")
    c.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor parallel size (default 1)")
    lengths = [2**power for power in range(14, 20)]
    c.add_argument("--lengths", nargs="+", type=positive, default=lengths, metavar="N", help="tokens a row (default 16384 ... 524288)")
    c.set_defaults(run=communication)

    b = commands.add_parser("balance", help="the busiest tensor-parallel rank's attention against the mean, by fa_balance")
    b.add_argument("--head-map", nargs="+", type=Path, default=[], metavar="FILE", help="head maps to show before the synthetic ones")
    b.add_argument("--tp", nargs="+", type=positive, default=[2, 4, 8], metavar="N", help="tensor parallel sizes (default 2 4 8)")
    b.add_argument("--length", type=positive, metavar="N", help="tokens of the one document (default 16384, with --measure 4096)")
    b.add_argument("--measure", action="store_true", help="time one layer of every rank of TP 8 instead of counting; takes minutes")
    b.add_argument("--repeats", type=positive, default=3, metavar="N", help="of --measure; the median counts (default 3)")
    b.set_defaults(run=balance)

    m = commands.add_parser("memory", help="peak memory a token of align and distill, beside end-to-end backpropagation")
    m.add_argument("--lengths", nargs=2, type=positive, default=[1024, 2048], metavar="N", help="tokens (default 1024 2048)")
    m.set_defaults(run=memory)

    selection_options(commands.add_parser("selection", help="seconds of the scores of all heads, beside one forward pass for each of them"))
    decode_options(commands.add_parser("decode", help="seconds and cache bytes of a decoded token by context length, beside the teacher"))
    data_options(commands.add_parser("data", help="tokens/s and memory of prepare_data, beside the tokenizers library alone"))
    evaluation_options(commands.add_parser("evaluation", help="prompts/s of the generators by task, time a token of models, by length"))
    return p


def data_options(d: argparse.ArgumentParser) -> None:
    whose = "folders with a tokenizer.json (default: one of 32768 words, trained on the text)"
    d.add_argument("--tokenizers", nargs="+", type=Path, default=[], metavar="DIR", help=whose)
    d.add_argument(
        "--megabytes", type=positive, default=8, metavar="N", help="of text (Python's library) in the smaller corpus (default 8)"
    )
    d.add_argument("--repeats", type=positive, default=3, metavar="N", help="the median counts (default 3)")
    d.add_argument("--workers", type=positive, default=2, metavar="N", help="processes that tokenize (default 2)")
    d.set_defaults(run=data)


def evaluation_options(p: argparse.ArgumentParser) -> None:
    whose = "folder with a tokenizer (default: one of 32768 words, trained on the text)"
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help=whose)
    lengths = [4096, 32_768, 131_072]
    p.add_argument("--lengths", nargs="+", type=positive, default=lengths, metavar="N", help="tokens (default 4096 32768 131072)")
    p.add_argument("--prompts", type=positive, default=10, metavar="N", help="of each task and length (default 10)")
    read = [2**power for power in range(12, 17)]
    p.add_argument("--read", nargs="+", type=positive, default=read, metavar="N", help="tokens that models read (default 4096 ... 65536)")
    p.set_defaults(run=evaluation)


def selection_options(s: argparse.ArgumentParser) -> None:
    models = [(4, 8), (8, 8), (14, 16), (28, 16)]
    s.add_argument("--models", nargs="+", type=layers_x_heads, default=models, metavar="LxH", help="default 4x8 8x8 14x16 28x16")
    s.add_argument("--hidden", type=positive, default=256, metavar="N", help="width (default 256)")
    s.add_argument("--head-dim", type=positive, default=32, metavar="N", help="channels of a head (default 32)")
    s.add_argument("--ffn", type=positive, default=768, metavar="N", help="width of the MLPs (default 768)")
    s.add_argument("--vocabulary", type=positive, default=512, metavar="N", help="tokens (default 512)")
    s.add_argument("--length", type=positive, default=512, metavar="N", help="tokens a prompt (default 512)")
    s.add_argument("--pairs", type=positive, default=1, metavar="N", help="pairs of prompts in the batch (default 1)")
    s.add_argument("--answer", type=positive, default=7, metavar="N", help="tokens an answer (default 7)")
    s.add_argument("--naive-heads", type=positive, default=64, metavar="N", help="receivers scored by definition too (default 64)")
    s.add_argument("--naive-senders", type=positive, default=24, metavar="N", help="senders scored by definition too (default 24)")
    s.set_defaults(run=selection)


def decode_options(d: argparse.ArgumentParser) -> None:
    lengths = [2**power for power in range(10, 16)]
    d.add_argument("--lengths", nargs="+", type=positive, default=lengths, metavar="N", help="tokens of context (default 1024 ... 32768)")
    d.add_argument("--steps", type=positive, default=16, metavar="N", help="tokens timed at each length (default 16)")
    d.add_argument("--figure", type=Path, metavar="FILE", help="PNG of both curves")
    d.add_argument("--teacher-hf", type=Path, metavar="DIR", help="Hugging Face folder of the teacher")
    d.add_argument("--hf", nargs="+", type=Path, default=[], metavar="DIR", help="exported HydraHead models; the code in them is run")
    random_models = d.add_argument_group("random models, without --hf")
    counts = "FA heads of each layer, in the fewest kv groups that hold them and spread over the most (default 4 2)"
    random_models.add_argument("--fa-heads", nargs="+", type=positive, default=DECODE_FA_HEADS, metavar="N", help=counts)
    for name, default in DECODE_SHAPE.items():
        flag = "--" + name.replace("_", "-")
        random_models.add_argument(flag, type=positive, default=default, metavar="N", help="default %(default)s")
    d.set_defaults(run=decode)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def layers_x_heads(text: str) -> tuple[int, int]:
    layers, heads = map(positive, text.split("x"))
    if layers == 1:
        raise argparse.ArgumentTypeError("heads of a single layer have no heads to act through")
    return layers, heads


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from hydra_mcore.compat import install

    install()
    from hydra_mcore.model.runtime import one_line_errors

    with one_line_errors("benchmark"):
        args.run(args)


def qwen3_shape() -> ModelShape:
    """Qwen3-1.7B (its config.json)."""
    from hydra_mcore.config import ModelShape

    return ModelShape(
        num_layers=28, hidden_size=2048, num_heads=16, num_kv_groups=8, head_dim=128, ffn_hidden_size=6144, vocab_size=151936,
        native_length=40960,
    )  # fmt: skip


def spread_heads(count: int, shape: ModelShape) -> list[int]:
    """So many heads, in as many kv groups as there are: the most keys and values for that number."""
    from hydra_mcore.heads import InputError

    if not 0 <= count <= shape.num_heads:
        raise InputError(f"{count} FA heads: choose 0 to {shape.num_heads}")
    size = shape.num_heads // shape.num_kv_groups
    return sorted(range(shape.num_heads), key=lambda head: head % size)[:count]


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|---|" + "---:|" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print()


def communication(args: argparse.Namespace) -> None:
    """Bytes of one layer, formulas of hydra_mcore/model/costs.py."""
    from hydra_mcore.model.costs import megatron_accepts

    shape = qwen3_shape()
    num_gdn = shape.num_heads - args.fa_heads
    rows = [_sent(args, shape, cp_size, length) for cp_size in args.cp for length in args.lengths]
    print(f"MiB sent for one layer, forward and backward, by the rank that sends most: {args.fa_heads} FA heads in different kv groups")
    print(f"(the worst case), {num_gdn} GDN heads, head_dim {shape.head_dim}, batch 1, bf16, TP {args.tp}. Megatron: its all-to-alls for")
    print(f"{num_gdn} GDN heads of this size; ratio: Megatron to ours, GDN heads alone.\n")
    print_table(["CP", "tokens", "GDN heads", "FA heads", "both", "Megatron, GDN heads", "ratio"], rows)
    refused = [size for size in args.cp if not megatron_accepts(num_gdn, args.tp, size)]
    if refused:
        sizes = ", ".join(map(str, refused))
        print(f"In brackets: Megatron refuses CP {sizes}, since {num_gdn} heads do not divide by TP x CP; what it would send otherwise.")


def _sent(args: argparse.Namespace, shape: ModelShape, cp_size: int, length: int) -> list[Any]:
    """A row of the table, for the rank that sends most."""
    from hydra_mcore.config import HydraOptions
    from hydra_mcore.heads import HeadLayout, LayerHeads
    from hydra_mcore.model.costs import cp_bytes, megatron_accepts, megatron_gdn_bytes
    from hydra_mcore.ops.sequence import SequencePart

    layout = HeadLayout(LayerHeads.from_fa(spread_heads(args.fa_heads, shape), shape.num_heads), shape.num_kv_groups, args.tp)
    sizes = (shape.head_dim, VALUE_BYTES, 1)
    parts = [SequencePart(length, cp_size, rank) for rank in range(cp_size)]
    ranks = [cp_bytes(layout, tp_rank, part, *sizes, HydraOptions()) for tp_rank in range(args.tp) for part in parts]
    ours = max(ranks, key=lambda sent: sent.total.total)
    num_gdn = len(layout.layer.gdn)
    theirs = megatron_gdn_bytes(num_gdn, parts[0], *sizes, args.tp).total
    columns = [f"{sent / 2**20:.1f}" for sent in (ours.gdn.total, ours.fa.total, ours.total.total, theirs)]
    if not megatron_accepts(num_gdn, args.tp, cp_size):
        columns[-1] = f"({columns[-1]})"
    return [cp_size, length, *columns, f"{theirs / ours.gdn.total:.1f}" if ours.gdn.total else "-"]


def balance(args: argparse.Namespace) -> None:
    """Attention work of tensor-parallel ranks, counted or timed."""
    shape = qwen3_shape()
    if args.measure:
        from tools.benchmark_seconds import WAYS, measured

        counts, tp_size, length = (2, 4, 10), 8, args.length or 4096
        rows = measured({n: spread_heads(n, shape) for n in counts}, shape, tp_size, length, args.repeats)
        print(
            f"Seconds of one layer's attention block, forward and backward, {length} tokens, TP {tp_size}, each rank alone on this machine"
        )
        print(f"without communication; median of {args.repeats}. {WAYS}\n", flush=True)
        head = ["FA heads", "way", "busiest rank, s", "mean of ranks, s", "busiest / mean", 'busiest / busiest of "heads"']
        return print_table(head, rows)
    length = args.length or 16384
    rows = [row for name, maps in _head_maps(args.head_map, shape) for row in _imbalances(name, maps, args.tp, length)]
    print(f"Causal query-key products of the busiest tensor-parallel rank over the mean of ranks, {length} tokens, one document;")
    print("mean and worst of the layers that have FA heads.\n")
    print_table(["head map", "TP", "heads: mean", "heads: worst", "queries: mean", "queries: worst"], rows)


def memory(args: argparse.Namespace) -> None:
    from tools.benchmark_memory import table

    print(table(tuple(args.lengths)))


def selection(args: argparse.Namespace) -> None:
    """Receiver scores, attribution and one round of sender scores of random models."""
    from hydra_mcore.config import ModelShape
    from tools.benchmark_selection import COLUMNS, Prompts, rows

    shapes = [
        ModelShape(
            num_layers=layers, hidden_size=args.hidden, num_heads=heads, num_kv_groups=max(1, heads // 2), head_dim=args.head_dim,
            ffn_hidden_size=args.ffn, vocab_size=args.vocabulary, native_length=args.length,
        )
        for layers, heads in args.models
    ]  # fmt: skip
    prompts = Prompts(args.length, args.pairs, args.answer)
    print(f"Random float32 models: width {args.hidden}, head_dim {args.head_dim}, MLPs {args.ffn}, two heads a kv group.")
    print(f"Prompts of {args.length} tokens, {args.answer} of them the answer; pairs in the batch: {args.pairs}.")
    print("Predicted: by counting operations. By definition: one forward pass for every head (senders: two) and two more; the median")
    print("of the heads run stands for all. Difference: between both ways, the largest, over the largest score.\n", flush=True)
    print_table(COLUMNS, (row for shape in shapes for row in rows(shape, prompts, args.naive_heads, args.naive_senders)))


def decode(args: argparse.Namespace) -> None:
    """Single-token calls after a real prefill; exit status 1 where a cache is not of the size that the formula says."""
    import torch

    from hydra_mcore.heads import InputError
    from tools.benchmark_decode import COLUMNS, MIB, figure, measured, rows

    if args.figure and not args.figure.absolute().parent.is_dir():
        raise InputError(f"--figure {args.figure}: no such folder; make it first")
    decoders = _decoders(args)
    weights = ", ".join(f"{decoder.weight_bytes / MIB:.1f} ({decoder.name})" for decoder in decoders)
    print(f"One row, float32, threads: {torch.get_num_threads()}. After a real prefill, {args.steps} calls of one token each, models in")
    print("turn: median (least..most). By bytes read: the ratio if time went with the bytes of weights and cache, each read once.")
    print("Page faults, teacher / HydraHead: the allocator handed out fresh memory for a cache that grew by a copy, and the kernel cleared")
    print("it; MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 in the environment keep glibc from that.")
    print(f"MiB of weights that a token reads: {weights}.\n", flush=True)
    found = list(measured(decoders, args.lengths, args.steps))
    print_table(COLUMNS, (row for points in found for row in rows(points)))
    # Linux counts in KiB.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"Resident memory of the process, prefills, all models and all caches together, at most: {resident:.0f} MiB.")
    everything = [point for points in found for point in points]
    if args.figure:
        figure(args.figure, everything)
    if wrong := [f"{point.name} at {point.length}" for point in everything if not point.exact]:
        sys.exit(f"benchmark: the cache is not of the size that the formula says: {', '.join(wrong)}")


def data(args: argparse.Namespace) -> None:
    """The command itself, on real text, at two sizes."""
    import tempfile

    from tools.benchmark_data import COLUMNS, TIMES, rows

    print(f"Python's library as JSON Lines, {args.megabytes} MB and {TIMES}x as much; {args.workers} workers; speeds are tokens for each")
    print("second of a core, those of reader and writer counted, without the start. Peak: resident memory of the largest process.")
    print(f"Median of {args.repeats}.\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print_table(COLUMNS, rows(args.tokenizers, args.megabytes, args.repeats, args.workers, Path(folder)))


def evaluation(args: argparse.Namespace) -> None:
    """Sets as evaluation makes them, without a cache; random models of the tiny teacher's shape as it runs them."""
    import os
    import tempfile

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tools.benchmark_evaluation import prompt_rows, reading_rows

    print(f"Prompts a second of one core, {args.prompts} of each task and length.\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print_table(["task", *map(str, args.lengths)], prompt_rows(args.tokenizer, args.lengths, args.prompts, Path(folder)))
    print("Microseconds a token of one prompt, 4 layers x 8 heads of 16 channels: flat where time is linear in length.\n", flush=True)
    print_table(["model", *map(str, args.read), "last / first"], reading_rows(args.read))


def _decoders(args: argparse.Namespace) -> list[Decoder]:
    """Teacher and students, stored or random."""
    from hydra_mcore.config import ModelShape
    from hydra_mcore.heads import InputError
    from tools.benchmark_decode import random_decoders, stored_decoders

    if bool(args.hf) != bool(args.teacher_hf):
        raise InputError("--hf and --teacher-hf go together: a model is measured beside its teacher")
    if args.hf:
        random_only = DECODE_SHAPE | {"fa_heads": DECODE_FA_HEADS}
        if given := [name for name, default in random_only.items() if getattr(args, name) != default]:
            raise InputError(f"--{given[0].replace('_', '-')} has no use with --hf, whose folders say what the models are; leave it out")
        return stored_decoders(args.teacher_hf, args.hf)
    shape = ModelShape(
        num_layers=args.layers, hidden_size=args.hidden, num_heads=args.heads, num_kv_groups=args.kv_groups, head_dim=args.head_dim,
        ffn_hidden_size=args.ffn, vocab_size=args.vocabulary, native_length=max(args.lengths),
    )  # fmt: skip
    return random_decoders(shape, [heads for n in args.fa_heads for heads in (range(n), spread_heads(n, shape))])


def _head_maps(paths: Sequence[Path], shape: ModelShape) -> Iterator[tuple[str, list[HeadMap]]]:
    """Named head maps: the given files, heads drawn from the whole model at several ratios, any number in any layer."""
    from hydra_mcore.heads import HeadMap
    from hydra_mcore.selection.choose import choose_heads, parse_ratio

    for path in paths:
        yield str(path), [HeadMap.load(path)]
    total = shape.num_layers * shape.num_heads
    for ratio in RATIOS:
        yield f"{ratio}, random scores, global", [choose_heads("global_random", shape, parse_ratio(ratio, total), seed=0).head_map]
    yield f"{RANDOM_MAPS} random maps", [_random_map(shape, random.Random(seed)) for seed in range(RANDOM_MAPS)]


def _random_map(shape: ModelShape, rng: random.Random) -> HeadMap:
    from hydra_mcore.heads import HeadMap

    heads = range(shape.num_heads)
    chosen = [(layer, head) for layer in range(shape.num_layers) for head in rng.sample(heads, rng.randint(0, shape.num_heads))]
    return HeadMap.from_fa(chosen, shape.num_layers, shape.num_heads, shape.num_kv_groups)


def _imbalances(name: str, maps: Sequence[HeadMap], tp_sizes: Sequence[int], length: int) -> Iterator[list[Any]]:
    from hydra_mcore.heads import HeadLayout
    from hydra_mcore.model.costs import fa_imbalance
    from hydra_mcore.ops.sequence import SequencePart

    part = SequencePart(length)
    for tp_size in tp_sizes:
        row: list[Any] = [name, tp_size]
        for way in ("heads", "queries"):
            found = [
                fa_imbalance(HeadLayout(layer, head_map.num_kv_groups, tp_size, layer_idx, way), part)
                for head_map in maps
                for layer_idx, layer in enumerate(head_map.layers)
                if layer.fa
            ]
            row += [f"{sum(found) / len(found):.3f}", f"{max(found):.3f}"] if found else ["-", "-"]
        yield row


if __name__ == "__main__":
    main()
