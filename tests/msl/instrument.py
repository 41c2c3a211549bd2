"""Counters and memory checks, put into LLVM IR as text, after the optimiser has run.

Counting after optimisation is what makes the numbers mean something: Apple's compiler is the same LLVM, so hoisted
address arithmetic, folded constants and removed loads are gone here too. Every basic block gets a counter,
and a static table says how many operations of each kind a block holds; every access to device, constant and threadgroup
memory calls the run time first, with its size, alignment and a number for the instruction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ARITHMETIC = ("fma", "fmul", "fadd", "fdiv", "fminmax", "convert", "logic", "int", "compare", "special")
KINDS = (*ARITHMETIC, "resize", "wide", "memory")
"""Kinds of operations. `wide` is 64-bit integer work, which is address arithmetic; `resize` is free on a GPU; `memory`
is loads and stores of device, constant and threadgroup memory, whatever their size."""

SPACES = {"1": "device", "2": "constant", "3": "threadgroup"}

_FLOAT = {"fmul": "fmul", "fadd": "fadd", "fsub": "fadd", "fneg": "fadd", "fdiv": "fdiv", "frem": "fdiv"}
_INT = {"add": "int", "sub": "int", "mul": "int", "udiv": "int", "sdiv": "int", "urem": "int", "srem": "int"}
_LOGIC = ("shl", "lshr", "ashr", "and", "or", "xor")
_CONVERT = ("sitofp", "uitofp", "fptosi", "fptoui", "fpext", "fptrunc")
_RESIZE = ("zext", "sext", "trunc")
_SIZES = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}

_ACCESS = re.compile(r"^\s*(?:%\S+ = )?(load|store) (?:volatile )?")
_OPCODE = re.compile(r"^\s*%\S+ = (?:(?:tail|notail|musttail) )?([a-z0-9]+) ")
_MEMCPY = re.compile(r"call void @llvm\.(memcpy|memmove|memset)\.")
_MATH = re.compile(
    r"@msl_(exp(2|10)?|log(2|10)?|r?sqrt|a?(sin|cos|tan)h?|(sin|cos|tan)pi|atan2|powr?|fmod|nextafter|divide|ldexp)\("
)
_LABEL = re.compile(r'^(?:[-\w.$]+|"[^"]*"):')


@dataclass
class Module:
    """Instrumented IR: its text, per basic block the operations of each kind, and arrays that stayed in memory."""

    text: str
    blocks: list[list[int]] = field(default_factory=list)
    allocas: list[str] = field(default_factory=list)


def instrument(ir: str) -> Module:
    """Textual IR of one kernel -> the same with counters and checks."""
    module = Module("")
    out: list[str] = []
    inside, fresh, site = False, False, 0
    for line in ir.splitlines():
        if line.startswith("define "):
            inside, fresh = True, True
            out.append(line)
            continue
        if not inside:
            out.append(line)
            continue
        if line == "}":
            inside = False
            out.append(line)
            continue
        if _LABEL.match(line):
            fresh = True
            out.append(line)
            continue
        if not line.strip() or line.lstrip().startswith((";", "#dbg")):
            continue
        if " = phi " in line:
            out.append(line)
            continue
        if fresh:
            n = len(module.blocks)
            module.blocks.append([0] * len(KINDS))
            out.append(f"  %msl.p{n} = getelementptr i64, ptr @msl_blocks, i64 {n}")
            out.append(f"  %msl.a{n} = load i64, ptr %msl.p{n}, align 8")
            out.append(f"  %msl.b{n} = add i64 %msl.a{n}, 1")
            out.append(f"  store i64 %msl.b{n}, ptr %msl.p{n}, align 8")
            fresh = False
        if (counted := operation(line)) is not None:
            kind, n = counted
            module.blocks[-1][KINDS.index(kind)] += n
        if " = alloca " in line:
            module.allocas.append(line.strip())
        if access := _ACCESS.match(line):
            call = _check(line[access.end() :], access[1], site)
            if call:
                module.blocks[-1][KINDS.index("memory")] += 1
                out.append(call)
                site += 1
        elif _MEMCPY.search(line):
            for call in _check_memcpy(line, site):
                out.append(call)
                site += 1
        elif "atomicrmw" in line or "cmpxchg" in line:
            raise NotImplementedError(f"atomic operations are not modelled: {line.strip()}")
        out.append(line)
    out.append(f"@msl_blocks = global [{max(1, len(module.blocks))} x i64] zeroinitializer, align 8")
    for space, name in SPACES.items():
        for verb in ("read", "write") if name != "constant" else ("read",):
            out.append(f"declare void @msl_{verb}_{name}(ptr addrspace({space}), i32, i32, i32)")
    module.text = "\n".join(out) + "\n"
    return module


def operation(line: str) -> tuple[str, int] | None:
    """The kind of arithmetic of one IR line and how many scalar operations it is, or None."""
    match = _OPCODE.match(line)
    if not match:
        return None
    op = match[1]
    rest = line[match.end() :]
    vector = re.search(r"<(\d+) x ", rest)
    n = int(vector[1]) if vector else 1
    if op == "call":
        if re.search(r"@llvm\.(fmuladd|fma)\.", rest):
            return "fma", n
        if re.search(r"@llvm\.(maxnum|minnum|maximum|minimum)\w*\.", rest):
            return "fminmax", n
        if re.search(r"@llvm\.fabs\.", rest):
            return None  # a source modifier
        if re.search(r"@llvm\.(smax|smin|umax|umin|abs)\.", rest):
            return ("wide" if " i64 " in rest else "int"), n
        if re.search(r"@llvm\.(fshl|fshr|ctpop|ctlz|cttz|bswap)\.", rest):
            return "logic", n
        if _MATH.search(rest) or re.search(r"@llvm\.(rint|round\w*|floor|ceil|trunc|sqrt)\.", rest):
            return "special", n
        return None
    if op in _FLOAT:
        return _FLOAT[op], n
    if op in _CONVERT:
        return "convert", n
    if op in _RESIZE:
        return "resize", n
    if op in ("icmp", "fcmp", "select"):
        return "compare", n
    if op in _INT or op in _LOGIC:
        if re.search(r"\bi64\b", rest):
            return "wide", n
        return ("logic" if op in _LOGIC else "int"), n
    return None


def _check(rest: str, verb: str, site: int) -> str | None:
    """The run-time call for `TYPE, ptr addrspace(N) P, align A` of a load or `TYPE V, ptr ...` of a store."""
    space = re.search(r", ptr addrspace\((\d)\) ", rest)
    if not space or space[1] not in SPACES:
        return None
    kind, _ = _type(rest)
    pointer = _operand(rest[space.end() :])
    align = re.search(r", align (\d+)", rest)
    name = "read" if verb == "load" else "write"
    return (
        f"  call void @msl_{name}_{SPACES[space[1]]}(ptr addrspace({space[1]}) {pointer}, i32 {_bytes(kind)}, "
        f"i32 {align[1] if align else 1}, i32 {site})"
    )


def _check_memcpy(line: str, site: int) -> list[str]:
    calls = []
    size = re.search(r", i64 (\d+), i1", line)
    pointers = list(re.finditer(r"ptr(?: addrspace\((\d)\))? ((?:\w+(?:\(\d+\))? )*)(?=[%@g])", line))
    for i, match in enumerate(pointers):
        if match[1] in SPACES:
            if size is None:
                raise NotImplementedError(f"a copy of unknown length: {line.strip()}")
            verb = "write" if i == 0 else "read"
            pointer = _operand(line[match.end() :])
            space = f"ptr addrspace({match[1]}) {pointer}"
            calls.append(f"  call void @msl_{verb}_{SPACES[match[1]]}({space}, i32 {size[1]}, i32 1, i32 {site + i})")
    return calls


def _operand(text: str) -> str:
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{<") - (char in ")]}>")
        if (char == "," and depth == 0) or depth < 0:
            return text[:i]
    return text


def _type(text: str) -> tuple[str, str]:
    text = text.strip()
    if text[0] == "<":
        end = text.index(">") + 1
        return text[:end], text[end:]
    match = re.match(r"[\w]+", text)
    if match is None:
        raise NotImplementedError(f"IR type not understood: {text}")
    return match[0], text[match.end() :]


def _bytes(kind: str) -> int:
    if vector := re.match(r"<(\d+) x (\w+)>", kind):
        return int(vector[1]) * _bytes(vector[2])
    if kind in _SIZES:
        return _SIZES[kind]
    return max(1, int(kind[1:]) // 8)
