"""
Docstrings of diffusers' style, ``name (`type`, *optional*): text``, as griffe's parser of Google's style takes them. Types
and defaults come from the signature; shapes go in front of the text. ``[`Name`]`` becomes a link to the reference.
"""

import re
from functools import partial

import griffe

# the arguments' sections, and in them `names (type):`, `name (type), name (type):` and `names:`
SECTION = re.compile(r"^( *)(Args|Parameters|Attributes):\n((?:\1 +.*(?:\n|$)|\n)*)", re.MULTILINE)
ARGUMENTS = re.compile(r"^( +)(\w+(?:, (?:\w+|\.\.\.))*) \((.+?)\):(?= |$)(.*)$", re.MULTILINE)
TWO_TYPED = re.compile(r"^( +)(\w+) \((.+?)\), (\w+) \((.+?)\):$", re.MULTILINE)
UNTYPED = re.compile(r"^( +)(\w+(?:, (?:\w+|\.\.\.))+):( [A-Z].*)$", re.MULTILINE)
SHAPE = re.compile(r"of (?:the )?(?:same )?shape .*?(?=, \*optional\*|$)")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")


class DiffusersDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs):
        objects = list(walk(pkg))
        paths = {}
        for one in objects:
            if one.is_class or one.is_function:
                paths.setdefault(one.name, one.path)
        for one in objects:
            if one.docstring:
                parameters = {parameter.name: parameter for parameter in getattr(one, "parameters", ())}
                text = SECTION.sub(partial(section, parameters=parameters), one.docstring.value)
                one.docstring.value = REFERENCE.sub(lambda match: link(match[1], paths), text)


def walk(parent: griffe.Object):
    """All modules, classes, functions and attributes in `parent`."""
    for one in parent.members.values():
        if not one.is_alias:
            yield one
            if one.is_module or one.is_class:
                yield from walk(one)


def section(match: re.Match, parameters: dict) -> str:
    """A section in Google's style."""
    body = TWO_TYPED.sub(r"\1\2, \4 (\3):", match[3])
    body = UNTYPED.sub(lambda entry: entries(entry[1], entry[2], "", entry[3], parameters), body)
    body = ARGUMENTS.sub(lambda entry: entries(*entry.groups(), parameters), body)
    return f"{match[1]}{match[2]}:\n{body}"


def entries(indent: str, names: str, kind: str, text: str, parameters: dict) -> str:
    """An entry for each name; those before the last refer to it. `a, ..., c` are the parameters from a to c."""
    names = names.split(", ")
    if "..." in names:
        known, dots = list(parameters), names.index("...")
        between = known[known.index(names[dots - 1]) + 1 : known.index(names[dots + 1])]
        names[dots : dots + 1] = between
    shape = SHAPE.search(kind)
    text = f" {shape[0].capitalize()}.{text}" if shape else text
    *others, last = (f"{indent}{name}{stated_type(kind, parameters.get(name))}:" for name in names)
    return "\n".join([*(f"{other} As `{names[-1]}`." for other in others), f"{last}{text}"])


def stated_type(kind: str, parameter: griffe.Parameter | None) -> str:
    """The docstring's type, where the signature has none."""
    if not kind or (parameter is not None and parameter.annotation is not None):
        return ""
    kind = REFERENCE.sub(r"\1", SHAPE.sub("", kind)).replace("`", "").replace("*optional*", "optional").strip(" ,")
    return f" ({kind})" if kind else ""


def link(name: str, paths: dict[str, str]) -> str:
    """A link if the reference has the object, its name if not."""
    first, dot, rest = name.partition(".")
    if first not in paths:
        return f"`{name}`"
    return f'<autoref optional identifier="{paths[first]}{dot}{rest}"><code>{name}</code></autoref>'
