# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
#
# NVIDIA's PyTorch image with what hydra_mcore needs beside it, in /opt/hydra; not yet built. docs/container.md says
# which tags fit, and how the image becomes a file for SLURM.
#
#   docker build --tag hydra_mcore .
#   docker build --tag hydra_mcore --build-arg TAG=26.09 .
#
# The repository is not in the image: jobs mount it.
ARG TAG=26.09
FROM nvcr.io/nvidia/pytorch:${TAG}-py3

# torch, Triton, Transformer Engine, Apex and numpy stay the image's own, or this step fails.
RUN --mount=type=bind,target=/src cd /src && python3 tools/container.py /opt/hydra
ENV PATH=/opt/hydra/bin:$PATH
# There is no GPU here: `tools/doctor.py` on a node looks at the rest. The first imports may take a minute.
RUN --mount=type=bind,target=/src cd /src && python3 tools/doctor.py --only packages --limit 300
