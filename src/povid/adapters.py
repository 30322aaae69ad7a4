"""``python -m povid.adapters``: what becomes of adapters after training.

    python -m povid.adapters card RUN --out FOLDER          the adapter of a run as one LoRA, with a model card
    python -m povid.adapters push RUN --repo OWNER/NAME     the same folder on the Hugging Face hub
    python -m povid.adapters combine RUN --out FOLDER       both stages as one LoRA of twice the rank
    python -m povid.adapters merge RUN --out FOLDER         a full checkpoint, for transformers, vLLM, llava
    python -m povid.adapters convert STAGE_ONE --lora STAGE_TWO --base llava-hf/llava-1.5-7b-hf --out FOLDER

``convert`` reads checkpoints that use the original LLaVA's names, such as those that the paper's authors released. It
writes FOLDER/model, a full checkpoint in llava-hf's format, and with ``--lora`` FOLDER/adapter in peft's format. Use
them with ``model.path=FOLDER/model adapters=[FOLDER/adapter]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from povid.fault import Fault
from povid.model.adapters import adapter_chain, convert, merge
from povid.model.combine import combine
from povid.model.loading import DTYPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, or 2 after one sentence about what the user can fix."""
    chosen = _parser().parse_args(arguments)
    commands = {"card": _card, "push": _push, "combine": _combine, "merge": _merge, "convert": _convert}
    try:
        print(commands[chosen.command](chosen))
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m povid.adapters", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    carding = commands.add_parser("card", help="a run's adapter as one LoRA, with a model card, in a folder")
    pushing = commands.add_parser("push", help="the same folder on the Hugging Face hub")
    combining = commands.add_parser("combine", help="adapters that build on each other as one LoRA")
    merging = commands.add_parser("merge", help="a full checkpoint from adapters")
    converting = commands.add_parser("convert", help="a checkpoint with the original LLaVA's names")
    for command in (carding, pushing):
        command.add_argument("run", type=Path, help="the folder of a finished run")
        command.add_argument("--base", help="the base model's name on the hub, where the run loaded it from a folder")
        command.add_argument("--license", help="the base model's license, such as llama2 (default: what its card says)")
        command.add_argument("--merged", action="store_true", help="a full checkpoint instead of an adapter")
    carding.add_argument("--repo", metavar="OWNER/NAME", help="where it will be; named in the card")
    pushing.add_argument("--repo", metavar="OWNER/NAME", required=True, help="of your own account without OWNER/")
    pushing.add_argument("--public", action="store_true", help="let everybody see it (default: private)")
    for command in (combining, merging):
        command.add_argument("adapters", type=Path, nargs="+", help="a run folder, or adapter folders in order")
        command.add_argument("--base", help="the base model; default: the one that the adapters name")
    converting.add_argument("checkpoint", type=Path)
    converting.add_argument("--lora", type=Path, help="a LoRA on that checkpoint, with the original LLaVA's names")
    converting.add_argument("--base", default="llava-hf/llava-1.5-7b-hf", help="llava-hf's model of the same size")
    for command in (carding, combining, merging, converting):
        command.add_argument("--out", type=Path, required=True, help="a new folder")
    for command in (carding, pushing, merging, converting):
        command.add_argument(
            "--dtype", choices=sorted(DTYPES), default="float16", help="of a full checkpoint's weights"
        )
    return parser


def _chain(places: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(adapter for place in places for adapter in adapter_chain(place)))


def _merge(chosen: argparse.Namespace) -> Path:
    merge(_chain(chosen.adapters), chosen.out, base=chosen.base, dtype=chosen.dtype)
    return chosen.out


def _combine(chosen: argparse.Namespace) -> Path:
    combine(_chain(chosen.adapters), chosen.out, base=chosen.base)
    return chosen.out


def _convert(chosen: argparse.Namespace) -> Path:
    dropped = convert(chosen.checkpoint, chosen.out, base=chosen.base, lora=chosen.lora, dtype=chosen.dtype)
    if dropped:
        print(
            f"note: dropped the LoRA of {len(dropped)} layers outside the language model, such as {dropped[0]}: its B "
            "is zero, so it adds nothing",
            file=sys.stderr,
        )
    return chosen.out


def _card(chosen: argparse.Namespace) -> Path:
    from povid.publish.folder import publishable, write

    run = publishable(chosen.run, base=chosen.base, license=chosen.license)
    write(run, chosen.out, repo=chosen.repo or chosen.out.resolve().name, dtype=chosen.dtype if chosen.merged else None)
    return chosen.out


def _push(chosen: argparse.Namespace) -> str:
    from povid.publish.push import push

    return push(
        chosen.run,
        chosen.repo,
        public=chosen.public,
        base=chosen.base,
        license=chosen.license,
        dtype=chosen.dtype if chosen.merged else None,
    )


if __name__ == "__main__":
    sys.exit(main())
