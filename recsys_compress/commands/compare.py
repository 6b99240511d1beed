"""The command `compare`: a study file in, figures and a report out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys_compress.commands.common import AsJson, print_json

if TYPE_CHECKING:
    from recsys_compress.compare.summary import Summary

INCOMPLETE = 1


def compare(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (TOML).")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of raw data, where the study prepares its own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of figures and report; else beside the study file.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of prepared data and runs; else runs/STUDY.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Cells to run, like 'hash*'; all without it."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each run.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="What runs may take together, like 16GB; else 80 % of all.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Run nothing: list the cells without figures.")
    ] = False,
    render: Annotated[
        bool, typer.Option("--render", help="Run nothing: write the report anew.")
    ] = False,
    redo: Annotated[
        bool,
        typer.Option("--redo", help="Forget figures first, with --only those of its cells."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods at byte budgets, over seeds, and write a report.

    Cells that have figures are not run again, and an interrupted one goes on where it stopped.

    Example: recsys-compress compare studies/movielens_1m.toml --data raw --processes 2
    """
    from recsys_compress.byte_sizes import parse_bytes
    from recsys_compress.compare.compare import Options, forget, missing
    from recsys_compress.compare.compare import compare as run_study
    from recsys_compress.compare.page import write_report
    from recsys_compress.compare.records import Records
    from recsys_compress.compare.study import load_study
    from recsys_compress.compare.summary import summarize
    from recsys_compress.config import load_job

    study = load_study(study_file)
    out = out or study_file.with_suffix("")
    work = work or Path("runs") / study_file.stem
    results, patterns = out / "results.json", only or ["*"]
    records = Records.load(study, results)
    if listed:
        if redo:
            forget(records, patterns)
        left = [f"{cell.name}, seed {seed}" for cell, seed in missing(records, patterns)]
        print_json(left) if as_json else typer.echo("\n".join(left))
        return
    if render:
        found = summarize(records)
        write_report(found, out)
        _print(found, out, as_json)
        return
    from recsys_compress.track.study import study_run

    with study_run(load_job(Path(study.job)), study.title, work / "study.json", out) as parent:
        failed = run_study(
            records,
            Options(
                results=results,
                work=work,
                data=data,
                only=patterns,
                processes=processes,
                memory=None if memory is None else parse_bytes(memory),
                threads=threads,
                redo=redo,
                parent=parent,
            ),
        )
        found = summarize(records)
        write_report(found, out)
    _print(found, out, as_json)
    for name, error in failed.items():
        typer.echo(f"failed: {name}: {error}", err=True)
    if failed:
        raise typer.Exit(INCOMPLETE)


def _print(found: "Summary", out: Path, as_json: bool) -> None:
    """Prints the winners and where the report is."""
    from recsys_compress.compare.summary import plain
    from recsys_compress.compare.tables import winners
    from recsys_compress.track.tables import make_table, print_table

    if as_json:
        print_json(plain(found) | {"report": str(out / "report.html")})
        return
    best = winners(found)
    if best.rows:
        print_table(make_table(best.titles[:-1], [row[:-1] for row in best.rows]))
    if found.missing:
        typer.echo(f"{found.missing} runs without figures")
    if found.unserved:
        typer.echo(f"{found.unserved} runs without all figures of storage types and inference")
    typer.echo(f"report: {out / 'report.html'}")
