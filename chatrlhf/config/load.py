"""From a YAML file (or a dictionary) and overrides to a `Config`, with errors that name the key."""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from chatrlhf.config.aliases import FLAT_GENERATION_KEYS, RENAMED, count_episodes, translate
from chatrlhf.config.model import PeftConfig
from chatrlhf.config.schema import Config
from chatrlhf.config.strict_yaml import YamlFault, parse_yaml
from chatrlhf.errors import ConfigError, MissingError
from chatrlhf.errors.boundary import doing

LOW_TEMPERATURE = 0.5
# Of a value in a message: aliases of YAML make lists of lists that are endless when they are written out.
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 200
SHORT.maxlevel, SHORT.maxlist, SHORT.maxdict = 2, 8, 8
MOST_VALUES = 100_000  # in a YAML file


def load_config(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    base_dir: Path | None = None,
) -> Config:
    """Read, translate, override and validate a configuration.

    Args:
        source: path of a YAML file, or its content as a dictionary, or a finished `Config`.
        overrides: ``{"section.key": value}``, or command-line words ``["section.key=value"]`` whose values are
            read as YAML.
        base_dir: of a dictionary, the folder that its relative paths are tried from first.

    Returns:
        The validated configuration. Relative paths in it are tried from the YAML file's folder, then from
        the working directory.

    Raises:
        ConfigError: file missing, not YAML, unknown key (the nearest known one is named), wrong value.
    """
    where = "configuration"
    if isinstance(source, Config):
        # What was written continues; values derived from it, such as a batch size, are derived anew.
        base_dir = source.base_dir
        raw = source._written if source._written is not None else source.model_dump(mode="json", exclude_unset=True)
    elif isinstance(source, Mapping):
        raw = dict(source)
    else:
        with doing("the configuration", source, untrusted=True):
            path = _expanded(source)
            raw, base_dir, where = _read_yaml(path), path.resolve().parent, str(path)
    # Overrides may use anybody's names too, so each layer is translated before the upper covers the lower.
    with _naming(where):
        raw, notes = translate({key: value for key, value in raw.items() if value is not None})
    given = _overriding(overrides)
    with _naming("--set"):
        upper, upper_notes = translate(given)
    written = _covered(raw, upper)
    with _naming(where):
        # Counted last, so that overriding one factor changes the product.
        config = Config.model_validate(count_episodes(written))
    config._base_dir, config._written = base_dir, written
    config._notes = list(dict.fromkeys(notes + upper_notes)) + _surprises(config)
    return config


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Errors inside say in which file, or that it was the command line, where the key stands."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def explain(error: ValidationError, root: type[BaseModel] = Config) -> str:
    """A pydantic error as one line: key, what was received, what was expected; ``root`` is what was validated."""
    parts = []
    for item in error.errors():
        loc = [str(part) for part in item["loc"]]
        key = ".".join(loc)
        if item["type"] == "extra_forbidden":
            near = _nearest_key(loc, root)
            parts.append(f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else ""))
        elif item["type"] == "value_error":
            section = f"{key}: " if key else ""
            parts.append(f"{section}{item['ctx']['error']}")
        else:
            parts.append(f"{key}: {item['msg'].lower()}, got {SHORT.repr(item['input'])}")
    return "; ".join(parts)


def resolve_path(config: Config, key: str, value: str) -> Path:
    """Find a file that the configuration names.

    Args:
        config: its YAML file's folder is tried first, then the working directory.
        key: the key it stands under, for the message.
        value: the path as written.

    Raises:
        MissingError: it exists in neither place; both are named.
    """
    with doing(f"{key}: finding the file", value, untrusted=True):
        path = _expanded(value)
        tried = [path] if path.is_absolute() else [base / path for base in (config.base_dir, Path.cwd()) if base]
        for candidate in tried:
            if _exists(candidate):
                return candidate
    places = " and ".join(dict.fromkeys(str(candidate) for candidate in tried))
    raise MissingError(f"{key}: file {value!r} does not exist (tried {places}); correct the path")


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # "~name" of no one on this machine
        return Path(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return True  # as far as anybody can say; whoever reads it says more
    except OSError:  # such as a name that is too long
        return False


def load_peft_config(config: Config, section: str = "actor_config") -> PeftConfig:
    """The adapters that a section's `peft_config_path` describes, peft's usual ones where no file is named.

    Args:
        section: `reward_config` and `critic_config` have the actor's where they name none.

    Raises:
        ConfigError: the file is missing, or holds something that is not supported.
    """
    key, value = f"{section}.peft_config_path", getattr(config, section).peft_config_path
    if value is None:
        return PeftConfig() if section == "actor_config" else load_peft_config(config)
    path = resolve_path(config, key, value)
    try:
        return PeftConfig.model_validate(_read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{key}: {path}: {explain(error, PeftConfig)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"configuration file {str(path)!r} does not exist (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML text file ({error})") from None
    try:
        raw = parse_yaml(text)
    except YamlFault as fault:
        line = f", line {fault.line}" if fault.line else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({fault.reason})") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as 'actor_config:', got a {type(raw).__name__}")
    if _size(raw, {}) > MOST_VALUES:
        raise ConfigError(
            f"{path}: its aliases (*name) repeat more than {MOST_VALUES:,} values; write out what is meant"
        )
    return raw


def _size(value: Any, sizes: dict[int, int]) -> int:
    """Values in a tree when each alias is replaced by what it stands for; too many in one that holds itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = MOST_VALUES  # while it is being counted
        parts = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(value)]


def _overriding(overrides: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """What overrides say, as sections; a key that two of them set is refused, as in a file."""
    if overrides is None:
        return {}
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_parse_override, overrides)
    tree: dict[str, Any] = {}
    for key, value in pairs:
        for name in reversed(key.split(".")):
            value = {name: value}
        tree = _joined(tree, value, ())
    return tree


def _parse_override(word: str) -> tuple[str, Any]:
    key, separator, value = word.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"--set {word!r}: expected section.key=value, such as trainer_config.actor_lr=1e-5")
    try:
        return key, parse_yaml(value) if value else None
    except YamlFault as fault:
        raise ConfigError(f"--set {key}: the value {value!r} is not valid YAML ({fault.reason})") from None


def _joined(tree: dict[str, Any], more: dict[str, Any], section: tuple[str, ...]) -> dict[str, Any]:
    """Two trees of overrides as one. Raises ConfigError where both set a key."""
    joined = dict(tree)
    for name, value in more.items():
        key = (*section, str(name))
        if name not in joined:
            joined[name] = value
        elif isinstance(joined[name], dict) and isinstance(value, dict):
            joined[name] = _joined(joined[name], value, key)
        elif isinstance(value, dict) and value:
            raise ConfigError(f"--set {'.'.join((*key, str(next(iter(value)))))}: {name!r} is a value, not a section")
        else:
            raise ConfigError(
                f"--set {'.'.join(key)}: it is given twice, as {joined[name]!r} and as {value!r}; keep one of them"
            )
    return joined


def _covered(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """``upper`` laid over ``lower``, section by section."""
    merged = dict(lower)
    for key, value in upper.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _covered(merged[key], value) if both else value
    return merged


def _nearest_key(loc: list[str], root: type[BaseModel]) -> str | None:
    """The known key most like the last part of ``loc``, looked for in its section first, then everywhere."""
    section: Any = root
    for part in loc[:-1]:
        if not part.isdigit():  # a place in a list
            section = _section_type(section.model_fields[part].annotation)
    known = [*section.model_fields, *RENAMED.get(loc[0], {})]
    if loc[0] == "trainer_config":
        known += FLAT_GENERATION_KEYS
    near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.6)
    if near:
        return ".".join([*loc[:-1], near[0]])
    everywhere = {
        field: f"{name}.{field}"
        for name, info in root.model_fields.items()
        if (inner := _section_type(info.annotation)) is not None
        for field in inner.model_fields
    }
    everywhere.update({name: name for name in root.model_fields})
    near = difflib.get_close_matches(loc[-1], list(everywhere), n=1, cutoff=0.6)
    return everywhere[near[0]] if near else None


def _section_type(annotation: Any) -> type[BaseModel] | None:
    several = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is list
    candidates = typing.get_args(annotation) if several else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


# ChatLLaMA's and trlX's keys that are accepted so that their files load, and why nothing here needs them.
WITHOUT_EFFECT = {
    "actor_config.additonal_prompt_tokens": "prompts are never padded to a common room",
    "reward_config.model_folder": "everything goes below actor_config.model_folder or output_dir",
    "critic_config.model_folder": "everything goes below actor_config.model_folder or output_dir",
    "critic_config.max_sequence_length": "the critic reads what the actor reads",
    "trainer_config.ref_mean": "the mean is never subtracted from a score",
    "trainer_config.gen_kwargs.pad_token_id": "padding is known by masks, never by an id",
}


def _surprises(config: Config) -> list[str]:
    notes = []
    idle = []
    for key, reason in WITHOUT_EFFECT.items():
        *sections, name = key.split(".")
        section = reduce(getattr, sections, config)
        if name in section.model_fields_set and getattr(section, name) is not None:
            idle.append(f"{key} ({reason})")
    if idle:
        notes.append("accepted without effect: " + "; ".join(idle))
    temperature = config.trainer_config.gen_kwargs.temperature or config.actor_config.temperature
    if temperature is not None and temperature < LOW_TEMPERATURE:
        notes.append(
            f"rollout temperature {temperature:g} is low: the policy explores little (ChatLLaMA's 0.1 never took "
            "effect there); 1.0 is usual"
        )
    return notes
