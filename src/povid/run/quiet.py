"""What other libraries may not say: each by name, since everything else may be something that a user can act on."""

from __future__ import annotations

import logging
import os
import warnings

# Warnings by how they begin. A user of this project can do nothing about them.
WARNINGS = (
    r"`is_gradient_checkpointing` is deprecated",  # peft's call of transformers
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's call of torch
    r"Found \d+ module\(s\) in eval mode at the start of training",  # POVIDModule sets the modes after Lightning looks
    r"You're resuming from a checkpoint that ended before the epoch ended and your dataloader",  # not resumable: it is
    r"The '\w+' does not have many workers",  # it names arguments that are not settings; data.workers fits the data
)
WANDB_WARNINGS = (
    "The anonymous setting has no effect and will be removed in a future version.",  # Lightning sets it
    "wandb.api and wandb.ensure_configured() are deprecated and will be removed in a future release. To check for "
    "credentials without prompting, use wandb.login(prompt=False).",  # which would also log in
)
LOGGERS = (  # whose information is not about a run
    "hydra._internal.core_plugins.basic_launcher",  # lists the jobs of a sweep; each says so itself
    "httpx",  # a line for each request to a server, by openai 2
    "httpx2",  # by openai 3
    "lightning.pytorch",
    "lightning.pytorch.utilities.rank_zero",
)


def quiet() -> None:
    """Silence warnings, loggers and W&B's banner; nothing is imported. Forked processes inherit it."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("WANDB_SHOW_INFO", "false")  # also a summary of what results.json holds


def quiet_imported() -> None:
    """Silence what can only be reached in the libraries themselves, which takes time to import."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from povid.internals import keep_from_saying
    from povid.terminal import redraws

    keep_from_saying(WANDB_WARNINGS)
    logging.getLogger("huggingface_hub").handlers.clear()  # what it warns of reaches ours too
    disable_progress_bar()  # "Loading weights", and downloads too, which may take an hour
    if redraws():
        enable_progress_bars()
