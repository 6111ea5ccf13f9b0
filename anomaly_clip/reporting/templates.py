"""Rendering of the HTML templates in this folder."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from anomaly_clip.files import readable

__all__ = ["render"]


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("anomaly_clip", "reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def render(template: str, **values: object) -> str:
    """Render a template; values are HTML-escaped unless they are markup.

    Args:
        template: File name of the template.
        values: Values of all names that the template uses.
    """
    # Names in damaged files may contain surrogates, which UTF-8 cannot encode.
    return readable(_environment().get_template(template).render(**values))
