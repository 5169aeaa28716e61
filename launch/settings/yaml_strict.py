"""Reads YAML as people expect it: no surprises of YAML 1.1, no duplicate keys, and a line number for every key.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is false, `010` is eight and `04:00:00` is 14400. Here plain
scalars are read by the short list below (close to YAML 1.2's core schema); all else is a string.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml

KeyPath = tuple[str | int, ...]

_RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"  # 1.5, 3., .5e-3
            r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$"  # 1e-4
        ),
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not read; write the value out", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what either dialect would misread."""


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


@dataclass(frozen=True)
class YamlProblem:
    """What stands in the way of reading a document: `line` counts from 1, `path` is the key it concerns."""

    line: int
    path: KeyPath
    message: str


@dataclass
class YamlDocument:
    """Plain Python values, the line of every key and list item, and what was wrong."""

    value: object = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[YamlProblem] = field(default_factory=list)


def read_yaml(text: str) -> YamlDocument:
    """Reads one document. Never raises: malformed text is a problem; of a duplicate key the first counts."""
    document = YamlDocument()
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            document.value = _build(loader, node, (), document)
    except RecursionError:
        document.problems.append(YamlProblem(1, (), "not valid YAML: nested too deep; a job is sections of keys"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(YamlProblem(mark.line + 1 if mark else 1, (), f"not valid YAML: {message}"))
    except yaml.YAMLError as error:  # a character that YAML does not allow
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        document.problems.append(YamlProblem(line, (), f"not valid YAML: {str(error).splitlines()[0]}"))
    finally:
        if loader is not None:
            loader.dispose()
    return document


def write_yaml(value: object) -> str:
    """Block-style YAML, keys in the order given, that `read_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=110)


def _build(loader: _Loader, node: yaml.Node, path: KeyPath, document: YamlDocument) -> object:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, index), document) for index, item in enumerate(node.value)]
    try:
        value = loader.construct_object(node)
        fault = _unusable(value)
    except ValueError as error:  # an explicit tag that does not fit, such as !!int x
        value, fault = None, str(error)
    if fault:
        document.problems.append(YamlProblem(node.start_mark.line + 1, path, fault))
        return None
    return value


def _unusable(value: object) -> str | None:
    """What is wrong with a scalar that YAML allows and nothing after it can hold."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"an integer of {len(str(abs(value)))} digits; none here is beyond 64 bits (19 digits)"
    if isinstance(value, str) and "\0" in value:
        return f"no text: character {value.index(chr(0))} is NUL, which no path can hold; leave it out"
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"no text: character {error.start} is half of a pair (a surrogate); write the character itself"
    return None


def _build_mapping(loader: _Loader, node: yaml.MappingNode, path: KeyPath, document: YamlDocument) -> dict:
    mapping: dict[str, object] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(YamlProblem(line, path, "a key must be a plain word"))
            continue
        if key_node.value == "<<":
            document.problems.append(YamlProblem(line, path, "<< (a merge) is not read; write the keys out"))
            continue
        key = str(key_node.value)
        key_path = (*path, key)
        if key in mapping:
            first = document.lines[key_path]
            document.problems.append(
                YamlProblem(line, key_path, f"duplicate key, first given on line {first}; keep one of the two")
            )
            continue
        document.lines[key_path] = line
        mapping[key] = _build(loader, value_node, key_path, document)
    return mapping
