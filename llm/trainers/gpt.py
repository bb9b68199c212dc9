"""Pre-train or fine-tune a GPT-like model on text.

Run it as `python -m llm.trainers.gpt`, `accelerate launch -m llm.trainers.gpt` or
`torchrun -m llm.trainers.gpt`; `--help` lists the options.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence

from llm.config.exit_codes import run_command
from llm.config.options import Options
from llm.config.reader import read_options
from llm.config.toml import redacted_command_line

PROGRAM = "python -m llm.trainers.gpt"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer and return the exit code.

    Args:
        argv: the command line without the program's name; `sys.argv[1:]` when None.

    Returns:
        0 done, 1 failed, 2 usage, 75 stopped by a signal or the walltime with everything saved.
    """
    return run_command(lambda: _train(list(sys.argv[1:] if argv is None else argv)))


def _train(argv: list[str]) -> int:
    started = time.time()
    options = read_options(Options, argv, prog=PROGRAM, description="Pre-train or fine-tune a GPT-like model on text.")
    # Trackers store and upload the command line of the process: remove secrets from it.
    sys.argv[1:] = shlex.split(redacted_command_line(argv))
    # Imported after the options are read: --help and mistakes must not wait for torch.
    from llm.training.run import train

    return train(options, command=f"{PROGRAM} {redacted_command_line(argv)}", started=started).exit_code


if __name__ == "__main__":
    sys.exit(main())
