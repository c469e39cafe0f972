# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The package.  constraints.txt holds the exact versions it was tested with."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'(?m)^__version__ = "(.+)"', (HERE / "hydra_mcore" / "__init__.py").read_text())[1]
# A wheel has the commands inside the package; hydra_mcore/__main__.py finds them in either place. As packages of their
# own, they would take the name "tools" away from everybody else.
TOOLS = find_namespace_packages(include=["tools", "tools.*"])
WHEEL = "hydra_mcore.commands_of_the_wheel."

setup(
    name="hydra_mcore",
    version=VERSION,
    description="HydraHead models on Megatron-Core: full attention and Gated DeltaNet, chosen head by head",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="the hydra_mcore authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["hydra_mcore", "hydra_mcore.*"]), *(WHEEL + name for name in TOOLS)],
    package_dir={WHEEL + name: name.replace(".", "/") for name in TOOLS},
    entry_points={"console_scripts": ["hydra-mcore = hydra_mcore.__main__:main"]},
    package_data={"hydra_mcore": ["py.typed"]},
    python_requires=">=3.12",
    install_requires=[
        "megatron-core==0.19.2",  # exact: hydra_mcore/compat fixes this version
        "torch>=2.9",
        "numpy>=2.0",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "datasets>=4.0",
        "pyarrow>=17.0",
        "huggingface_hub>=1.0",
        "pillow>=10.0",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "wandb>=0.20",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "wonderwords>=2.2",  # the word lists that RULER draws from
        "regex>=2024.5",  # Unicode's sentence terminators; transformers brings it along
        "psutil>=5.9",  # megatron.core's checkpoint writer imports it and does not ask for it
    ],
    extras_require={
        "gpu": ["hydra_mcore[kernels,te]"],
        "kernels": ["flash-linear-attention>=0.6"],
        # It opens CUDA's curand, but does not ask for it; README.md has the flags that its build needs.
        "te": ["transformer-engine[pytorch]>=2.19", "nvidia-curand"],
        "eval": ["lm-eval>=0.4.10", "accelerate>=1.1"],  # not lm-eval[hf]: it adds peft, for adapters
        "gguf": ["gguf>=0.17"],  # examples/smollm2_135m reads its weights through transformers with it
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "ruff>=0.12",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
