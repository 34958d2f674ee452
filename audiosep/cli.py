"""The `audiosep` command: arguments in, exit code out. Each command is one thin function.

Exit codes: 0 all done, 1 some files failed and the others finished, 2 usage, 3 no model,
130 interrupted. Results go to stdout, everything else to stderr. Whatever is slow to import
(torch, rich) is imported inside the commands.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import audiosep
from audiosep.errors import AudiosepError, ModelError, UsageError

if TYPE_CHECKING:
    from audiosep.batch import Result
    from audiosep.progress import Display

EXIT_FAILED, EXIT_USAGE, EXIT_MODEL, EXIT_INTERRUPTED = 1, 2, 3, 130
DEFAULT_MODELS = "speech,sound"

_SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,  # plain help: rich would take a tenth of a second
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(add_completion=True, **_SETTINGS)
models_app = typer.Typer(help="List, show, import, fetch and publish checkpoints.", **_SETTINGS)
app.add_typer(models_app, name="models")

Preset = StrEnum("Preset", ["default", "published", "paper"])
Sampler = StrEnum("Sampler", ["hybrid", "dsg", "dps", "analytical", "mmps", "mmps-exact"])
Method = StrEnum(
    "Method",
    [
        "sobi",
        "amuse",
        "jade",
        "fastica",
        "picard",
        "ar-flow-vae",
        "gp-vae",
        "skr-vae",
        "stradiff",
        "auxiva",
        "ilrma",
        "fastmnmf2",
    ],
)
Combine = StrEnum("Combine", ["wiener", "mean"])
Dtype = StrEnum("Dtype", ["auto", "float32", "bfloat16", "float16"])
Progress = StrEnum("Progress", ["auto", "plain", "json", "none"])


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command and leave the process with its exit code."""
    # A file's name may hold what the terminal's encoding lacks, or bytes that are no text at all.
    lossless = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape" if lossless else "backslashreplace")
    try:
        app(argv, prog_name="audiosep")
    except KeyboardInterrupt:  # while modules were being imported
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(audiosep.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version)] = False,
) -> None:
    """Separate a recording into its sources, with diffusion models of single sources as priors."""


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", value):
        raise typer.BadParameter(f"{value!r} is not auto, cpu, cuda, cuda:N or mps")
    return value


Models = Annotated[str, typer.Option("-n", "--model", help="Checkpoint names or folders, comma-separated.")]
Device = Annotated[str, typer.Option("-d", "--device", help="auto, cpu, cuda, cuda:N or mps.", callback=_device)]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of the sampler.  [default: the preset's]")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Runs of the sampler that a stem is made of.  [default: the preset's]")
]
PresetOption = Annotated[
    Preset,
    typer.Option(help="Sampler settings: ours, or those of the method's code, or of its text."),
]
SamplerOption = Annotated[Sampler | None, typer.Option(help="How the mixture guides.  [default: the preset's]")]
AsJson = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more; show where an error arose.")]


@app.command()
def separate(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Recordings; directories are searched recursively; - is stdin.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="Where results go; - sends the first stem to stdout."),
    ] = Path("separated"),
    model: Models = DEFAULT_MODELS,
    sources: Annotated[
        str | None,
        typer.Option(
            "-s",
            "--sources",
            help="Class names of the loaded priors, comma-separated, in any case; 'sound' is a"
            " sound of any class; repeats become speech_1, speech_2; 'auto' listens first."
            "  [default: one of each prior]",
        ),
    ] = None,
    device: Device = "auto",
    segment: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds separated at once.  [default: 4]"),
    ] = None,
    overlap: Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of a segment that overlaps the next.")] = 0.25,
    steps: Steps = None,
    sampler: SamplerOption = None,
    preset: PresetOption = Preset.default,
    samples: Samples = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="How far small networks that know classes steer. 0: not at all.  [default: the preset's]"
        ),
    ] = None,
    low_rank: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="How far what each source repeats steers. 0: not at all.  [default: the preset's]"
        ),
    ] = None,
    refine: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="How far a small network corrects the stems. 0: not at all.  [default: the preset's]"
        ),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="How often the last steps are taken again from corrected stems.  [default: one less than sources]",
        ),
    ] = None,
    least_noise: Annotated[
        float | None,
        typer.Option(
            min=1e-5,
            help="Noise, 1 is full scale, at which the default preset's sampler ends. 0.002: samples in place of "
            "means, in twice the time.  [default: 0.063 of its own sampler]",
        ),
    ] = None,
    combine: Annotated[
        Combine | None,
        typer.Option(help="Of several samples a stem is the mean, with `wiener` filtered where they disagree."),
    ] = None,
    mixing: Annotated[
        Path | None,
        typer.Option(help="Known gains: a CSV file, a row per channel, a column per source as --sources names them."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same stems.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the network.")] = Dtype.auto,
    compile: Annotated[
        bool, typer.Option("--compile", help="Faster networks after a minute or two: for much to separate.")
    ] = False,
    format: Annotated[str, typer.Option(help="Format of the stems: wav, flac, ogg, opus, mp3, aiff, w64, ...")] = "wav",
    subtype: Annotated[
        str | None,
        typer.Option(help="Word of the stems: pcm_16, pcm_24, float, ...  [default: the input's]"),
    ] = None,
    filename: Annotated[str, typer.Option(help="Where a stem goes, below OUT/MODEL.")] = "{track}/{stem}.{ext}",
    residual: Annotated[
        bool,
        typer.Option("--residual", help="Leave the stems unprojected; write what is left to residual."),
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Also a page with spectrograms and players.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out recordings whose stems exist.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace stems that exist.")] = (False),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and stop.")] = False,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="Recordings at a time.")] = 1,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")] = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    progress: Annotated[Progress, typer.Option(help="Progress on stderr.")] = Progress.auto,
) -> None:
    """Separate recordings into their sources.

    Stems go to OUT/MODEL/TRACK/STEM.wav, with a report.json beside them. A stem has its
    recording's sample rate, channels, length and level, and the stems sum to the recording.
    """
    from audiosep import batch
    from audiosep.progress import display

    shown = display(progress, quiet=quiet)
    with _errors(verbose, shown), contextlib.ExitStack() as stack:
        _refuse_both(skip_existing, "--skip-existing", overwrite, "--overwrite")
        _refuse_both(quiet, "-q", verbose, "-v")
        options = batch.Options(
            out=out,
            model=_model_folder(model),
            template=filename,
            sources=_split(sources) if sources is not None else None,
            format=format.lower().lstrip("."),
            subtype=subtype,
            residual=residual,
            page=report,
            existing="skip" if skip_existing else "overwrite" if overwrite else "refuse",
        )
        batch.check(options)
        if options.to_stdout:
            _refuse_both(as_json, "--json", True, "-o -")
            _refuse_both(report, "--report", True, "-o -")
        stack.enter_context(_logging(shown, verbose=verbose, quiet=quiet))

        from audiosep.direct import load
        from audiosep.mixing import read_mixing

        separator: Any = load(
            _split(model),
            device=device,
            dtype=dtype.value,
            compile=compile,
            preset=preset.value,
            sampler=sampler and sampler.value,
            steps=steps,
            segment=segment,
            overlap=overlap,
            samples=samples,
            guidance=guidance,
            low_rank=low_rank,
            refine=refine,
            restarts=restarts,
            least_noise=least_noise,
            combine=combine and combine.value,
            seed=seed,
            mixing=mixing and read_mixing(mixing),
        )
        stems = separator.source_names(options.sources)
        todo, failures = batch.plan(inputs, stems, options)
        if dry_run:
            results = batch.dry(todo, options)
        else:
            _share_cores(min(jobs, len(todo)))
            results = batch.run(separator, todo, options, shown, parallel=jobs)
            stack.enter_context(shown)
        stack.callback(results.close)
        statuses = []
        for result in itertools.chain(failures, results):
            _show_result(result, shown, as_json=as_json, quiet=quiet or options.to_stdout)
            statuses.append(result.status)
        failed = statuses.count("failed")
        if failed and len(statuses) > 1:
            shown.error(f"{failed} of {len(statuses)} recordings failed")
        if failed:
            raise typer.Exit(EXIT_FAILED)


def _show_result(result: Result, shown: Display, *, as_json: bool, quiet: bool) -> None:
    """One JSON line, or the path of each stem on a line; an error goes to stderr."""
    from audiosep.audio import printable

    name = printable(result.input)
    if result.error:
        shown.error(f"error: {result.error}")
    for note in result.notes:
        shown.note(f"{name}: {note}")
    if as_json:
        shown.result(json.dumps({key: value for key, value in vars(result).items() if value is not None}))
        return
    if quiet or result.status == "failed":
        return
    if result.status != "done":
        shown.note(f"{name}: {'exists, skipped' if result.status == 'skipped' else 'would be separated'}")
    for path in [*result.stems.values(), *([result.page] if result.page else [])]:
        shown.result(path)


@app.command()
def evaluate(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="Separators and tasks: a TOML file, see recipes/unasdiff. Without one, -n on --task."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a value of the recipe; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder for the rows, the stems, the tables and report.html; a run goes on."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="What each mixture holds, as in 2speech; may be repeated.  [default: 1speech+1sound]"),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Mixtures of each task.  [default: 20]")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Chooses the mixtures.  [default: 0]")] = None,
    length: Annotated[float | None, typer.Option(min=0.5, help="Seconds of a mixture.  [default: 4]")] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="The recordings to mix, as a prepare.py lists them.  [default: data/open16k.csv]"),
    ] = None,
    estimates: Annotated[
        Path | None, typer.Option(help="Score these stems instead: a folder per item, see --references.")
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="The true sources, a folder per item, as audiosep mix writes them.")
    ] = None,
    model: Models = DEFAULT_MODELS,
    preset: PresetOption = Preset.default,
    sampler: SamplerOption = None,
    steps: Steps = None,
    samples: Samples = None,
    device: Device = "auto",
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Score separators on mixtures of a corpus, or stems that any program made.

    Prints a table of scores with 95 % intervals.
    """
    from audiosep import distributed
    from audiosep.progress import display

    main_process = distributed.rank() == 0
    shown = display("auto", quiet=not main_process)
    with _errors(verbose, shown), _logging(shown, verbose=verbose):
        from audiosep.recipe import load, override

        if estimates is not None or references is not None:
            if estimates is None or references is None:
                raise UsageError("--estimates and --references go together")
            _refuse_both(recipe is not None, "a recipe", True, "--estimates")
            from audiosep import stems

            wanted: dict[str, Any] = {"evaluate": {"metrics": ()}}
            for setting in settings or []:
                override(wanted, setting)
            beside: list[Any] = [task, count, seed, length, manifest, sampler, steps, samples]
            names = "--task --count --seed --length --manifest --sampler --steps --samples"
            for name, value in zip(names.split(), beside, strict=True):
                _refuse_both(value is not None, name, True, "--estimates")
            _refuse_both(model != DEFAULT_MODELS, "-n", True, "--estimates")
            more = wanted["evaluate"].pop("metrics")
            if wanted != {"evaluate": {}}:
                raise UsageError("with --estimates, --set takes evaluate.metrics alone")
            with shown:
                scored = stems.run(estimates, references, out, more, shown.file(estimates.name))
            _show_summaries(scored, {}, as_json)
            return
        from audiosep import evaluate as module

        options = {"preset": preset.value, "sampler": sampler and sampler.value, "steps": steps, "samples": samples}
        options |= {"models": model, "device": device}
        unchanged = {"preset": "default", "models": DEFAULT_MODELS, "device": "auto"}
        chosen = {key: value for key, value in options.items() if value != unchanged.get(key)}
        if recipe is None:
            separators = {_model_folder(model): {"models": model, **chosen}}
            tables: dict[str, Any] = {"evaluate": {"manifest": "data/open16k.csv"}, "separators": separators}
        elif chosen:
            key, value = next(iter(chosen.items()))
            raise UsageError(f"a recipe's separators have their own options: use --set separators.NAME.{key}={value}")
        else:
            tables = load(recipe)
        given = {"manifest": manifest and str(manifest), "tasks": task, "count": count, "seed": seed, "segment": length}
        tables.setdefault("evaluate", {}).update({key: value for key, value in given.items() if value is not None})
        for setting in settings or []:
            override(tables, setting)
        with shown:
            summaries = module.run(tables, out, shown.file(recipe.stem if recipe else "mixtures"))
        if not main_process:
            return
        _show_summaries(summaries, tables.get("published", {}), as_json)
        if out is not None and not as_json:
            shown.result(os.fspath(out / "report.html"))
        if any(summary.get("errors") for summary in summaries):
            raise typer.Exit(EXIT_FAILED)


def _show_summaries(summaries: list[dict[str, Any]], published: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summaries))
        return
    from rich.console import Console

    from audiosep import results

    console = Console()
    console.print(results.table(summaries, published))
    for note in results.notes(summaries, published):
        console.print(note, markup=False)


@app.command()
def diagnose(
    mixture: Annotated[Path, typer.Argument(help="A recording whose sources are known.", show_default=False)],
    references: Annotated[
        list[Path],
        typer.Option(
            "--references", help="A source's recording, in the order of -s; once for each.", show_default=False
        ),
    ],
    sources: Annotated[
        str | None,
        typer.Option("-s", "--sources", help="What the references are, as in separate.  [default: one of each prior]"),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for report.html and diagnosis.json.")] = Path(
        "diagnosis"
    ),
    model: Models = DEFAULT_MODELS,
    sampler: Annotated[
        list[Sampler] | None,
        typer.Option(help="A sampler that takes gradients; may be repeated.  [default: dps, dsg, hybrid]"),
    ] = None,
    preset: PresetOption = Preset.published,
    steps: Steps = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of the recording, from its start.")] = 4.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same noise.")] = 0,
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Draw how guidance works on a mixture: its strength, its conflict with the priors, each source's SI-SDR."""
    from audiosep.progress import display

    shown = display("auto")
    with _errors(verbose, shown), _logging(shown, verbose=verbose):
        from audiosep import diagnose as module
        from audiosep.separator import Separator

        samplers = [name.value for name in sampler] if sampler else list(module.SAMPLERS)
        separators = {
            name: Separator.from_pretrained(
                _split(model), device=device, preset=preset.value, sampler=name, steps=steps, seed=seed
            )
            for name in samplers
        }
        with shown:
            progress = shown.file(mixture.name)
            names = _split(sources) if sources is not None else None
            shown.result(os.fspath(module.run(separators, mixture, references, out, names, seconds, progress)))


@app.command()
def mix(
    manifest: Annotated[Path, typer.Argument(help="The recordings to mix, as a recipe's prepare.py lists them.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for mixtures/, references/ and mixtures.jsonl.")],
    task: Annotated[
        str, typer.Option(help="What each mixture holds, as in 1speech+1sound or 3sound.")
    ] = "1speech+1sound",
    count: Annotated[int, typer.Option(min=1, help="Mixtures to make.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Chooses clips, offsets and levels.")] = 17,
    length: Annotated[float, typer.Option(min=0.5, help="Seconds of a mixture.")] = 4.0,
    sample_rate: Annotated[int, typer.Option(min=1000, help="In Hz.")] = 16000,
    split: Annotated[str, typer.Option(help="Which rows of the manifest.")] = "test",
    model: Annotated[
        str | None, typer.Option("-n", "--model", help="Keep to classes of sound that these checkpoints know.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Mix recordings of a corpus, to score separators on: the same mixtures on every machine.

    Distinct speakers and classes that overlap, each at -25 to -20 dBFS. Prints the folder's list of what was drawn.
    """
    from audiosep.progress import display

    shown = display("auto")
    with _errors(verbose, shown), _logging(shown, verbose=verbose):
        from audiosep import mixtures

        with shown:
            path = mixtures.write(
                manifest,
                out,
                task=task,
                count=count,
                seed=seed,
                segment=length,
                sample_rate=sample_rate,
                split=split,
                classes=mixtures.known_classes(_split(model)) if model else None,
                progress=shown.file(task),
            )
        shown.result(os.fspath(path))


@app.command("train")
def train_command(
    recipe: Annotated[Path, typer.Argument(help="What to train and how: a TOML file, see recipes/.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a value of the recipe; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The new checkpoint; log and state go to OUT.run.  [default: runs/RECIPE]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of OUT, if there is one.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that no run of OUT has made.")
    ] = False,
    stop_after: Annotated[
        float | None, typer.Option(min=0.0, metavar="MINUTES", help="Stop then, to be resumed.")
    ] = None,
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")] = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    progress: Annotated[Progress, typer.Option(help="Progress on stderr.")] = Progress.auto,
) -> None:
    """Train a prior from a recipe.

    Prints the path of the checkpoint. Started by torchrun or `accelerate launch`, several processes train one prior.
    """
    from audiosep import distributed
    from audiosep.progress import display

    main_process = distributed.rank() == 0
    shown = display(progress, quiet=quiet or not main_process)
    with _errors(verbose, shown), _logging(shown, verbose=verbose, quiet=quiet):
        from audiosep import fit
        from audiosep.recipe import load

        tables = load(recipe, settings or [])
        folder = out or Path("runs") / recipe.stem
        with shown:
            result = fit.fit(
                tables,
                folder,
                resume=resume,
                overwrite=overwrite,
                device=device,
                stop_minutes=stop_after,
                progress=shown.file(folder.name),
            )
        if main_process and as_json:
            shown.result(json.dumps({"checkpoint": os.fspath(folder), **result}))
        elif main_process:
            shown.result(os.fspath(folder))
        if not result["finished"]:
            shown.note(f"stopped at step {result['step']}; go on with --resume")
            if stop_after is None:  # by a signal
                raise typer.Exit(EXIT_INTERRUPTED)


@app.command()
def blind(
    recording: Annotated[
        Path,
        typer.Argument(
            help="Channels mixed at once: audio, csv, tsv, txt (a column each), npy, mat, edf.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the sources and report.html.")] = Path("sources"),
    method: Annotated[Method, typer.Option(help="How the sources are told apart.")] = Method.sobi,
    n_sources: Annotated[int | None, typer.Option(min=1, help="How many sources.  [default: estimated]")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the method, as in mixing=mlp; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same sources.")] = 0,
    progress: Annotated[Progress, typer.Option(help="Progress on stderr.")] = Progress.auto,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Find the sources that a recording's channels are mixtures of, knowing nothing of either.

    Writes the sources as files of the recording's kind, the mixing matrix, and a page about them.
    """
    from audiosep.progress import display

    shown = display(progress)
    with _errors(verbose, shown), _logging(shown, verbose=verbose):
        from audiosep.blind import command

        options = command.parse(settings or [])
        with shown:
            facts = command.run(
                recording,
                out,
                method=method.value,
                n_sources=n_sources,
                options=options,
                seed=seed,
                progress=shown.file(recording.name),
            )
            shown.ended(recording.name)
        for warning in facts["warnings"]:
            shown.note(warning)
        if as_json:
            print(json.dumps(facts))
            return
        for path in [*facts["files"], facts["page"]]:
            shown.result(path)


@app.command("learn")
def learn_command(
    views: Annotated[Path, typer.Argument(help="Sources and views: a TOML file, see recipes/ddprism.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the checkpoints, one per source.")] = Path(
        "priors"
    ),
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a value of the file; may be repeated."),
    ] = None,
    device: Annotated[str, typer.Option("-d", "--device", help="cpu or cuda.")] = "cpu",
    progress: Annotated[Progress, typer.Option(help="Progress on stderr.")] = Progress.auto,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Learn priors of sources that were never recorded alone.

    Prints the checkpoints, for `separate -n`, and a page. The same command goes on with a run that was stopped.
    """
    from audiosep.progress import display

    shown = display(progress)
    with _errors(verbose, shown), _logging(shown, verbose=verbose):
        from audiosep import learn
        from audiosep.recipe import load

        with shown:
            facts = learn.run(load(views, settings or []), out, device=device, progress=shown.file(views.name))
            shown.ended(views.name)
        if as_json:
            print(json.dumps(facts))
            return
        for path in [*facts["checkpoints"], facts["page"]]:
            shown.result(path)


@models_app.command("list")
def models_list(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """The checkpoints that ship with audiosep."""
    with _errors(verbose):
        from audiosep import hub

        found = hub.list_checkpoints()
        if as_json:
            print(json.dumps(found, indent=2, default=str))
            return
        for entry in found:
            fields = ("name", "kind", "sample_rate", "parameters", "licence", "path")
            print("\t".join(f"{entry.get(key, '')}" for key in fields))
        if not found:
            raise ModelError("no checkpoints found; see: audiosep models import --help")


@models_app.command("info")
def models_info(
    name: Annotated[str, typer.Argument(help="A checkpoint's name or folder.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """What a checkpoint holds: its configuration, and its card."""
    with _errors(verbose):
        from audiosep import hub

        folder = hub.find(name)
        config = hub.read_config(folder)
        if as_json:
            print(json.dumps({"path": os.fspath(folder), "config": config}, indent=2))
            return
        print(f"path: {folder}")
        for key, value in config.items():
            print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
        card = folder / "README.md"
        if card.exists():
            print(f"\n{card.read_text(encoding='utf-8').strip()}")


@models_app.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(help="sound_source.pt or speech_source.pt, as published.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The new checkpoint folder.  [default: FILE's name]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
    verbose: Verbose = False,
) -> None:
    """Turn a published checkpoint file into a checkpoint folder of ours."""
    with _errors(verbose):
        folder = out or Path(file.stem)
        if not file.is_file():
            raise ModelError(f"{file}: no such file")
        if folder.exists() and not overwrite:
            raise UsageError(f"{folder}: exists; choose --overwrite or another -o")
        import torch

        from audiosep import hub

        prior = hub.import_unasdiff(file)
        card = hub.UNASDIFF_CARD | {"title": f"UnaSDiff source prior, imported from {file.name}"}
        hub.save_prior(prior, folder, card, torch.float32)  # outputs stay those published
        print(folder)


@models_app.command("download")
def models_download(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME[@REVISION]", help="A checkpoint on the Hub.")],
    verbose: Verbose = False,
) -> None:
    """Fetch a checkpoint from the Hub; print its folder in the cache."""
    with _errors(verbose):
        from audiosep import hub

        print(hub.download(name))


@models_app.command("push")
def models_push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder.")],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where on the Hub; made if it isn't there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
    verbose: Verbose = False,
) -> None:
    """Put a checkpoint on the Hub; print the commit's address. HF_TOKEN is used."""
    with _errors(verbose):
        from audiosep import hub

        print(hub.push(folder, name, private=private))


@app.command()
def doctor(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Show what is installed, and what is amiss."""
    with _errors(verbose):
        from audiosep import doctor as module

        facts = module.examine()
        print(json.dumps(facts, indent=2) if as_json else module.as_text(facts))


@contextlib.contextmanager
def _errors(verbose: bool, shown: Display | None = None) -> Iterator[None]:
    """Turn an error into one line on stderr and its exit code; -v adds where it arose."""

    def leave(line: str, code: int) -> NoReturn:
        if verbose and code not in (EXIT_INTERRUPTED, EXIT_USAGE):
            traceback.print_exc()
        if shown is None:
            print(line, file=sys.stderr)
        else:
            shown.error(line)
        raise typer.Exit(code) from None

    try:
        yield
    except KeyboardInterrupt:
        leave("interrupted", EXIT_INTERRUPTED)
    except AudiosepError as error:
        codes = {UsageError: EXIT_USAGE, ModelError: EXIT_MODEL}
        code = next((c for kind, c in codes.items() if isinstance(error, kind)), EXIT_FAILED)
        leave(f"error: {error}", code)
    except BrokenPipeError:  # the reader of stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_FAILED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        hint = "" if verbose else " (-v shows where)"
        text = " ".join(f"{type(error).__name__}: {error}".split())
        leave(f"error: {text}{hint}", EXIT_FAILED)


@contextlib.contextmanager
def _logging(shown: Display, *, verbose: bool, quiet: bool = False) -> Iterator[None]:
    """Send audiosep's log to the display: warnings, with -v everything, with -q errors."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.error(self.format(record))

    logger = logging.getLogger("audiosep")
    handler = Handler(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(handler.level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _share_cores(parallel: int) -> None:
    if parallel > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // parallel))


def _refuse_both(first: bool, first_name: str, second: bool, second_name: str) -> None:
    if first and second:
        raise UsageError(f"{first_name} and {second_name} exclude each other")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _model_folder(names: str) -> str:
    """The models' part of the output path: "speech+sound", a folder by its last part."""
    return "+".join(name.rstrip("/").rpartition("/")[2] for name in _split(names))
