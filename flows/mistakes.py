"""What is wrong with a stage's parameters, in a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from ..tasks.catalogue import did_you_mean
from ..tasks.stage import Stage

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


NO_REMOTE_CODE = (
    "there is no 'trust_remote_code': Python that comes with a model or data set is never run, for it could do "
    "whatever who computes may do; take a model whose family transformers has itself, and data as text or jsonl"
)


def sentence(stage: Stage, label: str, detail: ErrorDetails) -> str:
    """One of the errors that pydantic found in the parameters of a stage; label: how errors call the stage."""
    fields = stage.parameters.model_fields
    key = str(detail["loc"][0]) if detail["loc"] else ""
    description = fields[key].description if key in fields else None
    remark = f" ({key}: {description})" if description else ""
    inner = detail["loc"][1:] if _has_parts(stage, key) else ()
    path = key + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)
    match detail["type"]:
        case "extra_forbidden" if "trust_remote_code" in path:
            return f"{label}: {NO_REMOTE_CODE}"
        case "extra_forbidden":
            advice = remark if path != key else f"; {did_you_mean(key, [*fields, *stage.inputs])}"
            return f"{label} has no parameter '{path}'{advice}"
        case "missing":
            return f"{label} needs '{path}'{remark}" if path != key else f"{label} needs '{key}': {description}"
        case "value_error":
            return f"{label}: {f'{path} ' if inner else ''}{detail['ctx']['error']}"
    said = detail["msg"]
    return f"{label}: {path} is {detail['input']!r}, but {said[:1].lower()}{said[1:]}{remark}"


def _has_parts(stage: Stage, parameter: str) -> bool:
    """Whether a parameter is a mapping with fields of its own, or a list of such."""
    field = stage.parameters.model_fields.get(parameter)
    return field is not None and _is_model(field.annotation)


def _is_model(kind: Any) -> bool:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return True
    return any(_is_model(part) for part in get_args(kind))
