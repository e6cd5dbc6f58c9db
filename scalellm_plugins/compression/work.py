"""A run from beginning to end: `compress`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from scalellm_plugins.errors import CheckpointError, ConfigError

from . import calibration, journal, plan, report
from .calibration import Text
from .checkpoint import Checkpoint, open_checkpoint
from .families import check_droppable
from .journal import Journal
from .plan import Selection, Step
from .progress import say
from .recipe import Recipe, check

SPARE_BYTES = 64 << 20
"""Room on the disk for what is not weights."""


class Job(msgspec.Struct, frozen=True):
    """A command: what to make of `model` in `out`.

    Attributes:
        model: a folder, or a model's name on the hub.
        recipe: what to do; `text` is filled in from `calibration`.
        calibration: the text, or None.
        measure: compare quality and speed, where there is text.
    """

    model: str
    out: Path
    recipe: Recipe
    calibration: Path | None = None
    measure: bool = True


def compress(job: Job) -> report.Report:
    """Do it, and return the report, which is in OUT, too.

    Raises:
        ConfigError: options that cannot be, OUT exists, or earlier work there is another's.
        CheckpointError: MODEL is damaged, or nothing is known about it.
        OutputError: OUT cannot be written.
    """
    journal.refuse(job.out)
    recipe = _with_text(job)
    if recipe.method:
        from . import calibrated

        calibrated.require(recipe.method)
    checkpoint = open_checkpoint(find_model(job.model))
    trial = _trial(checkpoint, recipe)
    text = _text(checkpoint, job)
    work = journal.begin(job.out, recipe, checkpoint.folder, checkpoint.fingerprint())
    if work.resumed:
        say(f"going on with {work.folder.parent}")
    try:
        _check_room(plan.steps(checkpoint, recipe, work.selection or trial), work, job.out)
        found = _run(checkpoint, recipe, job, work, text)
        work.finish()
    except BaseException as error:
        work.give_up(refused=isinstance(error, (ConfigError, CheckpointError)))
        raise
    return found


def _with_text(job: Job) -> Recipe:
    recipe = job.recipe
    if job.calibration is not None:
        digest = calibration.digest_of(job.calibration)
        recipe = msgspec.structs.replace(recipe, text=digest)
    return check(recipe)


def _trial(checkpoint: Checkpoint, recipe: Recipe) -> Selection:
    """A selection of the right size, and the largest one; what cannot be is refused with it."""
    if recipe.drop_layers >= checkpoint.layers:
        raise ConfigError(
            f"--drop-layers {recipe.drop_layers}: the model has {checkpoint.layers} layers, of "
            f"which one must stay: at most {checkpoint.layers - 1}"
        )
    if recipe.drop_layers:
        check_droppable(checkpoint.config)
    kept = tuple(range(plan.kept_channels(recipe, checkpoint.channels)))
    layers = tuple(range(checkpoint.layers))
    trial = Selection(layers, dict.fromkeys(layers, kept) if recipe.prune_ffn else {})
    plan.steps(checkpoint, recipe, trial)
    return trial


def _check_room(steps: Mapping[str, Sequence[Step]], work: Journal, out: Path) -> None:
    """Refuse what the disk has no room for; finished shards need none."""
    todo = [step for shard, made in steps.items() if not work.has(shard) for step in made]
    needed = sum(spec.nbytes for step in todo for spec in step.outputs)
    free = shutil.disk_usage(work.folder).free
    if free < needed + SPARE_BYTES:
        raise ConfigError(
            f"{out} needs up to {_size(needed)} and {_size(SPARE_BYTES)} in reserve, and "
            f"{_size(free)} are free there: free some room, or name an OUT on another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _run(
    checkpoint: Checkpoint, recipe: Recipe, job: Job, work: Journal, text: Text | None
) -> report.Report:
    from . import writer  # torch

    if recipe.method:
        return _run_calibrated(checkpoint, recipe, job, work, text)
    selection = work.selection or _select(checkpoint, recipe, text)
    work.select(selection)
    steps = plan.steps(checkpoint, recipe, selection)
    writer.write_shards(checkpoint, recipe, steps, work)
    config = plan.new_config(checkpoint, recipe, selection)
    writer.write_rest(checkpoint, config, steps, work.folder)
    if job.measure and text is not None:
        measured = _measure(checkpoint, recipe, text, work)
    else:
        reason = "no --calibration text to measure with" if job.measure else "--no-measure"
        measured = {"quality_skipped": reason, "speed_skipped": reason}
    found = report.make(checkpoint, recipe, selection, steps, versions=_versions(), **measured)
    report.save(found, work.folder)
    return found


def _run_calibrated(
    checkpoint: Checkpoint, recipe: Recipe, job: Job, work: Journal, text: Text | None
) -> report.Report:
    """The same by llm-compressor, which writes a checkpoint as a whole: no half of it is kept."""
    from . import calibrated

    assert text is not None, "check() refuses a method without text"
    shutil.rmtree(work.folder)
    work.folder.mkdir()
    ignored = plan.ignored_modules(checkpoint, recipe)
    calibrated.write(checkpoint.folder, recipe, ignored, text.chosen_by, work.folder)
    measured: dict[str, Any] = {"quality_skipped": "--no-measure", "speed_skipped": "--no-measure"}
    if job.measure:
        measured = _measure(checkpoint, recipe, text, work)
    selection = Selection(tuple(range(checkpoint.layers)))
    steps = plan.steps(checkpoint, recipe, selection)
    found = report.make(checkpoint, recipe, selection, steps, versions=_versions(), **measured)
    written = sum(path.stat().st_size for path in work.folder.glob("*.safetensors"))
    found = msgspec.structs.replace(found, bytes=(checkpoint.nbytes, written))
    report.save(found, work.folder)
    return found


def _text(checkpoint: Checkpoint, job: Job) -> Text | None:
    if job.calibration is None:
        return None
    from . import models

    tokenizer = models.load_tokenizer(checkpoint.folder)
    return calibration.load(job.calibration, tokenizer, job.recipe.tokens)


def _select(checkpoint: Checkpoint, recipe: Recipe, text: Text | None) -> Selection:
    if not recipe.selects:
        return Selection(tuple(range(checkpoint.layers)))
    from . import influence, models

    assert text is not None, "check() refuses a recipe that selects without text"
    model = models.load_model(checkpoint.folder)
    kept = plan.kept_channels(recipe, checkpoint.channels)
    return influence.select(model, text.chosen_by, recipe.drop_layers, kept)


def _measure(checkpoint: Checkpoint, recipe: Recipe, text: Text, work: Journal) -> dict[str, Any]:
    """The report's fields about quality and speed."""
    from . import measure, models

    try:
        before, after = (models.load_model(path) for path in (checkpoint.folder, work.folder))
    except CheckpointError as error:  # transformers is not needed for OUT, only to judge it here
        reason = str(error)
        return {"quality_skipped": reason, "speed_skipped": reason}
    found: dict[str, Any] = {"quality": measure.quality(before, after, text.held_out)}
    if recipe.scheme:
        reason = "transformers decompresses integers; measure in vLLM"
        return found | {"speed_skipped": reason}
    # Of middle length: the first rows may all be short.
    prompt = sorted(text.held_out, key=len)[len(text.held_out) // 2]
    return found | {"speed": measure.speed(before, after, prompt.ids)}


def find_model(model: str) -> Path:
    """The folder of a model: itself, or what the hub has (the local cache, when offline).

    Raises:
        CheckpointError: there is none.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise CheckpointError(f"{model} is no folder with a checkpoint")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
    except Exception as error:  # many kinds: no such model, no network, no right to it
        raise CheckpointError(f"{model} is no folder, and not on the hub: {error}") from None


def _versions() -> dict[str, str]:
    names = (
        "scalellm-plugins",
        "torch",
        "transformers",
        "safetensors",
        "compressed-tensors",
        "llmcompressor",
    )
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
