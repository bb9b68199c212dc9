"""Every option of the trainer: one row each, grouped as the TOML tables are.

Names, types, defaults and meanings are those of HuggingFace's ``run_clm_no_trainer.py`` and of
llm-pytorch's ``llm.trainers.gpt`` where these have the option, else those of HuggingFace's Trainer. Flag
names are unique over all groups, so that the command line stays flat.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from llm.config.durations import DURATION_FORMATS, parse_duration
from llm.config.option import OptionGroup, option
from llm.config.weighted_dirs import parse_weighted_dirs

# One row a line, however long: the table is read down its columns.
# fmt: off

SchedulerName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
    "greedy",
]


class DataOptions(OptionGroup):
    """Where the text comes from and how it becomes blocks of tokens."""

    dataset_name: str | None = option(None, "Hub dataset, local folder, or builtin:python (also used when no data is named)", metavar="NAME", replaces=("train_file", "validation_file", "train_dir", "validation_dir"))
    dataset_config_name: str | None = option(None, "configuration of the Hub dataset", metavar="NAME")
    train_file: tuple[str, ...] | None = option(None, "training text: txt, md, csv, tsv, json, jsonl or parquet, compressed ones too, or token files (.bin, .npy); several files and globs", metavar="FILE", replaces=("dataset_name", "dataset_config_name", "train_dir", "validation_dir"))
    validation_file: tuple[str, ...] | None = option(None, "validation text, as --train_file", metavar="FILE")
    validation_split_percentage: float = option(5, "share of the text held out when there is no validation data", ge=0, lt=100, metavar="PERCENT")
    train_dir: tuple[str, ...] | None = option(None, "token shards: a folder of llm.prepare (its validation part and tokenizer included), of nanoGPT, llm.c, build-nanogpt, or of save_to_disk with input_ids; several are mixed by their weights, or by their sizes without any", metavar="DIR[=WEIGHT]", replaces=("dataset_name", "dataset_config_name", "train_file", "validation_file"))
    validation_dir: str | None = option(None, "token shards for validation, as --train_dir", metavar="DIR")
    text_column: str | None = option(None, "column that holds the text (default: the one called text)", metavar="NAME")
    no_keep_linebreaks: bool = option(False, "drop the line breaks of txt and md files")
    streaming: bool = option(False, "train on the text as it arrives, in that order, and write its shards behind; needs --max_train_steps")
    block_size: int | None = option(None, "tokens a block (default: the smallest of 1024, the model's and the tokenizer's limit)", ge=2, metavar="N")
    document_mask: bool = option(False, "keep attention, positions and loss inside a document, where a block holds several")
    preprocessing_num_workers: int | None = option(None, "processes for tokenizing (default: all cores)", ge=1, metavar="N")
    overwrite_cache: bool = option(False, "tokenize again although a cached copy exists")
    dataloader_num_workers: int = option(0, "processes that read blocks ahead (0: the training process itself)", ge=0, metavar="N")


class TokenizerOptions(OptionGroup):
    """The tokenizer."""

    tokenizer_name: str | None = option(None, "Hub name, folder, char, or train:bpe (default: the model's own; from scratch train:bpe)", metavar="NAME")
    use_slow_tokenizer: bool = option(False, "use the slow tokenizer of a Hub name or folder")
    vocab_size: int | None = option(None, "tokens of a tokenizer trained by train:bpe (default 8192)", ge=258, metavar="N")


class ModelOptions(OptionGroup):
    """The model: loaded with its weights, or built from scratch."""

    model_name_or_path: str | None = option(None, "Hub name or folder whose weights are trained further", metavar="NAME")
    config_name: str | None = option(None, "Hub name or folder whose configuration is built from scratch", metavar="NAME")
    model_type: str | None = option(None, "architecture built from scratch, such as gpt2 (the default), gpt_neo or llama", metavar="TYPE")
    config_overrides: str | None = option(None, "changes of the configuration, such as n_layer=4,n_embd=128", metavar="K=V,...")
    trust_remote_code: bool = option(False, "run code that a Hub repository brings along")
    low_cpu_mem_usage: bool = option(False, "accepted; weights are always loaded without a second copy in memory")
    attn_implementation: str | None = option(None, "attention of transformers: eager, sdpa, flash_attention_2, ...", metavar="NAME")
    dropout: float | None = option(None, "every dropout rate of the model (default: as its configuration says)", ge=0, lt=1, metavar="P")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, about a third slower")


class TrainingOptions(OptionGroup):
    """How long and how much at a time."""

    num_train_epochs: int = option(3, "times that the training text is read", ge=1, metavar="N")
    max_train_steps: int | None = option(None, "updates of the weights; overrides --num_train_epochs", ge=1, metavar="N")
    per_device_train_batch_size: int = option(8, "blocks of one forward and backward pass on one device", ge=1, metavar="N")
    gradient_accumulation_steps: int = option(1, "forward and backward passes of one update", ge=1, metavar="N")
    global_batch_size: int | None = option(None, "blocks of one update over all devices; --gradient_accumulation_steps is computed from it", ge=1, metavar="N")
    seed: int | None = option(None, "seed of all randomness (default: drawn, and recorded)", ge=0, lt=2**63, metavar="N")
    mixed_precision: Literal["auto", "no", "bf16", "fp16", "fp8"] = option("auto", "arithmetic of the forward and backward pass: auto is what accelerate launch says, else the checkpoint's, else bf16 where the device multiplies it natively, else no (fp8 is refused)")
    use_cpu: bool = option(False, "use no accelerator")
    torch_compile: bool | Literal["auto", "blocks", "cudagraphs", "max-autotune"] = option("auto", "compile the training (true), also as CUDA graphs (cudagraphs, without accumulation) or with kernels chosen by trying (max-autotune), each layer alone (blocks), or nothing (false); auto: true for runs of 2,000 updates or more on CUDA, of 10,000 on a CPU, up to 50 million parameters", metavar="auto|true|false|...")
    max_skipped_updates: int = option(3, "updates in a row with a gradient that is not finite that end the run; one alone is skipped", ge=1, metavar="N")
    max_time: float | str | None = option(None, f"save and stop that long after the start of the process: {DURATION_FORMATS}; a job's walltime is found by itself", metavar="TIME")
    full_determinism: bool = option(False, "only deterministic kernels, and no TF32: the same bits on every run of a CUDA device, slower")


class OptimizerOptions(OptionGroup):
    """The optimizer."""

    optim: Literal["adamw", "sgd", "muon"] = option("adamw", "optimizer; muon is Muon for the matrices inside the blocks and AdamW for all else")
    learning_rate: float = option(5e-5, "highest learning rate", ge=0, metavar="LR")
    muon_learning_rate: float = option(0.02, "highest learning rate of Muon's matrices; it follows the same schedule", ge=0, metavar="LR")
    muon_momentum: float = option(0.95, "momentum of Muon's matrices", ge=0, lt=1, metavar="X")
    weight_decay: float = option(0.0, "weight decay of matrices (never of biases and norms)", ge=0, metavar="X")
    adam_beta1: float = option(0.9, "decay of the first moment", ge=0, lt=1, metavar="X")
    adam_beta2: float = option(0.999, "decay of the second moment", ge=0, lt=1, metavar="X")
    adam_epsilon: float = option(1e-8, "added to the root of the second moment", gt=0, metavar="X")
    max_grad_norm: float = option(1.0, "largest norm of the gradient, clipped beyond (0: no clipping)", ge=0, metavar="X")


class ScheduleOptions(OptionGroup):
    """The learning rate as a function of the update number."""

    lr_scheduler_type: SchedulerName = option("linear", "shape of the schedule (reduce_lr_on_plateau and greedy are refused)")
    lr_scheduler_kwargs: dict[str, float | int | str | bool | None] = option({}, "further arguments of the schedule, as JSON", metavar="JSON")
    num_warmup_steps: int = option(0, "updates over which the rate rises to its peak", ge=0, metavar="N")
    min_lr_ratio: float | None = option(None, "floor of the cosine schedule, as a share of its peak", ge=0, le=1, metavar="X")


class EvaluationOptions(OptionGroup):
    """Evaluation and samples during training."""

    per_device_eval_batch_size: int = option(8, "blocks of one forward pass of an evaluation on one device", ge=1, metavar="N")
    eval_steps: int | None = option(None, "updates between evaluations (default: every epoch); there is always one at the end", ge=1, metavar="N")
    max_eval_batches: int | None = option(None, "batches of an evaluation, over all devices (default: the whole validation text)", ge=1, metavar="N")
    sample_steps: int | None = option(None, "updates between samples; three more at the end", ge=1, metavar="N")
    sample_prompt: str | None = option(None, "text that samples continue (default: the tokenizer's first token)", metavar="TEXT")


class OutputOptions(OptionGroup):
    """What is kept, and where."""

    output_dir: str | None = option(None, "folder of the run (default: nothing is kept)", metavar="DIR")
    overwrite_output_dir: bool = option(False, "remove what an earlier run wrote there, and nothing else")
    checkpointing_steps: int | Literal["epoch"] | None = option(None, "updates between checkpoints, or epoch", metavar="N|epoch")
    save_minutes: float = option(1, "minutes between saves by the clock, of which the newest two are kept (0: none); more where saving would cost more than 2 % of the time", ge=0, metavar="MIN")
    save_total_limit: int | None = option(None, "checkpoints of --checkpointing_steps that are kept (default: all); the newest and the best always are", ge=1, metavar="N")
    resume_from_checkpoint: bool | str = option(False, "continue from a checkpoint: the newest good one (bare), latest, best, or a path", metavar="PATH")
    logging_steps: int = option(10, "updates between records", ge=1, metavar="N")
    run_name: str | None = option(None, "name of the run in trackers and in the model card (default: the output folder's)", metavar="NAME")
    dry_run: bool = option(False, "print tokens, steps, parameters, memory, disk and learning rates, and stop")


class TrackingOptions(OptionGroup):
    """Experiment trackers beside metrics.jsonl and TensorBoard, which every kept run writes."""

    with_tracking: bool = option(False, "send the records to the trackers of --report_to")
    report_to: str = option("all", "trackers: all (every installed one), tensorboard, wandb, trackio, comet_ml, mlflow, ...; several with commas", metavar="NAME")


class HubOptions(OptionGroup):
    """The HuggingFace Hub."""

    push_to_hub: bool = option(False, "upload the finished folder")
    hub_model_id: str | None = option(None, "repository, such as me/my-gpt (default: the output folder's name)", metavar="ID")
    hub_token: str | None = option(None, "access token (default: HF_TOKEN, or the one of hf auth login); never logged or stored", metavar="TOKEN", secret=True)


class KfacOptions(OptionGroup):
    """K-FAC preconditioning."""

    kfac: bool = option(False, "divide the gradients of linear layers by their curvature, before any --optim")
    kfac_factor_update_steps: int = option(10, "updates between two looks at the curvature (its Kronecker factors)", ge=1, metavar="N")
    kfac_inv_update_steps: int = option(10, "updates between refreshes of the factors' inverses; below it also 1, 2, 4, 8, ...", ge=1, metavar="N")
    kfac_spread: bool = option(False, "refresh the layers one after the other, over the updates from one refresh to the next, so that all take about as long")
    kfac_damping: float | None = option(None, "damping, relative to the mean curvature of each layer (default 0.1; with --kfac_compat absolute, 0.001)", gt=0, metavar="X")
    kfac_factor_decay: float = option(0.95, "decay of the factors' running average", gt=0, le=1, metavar="X")
    kfac_kl_clip: float | None = option(None, "bound of the KL-clip (default: none, each layer keeps its gradient's norm; with --kfac_compat 0.001)", gt=0, metavar="X")
    kfac_method: Literal["eigen", "inverse"] = option("eigen", "by eigenbases, or by inverses: each factor is damped alone, about half the cost")
    kfac_factor_tokens: int | None = option(None, "tokens of an update, over all devices, that the factors are made of (default: all)", ge=1, metavar="N")
    kfac_skip_layers: tuple[str, ...] | None = option(None, "layers to leave out: regular expressions found in their names or classes", metavar="REGEX")
    kfac_compat: bool = option(False, "kfac-pytorch's formulas and its defaults of --kfac_damping and --kfac_kl_clip")
    kfac_backend: Literal["llm", "kfac-pytorch"] = option("llm", "whose K-FAC: this package's, or an installed kfac-pytorch")


class Options(OptionGroup):
    """The options of ``python -m llm.trainers.gpt``."""

    data: DataOptions = DataOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()
    model: ModelOptions = ModelOptions()
    training: TrainingOptions = TrainingOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    output: OutputOptions = OutputOptions()
    tracking: TrackingOptions = TrackingOptions()
    hub: HubOptions = HubOptions()
    kfac: KfacOptions = KfacOptions()

    @model_validator(mode="after")
    def _refuse_what_cannot_work(self) -> Options:
        mistakes = [mistake for mistake in _contradictions(self) if mistake]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


def _contradictions(options: Options) -> list[str | None]:
    """What two or more options say against each other, or what one says that nothing here can do."""
    training, schedule, kfac = options.training, options.schedule, options.kfac
    data, model, tokenizer, output = options.data, options.model, options.tokenizer, options.output
    return [
        "--mixed_precision fp8 is refused: it converts Linear layers only, and GPT-2's blocks are Conv1D, so that nothing would change; use bf16"
        if training.mixed_precision == "fp8" else None,
        f"--lr_scheduler_type {schedule.lr_scheduler_type} is refused: it depends on measured losses, and the rate here is a function of the update number alone; use linear or cosine"
        if schedule.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") else None,
        "--min_lr_ratio is the floor of --lr_scheduler_type cosine; other schedules take theirs through --lr_scheduler_kwargs"
        if schedule.min_lr_ratio is not None and schedule.lr_scheduler_type != "cosine" else None,
        *_mistakes_in_kfac(kfac),
        "--train_dir, --dataset_name and --train_file name the text to train on twice; give one of them"
        if data.train_dir and (data.dataset_name is not None or data.train_file is not None) else None,
        "--validation_file is text, and --train_dir holds tokens; prepare it too and give its folder as --validation_dir"
        if data.train_dir and data.validation_file is not None else None,
        "--validation_dir holds tokens: give the tokens to train on as --train_dir"
        if data.validation_dir is not None and not data.train_dir else None,
        _mistake_in_folders(data.train_dir or ()),
        "--streaming does not know how long the text is: give --max_train_steps"
        if data.streaming and training.max_train_steps is None else None,
        "--streaming reads text, and --train_dir holds tokens already; leave --streaming out"
        if data.streaming and data.train_dir else None,
        "--tokenizer_name char needs all characters of the text, and --streaming meets new ones later; use train:bpe or name one"
        if data.streaming and tokenizer.tokenizer_name == "char" else None,
        "--checkpointing_steps epoch: the length of an epoch is not known with --streaming; give a number of updates"
        if data.streaming and output.checkpointing_steps == "epoch" else None,
        "--global_batch_size and --gradient_accumulation_steps say the same thing twice; give one of them"
        if training.global_batch_size is not None and training.gradient_accumulation_steps != 1 else None,
        "--vocab_size belongs to --tokenizer_name train:bpe; other tokenizers have their own size"
        if tokenizer.vocab_size is not None and tokenizer.tokenizer_name != "train:bpe" else None,
        "--config_overrides changes a model built from scratch; with --model_name_or_path the weights fix the configuration"
        if model.config_overrides is not None and model.model_name_or_path is not None else None,
        "--push_to_hub uploads the finished folder: give --output_dir"
        if options.hub.push_to_hub and output.output_dir is None else None,
        "--checkpointing_steps must be a number of updates >= 1, or epoch"
        if isinstance(output.checkpointing_steps, int) and output.checkpointing_steps < 1 else None,
        _duration_mistake("--max_time", training.max_time),
    ]


def _mistakes_in_kfac(kfac: KfacOptions) -> list[str]:
    """Of options that are read without --kfac too."""
    foreign = kfac.kfac_backend == "kfac-pytorch"
    mistakes = []
    if foreign and kfac.kfac_factor_tokens is not None:
        mistakes.append("--kfac_factor_tokens is for --kfac_backend llm: kfac-pytorch looks at all tokens")
    if kfac.kfac_spread and (foreign or kfac.kfac_compat):
        mistakes.append("--kfac_spread is not kfac-pytorch's way, which refreshes all layers at once")
    for pattern in kfac.kfac_skip_layers or ():
        try:
            re.compile(pattern)
        except re.error as error:
            mistakes.append(f"--kfac_skip_layers {pattern}: no regular expression ({error})")
    return mistakes


def _mistake_in_folders(words: tuple[str, ...]) -> str | None:
    try:
        parse_weighted_dirs(words)
    except ValueError as error:
        return str(error)
    return None


def _duration_mistake(flag: str, given: float | str | None) -> str | None:
    try:
        if given is not None:
            parse_duration(given)
    except ValueError as mistake:
        return f"{flag} {given}: {mistake}"
    return None
