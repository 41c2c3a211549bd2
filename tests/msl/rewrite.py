"""MSL text to text that Clang's C++ front end takes: a few mechanical rewrites; none of them touches an address space.

Clang knows address spaces, vectors and swizzles; what it lacks in plain C++ is (1) `float4(a, b)` constructors,
(2) threadgroup arrays as automatic variables, (3) function constants and `host_name` instantiations, (4) member
functions overloaded on the address space of `this`, and array parameters in an address space. Everything else of a
kernel reaches the compiler as it was written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ATTRIBUTES = (
    "thread_position_in_grid",
    "threadgroup_position_in_grid",
    "thread_position_in_threadgroup",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "thread_index_in_threadgroup",
    "quadgroup_index_in_threadgroup",
    "thread_index_in_quadgroup",
    "dispatch_threads_per_threadgroup",
)
"""Thread attributes in the order of runtime.cpp's `msl_attribute`."""

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_VECTOR = re.compile(r"(?<![\w.>])((?:metal::)?(?:float|half|u?int|u?short|u?char|u?long)[234])\s*\((?!\s*\*)")
_VEC = re.compile(r"(?<![\w.])(?<!operator )(vec<\s*\w+\s*,\s*\d\s*>)\s*\(")
_THREADGROUP = re.compile(r"(?<=[;{}])(\s*)threadgroup\s+([^;(){}=*&]*?)\b(\w+)((?:\s*\[[^;]*?\])*)\s*;")
_FUNCTION_CONSTANT = re.compile(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\(\d+\)\s*\]\]\s*;")
_HOST_NAME = re.compile(
    r'template\s*\[\[host_name\("([^"]+)"\)\]\]\s*\[\[kernel\]\]\s*decltype\((.*?)\)\s*\2\s*;', re.S
)
_ARRAY_PARAMETER = re.compile(
    r"\b((?:const\s+)?(?:constant|device|threadgroup)\s+(?:const\s+)?\w+)\s+(\w+)\[\d*\](?=\s*[,)])"
)
_MEMBER = re.compile(r"\)\s*(?:const\s+)?(threadgroup|device|constant)\s*(?=[{:])")


@dataclass(frozen=True)
class Kernel:
    """One kernel function of a text: its name and, per parameter, a buffer index or `~attribute`."""

    name: str
    slots: tuple[int, ...]
    parameters: tuple[str, ...] = field(default=())


def strip_comments(text: str) -> str:
    return _COMMENT.sub(" ", text)


def flatten(path: Path, root: Path, seen: set[Path] | None = None) -> str:
    """`path` with its `mlx/...` includes pasted in, once each, as MLX does when it compiles at run time."""
    seen = set() if seen is None else seen
    if path in seen:
        return ""
    seen.add(path)
    out = []
    for line in path.read_text().splitlines():
        if match := re.match(r'\s*#include\s+"(.*)"', line):
            out.append(flatten(root / match[1], root, seen))
        elif not re.match(r"\s*#(include\s+<|pragma once)", line):
            out.append(line)
    return "\n".join(out) + "\n"


def rewrite(text: str, constants: dict[str, int | bool] | None = None) -> str:
    """All the rewrites. `constants` gives function constants their values (a missing one is 0)."""
    text = strip_comments(text)
    text = re.sub(r"^\s*#include.*$", "", text, flags=re.M)
    text = _drop_members(text)

    def value(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        return f"static constexpr {kind} {name} = {int((constants or {}).get(name, 0))};"

    text = _FUNCTION_CONSTANT.sub(value, text)
    text = re.sub(r",?\s*function_constant\(\w+\)", "", text)
    text = _HOST_NAME.sub("", text)
    text = _ARRAY_PARAMETER.sub(r"\1* \2", text)
    text = _THREADGROUP.sub(r'\1static threadgroup \2\3\4; msl_declare((const void*)&\3, sizeof(\3), "\3");', text)
    text = _VECTOR.sub(r"msl_make<\1>(", text)
    text = re.sub(r"\b(-?\d+\.\d*(?:e-?\d+)?)h\b", r"half(\1f)", text)
    return _VEC.sub(r"msl_make<\1>(", text)


def _drop_members(text: str) -> str:
    """Without member functions for `this` in threadgroup, device or constant memory: C++ has one overload of each."""
    while match := _MEMBER.search(text):
        start = _start_of_declaration(text, match.start())
        end = match.end()
        depth = 0
        while True:  # past initialisers and the body
            char = text[end]
            depth += (char == "{") - (char == "}")
            end += 1
            if char == "}" and depth == 0:
                break
        text = text[:start] + text[end:]
    return text


def _start_of_declaration(text: str, at: int) -> int:
    depth = 0
    while at > 0:
        char = text[at]
        depth += (char in ")>") - (char in "(<")
        if char in ";{}" and depth <= 0:
            return at + 1
        at -= 1
    return 0


def kernels(text: str) -> dict[str, Kernel]:
    """Every `[[kernel]] void name(...)` of a text."""
    text = strip_comments(text)
    found = {}
    for match in re.finditer(r"(?:\[\[\s*kernel\s*\]\]|\bkernel)\s+void\s+(\w+)\s*\(", text):
        parameters = _split(text, match.end())
        slots, next_buffer = [], 0
        for parameter in parameters:
            attribute = next((a for a in ATTRIBUTES if re.search(rf"\[\[\s*{a}\s*\]\]", parameter)), None)
            if attribute is not None:
                slots.append(~ATTRIBUTES.index(attribute))
                continue
            if index := re.search(r"buffer\((\d+)\)", parameter):
                next_buffer = int(index[1])
            slots.append(next_buffer)
            next_buffer += 1
        found[match[1]] = Kernel(match[1], tuple(slots), tuple(p.strip() for p in parameters))
    return found


def instantiation(text: str) -> str | None:
    """What MLX instantiates by host name, e.g. `kernel_x<float16_t, 3>`, or None for a kernel without template."""
    match = _HOST_NAME.search(text)
    return match[2] if match else None


def _split(text: str, at: int) -> list[str]:
    parts, depth, angle, start = [], 0, 0, at
    while True:
        char = text[at]
        if char in "([":
            depth += 1
        elif char in ")]":
            if depth == 0:
                break
            depth -= 1
        elif char in "<>":
            angle += 1 if char == "<" else -1
        elif char == "," and depth == 0 and angle == 0:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    return [*parts, text[start:at]]
