"""The pages of the Python API, made of its docstrings: a name that is added is on them.

In: `torchdlrm.__all__`.  Out: Markdown: a signature, what the docstring says, and of a class its public members.
"""

import enum
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

from docstring_parser import Docstring, DocstringStyle, parse
from pydantic import BaseModel

import torchdlrm

_WIDTH = 100
_FIELDS = {"Config": "configuration.md", "LiveSettings": "live.md#settings"}  # their pages list every key


@dataclass(frozen=True)
class Documented:
    """A public name, or a public member of a class.

    Attributes:
        path: as `Bundle.open`, without the package.
        value: what it is.
        doc: its docstring, without indentation; "" where there is none.
    """

    path: str
    value: Any
    doc: str


def public_names() -> Iterator[Documented]:
    """Every name of `torchdlrm.__all__`, in its order, and after each class its public members."""
    for name in torchdlrm.__all__:
        value = getattr(torchdlrm, name)
        yield Documented(name, value, inspect.getdoc(value) or "")
        if inspect.isclass(value):
            yield from _members(name, value)


def undocumented() -> list[str]:
    """Public names without a docstring, and parameters of functions of which no docstring says what they are."""
    missing = []
    for named in public_names():
        if not named.doc:
            missing.append(named.path)
        elif inspect.isfunction(named.value) and "." not in named.path:
            explained = _explained(named.value)
            for other in re.findall(r"`(\w+)`", named.doc):  # "takes what `advance` takes"
                explained |= _explained(getattr(torchdlrm, other)) if other in torchdlrm.__all__ else set()
            names = inspect.signature(named.value).parameters
            missing += [f"{named.path}({name})" for name in names if name not in explained]
    return missing


def functions_page() -> str:
    """Every public function."""
    names = [named for named in public_names() if inspect.isfunction(named.value) and "." not in named.path]
    about = "Every stage as one function that takes and returns folders or objects. `import torchdlrm` needs no torch:"
    return "\n".join(
        [f"# Python: functions\n\n{about} a name is imported when it is first used.\n", *map(_entry, names)]
    )


def classes_page() -> str:
    """Every public class, with its public members."""
    names = [named for named in public_names() if inspect.isclass(named.value) or "." in named.path]
    about = "What the [functions](functions.md) take and return, and the parts of a model."
    return "\n".join([f"# Python: classes\n\n{about}\n", *map(_entry, names)])


def _members(name: str, owner: type) -> Iterator[Documented]:
    for key in sorted({key for base in owner.__mro__ if _is_ours(base) for key in vars(base)}):
        value = inspect.getattr_static(owner, key)
        if key.startswith("_") or key in getattr(owner, "__annotations__", {}) or isinstance(owner, enum.EnumMeta):
            continue
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isfunction(function):
            yield Documented(f"{name}.{key}", function, inspect.getdoc(getattr(owner, key)) or "")
        elif isinstance(value, property) or type(value).__name__ == "cached_property":
            yield Documented(f"{name}.{key}", value, inspect.getdoc(value) or "")


def _is_ours(owner: type) -> bool:
    return owner.__module__.startswith("torchdlrm")


def _explained(function: Any) -> set[str]:
    return {one.arg_name for one in _parsed(inspect.getdoc(function) or "").params}


def _parsed(doc: str) -> Docstring:
    return parse(doc, style=DocstringStyle.GOOGLE)


def _entry(named: Documented) -> str:
    """A heading, the signature, and the docstring."""
    is_member = "." in named.path
    parts = [f"{'###' if is_member else '##'} {named.path}", _signature(named), _body(named)]
    home = _FIELDS.get(named.path)
    if home:
        parts.append(f"Every key with its default: [{home.partition('#')[0]}](../{home}).")
    return "\n\n".join(part for part in parts if part) + "\n"


def _signature(named: Documented) -> str:
    value = named.value
    if isinstance(value, property) or not callable(value):
        getter: Any = value.fget if isinstance(value, property) else value.func
        kind = getter.__annotations__.get("return")
        return f"```python\n{named.path}{'' if kind is None else f': {_type(kind)}'}\n```"
    if inspect.isclass(value) and (
        issubclass(value, BaseModel) or not any("__init__" in vars(b) for b in value.__mro__ if _is_ours(b))
    ):
        return ""
    signature = inspect.signature(value)
    parameters = [p for p in signature.parameters.values() if p.name not in {"self", "cls"}]
    shown = [
        str(p.replace(annotation=_Text(_type(p.annotation)))) if p.annotation is not p.empty else str(p)
        for p in parameters
    ]
    stars = [n for n, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY]
    if stars and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        shown.insert(stars[0], "*")
    returns = (
        ""
        if inspect.isclass(value) or signature.return_annotation is signature.empty
        else f" -> {_type(signature.return_annotation)}"
    )
    line = f"{named.path}({', '.join(shown)}){returns}"
    if len(line) > _WIDTH:
        line = f"{named.path}(\n" + "".join(f"    {part},\n" for part in shown) + f"){returns}"
    line = re.sub(r"<[\w.]*?(\w+) object at 0x\w+>", r"\1()", line)
    return f"```python\n{line}\n```"


class _Text:
    """An annotation that shows as what it was given."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _type(annotation: Any) -> str:
    """A type as a person writes it: without the modules of its parts."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", text)


def _body(named: Documented) -> str:
    parsed = _parsed(named.doc)
    parts = [parsed.short_description or "", parsed.long_description or ""]
    fields = [one for one in parsed.params if one.args[0] == "attribute"]
    arguments = [one for one in parsed.params if one.args[0] != "attribute"]
    types = _types_of(named.value)
    for title, listed in (("Arguments", arguments), ("Attributes", fields)):
        if listed:
            rows = [
                f"- **`{one.arg_name}`**{_of_type(types.get(one.arg_name))}: {_line(one.description)}" for one in listed
            ]
            parts.append("\n".join([f"**{title}**", "", *rows]))
    if parsed.returns and parsed.returns.description:
        parts.append(
            f"**{'Yields' if parsed.returns.is_generator else 'Returns'}** {_line(parsed.returns.description)}"
        )
    if parsed.raises:
        rows = [f"- **`{one.type_name}`**: {_line(one.description)}" for one in parsed.raises]
        parts.append("\n".join(["**Raises**", "", *rows]))
    return "\n\n".join(part for part in parts if part)


def _types_of(value: Any) -> dict[str, str]:
    annotated = value
    if inspect.isclass(value) and not (is_dataclass(value) or issubclass(value, BaseModel)):
        annotated = value.__init__
    hints: dict[str, Any] = {}
    for owner in reversed(annotated.__mro__) if inspect.isclass(annotated) else [annotated]:
        hints |= getattr(owner, "__annotations__", {})
    return {name: _type(hint) for name, hint in hints.items()}


def _of_type(kind: str | None) -> str:
    return "" if kind is None else f" `{kind}`"


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
