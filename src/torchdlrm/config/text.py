"""Converts configs from and to TOML text, and writes the page that documents every key.

In: a TOML file and overrides by dotted name.  Out: a `Config`, or one error that lists every problem.
"""

import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from torchdlrm.config.contradictions import contradictions
from torchdlrm.config.model import FLAT_NAMES, in_sections
from torchdlrm.config.sections import ANY_FEATURE, Config, sections, settings
from torchdlrm.errors import ConfigError
from torchdlrm.folders import kind_of
from torchdlrm.storage.mirror import fetch
from torchdlrm.storage.places import located
from torchdlrm.toml import did_you_mean, explain, is_preset, read_toml, toml_text, toml_value

SHIPPED_CONFIGS = Path(__file__).parents[1] / "configs"
# Earlier names of keys. A message gives the new name; in the config of a run, the old ones are read as well.
_RENAMED_KEYS = {
    "train.dropout_share": "train.dropout",
    "sharding.reserved_share": "sharding.reserved_fraction",
    "sharding.host_cache_share": "sharding.cache_fraction",
    **{f"model.{old}": f"model.{section}.{leaf}" for old, (section, leaf) in FLAT_NAMES.items()},
}
_DOCUMENT_HEAD = """
# Configuration

A run is described by one TOML file. Some configs come with torchdlrm and are used by name, as in
`dlrm train criteo-small ...`; `dlrm config criteo-small > my.toml` writes one that you can edit. A bare name that is
one of theirs means it, whatever lies in the folder: a file is written with its ending or its folder, as in `my.toml` or
`./criteo-small` (schemas and `dlrm plan --tables` likewise). Keys that a file leaves out have the defaults below, which
are the paper's Criteo model; `dlrm config` prints them. `dlrm train` and `dlrm plan` say how many keys the file sets,
and one that sets none is refused. Any key can be
overridden on the command line by its dotted name, with `-` or `_`: `--train.batch-size-global 8192`,
`--model.dense-arch-layer-sizes 512,256,64`. All mistakes, in the file and on the command line, are reported together.
(`make docs` generates this page from `src/torchdlrm/config/`.)
"""


def shipped_config_names() -> list[str]:
    """List the names of the configs that come with torchdlrm, such as `criteo-small`."""
    return sorted(path.stem for path in SHIPPED_CONFIGS.glob("*.toml"))


def find_config(name: str | Path) -> Path:
    """Find the file of a config.

    Args:
        name: of a config that comes with torchdlrm, or a TOML file; a file that is called as one of those is written
            with its folder (`./criteo-small`).

    Raises:
        ConfigError: there is neither.
    """
    names = shipped_config_names()
    if is_preset(name, names):
        return SHIPPED_CONFIGS / f"{name}.toml"
    path = fetch(located(name))
    if path.exists():
        return path
    msg = f"{name}: no such config; name a TOML file, or one of {', '.join(names)}{did_you_mean(path.stem, names)}"
    raise ConfigError(msg)


def load_config(
    path: str | Path | Config | None, overrides: Mapping[str, str] | None = None, *, is_of_run: bool = False
) -> Config:
    """Read a config from a TOML file (defaults where it is silent), changed by overrides such as {"train.epochs": "2"}.

    Args:
        path: the file, the name of a config that comes with torchdlrm (`"criteo-small"`), a config, or None for the
            defaults.
        overrides: values as TOML text by dotted name.
        is_of_run: the file is the config.toml of a run: what earlier versions called otherwise, or accepted, is read.

    Raises:
        ConfigError: the file cannot be read or is empty, or keys or values are wrong; every problem in one message.
    """
    where: dict[str, str] = {}
    if isinstance(path, Config):
        raw, path = path.model_dump(mode="json", exclude_none=True), None
    else:
        path = None if path is None else Path(path) if is_of_run else find_config(path)
        raw = {} if path is None else _read(path)
    if is_of_run:
        _rename_keys(raw)
    problems: list[str] = []
    for name, text in (overrides or {}).items():
        key = name.replace("-", "_")
        where[key] = f"--{name}"
        *names, leaf = key.split(".")
        target: Any = raw
        for section in names:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            problems.append(f"--{name}: {'.'.join(names)} is not a section")
            continue
        target[leaf] = _typed(key, text)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        items = _by_value(error.errors(include_url=False), raw)
        problems += [_describe(item, path, where) for item in items]
        problems += _contradictions_of_the_rest(raw, [[str(part) for part in item["loc"]] for item in items])
    else:
        problems += contradictions(config)
        if not problems:
            return config
    raise ConfigError("\n".join(["the config is wrong:", *(f"  {problem}" for problem in problems)]))


def about_config(name: str | Path, overrides: Mapping[str, str]) -> str:
    """Say in one line how many keys a config sets: one that says less than was thought trains another model."""
    raw = _read(find_config(name))
    of_model = "" if raw.get("model") else ", none of [model]"
    over = f"; {len(overrides)} overridden" if overrides else ""
    keys = "1 key" if _num_keys(raw) == 1 else f"{_num_keys(raw)} keys"
    return f"config {name}: sets {keys}{of_model}{over}; all others have their defaults"


def _read(path: Path) -> dict[str, Any]:
    names = ", ".join(shipped_config_names())
    if path.is_dir():
        what = "folder" if (kind := kind_of(path)) is None else kind.name
        raise ConfigError(f"{path}: is a {what}, not a config; name a TOML file, or one of {names}")
    raw = read_toml(path, ConfigError)
    if not _num_keys(raw):
        raise ConfigError(
            f"{path}: sets no key, so it is no config; `dlrm config NAME` prints one to start from, NAME one of {names}"
        )
    return raw


def _num_keys(raw: Mapping[str, Any]) -> int:
    return sum(_num_keys(value) if isinstance(value, dict) else 1 for value in raw.values())


def _rename_keys(raw: dict[str, Any]) -> None:
    if isinstance(raw.get("model"), dict):
        raw["model"] = in_sections(raw["model"])
    for old, new in _RENAMED_KEYS.items():
        (section, old_leaf), new_leaf = old.split("."), new.rpartition(".")[2]
        if old_leaf in raw.get(section, {}):
            raw[section][new_leaf] = raw[section].pop(old_leaf)
    for section in ("table_optimizer", "dense_optimizer"):
        if raw.get(section, {}).get("name") == "sgd":
            raw[section].pop("eps", None)  # was accepted, and read by nothing


def _contradictions_of_the_rest(raw: dict[str, Any], wrong: list[list[str]]) -> list[str]:
    """Find what the right keys contradict, so that it need not wait for the others' correction."""
    for section, *leaf in wrong:
        if leaf and isinstance(raw.get(section), dict):
            raw[section].pop(leaf[0], None)
        else:
            raw.pop(section, None)
    names = [".".join(loc[:2]) for loc in wrong]
    return [line for line in contradictions(Config.model_validate(raw)) if not any(name in line for name in names)]


def config_toml(config: Config) -> str:
    """Write the config as TOML text that `load_config` reads back; keys that are not set are left out."""
    return toml_text(config.model_dump(mode="json", exclude_none=True))


def configuration_markdown() -> str:
    """Make docs/configuration.md: every setting with its default and meaning."""
    lines = [_DOCUMENT_HEAD.strip(), "", "| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in settings():
        default = "not set" if field.default in (None, {}) else f"`{toml_value(field.default)}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    for name, section in sections():
        if name:
            lines += ["", f"`[{name}]`: {' '.join((section.__doc__ or '').split())}"]
    return "\n".join(lines) + "\n"


def _typed(key: str, text: str) -> object:
    """Read an override's text as TOML would, so that both ways in are validated alike."""
    field = dict(settings()).get(_of_any_feature(key))
    kinds = _plain_types(field.annotation) if field is not None else set()
    if str in kinds:
        return text
    if tuple in kinds and not text.startswith("["):
        text = f"[{text}]"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if tuple in kinds:  # names without quotation marks
            return [int(part) if part.strip().isdigit() else part.strip() for part in text.strip("[]").split(",")]
        return text
    return float(value) if float in kinds and isinstance(value, int) and not isinstance(value, bool) else value


def _of_any_feature(key: str) -> str:
    """A key as `settings` has it: for all features alike."""
    return re.sub(r"^model\.features\.\w+", f"model.features.{ANY_FEATURE}", key)


def _plain_types(annotation: object) -> set[object]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _plain_types(get_args(annotation)[0])
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if origin in {Union, types.UnionType}:
        return {kind for part in get_args(annotation) for kind in _plain_types(part)}
    return {origin or annotation}


def _by_value(items: Sequence[Any], raw: Any) -> list[Any]:
    """One error for each wrong value, by its key alone: of the types that it may be of, pydantic names each."""
    found = dict[tuple[Any, ...], Any]()
    for item in items:
        at, loc = raw, list[Any]()
        for part in item["loc"]:
            if isinstance(part, int) or (isinstance(at, dict) and part in at):
                at, loc = at[part], [*loc, part]
        found[*loc,] = {**item, "loc": loc}
    return [item for loc, item in found.items() if not any(loc == other[: len(loc)] != other for other in found)]


def _describe(item: Any, path: Path | None, where: Mapping[str, str]) -> str:
    names = [str(part) for part in item["loc"]]
    key = ".".join(names)
    named = [flag for name, flag in where.items() if all(a == b for a, b in zip(name.split("."), names, strict=False))]
    place = named[0] if named else f"{path}: {key}"
    if item["type"] == "extra_forbidden":
        if key in _RENAMED_KEYS:
            return f"{place}: is called {_RENAMED_KEYS[key]} now"
        feature = next(iter(names[2:]), ANY_FEATURE)
        known = [name.replace(ANY_FEATURE, feature) for name, _ in (*settings(), *sections()) if name]
        leaf = [name for name in known if names[-1] in _also_called(name.rpartition(".")[2])]
        hint = f"; did you mean {' or '.join(leaf)}?" if leaf else did_you_mean(key, known)
        return f"{place}: there is no such key{hint or '; dlrm config shows all'}"
    return f"{place}: {explain(item)}"


def _also_called(leaf: str) -> set[str]:
    """A key without its section, and its initials: people write lr for learning_rate."""
    return {leaf, "".join(word[0] for word in leaf.split("_"))}
