"""What all HTML pages share: the style sheet, how values are written, the section about the run; and checks of the JSON behind them."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from tsrfast._page import numerals

_RUN = {"started", "seconds", "stages", "machine", "command"}


def document(package: str, name: str, *, run: dict[str, Any] | None = None, **values: Any) -> str:
    """The page of a template.

    Args:
        package, name: where the template is.
        run: what `run.json` holds (`checks.load_run`).
        values: what the template is given besides `run` and `style`.
    """
    import jinja2  # late: only pages need it
    from markupsafe import Markup

    def source(file: str) -> str:
        return resources.files(package if file == name else __package__).joinpath(file).read_text("utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["value"] = _value
    environment.filters["duration"] = numerals.duration
    style = Markup(source("style.css"))
    return environment.get_template(name).render(style=style, run=None if run is None else _run(run), **values)


def _run(run: dict[str, Any]) -> dict[str, Any]:
    command = run.get("command")
    return {
        "command": " ".join(map(str, command)) if isinstance(command, list) else command,
        "started": run.get("started"),
        "seconds": run.get("seconds"),
        "machine": run.get("machine") or {},
        "stages": run.get("stages") or [],
        "rest": {key: value for key, value in run.items() if key not in _RUN},
    }


def _value(value: Any) -> str:
    """A setting as text: lists and numbers as JSON writes them, text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value):
        return ", ".join(_value(v) for v in value)
    return json.dumps(value, ensure_ascii=False)
