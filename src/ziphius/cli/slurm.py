"""The verb `slurm`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from ziphius.cli.options import ConfigFile, EngineArguments, Json, resolved_from, takes_options, with_engine_arguments


@takes_options
def slurm(
    flags: dict[str, Any],
    arguments: EngineArguments = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node; --tp follows from it.")] = 0,
    time: Annotated[str | None, typer.Option(metavar="TEXT", help="Time limit, as 2-00:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(metavar="TEXT", help="Partition of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(metavar="TEXT", help="Account to charge.")] = None,
    sbatch: Annotated[str | None, typer.Option(metavar="TEXT", help="Further options of sbatch.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the script too.")] = False,
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """Print a Slurm script that starts a server, and submit it.

    Of a job that was submitted here, status, logs, chat and stop work as of any instance.
    """
    from ziphius.cli.output import note
    from ziphius.config import words_of
    from ziphius.installation import ziphius_home
    from ziphius.launchers.engines import refuse_other_engines_options, with_absolute_paths
    from ziphius.launchers.slurm import Allocation, for_job
    from ziphius.manager.slurm import SlurmInstances

    asked = resolved_from(with_engine_arguments(flags, arguments), config)
    allocation = Allocation(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time_limit=time,
        partition=partition,
        account=account,
        more=words_of(sbatch or "", "sbatch"),
    )
    resolved = for_job(with_absolute_paths(asked), allocation)
    refuse_other_engines_options(resolved)
    if not allocation.asks_for_cpus:
        note("Slurm may give one CPU a node and the memory that goes with it: ask for more, as --sbatch "
             "'--exclusive --mem=0'")  # fmt: skip
    instances = SlurmInstances(ziphius_home(os.environ), os.environ)
    if not submit:
        print(instances.script(resolved, allocation), end="")
        return
    status = instances.submit(resolved, allocation)
    if json:
        from ziphius.cli.output import print_json

        print_json(status)
        return
    print(f"{status.name} is {status.state}, as job {status.job}" + (f": {status.reason}" if status.reason else ""))
    print(f"  log    {status.log}\nSee `ziphius status --name {status.name}`; `ziphius stop` ends the job.")
