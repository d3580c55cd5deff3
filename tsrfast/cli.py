"""The command ``tsrfast``. Exit codes: 0 done (claims may be false: they are results), 1 the environment failed, 2 wrong input."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        list[str] | None,
        typer.Argument(help="table1 to table5, fig2 to fig12, fig14 to fig16, global; all, or none named: all of them."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Size of the run: smoke (a minute), quick (half an hour), paper (for a GPU).")
    ] = "quick",
    data: Annotated[str, typer.Option(help="synthetic, cifar10:PATH or folder:PATH.")] = "synthetic",
    out: Annotated[Path, typer.Option(help="Folder for report and results; used again, it goes on where it was.")] = Path(
        "runs/reproduce"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of everything that is random; 0 if not given. Repeatable: means over all.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting of the preset: key=value, repeatable.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only print what would be run: stages, cost, estimated time, what is cached.")
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(help="Processes in which independent stages run side by side; they share out the threads, or the GPUs."),
    ] = 1,
) -> None:
    """Reproduce tables and figures of the paper beside the published numbers.

    Large runs: torchrun --nproc-per-node=N -m tsrfast reproduce ... splits batches over N processes, on a GPU each with --device cuda.
    """
    from tsrfast._machine import choose_device
    from tsrfast._progress import Reporter
    from tsrfast.suite.plan import plan as make_plan
    from tsrfast.suite.presets import preset as choose_preset
    from tsrfast.suite.processes import Quiet, joined
    from tsrfast.suite.reproduce import reproduce as run

    chosen, where = choose_preset(preset, set_ or []), choose_device(device)
    with _interruptible(), joined(where) as (ranks, mine):
        job = (experiments or [], chosen, data, out, mine, seed or [0], Reporter() if ranks.first else Quiet())
        said = make_plan(*job).text() if plan else run(*job, jobs=jobs, ranks=ranks)
        if ranks.first:
            print(said)


@app.command()
def oracle(
    preset: Annotated[str, typer.Option(help="Size of the oracle and of its training: smoke, quick, paper.")] = "quick",
    data: Annotated[str, typer.Option(help="synthetic, cifar10:PATH or folder:PATH.")] = "synthetic",
    out: Annotated[
        Path, typer.Option(help="Folder for oracle.safetensors and oracle.json; used again, it goes on where it was.")
    ] = Path("runs/oracle"),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that is random.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting of the preset: key=value, repeatable.")
    ] = None,
) -> None:
    """Train, prune and fine-tune the oracle alone, for reproduce --set oracle=FILE; oracle.json is the record of its training."""
    from tsrfast._machine import choose_device
    from tsrfast._progress import Reporter
    from tsrfast.suite.oracle import write_oracle
    from tsrfast.suite.presets import preset as choose_preset

    chosen, where = choose_preset(preset, set_ or []), choose_device(device)
    with _interruptible():
        print(write_oracle(chosen, data, out, where, seed, Reporter()))


Model = Annotated[Path, typer.Option(help="Checkpoint of a network (safetensors, from tsrfast.nets.save_checkpoint).")]
Data = Annotated[str, typer.Option(help="synthetic, cifar10:PATH or folder:PATH.")]
Split = Annotated[str, typer.Option(help="test or train.")]
Limit = Annotated[int | None, typer.Option(help="The first so many images; all when not given.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time.")]
Norm = Annotated[str | None, typer.Option(help="linf, l2 or l1.")]
Eps = Annotated[str | None, typer.Option(help="Radius in pixels of [0, 1]: 0.03 or 8/255.")]
Seed = Annotated[int | None, typer.Option(help="Seed of what is random in the attacks.")]


@app.command()
def attack(
    model: Model,
    attack: Annotated[str, typer.Option(help="pgd, fgsm, apgd-ce, square, cw, ...: what tsrfast.attacks has.")],
    data: Data = "synthetic",
    split: Split = "test",
    limit: Limit = None,
    norm: Norm = None,
    eps: Eps = None,
    step_size: Annotated[str | None, typer.Option(help="Length of a step, likewise.")] = None,
    steps: Annotated[str | None, typer.Option(help="Number of steps.")] = None,
    loss: Annotated[str | None, typer.Option(help="cross_entropy, margin, dlr; with --teacher also oracle_l2, ...")] = None,
    seed: Seed = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting of the attack: key=value, repeatable.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint of the oracle that an oracle loss asks.")] = None,
    surrogate: Annotated[
        list[Path] | None, typer.Option(help="Checkpoint to make the images on instead (transfer), repeatable.")
    ] = None,
    batch_size: BatchSize = 500,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for images, table and report; used again, it goes on where it was.")] = Path(
        "runs/attack"
    ),
) -> None:
    """Attack every image: adversarial.safetensors, images.csv, evaluation.json and a report."""
    from tsrfast._machine import choose_device
    from tsrfast._progress import Reporter
    from tsrfast.evaluation.commands import Subject, run_attack

    subject = Subject(model, data, split, limit, choose_device(device), batch_size)
    given = {"norm": norm, "eps": eps, "step_size": step_size, "steps": steps, "loss": loss, "seed": seed}
    with _interruptible():
        report = run_attack(
            subject, attack, _settings(given), set_ or [], out,
            teacher=teacher, surrogates=surrogate or [], reporter=Reporter(),
        )  # fmt: skip
        print(report)


@app.command()
def evaluate(
    model: Model,
    attacks: Annotated[
        str, typer.Option(help="standard (AutoAttack), plus, rand, or names of attacks: apgd-ce,square,pgd.")
    ] = "standard",
    data: Data = "synthetic",
    split: Split = "test",
    limit: Limit = None,
    norm: Norm = None,
    eps: Eps = None,
    seed: Seed = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of all attacks that have it, or of one: pgd.steps=40, repeatable."),
    ] = None,
    individually: Annotated[bool, typer.Option("--individually", help="Every attack on all images.")] = False,
    masking_images: Annotated[int, typer.Option(help="Images that are checked for gradient masking; 0: none.")] = 64,
    batch_size: BatchSize = 500,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the report; used again, it goes on where it was.")] = Path(
        "runs/evaluate"
    ),
) -> None:
    """Clean and robust accuracy over several attacks: evaluation.json and a report."""
    from tsrfast._machine import choose_device
    from tsrfast._progress import Reporter
    from tsrfast.evaluation.commands import Subject, run_evaluation

    subject = Subject(model, data, split, limit, choose_device(device), batch_size)
    settings = _settings({"norm": norm, "eps": eps, "seed": seed})
    with _interruptible():
        report = run_evaluation(
            subject, attacks, settings, set_ or [], out,
            individually=individually, masking_images=masking_images, seed=seed or 0, reporter=Reporter(),
        )  # fmt: skip
        print(report)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="A folder with results.json or evaluation.json; results.json files of several seeds.")
    ],
    out: Annotated[Path | None, typer.Option(help="Where the report goes; into the folder itself when not given.")] = None,
) -> None:
    """Render the report of a results.json or evaluation.json again; of several results.json, of different seeds, one over all."""
    from tsrfast import evaluation
    from tsrfast.suite.report import load_results, load_run, render
    from tsrfast.suite.seeds import over_seeds

    files = [f if f.is_file() else f / "results.json" for f in folders]
    folder = out or files[0].parent
    if len(files) > 1 and out is None:
        raise InputError("--out: must be given with several results, got none")
    if len(files) == 1 and not files[0].exists() and (folders[0] / "evaluation.json").exists():
        record = evaluation.load_evaluation(folders[0] / "evaluation.json")
        print(evaluation.render(record, out or folders[0], run=load_run(folders[0] / "run.json")))
        return
    run = load_run(files[0].parent / "run.json") if len(files) == 1 else None
    print(render(over_seeds([load_results(f) for f in files]), folder, run=run))


def _settings(given: Mapping[str, str | int | None]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in given.items() if value is not None]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is answered with one line and 130; warnings are lines that do not say where in the code they arose."""

    def say(message: Warning | str, *place: object, **more: object) -> None:
        print(f"warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = say
            yield
    except KeyboardInterrupt:  # here, because typer turns those that reach it into a silent exit
        print("tsrfast: interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


def main() -> None:
    """Run the command line: one clear line for a user's mistake, never a traceback."""
    try:
        app(standalone_mode=True)
    except InputError as e:
        _leave(2, str(e))
    except EnvironmentFault as e:
        _leave(1, str(e))
    except (MemoryError, torch.OutOfMemoryError) as e:
        _leave(1, f"out of memory: {str(e).partition(chr(10))[0]}")


def _leave(code: int, complaint: str) -> None:
    print(f"tsrfast: {complaint}", file=sys.stderr)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Nothing is torn down: what is left of a connection to a process that is gone may abort this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
