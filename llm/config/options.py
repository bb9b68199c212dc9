"""All options of the trainer: one field an option, one group a TOML table.

Names, types, defaults and meanings are those of HuggingFace's ``run_clm_no_trainer.py`` and of
llm-pytorch's ``llm.trainers.gpt`` where these have the option, else those of HuggingFace's Trainer. Option
names are unique over all groups, so that the command line is flat.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from llm.config.durations import DURATION_FORMATS, parse_duration
from llm.config.option import OptionGroup, option
from llm.config.weighted_dirs import parse_weighted_dirs

# One option a line, however long: the table is read down its columns.
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
    """The training and validation text, and how it becomes blocks of tokens."""

    dataset_name: str | None = option(None, "Hub dataset, local folder, or builtin:python (also used when no data is named)", metavar="NAME", replaces=("train_file", "validation_file", "train_dir", "validation_dir"))
    dataset_config_name: str | None = option(None, "configuration of the Hub dataset", metavar="NAME")
    train_file: tuple[str, ...] | None = option(None, "training text: txt, md, csv, tsv, json, jsonl or parquet files, also compressed, or token files (.bin, .npy); several files and globs", metavar="FILE", replaces=("dataset_name", "dataset_config_name", "train_dir", "validation_dir"))
    validation_file: tuple[str, ...] | None = option(None, "validation text, in the formats of --train_file", metavar="FILE")
    validation_split_percentage: float = option(5, "percentage of the text held out when there is no validation data", ge=0, lt=100, metavar="PERCENT")
    train_dir: tuple[str, ...] | None = option(None, "token shards: a folder written by llm.prepare (its validation part and tokenizer are used too), nanoGPT, llm.c or build-nanogpt, or by save_to_disk with input_ids; several are mixed by their weights, or by their sizes when none has a weight", metavar="DIR[=WEIGHT]", replaces=("dataset_name", "dataset_config_name", "train_file", "validation_file"))
    validation_dir: str | None = option(None, "token shards for validation, in the formats of --train_dir", metavar="DIR")
    text_column: str | None = option(None, "column that holds the text (default: the one named text)", metavar="NAME")
    no_keep_linebreaks: bool = option(False, "drop the line breaks of txt and md files")
    streaming: bool = option(False, "train on the text while it arrives, in its own order, and write its token shards at the same time; needs --max_train_steps")
    block_size: int | None = option(None, "tokens per block (default: the smallest of 1024, the model's and the tokenizer's limit)", ge=2, metavar="N")
    document_mask: bool = option(False, "restrict attention, positions and loss to one document where a block holds several")
    preprocessing_num_workers: int | None = option(None, "number of tokenization processes (default: all cores)", ge=1, metavar="N")
    overwrite_cache: bool = option(False, "tokenize again even if a cached copy exists")
    dataloader_num_workers: int = option(0, "number of processes that read blocks ahead (0: the training process reads them)", ge=0, metavar="N")


class TokenizerOptions(OptionGroup):
    """The tokenizer: loaded, or trained on the text."""

    tokenizer_name: str | None = option(None, "Hub name, folder, char, or train:bpe (default: the model's own; train:bpe for a model from scratch)", metavar="NAME")
    use_slow_tokenizer: bool = option(False, "use the slow tokenizer of a Hub name or folder")
    vocab_size: int | None = option(None, "vocabulary size of a tokenizer trained by train:bpe (default 8192)", ge=258, metavar="N")


class ModelOptions(OptionGroup):
    """The model: loaded with its weights, or built from scratch."""

    model_name_or_path: str | None = option(None, "Hub name or folder of pretrained weights, which are trained further", metavar="NAME")
    config_name: str | None = option(None, "Hub name or folder of a configuration, from which a model is built from scratch", metavar="NAME")
    model_type: str | None = option(None, "architecture of a model from scratch, such as gpt2 (the default), gpt_neo or llama", metavar="TYPE")
    config_overrides: str | None = option(None, "changes to the configuration, such as n_layer=4,n_embd=128", metavar="K=V,...")
    trust_remote_code: bool = option(False, "run code from a Hub repository")
    low_cpu_mem_usage: bool = option(False, "accepted without effect: weights are always loaded without a second copy in memory")
    attn_implementation: str | None = option(None, "attention implementation of transformers: eager, sdpa, flash_attention_2, ...", metavar="NAME")
    dropout: float | None = option(None, "every dropout rate of the model (default: the rates of its configuration)", ge=0, lt=1, metavar="P")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, about a third slower")


class TrainingOptions(OptionGroup):
    """Length of the run, batch sizes, precision and compilation."""

    num_train_epochs: int = option(3, "number of passes over the training text", ge=1, metavar="N")
    max_train_steps: int | None = option(None, "number of steps (one step is one weight update); overrides --num_train_epochs", ge=1, metavar="N")
    per_device_train_batch_size: int = option(8, "blocks per device in one forward and backward pass", ge=1, metavar="N")
    gradient_accumulation_steps: int = option(1, "forward and backward passes per step", ge=1, metavar="N")
    global_batch_size: int | None = option(None, "blocks per step over all devices; --gradient_accumulation_steps is computed from it", ge=1, metavar="N")
    seed: int | None = option(None, "seed of all random numbers (default: drawn, and recorded)", ge=0, lt=2**63, metavar="N")
    mixed_precision: Literal["auto", "no", "bf16", "fp16", "fp8"] = option("auto", "precision of the forward and backward pass; auto: as accelerate launch says, else as in the checkpoint, else bf16 where the device multiplies it natively, else no (fp8 is refused)")
    use_cpu: bool = option(False, "train on the CPU, not on an accelerator")
    torch_compile: bool | Literal["auto", "blocks", "cudagraphs", "max-autotune"] = option("auto", "compile the training step (true), also as CUDA graphs (cudagraphs, without accumulation) or with kernels chosen by measurement (max-autotune), each layer alone (blocks), or nothing (false); auto: true on CUDA for runs of 2,000 steps or more, and on a CPU for runs of 10,000 steps or more with up to 50 million parameters", metavar="auto|true|false|...")
    max_skipped_updates: int = option(3, "end the run after this many consecutive steps with a non-finite gradient; each such step is skipped", ge=1, metavar="N")
    max_time: float | str | None = option(None, f"save and stop this long after the start of the process: {DURATION_FORMATS}; the walltime of a job is detected automatically", metavar="TIME")
    full_determinism: bool = option(False, "use only deterministic kernels and no TF32: bit-identical runs on a CUDA device, but slower")


class OptimizerOptions(OptionGroup):
    """The optimizer and its hyperparameters."""

    optim: Literal["adamw", "sgd", "muon"] = option("adamw", "optimizer; muon uses Muon for the matrices inside the blocks and AdamW for all other parameters")
    learning_rate: float = option(5e-5, "peak learning rate", ge=0, metavar="LR")
    muon_learning_rate: float = option(0.02, "peak learning rate of Muon's matrices; it follows the same schedule", ge=0, metavar="LR")
    muon_momentum: float = option(0.95, "momentum of Muon's matrices", ge=0, lt=1, metavar="X")
    weight_decay: float = option(0.0, "weight decay of matrices (biases and norms have none)", ge=0, metavar="X")
    adam_beta1: float = option(0.9, "decay rate of the first moment", ge=0, lt=1, metavar="X")
    adam_beta2: float = option(0.999, "decay rate of the second moment", ge=0, lt=1, metavar="X")
    adam_epsilon: float = option(1e-8, "added to the square root of the second moment", gt=0, metavar="X")
    max_grad_norm: float = option(1.0, "clip gradients to this norm (0: no clipping)", ge=0, metavar="X")


class ScheduleOptions(OptionGroup):
    """The learning rate as a function of the step."""

    lr_scheduler_type: SchedulerName = option("linear", "learning rate schedule (reduce_lr_on_plateau and greedy are refused)")
    lr_scheduler_kwargs: dict[str, float | int | str | bool | None] = option({}, "further arguments of the schedule, as a JSON object", metavar="JSON")
    num_warmup_steps: int = option(0, "steps over which the learning rate rises to its peak", ge=0, metavar="N")
    min_lr_ratio: float | None = option(None, "lowest learning rate of the cosine schedule, as a fraction of its peak", ge=0, le=1, metavar="X")


class EvaluationOptions(OptionGroup):
    """Evaluations and text samples during training."""

    per_device_eval_batch_size: int = option(8, "blocks per device in one forward pass of an evaluation", ge=1, metavar="N")
    eval_steps: int | None = option(None, "steps between evaluations (default: every epoch); the last step is always evaluated", ge=1, metavar="N")
    max_eval_batches: int | None = option(None, "batches per evaluation, over all devices (default: the whole validation text)", ge=1, metavar="N")
    sample_steps: int | None = option(None, "steps between text samples; three more samples at the end", ge=1, metavar="N")
    sample_prompt: str | None = option(None, "prompt of the text samples (default: the tokenizer's first token)", metavar="TEXT")


class OutputOptions(OptionGroup):
    """The files that a run keeps, and what it logs."""

    output_dir: str | None = option(None, "folder of the run (default: no file is kept)", metavar="DIR")
    overwrite_output_dir: bool = option(False, "remove the files of an earlier run from --output_dir, and no others")
    checkpointing_steps: int | Literal["epoch"] | None = option(None, "steps between checkpoints, or epoch", metavar="N|epoch")
    save_minutes: float = option(1, "minutes between timed checkpoints, of which the newest two are kept (0: none); the interval grows where saving would take more than 2 % of the time", ge=0, metavar="MIN")
    save_total_limit: int | None = option(None, "number of checkpoints of --checkpointing_steps that are kept (default: all); the newest and the best are always kept", ge=1, metavar="N")
    resume_from_checkpoint: bool | str = option(False, "resume from a checkpoint: the newest valid one if there is one (no value), latest, best, or a path", metavar="PATH")
    logging_steps: int = option(10, "steps between log records", ge=1, metavar="N")
    run_name: str | None = option(None, "name of the run in trackers and in the model card (default: the output folder's)", metavar="NAME")
    dry_run: bool = option(False, "print tokens, steps, parameters, memory, disk and learning rates, then exit")


class TrackingOptions(OptionGroup):
    """Experiment trackers beside metrics.jsonl and TensorBoard, which every run with an --output_dir writes."""

    with_tracking: bool = option(False, "send the log records to the trackers of --report_to")
    report_to: str = option("all", "trackers: all (every installed one), tensorboard, wandb, trackio, comet_ml, mlflow, ...; several separated by commas", metavar="NAME")


class HubOptions(OptionGroup):
    """Upload to the HuggingFace Hub."""

    push_to_hub: bool = option(False, "upload the folder of the finished run")
    hub_model_id: str | None = option(None, "repository, such as me/my-gpt (default: the output folder's name)", metavar="ID")
    hub_token: str | None = option(None, "access token (default: HF_TOKEN, or the token of hf auth login); never logged or stored", metavar="TOKEN", secret=True)


class KfacOptions(OptionGroup):
    """K-FAC preconditioning of the gradients."""

    kfac: bool = option(False, "precondition gradients of linear layers with K-FAC; combines with any --optim")
    kfac_factor_update_steps: int = option(10, "steps between updates of the Kronecker factors", ge=1, metavar="N")
    kfac_inv_update_steps: int = option(10, "steps between updates of the factors' inverses; among the first N steps also at 1, 2, 4, 8, ...", ge=1, metavar="N")
    kfac_spread: bool = option(False, "stagger the inverse updates of the layers over the steps of an interval, so that all steps take about the same time")
    kfac_damping: float | None = option(None, "damping, relative to the mean curvature of each layer (default 0.1; with --kfac_compat absolute, default 0.001)", gt=0, metavar="X")
    kfac_factor_decay: float = option(0.95, "decay rate of the running average of the factors", gt=0, le=1, metavar="X")
    kfac_kl_clip: float | None = option(None, "bound of KL clipping (default: none, each layer keeps its gradient's norm; with --kfac_compat 0.001)", gt=0, metavar="X")
    kfac_method: Literal["eigen", "inverse"] = option("eigen", "eigen: eigendecompositions; inverse: inverses, with each factor damped separately, at about half the cost")
    kfac_factor_tokens: int | None = option(None, "tokens per step, over all devices, from which the factors are computed (default: all)", ge=1, metavar="N")
    kfac_skip_layers: tuple[str, ...] | None = option(None, "layers to skip: regular expressions searched in their names and classes", metavar="REGEX")
    kfac_compat: bool = option(False, "kfac-pytorch's formulas and its defaults of --kfac_damping and --kfac_kl_clip")
    kfac_backend: Literal["llm", "kfac-pytorch"] = option("llm", "K-FAC implementation: llm is this package's, kfac-pytorch is the installed package")


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
    def _check_combinations(self) -> Options:
        mistakes = [*_wrong_kfac_options(self.kfac), *_wrong_combinations(self)]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


def _wrong_combinations(options: Options) -> list[str]:
    """Return one line for each combination of options, or single value, that this program cannot run."""
    training = options.training
    schedule = options.schedule
    data = options.data
    output = options.output
    tokenizer = options.tokenizer
    model = options.model
    names_text = data.dataset_name is not None or data.train_file is not None
    # (whether it is wrong, the message)
    checks = [
        (training.mixed_precision == "fp8",
         "--mixed_precision fp8 is refused: it converts Linear layers only, and the layers of GPT-2 are Conv1D, so it would change nothing; use bf16"),
        (schedule.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
         f"--lr_scheduler_type {schedule.lr_scheduler_type} is refused: it depends on measured losses, but the learning rate here is a function of the step alone; use linear or cosine"),
        (schedule.min_lr_ratio is not None and schedule.lr_scheduler_type != "cosine",
         "--min_lr_ratio applies to --lr_scheduler_type cosine only; give the arguments of other schedules as --lr_scheduler_kwargs"),
        (bool(data.train_dir) and names_text,
         "--train_dir, --dataset_name and --train_file each name the training text; give one of them"),
        (bool(data.train_dir) and data.validation_file is not None,
         "--validation_file is text, but --train_dir holds tokens; run llm.prepare on it and give the folder as --validation_dir"),
        (data.validation_dir is not None and not data.train_dir,
         "--validation_dir holds tokens; give the training tokens as --train_dir"),
        (data.streaming and training.max_train_steps is None,
         "--streaming: the length of the text is unknown; give --max_train_steps"),
        (data.streaming and bool(data.train_dir),
         "--streaming reads text, but --train_dir holds tokens; leave --streaming out"),
        (data.streaming and tokenizer.tokenizer_name == "char",
         "--tokenizer_name char needs all characters of the text in advance, but --streaming finds new ones later; use train:bpe or name a tokenizer"),
        (data.streaming and output.checkpointing_steps == "epoch",
         "--checkpointing_steps epoch: the length of an epoch is unknown with --streaming; give a number of steps"),
        (training.global_batch_size is not None and training.gradient_accumulation_steps != 1,
         "--global_batch_size and --gradient_accumulation_steps both set the blocks per step; give one of them"),
        (tokenizer.vocab_size is not None and tokenizer.tokenizer_name != "train:bpe",
         "--vocab_size applies to --tokenizer_name train:bpe only; other tokenizers have a fixed size"),
        (model.config_overrides is not None and model.model_name_or_path is not None,
         "--config_overrides applies to a model built from scratch; with --model_name_or_path the weights fix the configuration"),
        (options.hub.push_to_hub and output.output_dir is None,
         "--push_to_hub uploads the folder of the run; give --output_dir"),
        (isinstance(output.checkpointing_steps, int) and output.checkpointing_steps < 1,
         "--checkpointing_steps must be a number of steps >= 1, or epoch"),
    ]
    mistakes = [message for is_wrong, message in checks if is_wrong]
    try:
        parse_weighted_dirs(data.train_dir or ())
    except ValueError as error:
        mistakes.append(str(error))
    if training.max_time is not None:
        try:
            parse_duration(training.max_time)
        except ValueError as error:
            mistakes.append(f"--max_time {training.max_time}: {error}")
    return mistakes


def _wrong_kfac_options(kfac: KfacOptions) -> list[str]:
    """Return one line for each K-FAC option that cannot be used; these are checked without --kfac too."""
    uses_kfac_pytorch = kfac.kfac_backend == "kfac-pytorch"
    mistakes = []
    if uses_kfac_pytorch and kfac.kfac_factor_tokens is not None:
        mistakes.append("--kfac_factor_tokens needs --kfac_backend llm: kfac-pytorch computes the factors from all tokens")
    if kfac.kfac_spread and (uses_kfac_pytorch or kfac.kfac_compat):
        mistakes.append("--kfac_spread cannot be combined with kfac-pytorch or its formulas, which update all layers at once")
    for pattern in kfac.kfac_skip_layers or ():
        try:
            re.compile(pattern)
        except re.error as error:
            mistakes.append(f"--kfac_skip_layers {pattern}: not a regular expression ({error})")
    return mistakes
