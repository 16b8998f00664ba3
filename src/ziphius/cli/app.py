"""The application: which module each verb is in, and how an error becomes an exit status.

No verb imports torch, and each imports what it needs when it runs, so that `--help` and `status` answer at once.
"""

from __future__ import annotations

import sys

from ziphius.cli.verbs import LazyGroup
from ziphius.errors import ZiphiusError

_MODULES = {
    "start": "ziphius.cli.lifecycle",
    "restart": "ziphius.cli.lifecycle",
    "serve": "ziphius.cli.lifecycle",
    "stop": "ziphius.cli.lifecycle",
    "status": "ziphius.cli.observe",
    "logs": "ziphius.cli.observe",
    "chat": "ziphius.cli.observe",
    "pull": "ziphius.cli.settings",
    "config": "ziphius.cli.settings",
    "plan": "ziphius.cli.plan",
    "doctor": "ziphius.cli.plan",
    "slurm": "ziphius.cli.slurm",
    "version": "ziphius.cli.settings",
    "image": "ziphius.cli.image",
}
"""In the order of `--help`."""


def application() -> LazyGroup:
    """The command `ziphius` with all its verbs."""
    return LazyGroup(
        _MODULES,
        name="ziphius",
        help="Start, serve and watch a language model behind an OpenAI-compatible API.",
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def main() -> None:
    """Run the command line. An error becomes a line on stderr and an exit status here, and nowhere else."""
    try:
        application().main(prog_name="ziphius")
    except ZiphiusError as e:
        print(f"ziphius: {e.message}", file=sys.stderr)
        sys.exit(e.exit_code)
