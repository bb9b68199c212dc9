"""The story of a measurement: the options of a run in, the figures of its update out."""

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
# Updates of a run whose length nobody has said.
_ENDLESS = 1_000_000
_SOURCES = ("dataset_name", "train_file", "train_dir")


def bench(
    options: Options,
    *,
    num_updates: int,
    sweep: Literal["micro_batch"] | None = None,
    profile: str | None = None,
    json_file: str | None = None,
) -> None:
    """Measures the update of a run, and logs and writes what was found; nothing is trained that is kept.

    Blocks are random ids, unless the options name a text or tokens.

    Args:
        options: the run.
        num_updates: updates that are timed.
        sweep: "micro_batch" to measure several sizes of the micro-batch; None for that of the options alone.
        profile: file for a trace of three updates.
        json_file: file for the figures.

    Raises:
        UserError: something outside the program is wrong; one line says what.
    """
    machine = start_compute(options.training)
    setup_logging(is_main=machine.world.is_main, rank=machine.world.rank)
    try:
        with ExitStack() as stack:
            stack.callback(come_online)
            stack.callback(restore_process)  # a failed one's memory can go
            _bench(options, machine, num_updates=num_updates, sweep=sweep, profile=profile, json_file=json_file)
        machine.release()
    finally:
        teardown_logging()


def _bench(
    options: Options,
    machine: Compute,
    *,
    num_updates: int,
    sweep: Literal["micro_batch"] | None,
    profile: str | None,
    json_file: str | None,
) -> None:
    world = machine.world
    log.info("%s", machine)
    if sweep is not None and world.size > 1:
        raise UserError("--sweep tries sizes until memory is full or more is no faster, in one process; start one")
    if world.is_main:
        _require_writable("profile", profile)
        _require_writable("json_file", json_file)
    detect_hub(options, world)
    limit = context_limit(read_config(options.model))
    choose_block_size(options.data.block_size, limit, limit)
    check_training(options, num_ranks=world.size)
    config, tokenizer, samples = _samples(options, machine, limit)
    plan = _plan(options, samples, world)
    seed_weights(plan.seed)
    language_model = build_language_model(options, options.model, config, tokenizer, machine, plan)
    updater = build_updater(options, machine, language_model, plan_schedule(options, plan), plan)
    for line in updater.summary():
        log.info("%s", line)
    runner = StepBenchmark(machine, updater, samples, plan, options.data.dataloader_num_workers)
    dtype = _DTYPES[machine.precision]
    facts = {
        "device": str(machine),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "compiled": is_compiled(language_model),
        "arithmetic": str(dtype).removeprefix("torch."),
        "num_parameters": language_model.model.num_parameters(),
        "block_size": plan.block_size,
        "flops_per_token": flops_per_token(language_model.model, plan.block_size),
        # Of all devices, as tokens are.
        "measured_flops": measured_flops(world.device, dtype) * world.size,
        "data_sheet_flops": _times(peak_flops(world.device, dtype), world.size),
    }
    if sweep is not None:
        found = []
        for each in runner.sweep(num_updates, options.training.global_batch_size):
            found.append(each)
            log.info("%s", _sweep_line(each, facts))
        best = max(found, key=lambda each: each.tokens_per_second)
        log.info("fastest: --per_device_train_batch_size %d", best.micro_batch)
    else:
        found = [runner.measure(num_updates)]
        for line in _lines(found[0], facts):
            log.info("%s", line)
    if profile is not None:
        log.info("%s", runner.profile(Path(profile)))
    if json_file is not None and world.is_main:
        _write(json_file, facts | {"updates": [_record(each, facts) for each in found]})


def _plan(options: Options, samples: BlockSource, world: World) -> Plan:
    """That of the run, where its length is known."""
    has_an_end = options.training.max_train_steps is not None or samples.num_blocks is not None
    training = options.training if has_an_end else options.training.model_copy(update={"max_train_steps": _ENDLESS})
    plan = plan_run(training, samples, num_ranks=world.size, seed=choose_seed(options.training.seed))
    log.info("%s", plan if has_an_end else f"updates: as of a run that does not end ({_ENDLESS:,})")
    return plan


def _samples(
    options: Options, machine: Compute, limit: int
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | None, BlockSource]:
    """The model's configuration, its tokenizer if there is a text, and the blocks."""
    data = options.data
    if all(getattr(data, name) is None for name in _SOURCES):
        if data.document_mask:
            raise UserError("--document_mask: random ids have no documents; name a text (--train_file FILE)")
        config = _config_without_a_text(options)
        size = int(config.get_text_config(decoder=True).vocab_size)
        log.info("blocks: random ids of a vocabulary of %s", f"{size:,}")
        return config, None, SyntheticBlocks(choose_block_size(data.block_size, limit, limit), size)
    text = machine.world.main_first("the text", lambda: prepare_dataset(options, machine.world))
    config = load_config(options.model, text.tokenizer)
    block_size = choose_block_size(data.block_size, limit, context_limit(config, text.tokenizer))
    blocks, _ = text.blocks(block_size, document_mask=data.document_mask)
    return config, text.tokenizer, blocks


def _config_without_a_text(options: Options) -> PretrainedConfig:
    """The configuration, with the vocabulary of the tokenizer that the options name; its own where they name none.

    Raises:
        UserError: only the text knows the vocabulary.
    """
    name, model = options.tokenizer.tokenizer_name, options.model
    if name == CHARACTERS:
        raise UserError("--tokenizer_name char: the vocabulary is that of the text; name it (--train_file FILE)")
    if name is None or model.model_name_or_path is not None:
        return read_config(model)
    if name == TRAINED:
        size = options.tokenizer.vocab_size or DEFAULT_VOCAB_SIZE
        overrides = ",".join(filter(None, [model.config_overrides, f"vocab_size={size}"]))
        return read_config(model.model_copy(update={"config_overrides": overrides}))
    nothing = load_tokenizer(options.tokenizer, model, texts=lambda: iter(()), corpus_fingerprint="", cache_dir=Path())
    return load_config(model, nothing)


def _record(found: Measurement, facts: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file says of one size of the micro-batch."""
    flops = facts["flops_per_token"] * found.tokens_per_second
    sheet = facts["data_sheet_flops"]
    return {
        "micro_batch": found.micro_batch,
        "tokens": found.tokens,
        "median_seconds": found.median_seconds,
        "seconds": found.seconds,
        "period": found.period,
        "cpu_seconds": found.cpu_seconds,
        "tokens_per_second": found.tokens_per_second,
        "flops": flops,
        "share_of_measured_flops": flops / facts["measured_flops"],
        "mfu": None if sheet is None else flops / sheet,
        "peak_bytes": found.peak_bytes,
        "communication_seconds": found.communication_seconds,
        "shares": found.shares(),
    }


def _lines(found: Measurement, facts: dict[str, Any]) -> list[str]:
    record = _record(found, facts)
    exchange = found.communication_seconds
    sheet = "its data sheet is not known here" if record["mfu"] is None else f"MFU {record['mfu']:.1%}"
    means = f" means of {found.period}" if found.period > 1 else ""
    low, high = min(found.seconds) * 1e3, max(found.seconds) * 1e3
    return [
        f"update: {found.median_seconds * 1e3:.1f} ms, the median of {len(found.seconds)}{means} ({low:.1f} to"
        f" {high:.1f}; CPU {found.cpu_seconds * 1e3:.1f}), of {found.tokens:,} tokens",
        f"speed: {format_quantity(found.tokens_per_second)} tok/s",
        f"arithmetic: {format_quantity(facts['flops_per_token'])}FLOP a token,"
        f" {format_quantity(record['flops'])}FLOP/s:"
        f" {record['share_of_measured_flops']:.1%} of what this device does in {facts['arithmetic']} products"
        f" ({format_quantity(facts['measured_flops'])}FLOP/s, measured now); {sheet}",
        f"memory: {format_quantity(found.peak_bytes)}B at most",
        "time: " + ", ".join(f"{name} {share:.1%}" for name, share in record["shares"].items()),
        *([] if exchange is None else [f"communication: {exchange * 1e3:.1f} ms of an update that nothing hides"]),
    ]


def _sweep_line(found: Measurement, facts: dict[str, Any]) -> str:
    record = _record(found, facts)
    return (
        f"micro_batch {found.micro_batch} | {found.median_seconds * 1e3:.1f} ms"
        f" | {format_quantity(found.tokens_per_second)} tok/s"
        f" | {record['share_of_measured_flops']:.1%} of the products' rate"
        f" | {format_quantity(found.peak_bytes)}B"
    )


def _times(value: float | None, factor: int) -> float | None:
    return None if value is None else value * factor


def _require_writable(option: str, path: str | None) -> None:
    """Before anything is measured for it.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    with _naming(option, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        is_new = not Path(path).exists()
        with open(path, "a"):
            pass
        if is_new:
            Path(path).unlink()


def _write(path: str, figures: dict[str, Any]) -> None:
    with _naming("json_file", path):
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")


@contextmanager
def _naming(option: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--{option} {path} cannot be written: {error.strerror or error}") from error
