"""The command `plan`: a byte budget in, a plan file out."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from recsys_compress.commands.common import OF_PLANS, AsJson, hint, key_of, print_json
from recsys_compress.errors import UserError


def plan(
    job: Annotated[Path, typer.Argument(help="Job file.", show_default=False)],
    budget: Annotated[
        str | None, typer.Option(help="Bytes, like 2MB, or a share of full tables, like 0.1x.")
    ] = None,
    purpose: Annotated[
        Literal["training", "parameters", "serving"],
        typer.Option("--for", help="Count optimizer state too, parameters, or what is served."),
    ] = "training",
    max_auc_loss: Annotated[
        float | None,
        typer.Option(help="Find the smallest plan that loses so much validation AUC at most."),
    ] = None,
    grade: Annotated[
        Literal["data", "reference", "probes"] | None,
        typer.Option(help="Evidence; 'reference' where there is a run, else 'data'."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Finished run of full tables.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods that free tables may have, by comma.")
    ] = None,
    probe_epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the data for each probe.")
    ] = 1,
    trial_epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Most passes for each trial from scratch; else the job's."),
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(help="Processes that the tables are to fit, by their memory.")
    ] = None,
    hbm: Annotated[
        str | None, typer.Option(help="Memory of each process's GPU, like 80GiB.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Plan file; an HTML page is written beside it.")] = Path(
        "plan.toml"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write no files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Plan which table is stored how within a byte budget.

    Example: recsys-compress plan job.toml --budget 0.1x --reference runs/dcnv2-full-1x-s0-1a2b3c4d
    """
    from recsys_compress.config import load_job
    from recsys_compress.files import check_writable
    from recsys_compress.plan.planner import make_plan
    from recsys_compress.plan.report import plain, render, write_page
    from recsys_compress.plan.request import Request

    if out.suffix != ".toml":
        raise UserError(f"plan: --out {out}: is no plan file; name one that ends in .toml")
    if not dry_run:
        check_writable(out)
    settings = load_job(job, overrides or ())
    given = {} if methods is None else {"methods": tuple(m.strip() for m in methods.split(","))}
    found = make_plan(
        settings,
        Request(
            purpose=purpose,
            budget=budget,
            max_auc_loss=max_auc_loss,
            grade=grade or ("data" if reference is None else "reference"),
            reference=reference,
            probe_epochs=probe_epochs,
            trial_epochs=trial_epochs,
            world_size=world_size,
            hbm=hbm,
            **given,
        ),
    )
    if not dry_run:
        found.file.write(out)
        write_page(found, out.with_suffix(".html"))
    if as_json:
        print_json(plain(found))
    else:
        from recsys_compress.track.tables import print_table

        for table in render(found):
            print_table(table)
    if found.warning is not None:
        typer.echo(f"note: this plan {found.warning}", err=True)
    if found.lost_too_much:
        typer.echo(
            "note: so small a plan does better from scratch: add --grade probes, and train it "
            "without --start",
            err=True,
        )
    if not dry_run:
        words = ["recsys-compress", "train", str(job), "--plan", str(out)]
        words += ["--start", str(found.request.reference)] if found.request.adopting else []
        kept = [given for given in overrides or () if key_of(given) not in OF_PLANS]
        words += [word for given in kept for word in ("--set", given)]
        hint(shlex.join(words))
