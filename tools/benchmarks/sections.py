# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""List the sections of ``tools/benchmark.py`` and their flags. It imports nothing heavy, so --help is quick.

``tools/benchmarks/NAME.py`` measures the section NAME. It is imported when the section runs.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.benchmarks import shapes
from tools.benchmarks.flags import add_heads, add_machine, add_profile, add_repeats, layers_x_heads, number, several
from tools.benchmarks.shapes import BLOCKS, DECODED, DECODED_FA_HEADS, QWEN3, SIZES, SMALL, STEP_SIZES


@dataclass(frozen=True)
class Section:
    """One subcommand.

    Attributes:
        add_flags: adds its flags to a parser; its docstring says what is measured.
        help: one line for the list of sections.
        examples: command lines.
        figure: its results are curves, so ``--figure`` draws them.
        plain: it does without what hydra_mcore changes in the process, or installs it once it measured others without.
    """

    add_flags: Callable[[argparse.ArgumentParser], None]
    help: str
    examples: str
    figure: bool
    plain: bool

    @property
    def about(self) -> str:
        return inspect.getdoc(self.add_flags)


SECTIONS: dict[str, Section] = {}


def section(help: str, examples: str, figure: bool = False, plain: bool = False) -> Callable:
    def add(add_flags: Callable[[argparse.ArgumentParser], None]) -> Callable:
        SECTIONS[add_flags.__name__] = Section(add_flags, help, examples, figure, plain)
        return add_flags

    return add


@section(
    "seconds and memory of the gated delta rule by length, beside Megatron-Core, transformers, attention and FLA",
    """\
  the gated delta rule, forward and backward, beside Megatron-Core's, transformers' and attention (minutes)
      python tools/benchmark.py delta-rule --json delta_rule.json --figure delta_rule.png
  the same without the two slow ones beyond 2K tokens (a minute)
      python tools/benchmark.py delta-rule --slow-limit 2048
""",
    figure=True,
    plain=True,
)
def delta_rule(p: argparse.ArgumentParser) -> None:
    """Time the gated delta rule, and what one would call instead: Megatron-Core's and transformers' torch code,
    attention, and FLA's kernel.
    """
    lengths = [2**power for power in range(10, 15)]
    number(p, "--lengths", "tokens of a row (default 1024 ... 16384)", lengths, nargs="+")
    add_heads(p)
    slow = "longest row for Megatron-Core's and transformers' torch code (default 16384; 0 leaves them out)"
    p.add_argument("--slow-limit", type=int, default=16384, metavar="N", help=slow)
    sizes = "chunk sizes of our torch code that are compared, in rows (default 32 64 128)"
    number(p, "--chunk-sizes", sizes, [32, 64, 128], nargs="*")
    exact = "tokens of the comparison with the recurrence in float64 (default 512)"
    number(p, "--accuracy-length", exact, 512)
    add_machine(p)


@section(
    "seconds and memory of the core of each kind of heads, beside attention, GDN and the torch code of others",
    """\
  all kinds forward and backward at 2K and 16K tokens, time beside counted operations (minutes)
      python tools/benchmark.py kinds --json kinds.json --figure kinds.png
""",
    figure=True,
)
def kinds(p: argparse.ArgumentParser) -> None:
    """Time the core of each kind of heads, forward and backward. It stands beside attention, Gated DeltaNet and the
    torch code that one would call instead: Megatron-Core's, and flash-linear-attention's if it is installed.
    """
    number(p, "--lengths", "tokens of a row (default 2048 16384)", [2048, 16_384], nargs="+")
    add_heads(p)
    slow = "longest row for the torch code of others (default 2048; 0 leaves it out)"
    p.add_argument("--slow-limit", type=int, default=2048, metavar="N", help=slow)
    add_machine(p)


@section(
    "seconds and memory of causal attention by torch's kernels, keys and values copied per head or shared in a group",
    """\
  the kernels that FA heads could take, at Qwen3-1.7B's heads
      python tools/benchmark.py attention --device cuda --lengths 16384 131072
""",
    figure=True,
)
def attention(p: argparse.ArgumentParser) -> None:
    """Time causal attention with each of torch's kernels, forward and backward. Keys and values of a group are copied
    for each head, or shared.

    FA heads copy them, because groups may be uneven, and take the kernel that torch chooses. This section says what
    another choice would give.
    """
    number(p, "--lengths", "tokens of a row (default 512 2048; 2048 16384 131072 on a GPU)", nargs="+")
    number(p, "--heads", "number of query heads (default 16)", QWEN3.num_heads)
    number(p, "--kv-groups", "number of kv groups, a divisor of the heads (default 8)", QWEN3.num_kv_groups)
    number(p, "--head-dim", "channels of a head (default 128)", QWEN3.head_dim)
    add_repeats(p, 5)
    add_machine(p)


@section(
    "seconds and memory of an attention block by length: all heads FA beside HydraHead at 3:1, 7:1 and all GDN",
    """\
  one attention block forward and backward, the teacher's beside HydraHead's, and where they cross (minutes)
      python tools/benchmark.py layer --json layer.json --figure layer.png
  the shape of Qwen3-1.7B on a GPU, to 512K tokens
      python tools/benchmark.py layer --device cuda
  which part of each block takes how long at 16K tokens
      python tools/benchmark.py layer --lengths 16384 --profile
""",
    figure=True,
)
def layer(p: argparse.ArgumentParser) -> None:
    """Time an attention block, forward and backward: the teacher's (all heads FA, rotary) beside HydraHead's at several
    ratios.
    """
    number(p, "--lengths", "tokens of a row (default 2048 ... 32768, on a GPU 2048 ... 524288)", nargs="+")
    for name, on_cpu in BLOCKS["cpu"].items():
        number(p, "--" + name.replace("_", "-"), f"{SIZES[name]} (default {on_cpu}, on a GPU {BLOCKS['cuda'][name]})")
    add_repeats(p, 3)
    several(p, "--ratios", shapes.SHARES, "HydraHead's ratios that are timed beside the teacher")
    add_profile(p)
    add_machine(p)


@section(
    "seconds and memory of a micro-batch of align, distill and extend, beside teacher forward + student step alone",
    """\
  a micro-batch of every stage beside teacher forward + student step alone (a small model; minutes)
      python tools/benchmark.py step
      python tools/benchmark.py step --lengths 512 2048 --layers 8 --hidden 1024 --heads 16 --ffn 3072
  the same at the size of Qwen3-1.7B
      python tools/benchmark.py step --device cuda --lengths 2048 16384 --json step.json --figure step.png
  the shape of SmolLM2-135M on a CPU, beside transformers
      python tools/benchmark.py step --transformers --lengths 2048 --layers 30 --hidden 576 --heads 9 --kv-groups 3 \\
          --fa-heads 2 --vocabulary 49152
  which part of the model takes how long in every stage
      python tools/benchmark.py step --lengths 2048 --profile
""",
    figure=True,
)
def step(p: argparse.ArgumentParser) -> None:
    """Measure seconds and peak memory of one micro-batch of align, distill and extend. Beside them stand the teacher's
    forward pass and the student's step, which distill cannot do without.
    """
    number(p, "--lengths", "tokens of a row (default 512 2048 8192; 2048 8192 32768 on a GPU)", nargs="+")
    add_repeats(p, 3)
    longest = "longest row for distill from whole logits too, which take some 24 bytes a token and word (default 2048)"
    p.add_argument("--whole-logits", type=int, default=2048, metavar="N", help=longest)
    other = "also time the teacher's shape in transformers: its forward pass and its training step"
    p.add_argument("--transformers", action="store_true", help=other)
    add_profile(p)
    add_machine(p)
    model = p.add_argument_group("model (default: a small one; on a GPU that of Qwen3-1.7B)")
    model.add_argument("--fa-heads", type=int, metavar="N", help="FA heads of every layer (default: a quarter)")
    for name, field in STEP_SIZES.items():
        default = f"{SIZES[name]} (default {getattr(SMALL, field)}, on a GPU {getattr(QWEN3, field)})"
        number(model, "--" + name.replace("_", "-"), default)


@section(
    "seconds of a prompt and of a decoded token, and cache bytes, by context length, beside the teacher",
    """\
  seconds of a prompt, seconds and cache bytes of a decoded token, teacher beside HydraHead (minutes, random models or
  your own)
      MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 python tools/benchmark.py decode --figure decode.png
      python tools/benchmark.py decode --teacher-hf Qwen3-1.7B --hf runs/a/hf --lengths 1024 4096
""",
    figure=True,
)
def decode(p: argparse.ArgumentParser) -> None:
    """Measure an exported model beside its teacher in transformers: the seconds of a prompt, and the seconds and cache
    bytes of a decoded token.
    """
    lengths = [2**power for power in range(10, 16)]
    number(p, "--lengths", "tokens of context (default 1024 ... 32768)", lengths, nargs="+")
    number(p, "--steps", "decoded tokens that are timed at each length (default 16)", 16)
    number(p, "--prompts", "readings of a prompt of each length, each in one call (default 2)", 2)
    add_machine(p)
    p.add_argument("--teacher-hf", type=Path, metavar="DIR", help="Hugging Face folder of the teacher")
    exported = "exported HydraHead models. The code in them is run"
    p.add_argument("--hf", nargs="+", type=Path, default=[], metavar="DIR", help=exported)
    random_models = p.add_argument_group("random models, without --hf")
    counts = (
        "FA heads of each layer, in the fewest kv groups that hold them, and spread over the most (default 4 2). The"
        " first of these maps is also timed with each other kind in place of GDN"
    )
    number(random_models, "--fa-heads", counts, DECODED_FA_HEADS, nargs="+")
    for name, default in DECODED.items():
        number(random_models, "--" + name.replace("_", "-"), f"{SIZES[name]} (default %(default)s)", default)


@section(
    "MiB that a rank sends for a layer, by context parallel size and length",
    """\
  bytes sent under context parallelism by a layer of Qwen3-1.7B, beside Megatron's all-to-all
      python tools/benchmark.py communication
      python tools/benchmark.py communication --fa-heads 2 --cp 2 4 --lengths 32768
""",
)
def communication(p: argparse.ArgumentParser) -> None:
    """Compute the bytes that a context-parallel rank sends for a layer, beside Megatron's all-to-all. The formulas are
    those of hydra_mcore/costs/communication.py.
    """
    few = "FA heads among the layer's 16 (default 4, that is 3:1)"
    p.add_argument("--fa-heads", type=int, default=4, metavar="N", help=few)
    number(p, "--cp", "context parallel sizes (default 2 4 8 16)", [2, 4, 8, 16], nargs="+")
    number(p, "--tp", "tensor parallel size (default 1)", 1)
    lengths = [2**power for power in range(14, 20)]
    number(p, "--lengths", "tokens of a row (default 16384 ... 524288)", lengths, nargs="+")


@section(
    "the busiest tensor-parallel rank's attention against the mean, by fa_balance",
    """\
  attention work of tensor-parallel ranks of Qwen3-1.7B, for a head map of your own too
      python tools/benchmark.py balance --head-map runs/heads/head_map.json
  the seconds of every rank's layer on this machine (minutes, one process)
      python tools/benchmark.py balance --measure
""",
)
def balance(p: argparse.ArgumentParser) -> None:
    """Say how evenly tensor-parallel ranks share a layer's attention, by ``fa_balance``. The work is counted, or timed
    rank by rank.
    """
    maps = "head maps of your own, shown before the synthetic ones"
    p.add_argument("--head-map", nargs="+", type=Path, default=[], metavar="FILE", help=maps)
    number(p, "--tp", "tensor parallel sizes (default 2 4 8)", [2, 4, 8], nargs="+")
    number(p, "--length", "tokens of the document (default 16384, with --measure 4096)")
    timed = "time a layer of every rank of TP 8 instead of counting, which takes minutes"
    p.add_argument("--measure", action="store_true", help=timed)
    number(p, "--repeats", "measurements with --measure, of which the median counts (default 3)", 3)


@section(
    "peak memory a token of align and distill, beside end-to-end backpropagation",
    """\
  peak memory of align and distill beside end-to-end backpropagation (a minute, a small model)
      python tools/benchmark.py memory
""",
)
def memory(p: argparse.ArgumentParser) -> None:
    """Measure the peak memory a token of align and distill, beside end-to-end backpropagation of the same model."""
    number(p, "--lengths", "tokens of a row (default 1024 2048)", [1024, 2048], nargs=2)


@section(
    "seconds of the scores of all heads, beside one forward pass for each of them",
    """\
  seconds of the exact scores of all heads beside a forward pass for every head (minutes, random models)
      python tools/benchmark.py selection
      python tools/benchmark.py selection --models 28x16 --naive-heads 448
""",
)
def selection(p: argparse.ArgumentParser) -> None:
    """Time the exact scores of all heads of random models, beside a forward pass for every head."""
    models, named = [(4, 8), (8, 8), (14, 16), (28, 16)], "layers x heads of the models (default 4x8 8x8 14x16 28x16)"
    p.add_argument("--models", nargs="+", type=layers_x_heads, default=models, metavar="LxH", help=named)
    number(p, "--hidden", "width of the models (default 256)", 256)
    number(p, "--head-dim", "channels of a head (default 32)", 32)
    number(p, "--ffn", "width of the MLPs (default 768)", 768)
    number(p, "--vocabulary", "tokens of the vocabulary (default 512)", 512)
    number(p, "--length", "tokens of a prompt (default 512)", 512)
    number(p, "--pairs", "pairs of prompts in the batch (default 1)", 1)
    number(p, "--answer", "tokens of an answer (default 7)", 7)
    number(p, "--naive-heads", "receivers that are also scored one forward pass each (default 64)", 64)
    number(p, "--naive-senders", "senders that are also scored one forward pass each (default 24)", 24)


@section(
    "tokens/s and memory of prepare_data, beside the tokenizers library alone",
    """\
  tokens/s and memory of prepare_data beside the tokenizers library alone (minutes)
      python tools/benchmark.py data --tokenizers examples/tiny/teacher
""",
)
def data(p: argparse.ArgumentParser) -> None:
    """Measure tokens a second and memory of tools/prepare_data.py, beside the tokenizers library alone. The command
    itself runs, on real text.
    """
    whose = "folders with a tokenizer.json (default: one of 32768 words, trained on the text)"
    p.add_argument("--tokenizers", nargs="+", type=Path, default=[], metavar="DIR", help=whose)
    number(p, "--megabytes", "megabytes of text (Python's library) in the smaller corpus (default 8)", 8)
    add_repeats(p, 3)
    number(p, "--workers", "processes that tokenize (default 2)", 2)


@section(
    "prompts/s of the generators by task, time a token of models, by length",
    """\
  how fast evaluation makes prompts, and how fast models read them (minutes)
      python tools/benchmark.py evaluation --lengths 4096 131072 1048576 --read 4096 65536
""",
)
def evaluation(p: argparse.ArgumentParser) -> None:
    """Measure how fast evaluation makes prompts, and how fast models read them.

    Prompts are made as evaluation makes them, without a cache. Random models of the tiny teacher's shape run as
    evaluation runs them.
    """
    whose = "folder with a tokenizer (default: one of 32768 words, trained on the text)"
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help=whose)
    lengths, read = [4096, 32_768, 131_072], [2**power for power in range(12, 17)]
    number(p, "--lengths", "tokens of a prompt (default 4096 32768 131072)", lengths, nargs="+")
    number(p, "--prompts", "prompts of each task and length (default 10)", 10)
    number(p, "--read", "tokens that models read (default 4096 ... 65536)", read, nargs="+")


@section(
    "seconds from a command to its --help, and to the first training step of the tiny example",
    """\
  how long every command takes to its --help, and training to its first step (a minute or two)
      python tools/benchmark.py start-up
""",
)
def start_up(p: argparse.ArgumentParser) -> None:
    """Measure the seconds from a command to its --help, for every command, and to the end of the tiny example's first
    training step.
    """
    add_repeats(p, 3)


@section(
    "registers and memory of every Triton kernel that we call, compiled for GPUs on a machine without one",
    """\
  every kernel for Hopper (H100, H200) and Blackwell (B200); minutes to an hour on one core
      python tools/benchmark.py kernels --json kernels.json
  what a model with GDN heads of 128 channels calls on Hopper in bf16
      python tools/benchmark.py kernels --gpus sm_90 --calls gdn conv norm --head-dims 128 --dtypes bf16
""",
    plain=True,
)
def kernels(p: argparse.ArgumentParser) -> None:
    """Run the functions of hydra_mcore/ops/fla_kernels.py as a layer does, while Triton compiles their kernels for GPUs
    that are not there. The exit status is 1 if a kernel does not compile or fit. `make env` installs
    flash-linear-attention, which this needs.
    """
    several(p, "--gpus", shapes.CAPABILITIES, "GPUs to compile for: sm_90 is H100 and H200, sm_100 is B200")
    several(
        p,
        "--calls",
        shapes.CALLERS,
        "what to compile: kinds of heads, their short convolution, the norm of queries and keys",
    )
    number(p, "--head-dims", "channels of a head (default 64 128)", [64, 128], nargs="+")
    several(p, "--dtypes", ("bf16", "float32"), "precisions of queries, keys and values")
    p.add_argument("--forward", action="store_true", help="leave out the backward pass")


@section(
    "what linear heads cannot imitate of a model's heads, by what they are given: kernel, convolutions, gates, windows",
    """\
  the tiny teacher, whole (minutes)
      python tools/benchmark.py imitation --teacher runs/demo/teacher --text runs/demo/train.txt
  a larger model, a few layers of it
      python tools/benchmark.py imitation --teacher runs/teacher --text books.txt --layers 0 7 14 21
""",
)
def imitation(p: argparse.ArgumentParser) -> None:
    """Say where the error of linear heads comes from. The measure is the share of each head's output that is left on
    held-out tokens, with the best values in closed form. It is taken for a GDN head with the teacher's queries and
    keys, and for heads that might be better.
    """
    p.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="checkpoint of an imported model")
    p.add_argument("--text", type=Path, required=True, metavar="FILE", help="text; needle prompts are hidden in it too")
    p.add_argument("--layers", type=int, nargs="+", metavar="N", help="numbers of layers, from 0 (default: all)")
    number(p, "--length", "tokens of a row, at most 512 (default 512)", 512)
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of prompts and text (default 0)")
