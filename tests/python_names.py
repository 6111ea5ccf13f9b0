"""Page of the public names of ``anomaly_clip``, written by ``option_pages.py``."""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from typing import Any

import docstring_parser
from option_texts import NOTE, anchor, cell, links, plain, summary, table

import anomaly_clip

BASES = {"AnomalyData": "data.md#all-data-sets", "AnomalyMethod": "", "RunWriter": ""}
"""Base classes, with the page of their options: only what subclasses implement is listed."""


def _is_abstract(member: Any) -> bool:
    return bool(getattr(member, "__isabstractmethod__", False))


MODULES = {
    "backbones": "Frozen CLIP and CNN encoders, prompts and weights.",
    "decisions": "Thresholds with a bounded rate of false alarms, p-values and drift.",
}
"""Content of the packages without a docstring."""


def python_page(kinds: list[type], datasets: list[type]) -> str:
    """Return the page of the public names of the package.

    Args:
        kinds: Classes of methods, which have a page of their own.
        datasets: Classes of data sets, which do as well.
    """
    others = {kind.__name__ for kind in [*kinds, *datasets]}
    names = [name for name in anomaly_clip.__all__ if name != "__version__"]
    objects = {name: getattr(anomaly_clip, name) for name in names}
    functions = [n for n, value in objects.items() if inspect.isfunction(value)]
    classes = [n for n, value in objects.items() if inspect.isclass(value) and n not in others]
    listed = [*functions, *classes]
    modules = [n for n, value in objects.items() if inspect.ismodule(value)]
    lines = [
        NOTE,
        "# Python",
        "",
        "The public names of `anomaly_clip`. [python.md](../howto/python.md) shows their use.",
        "",
        *table(
            ("name", "content"),
            [
                *((f"[`{n}`](#{anchor(n)})", cell(summary(objects[n]))) for n in listed),
                *(
                    (f"`anomaly_clip.{n}`", cell(summary(objects[n]) or MODULES[n]))
                    for n in modules
                ),
            ],
        ),
        f"Methods: {links(kinds, 'methods.md')}.",
        "",
        f"Data sets: {links(datasets, 'data.md')}.",
        "",
    ]
    for name in functions:
        lines += [f"## {name}", "", *described(objects[name], name)]
    for name in classes:
        kind = objects[name]
        lines += [f"## {name}", "", *described(kind, name)]
        for member, value in vars(kind).items():
            if member.startswith("_") or (name in BASES and not _is_abstract(value)):
                continue
            if isinstance(value, property):
                lines += [f"- `{name}.{member}`: {summary(value)}", ""]
            elif inspect.isfunction(value) or isinstance(value, classmethod | staticmethod):
                function = getattr(kind, member)
                lines += [f"### {name}.{member}", "", *described(function, f"{name}.{member}")]
    return "\n".join(lines)


def described(thing: Any, name: str) -> list[str]:
    """Return signature, text, arguments, result and errors of a function or class."""
    if inspect.isclass(thing) and is_dataclass(thing):
        parsed = docstring_parser.parse_from_object(thing)  # with the texts below attributes
    else:
        parsed = docstring_parser.parse(inspect.getdoc(thing) or "")
    short = plain(parsed.short_description or "")
    if name in BASES:
        page = BASES[name]
        return [short, "", *([f"Arguments: [options]({page}).", ""] if page else [])]
    lines = ["```text", signature(thing, name), "```", "", short, ""]
    if parsed.long_description:
        for paragraph in re.split(r"\n\s*\n", parsed.long_description):
            if "::" in paragraph or paragraph.startswith("    "):
                lines += ["```text", inspect.cleandoc(paragraph), "```", ""]
            else:
                lines += [plain(paragraph), ""]
    if parsed.params:
        lines += table(
            ("argument", "meaning"),
            [(f"`{p.arg_name}`", cell(p.description or "")) for p in parsed.params],
        )
    if parsed.returns and parsed.returns.description:
        lines += [f"Returns: {plain(parsed.returns.description)}", ""]
    if parsed.raises:
        lines += table(
            ("error", "cause"),
            [(f"`{r.type_name}`", cell(r.description or "")) for r in parsed.raises],
        )
    return lines


STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def signature(thing: Any, name: str) -> str:
    """Return a signature with its defaults, without its types."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except ValueError:
        return f"{name}(...)"
    shown, starred = [], False
    for parameter in parameters:
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            shown.append("*")
        starred = starred or parameter.kind is parameter.VAR_POSITIONAL
        prefix = STARS.get(parameter.kind, "")
        default = parameter.default
        text = repr(default) if isinstance(default, str | int | float | tuple | None) else "..."
        suffix = "" if default is parameter.empty else f"={text}"
        shown.append(f"{prefix}{parameter.name}{suffix}")
    line = f"{name}({', '.join(shown)})"
    if len(line) <= 90:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + ")"
