"""The HTML templates beside this file, filled in."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["render"]


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("anomaly_clip", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def render(template: str, **values: object) -> str:
    """Return a template's text with the values filled in, escaped where they are no markup.

    Args:
        template: The template's file name.
        values: Every name that the template uses.
    """
    return _environment().get_template(template).render(**values)
