# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One stage of the transfer, from its command line to its last checkpoint."""

from __future__ import annotations

import copy
import shutil
import sys
from functools import partial
from typing import Any

from hydra_mcore.compat import install

install()

import torch  # noqa: E402  the patches come before the engine
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training import get_args, get_tokenizer, pretrain  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_args  # noqa: E402
from megatron.training.global_vars import get_tensorboard_writer, set_global_variables  # noqa: E402
from megatron.training.models import GPTModelConfig  # noqa: E402

from hydra_mcore.config import ConfigError, ModelCard, add_stage_flags  # noqa: E402
from hydra_mcore.files import write_text  # noqa: E402
from hydra_mcore.model.build import apply_card, contiguous_parts, model_config  # noqa: E402
from hydra_mcore.model.checkpoints import load_weights  # noqa: E402
from hydra_mcore.stages import STAGES  # noqa: E402
from hydra_mcore.train.anomalies import DataTimeout  # noqa: E402
from hydra_mcore.train.arguments import ResolvedStage, resolve  # noqa: E402
from hydra_mcore.train.checkpoint_care import checkpoint_care, note_versions, tidy  # noqa: E402
from hydra_mcore.train.console import ARGUMENTS, leave_out_details, validated  # noqa: E402
from hydra_mcore.train.data import build_datasets, check_data, fetch_micro_batch  # noqa: E402
from hydra_mcore.train.dry_run import report  # noqa: E402
from hydra_mcore.train.flags import refusal  # noqa: E402
from hydra_mcore.train.interrupt import saved_at_ctrl_c  # noqa: E402
from hydra_mcore.train.needle_panels import NeedlePanels, make_panels  # noqa: E402
from hydra_mcore.train.pipeline import teacher_in_the_pipeline  # noqa: E402
from hydra_mcore.train.profile import profiled_steps  # noqa: E402
from hydra_mcore.train.resume import (  # noqa: E402
    alone_in,
    check_settings_of_resume,
    note_settings,
    samples_of_now,
    schedule_of_now,
    settings_of,
)
from hydra_mcore.train.step import TransferStep, forward_step  # noqa: E402
from hydra_mcore.train.training_log import TrainingLog, logging_to  # noqa: E402
from hydra_mcore.train.wandb_run import logged_to_wandb, send_alert  # noqa: E402


def run_stage(argv: list[str]) -> None:
    """Resolve, check and run one stage.

    Raises:
        InputError: bad input, before anything is written; a folder that another run writes to.
    """
    if (resolved := _unfinished(argv)) is None:
        return
    args, config, settings, table = _validated(resolved)
    if resolved.options.dry_run:
        if not resolved.assumed:
            make_panels(args, resolved.start, resolved.card.shape.vocab_size)
        if args.rank == 0:
            report(resolved, args, settings, table)
        return
    check_data(args)
    panels = make_panels(args, resolved.start, resolved.card.shape.vocab_size)
    with alone_in(resolved.save, args) as store:
        if (now := _unfinished(argv)) is None:  # whoever had the folder until now may have saved
            return
        if now != resolved:
            resolved, (args, config, settings, table) = now, _validated(now)
        if args.rank == 0:
            _prepare_output(resolved, settings, table)
        with logged_to_wandb(resolved):
            set_global_variables(args)
            with saved_at_ctrl_c(args):
                _train(resolved, args, config, panels, store)


def _unfinished(argv: list[str]) -> ResolvedStage | None:
    """The stage that a command line asks for; None, and a line, where nothing of it is left to do."""
    resolved = resolve(argv)
    if resolved.finished:
        print(f"stage {resolved.options.stage} is finished: {resolved.save}")
        return None
    return resolved


def _validated(resolved: ResolvedStage) -> tuple[Any, GPTModelConfig, dict[str, Any], str]:
    """Megatron's own parse and validation, which write nothing yet, the settings as given, and the table of all
    arguments; its refusals become one line.
    """
    sys.argv = [sys.argv[0], *resolved.flags]
    args = parse_args(extra_args_provider=add_stage_flags)
    settings = settings_of(args)
    args.world_size = resolved.options.world_size or args.world_size
    args.enable_one_logger = False  # NVIDIA's own, which nobody else can install
    leave_out_details(args)
    try:
        table = validated(args)
        config = gpt_config_from_args(args)
        pretrain_cfg_container_from_args(args, config)  # what it holds checks itself
    except Exception as error:  # it asserts, and falls over, in many ways, and has built nothing yet
        raise refusal(error, args) from None
    config.vocab_size, config.should_pad_vocab = resolved.card.shape.vocab_size, False
    config.rotary_base = resolved.card.shape.rope_theta
    apply_card(config, resolved.card, resolved.options.stage, resolved.options.fa_balance)
    if resolved.resume:
        check_settings_of_resume(resolved.save, settings, not (args.no_load_optim or args.finetune))
    return args, config, settings, table


def _prepare_output(resolved: ResolvedStage, settings: dict[str, Any], table: str) -> None:
    """Put card, head map, tokenizer and the table of arguments into the stage's folder; checkpoints follow as training
    saves them.
    """
    resolved.save.mkdir(parents=True, exist_ok=True)
    resolved.card.save(resolved.save)
    tidy(resolved.save)
    note_versions(resolved.save)
    note_settings(resolved.save, settings, resolved.resume)
    write_text(resolved.save / ARGUMENTS, table)
    print(f"start {resolved.start}, save {resolved.save}, all arguments {resolved.save / ARGUMENTS}", flush=True)
    resolved.card.head_map.save(resolved.save / "head_map.json")
    if (resolved.start / "tokenizer").is_dir():
        shutil.copytree(resolved.start / "tokenizer", resolved.save / "tokenizer", dirs_exist_ok=True)


def _train(
    resolved: ResolvedStage,
    args: Any,
    config: GPTModelConfig,
    panels: NeedlePanels | None,
    store: torch.distributed.Store,
) -> None:
    data = DataTimeout(
        resolved.options.data_timeout, lambda: f"rank {args.rank} reads {' '.join(args.data_path or [])}", send_alert
    )
    step = forward_step(resolved.options, partial(fetch_micro_batch, args, data), lambda: args.curr_iteration + 1)
    config.pre_wrap_hooks.append(partial(_prepare_models, resolved, config, step))
    log = TrainingLog(resolved.card, args, step, data, panels)
    care = checkpoint_care(resolved.save, resolved.options, args, config)
    resuming = schedule_of_now(resolved.save, args)
    with teacher_in_the_pipeline(step), care, resuming, logging_to(log), profiled_steps(args, step):
        pretrain(
            pretrain_cfg_container_from_args(args, config), _datasets, ModelType.encoder_or_decoder, step, store=store
        )
    if (writer := get_tensorboard_writer()) is not None:
        writer.close()  # its thread would die with the process, and the last values with it


def _prepare_models(
    resolved: ResolvedStage, config: GPTModelConfig, step: TransferStep, models: list[GPTModel]
) -> list[GPTModel]:
    """Freeze what the stage leaves alone, fill in the starting weights, build the teacher."""
    trains = STAGES[resolved.options.stage].trains
    for model in models:
        contiguous_parts(model, resolved.card.shape)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains in name)
    if not resolved.resume:
        load_weights(models, resolved.start)
    step.prepare(
        models, _build_teachers(resolved, config, models) if STAGES[resolved.options.stage].needs_teacher else []
    )
    return models


def _build_teachers(resolved: ResolvedStage, config: GPTModelConfig, students: list[GPTModel]) -> list[GPTModel]:
    """The teacher's layers that stand beside each of this rank's model chunks, frozen."""
    card = ModelCard.load(resolved.options.teacher)
    try:
        card.check_head_map(resolved.card.head_map)
    except ConfigError as error:
        raise ConfigError(f"the student does not descend from teacher {resolved.options.teacher}: {error}") from None
    teacher_config = model_config(card, resolved.options.stage, copy.copy(config.transformer))
    if not resolved.options.teacher_fp8:
        teacher_config.transformer.fp8 = None
    teacher_config.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size
    builder, groups = teacher_config.get_builder_cls()(teacher_config), ProcessGroupCollection.use_mpu_process_groups()
    # Without an output layer there is no copy of the embedding on the last pipeline stage to keep equal.
    with_output = STAGES[resolved.options.stage].needs_teacher_logits
    teacher_config.share_embeddings_and_output_weights &= with_output
    teachers = [
        builder.build_model(
            groups, student.pre_process, student.post_process and with_output, getattr(student, "vp_stage", None)
        )
        for student in students
    ]
    load_weights(teachers, resolved.options.teacher)
    return [
        contiguous_parts(teacher, card.shape).requires_grad_(False).to(torch.cuda.current_device()).eval()
        for teacher in teachers
    ]


def _datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    return build_datasets(get_args(), get_tokenizer(), samples_of_now(num_samples, get_args()), vp_stage)


_datasets.is_distributed = True
