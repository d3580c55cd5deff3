"""The command ``tsrfast``. Exit codes: 0 done (claims may be false: they are results), 1 the environment failed, 2 wrong input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from tsrfast.errors import EnvironmentFault, InputError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fast adversarial attacks and specialization analysis.",
)


@app.command()
def info() -> None:
    """Print version, compiled backends, instruction set, torch and devices."""
    from tsrfast import __version__, _native

    c = _native._C
    print(f"tsrfast       {__version__}")
    print(f"cuda kernels  {'yes' if c.with_cuda else 'no'} ({c.cuda_note})")
    print(f"cpu kernels   {c.isa()} (of {', '.join(c.isa_levels())}; TSRFAST_ISA forces one)")
    print(f"torch         {torch.__version__}, {torch.get_num_threads()} threads")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    print(f"devices       {', '.join(['cpu', *(f'cuda:{i} {n}' for i, n in enumerate(names))])}")


@app.command()
def reproduce(
    experiments: Annotated[
        list[str] | None, typer.Argument(help="fig2 fig3 fig4 table1 table3; all when none is named.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Size of the run: smoke (a minute), quick (some minutes), paper (for a GPU).")
    ] = "quick",
    data: Annotated[str, typer.Option(help="synthetic, cifar10:PATH or folder:PATH.")] = "synthetic",
    out: Annotated[Path, typer.Option(help="Folder for report and results; used again, it goes on where it was.")] = Path(
        "runs/reproduce"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that is random.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting of the preset: key=value, repeatable.")
    ] = None,
) -> None:
    """Reproduce tables and figures of the paper beside the published numbers."""
    from tsrfast.suite.presets import preset as choose_preset
    from tsrfast.suite.progress import Reporter
    from tsrfast.suite.reproduce import choose_device
    from tsrfast.suite.reproduce import reproduce as run

    reporter = Reporter()
    chosen, where = choose_preset(preset, set_ or []), choose_device(device)
    try:
        print(run(experiments or [], chosen, data, out, where, seed, reporter))
    except KeyboardInterrupt:  # here, because typer turns those that reach it into a silent exit
        print("tsrfast: interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A folder with results.json.")]) -> None:
    """Render the report of a results.json again."""
    from tsrfast.suite.report import load_results, load_run, render

    print(render(load_results(folder / "results.json"), folder, run=load_run(folder / "run.json")))


def main() -> None:
    """Run the command line: one clear line for a user's mistake, never a traceback."""
    try:
        app(standalone_mode=True)
    except InputError as e:
        print(f"tsrfast: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except EnvironmentFault as e:
        print(f"tsrfast: {e}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, torch.OutOfMemoryError) as e:
        print(f"tsrfast: out of memory: {str(e).partition(chr(10))[0]}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
