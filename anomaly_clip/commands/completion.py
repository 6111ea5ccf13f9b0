"""Completion of command lines in bash, zsh and fish.

A small script in the shell asks this program for the words that may follow. They come from the
sources, without imports: a parser of Lightning's would take seconds for each press of the key.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from anomaly_clip.commands.configs import config_names
from anomaly_clip.commands.named_classes import MODULES, named_options
from anomaly_clip.commands.source_options import SourceOption, public_classes
from anomaly_clip.commands.verb_help import ALL, SECTIONS, plain_options, shared_options
from anomaly_clip.errors import UserError

__all__ = ["SHELLS", "complete", "completion_script"]

BASH = """\
_anomaly_clip() {
    local IFS=$'\\n'
    COMPREPLY=($(anomaly_clip --complete "$COMP_CWORD" "${COMP_WORDS[@]}" 2>/dev/null))
}
complete -o default -F _anomaly_clip anomaly_clip"""
ZSH = """\
_anomaly_clip() {
    local -a answers
    answers=(${(f)"$(anomaly_clip --complete $((CURRENT - 1)) "${words[@]}" 2>/dev/null)"})
    if (( ${#answers} )); then compadd -- $answers; else _files; fi
}
compdef _anomaly_clip anomaly_clip"""
FISH = """\
function __anomaly_clip_complete
    set -l words (commandline -opc)
    anomaly_clip --complete (count $words) $words (commandline -ct) 2>/dev/null
end
complete -c anomaly_clip -a '(__anomaly_clip_complete)'"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
GENERAL = ("--help", "--version", "--print_completion")
CONFIGS = ("--config", "-c")
PLACES = {"configs": "", "sweep": "sweeps/"}
"""Verbs whose first word is the name of a configuration, and what the name begins with."""
DETECTOR = ("export", "benchmark")
"""Verbs with the options of ``detector_options``."""
OF_VERBS = {
    "fit": ("--calibrate",),
    "each": ("--calibrate", "--dry-run", "--resume"),
    "compare": ("--calibrate", "--resume"),
    "sweep": ("--resume",),
}
"""Options of verbs that no parser adds."""
CLASS_OPTIONS = {f"--{kind}{end}": kind for kind in MODULES for end in ("", ".help")}


def completion_script(shell: str) -> str:
    """Return the script that a shell reads at its start.

    Args:
        shell: bash, zsh or fish.

    Raises:
        UserError: If there is none for the shell.
    """
    if shell not in SHELLS:
        raise UserError(f"--print_completion {shell}: expected one of {', '.join(SHELLS)}")
    return SHELLS[shell]


def complete(place: int, words: Sequence[str], verbs: Sequence[str]) -> list[str]:
    """Return the words that may stand at a place of a command line; empty for names of files.

    Args:
        place: Index of the word.
        words: All words, the program first.
        verbs: The verbs of the program.

    Example:
        >>> from anomaly_clip.commands.completion import complete
        >>> complete(3, ["anomaly_clip", "test", "--config", "winclip_"], ["test"])
        ['winclip_4shot']
    """
    before, current = list(words[:place]), "".join(words[place : place + 1])
    if current == "=":  # bash splits --config=sdp into three words
        before, current = [*before, current], ""
    if before and before[-1] == "=":
        before.pop()
    while "=" in before[1:-1]:
        middle = before.index("=", 1)
        before[middle - 1 : middle + 2] = ["=".join((before[middle - 1], before[middle + 1]))]
    candidates = _candidates(before[1:], current, verbs)
    return sorted({word for word in candidates if word.startswith(current)})


def _candidates(before: Sequence[str], current: str, verbs: Sequence[str]) -> Iterator[str]:
    if not before:
        yield from (*verbs, *GENERAL)
        return
    verb, last = before[0], before[-1]
    if last == "--print_completion":
        yield from SHELLS
    elif last in CONFIGS:
        yield from config_names()
    elif last in CLASS_OPTIONS:
        for module in MODULES[CLASS_OPTIONS[last]]:
            yield from (source.name for source in public_classes(module))
    elif len(before) == 1 and verb in PLACES and not current.startswith("-"):
        yield from (name for name in config_names() if name.startswith(PLACES[verb]))
    elif verb in verbs:
        options = dict(_options(before))
        if current.startswith("-"):
            yield from ("--help", *([ALL] if verb in SECTIONS else []), *options)
        elif last in options:
            yield from _choices(options[last])


def _options(before: Sequence[str]) -> Iterator[tuple[str, SourceOption]]:
    """Yield the options of a verb, with those of the named method and data set."""
    verb = before[0]
    yield from ((name, SourceOption(name)) for name in OF_VERBS.get(verb, ()))
    modules = [f"{verb}.py", *(["detector_options.py"] if verb in DETECTOR else [])]
    for name in (name for module in modules for name in _own_options(module)):
        yield name, SourceOption(name)
    if verb not in SECTIONS:
        return
    try:
        named = named_options(before)
    except UserError:  # of a configuration; the verb reports it
        return
    for kind in SECTIONS[verb]:
        yield f"--{kind}", SourceOption(kind)
        choice = named.classes.get(kind)
        if choice is not None and choice.source is not None:
            yield from _flat(f"--{kind}", choice.source.options())
    for section, options in shared_options(verb).items():
        yield from _flat(f"--{section}", options)
    names = [text.split()[0] for text in plain_options(verb)]
    yield from ((name, SourceOption(name)) for name in names)


def _flat(prefix: str, options: Sequence[SourceOption]) -> Iterator[tuple[str, SourceOption]]:
    for option in options:
        name = f"{prefix}.{option.name}"
        yield name, option
        yield from _flat(name, option.settings)


def _choices(option: SourceOption) -> Iterator[str]:
    for kind in option.type.split(" | "):
        if kind.startswith("{"):
            yield from kind.strip("{}").split(", ")
        elif kind == "bool":
            yield from ("true", "false")


def _own_options(module: str) -> list[str]:
    """Return the options that a module adds to its parser, read from its source."""
    file = Path(__file__).with_name(module)
    if not file.is_file():  # of the verbs of an experiment
        return []
    calls = (node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call))
    return [
        word.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for word in call.args
        if isinstance(word, ast.Constant)
        and isinstance(word.value, str)
        and word.value.startswith("--")
    ]
