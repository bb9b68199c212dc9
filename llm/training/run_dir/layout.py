"""Names of the files and folders in a run's folder: the one list. Importing this module does not import torch.

The names inside `checkpoints/step_N/` are in `llm.training.checkpoints.layout`.
"""

from __future__ import annotations

CONFIG = "config.toml"  # the resolved options, in a form that --config accepts
STATUS = "status.json"  # state, step, reason and exit code of the newest start
METRICS = "metrics.jsonl"  # one record a line
LOG = "log.txt"  # the console's lines with their time
TRACKERS = "trackers.json"  # the run's id in trackers, kept over all its starts
SAVE = "SAVE"  # made by the user to request a checkpoint, and removed when it is saved
LOCK = "run.lock"  # exists while a start of the run uses the folder
TENSORBOARD = "tensorboard"  # folder of event files
CHECKPOINTS = "checkpoints"  # folder of step_N
UNVERIFIED = "unverified"  # folder of a finished model that did not pass its verification

RESULTS = "all_results.json"  # final losses and counts
CURVES = "curves.png"  # losses and learning rate over the run
MODEL_CARD = "README.md"

# Names that transformers gives to weights. Their presence means that a run has finished here.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

# Files that others need to load, judge and cite the model: only these are pushed to the Hub. fnmatch patterns.
FINISHED_FILES = (
    *WEIGHTS,
    "model-*-of-*.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    MODEL_CARD,
    RESULTS,
    CURVES,
)

# Logs, paths and checkpoints of the run, which are not pushed. fnmatch patterns of paths below the run's folder.
PRIVATE_FILES = (
    f"{CHECKPOINTS}/*",
    f"{TENSORBOARD}/*",
    f"{UNVERIFIED}/*",
    CONFIG,
    STATUS,
    METRICS,
    LOG,
    TRACKERS,
    LOCK,
    ".*",
)

# Everything that a run writes and keeps. --overwrite_output_dir removes these and nothing else. fnmatch patterns.
WRITTEN = (*FINISHED_FILES, CONFIG, STATUS, METRICS, LOG, TRACKERS, TENSORBOARD, CHECKPOINTS, UNVERIFIED)

# Any of these exists once a start of a run has written into a folder.
SIGNS_OF_A_START = (STATUS, METRICS, CHECKPOINTS)
# Any of these exists once a run has made updates in a folder.
SIGNS_OF_TRAINING = (METRICS, CHECKPOINTS, *WEIGHTS)
