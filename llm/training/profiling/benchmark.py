"""The benchmark of a run: from the options of a run to the measurements of its update."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.config.options import Options
from llm.data.batches.loader import BlockSource
from llm.data.dataset import detect_hub, prepare_dataset
from llm.distributed.world import World
from llm.hub.connection import come_online
from llm.models.compile import is_compiled
from llm.models.config import context_limit, load_config, read_config
from llm.models.flops import flops_per_token, peak_flops
from llm.models.language_model import LanguageModel
from llm.system.units import format_quantity
from llm.tokenization.load import CHARACTERS, DEFAULT_VOCAB_SIZE, TRAINED, load_tokenizer
from llm.training.accelerator import Compute, restore_process, start_compute
from llm.training.build import build_language_model, build_updater
from llm.training.plan import Plan, check_training, choose_block_size, choose_seed, plan_run, plan_schedule
from llm.training.profiling.measure import Measurement, StepBenchmark, SyntheticBlocks, measured_flops
from llm.training.run_dir.console import setup_logging, teardown_logging
from llm.training.seeding import seed_weights

log = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Updates of a run whose length the options do not give.
_DEFAULT_NUM_STEPS = 1_000_000
_TEXT_OPTIONS = ("dataset_name", "train_file", "train_dir")


def bench(
    options: Options,
    *,
    num_updates: int,
    sweep: Literal["micro_batch"] | None = None,
    profile: str | None = None,
    json_file: str | None = None,
) -> None:
    """Measure the update of a run, log the results and write them to a file; the model is not kept.

    The blocks are random ids, unless the options name a text or tokens.

    Args:
        options: of the run.
        num_updates: number of timed updates.
        sweep: "micro_batch" to measure several sizes of the micro-batch; None to measure the size of the options.
        profile: file for a trace of three updates; None writes no trace.
        json_file: file for the results; None writes no file.

    Raises:
        UserError: an option, a file or the device cannot be used; the message is one line.
    """
    compute = start_compute(options.training)
    setup_logging(is_main=compute.world.is_main, rank=compute.world.rank)
    try:
        with ExitStack() as stack:
            stack.callback(come_online)
            stack.callback(restore_process)  # frees the memory, also after an error
            _bench(options, compute, num_updates=num_updates, sweep=sweep, profile=profile, json_file=json_file)
        compute.release()
    finally:
        teardown_logging()


def _bench(
    options: Options,
    compute: Compute,
    *,
    num_updates: int,
    sweep: Literal["micro_batch"] | None,
    profile: str | None,
    json_file: str | None,
) -> None:
    world = compute.world
    log.info("%s", compute)
    if sweep is not None and world.size > 1:
        raise UserError("--sweep runs in one process only, because it fills the memory; start one process")
    if world.is_main:
        _require_writable("profile", profile)
        _require_writable("json_file", json_file)
    detect_hub(options, world)
    limit = context_limit(read_config(options.model))
    choose_block_size(options.data.block_size, limit, limit)
    check_training(options, num_ranks=world.size)
    config, tokenizer, blocks = _open_blocks(options, compute, limit)
    plan = _plan(options, blocks, world)
    seed_weights(plan.seed)
    language_model = build_language_model(options, options.model, config, tokenizer, compute, plan)
    updater = build_updater(options, compute, language_model, plan_schedule(options, plan), plan)
    for line in updater.summary():
        log.info("%s", line)
    benchmark = StepBenchmark(compute, updater, blocks, plan, options.data.dataloader_num_workers)
    facts = _facts(compute, language_model, plan)
    if sweep is not None:
        measurements = []
        for measurement in benchmark.sweep(num_updates, options.training.global_batch_size):
            measurements.append(measurement)
            log.info("%s", _sweep_line(measurement, facts))
        fastest = max(measurements, key=lambda measurement: measurement.tokens_per_second)
        log.info("fastest: --per_device_train_batch_size %d", fastest.micro_batch)
    else:
        measurements = [benchmark.measure(num_updates)]
        for line in _lines(measurements[0], facts):
            log.info("%s", line)
    if profile is not None:
        log.info("%s", benchmark.profile(Path(profile)))
    if json_file is not None and world.is_main:
        _write_json(json_file, facts | {"updates": [_record(measurement, facts) for measurement in measurements]})


def _facts(compute: Compute, language_model: LanguageModel, plan: Plan) -> dict[str, Any]:
    """Return what the results of all measurements share, by the keys of the JSON file."""
    world = compute.world
    dtype = _DTYPES[compute.precision]
    device_peak = peak_flops(world.device, dtype)
    return {
        "device": str(compute),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "compiled": is_compiled(language_model),
        "arithmetic": str(dtype).removeprefix("torch."),
        "num_parameters": language_model.model.num_parameters(),
        "block_size": plan.block_size,
        "flops_per_token": flops_per_token(language_model.model, plan.block_size),
        # Summed over all devices, as tokens are.
        "measured_flops": measured_flops(world.device, dtype) * world.size,
        "data_sheet_flops": None if device_peak is None else device_peak * world.size,
    }


def _plan(options: Options, blocks: BlockSource, world: World) -> Plan:
    """Return the plan of the run, with very many updates if the options do not give its length."""
    has_length = options.training.max_train_steps is not None or blocks.num_blocks is not None
    training = (
        options.training if has_length else options.training.model_copy(update={"max_train_steps": _DEFAULT_NUM_STEPS})
    )
    plan = plan_run(training, blocks, num_ranks=world.size, seed=choose_seed(options.training.seed))
    log.info("%s", plan if has_length else f"updates: as in a run of unlimited length ({_DEFAULT_NUM_STEPS:,} planned)")
    return plan


def _open_blocks(
    options: Options, compute: Compute, limit: int
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | None, BlockSource]:
    """Return the model's configuration, its tokenizer if the options name a text, and the blocks."""
    data = options.data
    if all(getattr(data, name) is None for name in _TEXT_OPTIONS):
        if data.document_mask:
            raise UserError("--document_mask: random ids have no documents; name a text (--train_file FILE)")
        config = _config_without_text(options)
        size = int(config.get_text_config(decoder=True).vocab_size)
        log.info("blocks: random ids of a vocabulary of %s", f"{size:,}")
        return config, None, SyntheticBlocks(choose_block_size(data.block_size, limit, limit), size)
    dataset = compute.world.main_first("the text", lambda: prepare_dataset(options, compute.world))
    config = load_config(options.model, dataset.tokenizer)
    block_size = choose_block_size(data.block_size, limit, context_limit(config, dataset.tokenizer))
    blocks, _ = dataset.blocks(block_size, document_mask=data.document_mask)
    return config, dataset.tokenizer, blocks


def _config_without_text(options: Options) -> PretrainedConfig:
    """Return the model's configuration, with the vocabulary size of the tokenizer if the options name one.

    Raises:
        UserError: the vocabulary depends on a text.
    """
    name = options.tokenizer.tokenizer_name
    model = options.model
    if name == CHARACTERS:
        raise UserError("--tokenizer_name char: the vocabulary is that of the text; name a text (--train_file FILE)")
    if name is None or model.model_name_or_path is not None:
        return read_config(model)
    if name == TRAINED:
        size = options.tokenizer.vocab_size or DEFAULT_VOCAB_SIZE
        overrides = ",".join(filter(None, [model.config_overrides, f"vocab_size={size}"]))
        return read_config(model.model_copy(update={"config_overrides": overrides}))
    tokenizer = load_tokenizer(
        options.tokenizer, model, texts=lambda: iter(()), corpus_fingerprint="", cache_dir=Path()
    )
    return load_config(model, tokenizer)


def _record(measurement: Measurement, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON record of the measurements at one size of the micro-batch."""
    flops = facts["flops_per_token"] * measurement.tokens_per_second
    data_sheet_flops = facts["data_sheet_flops"]
    return {
        "micro_batch": measurement.micro_batch,
        "tokens": measurement.tokens,
        "median_seconds": measurement.median_seconds,
        "seconds": measurement.seconds,
        "period": measurement.period,
        "cpu_seconds": measurement.cpu_seconds,
        "tokens_per_second": measurement.tokens_per_second,
        "flops": flops,
        "share_of_measured_flops": flops / facts["measured_flops"],
        "mfu": None if data_sheet_flops is None else flops / data_sheet_flops,
        "peak_bytes": measurement.peak_bytes,
        "communication_seconds": measurement.communication_seconds,
        "shares": measurement.shares(),
    }


def _lines(measurement: Measurement, facts: dict[str, Any]) -> list[str]:
    record = _record(measurement, facts)
    mfu = "the peak of this device is unknown" if record["mfu"] is None else f"MFU {record['mfu']:.1%}"
    means = f" means of {measurement.period}" if measurement.period > 1 else ""
    low = min(measurement.seconds) * 1e3
    high = max(measurement.seconds) * 1e3
    lines = [
        f"update: {measurement.median_seconds * 1e3:.1f} ms, the median of {len(measurement.seconds)}{means}"
        f" ({low:.1f} to {high:.1f}; CPU {measurement.cpu_seconds * 1e3:.1f}), of {measurement.tokens:,} tokens",
        f"speed: {format_quantity(measurement.tokens_per_second)} tok/s",
        f"arithmetic: {format_quantity(facts['flops_per_token'])}FLOP a token,"
        f" {format_quantity(record['flops'])}FLOP/s:"
        f" {record['share_of_measured_flops']:.1%} of what this device does in {facts['arithmetic']} products"
        f" ({format_quantity(facts['measured_flops'])}FLOP/s, measured now); {mfu}",
        f"memory: {format_quantity(measurement.peak_bytes)}B at most",
        "time: " + ", ".join(f"{name} {share:.1%}" for name, share in record["shares"].items()),
    ]
    if measurement.communication_seconds is not None:
        milliseconds = measurement.communication_seconds * 1e3
        lines.append(f"communication: {milliseconds:.1f} ms of an update that no computation hides")
    return lines


def _sweep_line(measurement: Measurement, facts: dict[str, Any]) -> str:
    record = _record(measurement, facts)
    return (
        f"micro_batch {measurement.micro_batch} | {measurement.median_seconds * 1e3:.1f} ms"
        f" | {format_quantity(measurement.tokens_per_second)} tok/s"
        f" | {record['share_of_measured_flops']:.1%} of the products' rate"
        f" | {format_quantity(measurement.peak_bytes)}B"
    )


def _require_writable(option: str, path: str | None) -> None:
    """Check, before the measurements, that a file can be written.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    with _naming_option(option, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        is_new = not Path(path).exists()
        with open(path, "a"):
            pass
        if is_new:
            Path(path).unlink()


def _write_json(path: str, figures: dict[str, Any]) -> None:
    with _naming_option("json_file", path):
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")


@contextmanager
def _naming_option(option: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--{option} {path} cannot be written: {error.strerror or error}") from error
