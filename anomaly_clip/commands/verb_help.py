"""``--help`` of the verbs with options of experiments: what a reader looks for comes first.

The options of the named method and data set come first, those of Lightning's trainer last. Nothing
is imported, so that the help appears at once; ``--help.all`` shows all texts in full.
"""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import yaml

from anomaly_clip.commands.named_classes import MODULES, NamedOptions, named_options
from anomaly_clip.commands.source_options import (
    SourceOption,
    find_class,
    public_classes,
    split_text,
)
from anomaly_clip.errors import suggest, user_errors

__all__ = [
    "ALL",
    "SECTIONS",
    "asks_for_help",
    "help_text",
    "plain_options",
    "shared_options",
    "show_help",
]

WIDTH = 80
"""Columns of a line."""
COLUMN, CLASS_COLUMN = 34, 28
"""Columns at which one-line texts begin."""
SHORT = 170
"""Characters of an option's text; the rest is shown by ``--help.all``."""
LONGEST_VALUE = 40
"""Characters of the longest value that is shown in full."""
ALL = "--help.all"
HELP = ("-h", "--help", ALL)
BACKBONE = "--model.backbone.help"
KINDS = {"model": "method", "data": "data set"}
EXPERIMENTS = ("fit", "validate", "test", "predict", "calibrate", "each")
"""Verbs whose whole help is written here."""
SECTIONS = {
    **dict.fromkeys((*EXPERIMENTS, "compare"), ("model", "data")),
    **dict.fromkeys(("export", "benchmark"), ("model",)),
    **dict.fromkeys(("check", "preview"), ("data",)),
}
"""Named classes whose options a verb takes; the help of other verbs is written by their parsers."""
LISTING = (*EXPERIMENTS, "compare", "check", "preview")
"""Verbs whose help lists all methods, or all data sets."""
STEPS = {"calibrate": "predict", "each": "fit"}
"""Verb of Lightning's trainer that a verb runs."""
TEXTS = {
    "fit": "Fit a method. test, predict and export take the run's folder as --ckpt_path.",
    "validate": "Compute metrics on the validation split.",
    "test": "Compute metrics on the test split.",
    "predict": "Score images and draw heat maps; with a calibration, decide.",
    "calibrate": "Score normal images that were not fitted on, and derive thresholds with a "
    "bounded rate of false alarms. The calibration is written into the checkpoint and next to "
    "it; for a zero-shot method, into a run folder, for --calibration.file. Nothing is fitted.",
    "each": "Fit and test one model per category in RUN/<category>/, then merge the metrics. "
    "--resume continues an interrupted run, inside the fit in progress, and skips the categories "
    "that are finished. --dry-run lists the commands of the fits. The results go into "
    "--output.folder, or a new folder in --output.root/--output.name. Processes that torchrun or "
    "srun has started share the categories.",
}
USAGES = {
    "fit": ("--config NAME-or-FILE", "--model CLASS --data CLASS"),
    "validate": ("--config NAME-or-FILE", "--ckpt_path RUN"),
    "test": ("--config NAME-or-FILE", "--ckpt_path RUN"),
    "predict": ("--config NAME-or-FILE", "--ckpt_path RUN --data.root PHOTOS"),
    "calibrate": ("--ckpt_path RUN --data.root GOOD", "--config NAME-or-FILE --data.root GOOD"),
    "each": ("--config NAME-or-FILE [--dry-run]", "--resume RUN"),
}
COMMON = {
    "--config NAME-or-FILE": "configuration; several are merged, the last one wins",
    "--ckpt_path RUN": "a run's folder, a .ckpt file, or last",
    "--seed_everything N": "seed of all random numbers; default: 0",
    "--print_config": "print the complete configuration, and exit",
    "--traceback": "show the traceback of an error",
}
CALIBRATE = "--calibrate true", "hold normal images out of the fit, and calibrate on them"
NOT_OF_USERS = (
    "ckpt_path",
    "model",
    "dataloaders",
    "train_dataloaders",
    "val_dataloaders",
    "datamodule",
)
"""Arguments of the trainer's methods that the command line sets."""
UNUSED = {"calibrate": ("calibration.file", "calibration.folds")}


def asks_for_help(words: Sequence[str]) -> bool:
    """Return whether a command line asks for the help that this module shows.

    Args:
        words: The verb and its options.
    """
    if words[0] not in SECTIONS:
        return False
    return not {*HELP, BACKBONE, "--model.help", "--data.help"}.isdisjoint(words[1:])


def show_help(words: Sequence[str]) -> int:
    """Print the help of a verb and return an exit code.

    Args:
        words: The verb and its options.

    Raises:
        UserError: If a configuration does not exist, or cannot be read.
    """
    verb = words[0]
    text = help_text(words)
    if verb not in EXPERIMENTS and not {*HELP}.isdisjoint(words):
        module = importlib.import_module(f"anomaly_clip.commands.{verb}")
        with suppress(SystemExit):  # of argparse
            getattr(module, f"run_{verb}")([verb, "--help"])
        print()
    print(text)
    return 0


def help_text(words: Sequence[str]) -> str:
    """Return the help of a verb; of a verb with a parser of its own, the part on named classes.

    Args:
        words: The verb and its options. The method and the data set that they name are shown with
            their options; other options are ignored.

    Raises:
        UserError: If a configuration does not exist, or cannot be read.

    Example:
        >>> from anomaly_clip.commands.verb_help import help_text
        >>> "--model.sigma" in help_text(["test", "--config", "sdp", "--help"])
        True
    """
    verb = words[0]
    is_complete = ALL in words
    named = named_options(_with_named_help(words))
    if BACKBONE in words:
        return "\n".join(_backbone_section(named))
    only = [kind for kind in MODULES if f"--{kind}.help" in words]
    lines: list[str] = []
    if not only and verb in EXPERIMENTS:
        lines += [*_usage(verb), "", *textwrap.wrap(TEXTS[verb], WIDTH)]
    for kind in only or SECTIONS[verb]:
        lines += ["", *_class_section(kind, named, verb, is_complete)]
    if not only and verb in (*EXPERIMENTS, "compare"):
        lines += _experiment_sections(verb, named, is_complete)
    return "\n".join(lines).strip("\n")


def _with_named_help(words: Sequence[str]) -> list[str]:
    """Replace ``--model.help SDP`` by ``--model SDP``; without a name, it is left out."""
    result: list[str] = []
    for place, word in enumerate(words):
        kind = word.removeprefix("--").removesuffix(".help")
        if word != f"--{kind}.help" or kind not in MODULES:
            result.append(word)
        elif place + 1 < len(words) and not words[place + 1].startswith("-"):
            result.append(f"--{kind}")
    return result


def _usage(verb: str) -> Iterator[str]:
    starts = ("usage: ", "       ")
    for start, usage in zip(starts, USAGES[verb], strict=False):
        more = "" if "--resume" in usage else " [options]"
        yield f"{start}anomaly_clip {verb} {usage}{more}"


def _class_section(kind: str, named: NamedOptions, verb: str, is_complete: bool) -> Iterator[str]:
    """Yield the options of the named method or data set, or the names of all."""
    choice = named.classes.get(kind)
    if choice is not None and choice.source is not None:
        source = choice.source
        yield f"{KINDS[kind]} {source.name} (from {choice.origin})"
        yield from textwrap.wrap(f"{_plain(source.summary)}.", WIDTH, **_indented(2))
        yield from _option_lines(kind, source.options(), named, is_complete)
        return
    if choice is None and verb not in LISTING:
        yield f"For the options of a {KINDS[kind]}: anomaly_clip {verb} --config sdp --help"
        return
    sources = [source for module in MODULES[kind] for source in public_classes(module)]
    if choice is not None:
        hint = suggest(choice.name, [source.name for source in sources])
        yield f"--{kind} {choice.name}: there is no such class{f'; {hint}' if hint else ''}"
        yield ""
    named_by = "--config sdp or --model SDP" if kind == "model" else "--data VisA"
    yield f"{KINDS[kind]}s; for the options of one, add {named_by} to --help"
    for source in sources:
        yield _one_line(f"--{kind} {source.name}", source.summary, CLASS_COLUMN)
    text = f"a {KINDS[kind]} of your own, in the file my_module.py"
    yield _one_line(f"--{kind} my_module.MyClass", text, CLASS_COLUMN)


def _backbone_section(named: NamedOptions) -> Iterator[str]:
    """Yield the options of the backbone of the named method, and the layers of the model."""
    choice = named.classes.get("model")
    options = choice.source.options() if choice is not None and choice.source is not None else []
    backbone = next((option for option in options if option.name == "backbone"), None)
    if backbone is None:
        yield "name the method of the backbone with --config or --model, such as --model PatchCore"
        return
    yield f"backbone of {choice.name if choice else ''}"
    yield from _option_lines("model.backbone", backbone.settings, named, True)
    names = {option.name for option in backbone.settings}
    if "layers" not in names:
        return
    default = next(option.default for option in backbone.settings if option.name == "name")
    name = str(named.values.get("model.backbone.name", default))
    with user_errors():
        yield from _layer_lines(name, "pretrained" in names, named)


def _layer_lines(name: str, any_tower: bool, named: NamedOptions) -> Iterator[str]:
    """Yield the layers of a CNN, or the blocks and tags of a ViT, of a method that takes both."""
    from anomaly_clip.backbones.cnn_layers import list_layers  # takes some seconds

    if any_tower:
        from anomaly_clip.backbones.clip import CLIPSettings
        from anomaly_clip.backbones.towers import BackboneSettings, settings_of
        from anomaly_clip.backbones.vit import ViTSettings

        if "model.backbone.pretrained" in named.values or name == CLIPSettings.name:
            yield from ["", "for the layers of a CNN or a ViT, add --model.backbone.name NAME"]
            yield "    --model.backbone.weights auto"
            return
        if isinstance(settings_of(BackboneSettings(name)), ViTSettings):
            yield from _vit_lines(name)
            return
    layers = list_layers(name)
    yield from ["", f"layers of {name}: stride in pixels, channels"]
    for layer in layers:
        yield f"  {layer.name:<{COLUMN}} {layer.stride:>4} {layer.channels:>6}"
    if not layers:
        yield "  none: it has no feature maps, so use a convolutional network, such as resnet18"


def _vit_lines(name: str) -> Iterator[str]:
    from anomaly_clip.backbones.vit_weights import summary_of

    vit = summary_of(name)
    yield from ["", f"layers of {name}: blocks 1 to {vit.num_blocks}, as model.layers"]
    rows = {
        "stride in pixels": vit.stride,
        "channels": vit.width,
        "class token and registers": vit.num_prefix_tokens,
        "image size of the weights": vit.image_size,
        "tags of weights, default first": ", ".join(vit.tags) or "none: give a file, or random",
    }
    for title, value in rows.items():
        yield from textwrap.wrap(
            f"{title:<{COLUMN - 2}}{value}",
            WIDTH,
            initial_indent="  ",
            subsequent_indent=" " * COLUMN,
        )


def shared_options(verb: str) -> dict[str, list[SourceOption]]:
    """Return the options of an experiment that do not depend on method and data, by section.

    Args:
        verb: The verb; one that runs no experiment has none.
    """
    if verb not in (*EXPERIMENTS, "compare"):
        return {}
    settings = _options("anomaly_clip.decisions.settings.CalibrationSettings")
    unused = UNUSED.get(verb, ())
    return {
        "output": _options("anomaly_clip.recording.writer.RunWriter"),
        "calibration": [o for o in settings if f"calibration.{o.name}" not in unused],
        "trainer": _options("lightning.pytorch.trainer.trainer.Trainer"),
    }


def plain_options(verb: str) -> dict[str, str]:
    """Return the options of an experiment without a section, as typed, and their texts.

    Args:
        verb: The verb; one that runs no experiment has none.
    """
    if verb not in (*EXPERIMENTS, "compare"):
        return {}
    several = verb in ("each", "compare")
    return {
        option: text for option, text in COMMON.items() if not (several and "ckpt_path" in option)
    }


def _experiment_sections(verb: str, named: NamedOptions, is_complete: bool) -> Iterator[str]:
    """Yield the options that do not depend on the method and the data set."""
    is_brief = bool(named.classes) and not is_complete
    shared = shared_options(verb)
    yield from ["", "output"]
    yield from _option_lines("output", shared["output"], named, is_complete, is_brief)
    yield from ["", "calibration and decisions"]
    step = STEPS.get(verb, verb)
    if step in ("fit", "compare"):
        yield _one_line(*CALIBRATE)
    yield from _option_lines("calibration", shared["calibration"], named, is_complete, is_brief)
    yield from ["", "configuration, checkpoint, seed"]
    yield from (_one_line(option, text) for option, text in plain_options(verb).items())
    trainer = find_class("lightning.pytorch.trainer.trainer.Trainer")
    if is_complete and trainer is not None:
        steps = [o for o in trainer.arguments(step) if o.name not in NOT_OF_USERS]
        yield from (_one_line(f"--{option.name}", _first(option.help)) for option in steps)
        yield from ["", "trainer (Lightning)"]
    else:
        yield from ["", f"trainer (Lightning); full texts: anomaly_clip {verb} {ALL}"]
    yield from _option_lines("trainer", shared["trainer"], named, is_complete, not is_complete)


def _options(name: str) -> list[SourceOption]:
    source = find_class(name)
    return [] if source is None else source.options()


def _option_lines(
    prefix: str,
    options: Sequence[SourceOption],
    named: NamedOptions,
    is_complete: bool,
    is_brief: bool = False,
) -> Iterator[str]:
    """Yield the options of a class with their types, values and texts.

    Args:
        prefix: Option of the class, such as ``model``.
        options: Its options.
        named: Configured values.
        is_complete: Whether texts are shown in full.
        is_brief: Whether each option has one line, with the beginning of its text.
    """
    for option in options:
        name = f"{prefix}.{option.name}"
        if is_brief:
            value = f"[{_shown(named.values[name])}] " if name in named.values else ""
            yield _one_line(f"--{name}", f"{value}{option.help}")
            continue
        if option.settings and named.values.get(name, option.default) is not None:
            yield from _option_lines(name, option.settings, named, is_complete)
            continue
        head = f"--{name}  {option.type}{_value(name, option, named)}"
        yield from textwrap.wrap(head, WIDTH, initial_indent="  ", subsequent_indent="    ")
        text = option.help if is_complete else _first(option.help)
        if option.settings:
            text = f"{text} Options: {', '.join(part.name for part in option.settings)}."
        yield from textwrap.wrap(_plain(text), WIDTH, **_indented(6))


def _value(name: str, option: SourceOption, named: NamedOptions) -> str:
    if name in named.values:
        return f", configured: {_shown(named.values[name])}"
    return f", default: {_shown(option.default)}" if option.is_known else ""


def _shown(value: Any) -> str:
    """Return a value as it is typed."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 4]} ..."


def _first(text: str) -> str:
    """Return the beginning of a text, at least its first sentence."""
    parts = split_text(text)
    while len(parts) > 1 and len(". ".join(parts)) > SHORT:
        parts.pop()
    return f"{'. '.join(parts)}." if text else ""


def _one_line(start: str, text: str, column: int = COLUMN) -> str:
    """Return an option and the beginning of its text, in one line."""
    start = f"  {start}".ljust(column)
    room = max(WIDTH - len(start) - 1, 20)
    return f"{start} {textwrap.shorten(_plain(text), room, placeholder=' ...')}".rstrip()


def _plain(text: str) -> str:
    """Return a docstring's text without its markup."""
    words = text.replace("``", "").replace("`", "").replace("~", "")
    for role in (":class:", ":meth:", ":mod:", ":func:", ":paramref:", ":attr:"):
        words = words.replace(role, "")
    return words


def _indented(columns: int) -> Mapping[str, Any]:
    return {"initial_indent": " " * columns, "subsequent_indent": " " * columns}
