"""Pages of the documentation as programs: their blocks run in order, and what they print held against what they show."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fisher_ray.cli import COMPLETE, main

_NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
# What a page may leave out: a clock, a speed, rounding.
_ANYTHING = "..."
# Relative difference of a number that is shown with a point: of other machines a sampled token in ten million is another.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the output shown after it."""

    language: str
    code: str
    line: int
    shown: str | None


def blocks(page: str) -> list[Block]:
    """Blocks that are run, in their order; a block of text shows what the one before it prints."""
    found: list[Block] = []
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        language, code = match.groups()
        if language == "text":
            assert found, "the page shows an output before anything is run"
            assert found[-1].shown is None, f"two outputs of the block in line {found[-1].line}"
            found[-1] = Block(found[-1].language, found[-1].code, found[-1].line, code)
        else:
            found.append(Block(language, code, page[: match.start()].count("\n") + 2, None))
    return found


@dataclass
class Session:
    """Where blocks of a page are run: one namespace, the current directory, the command line in this process."""

    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})

    def run(self, block: Block, page: Path) -> str:
        """What a block prints."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if block.language == "python":
                code = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's own line
                exec(compile(code, str(page), "exec"), self.namespace)
            elif block.language == "sh":
                for command in block.code.replace("\\\n", " ").strip().splitlines():
                    program, *arguments = shlex.split(command)
                    assert program == ".venv/bin/fisher-ray", f"{page.name}:{block.line}: cannot run {program}"
                    assert main(arguments) == COMPLETE, (
                        f"{page.name}:{block.line}: {command} failed: {printed.getvalue()}"
                    )
            else:
                raise AssertionError(f"{page.name}:{block.line}: blocks are of python, sh or text")
        return printed.getvalue()


def difference(shown: str, printed: str) -> str | None:
    """How an output differs from the one shown, if it does.

    White space does not count and ``...`` stands for anything. Whole numbers are the same; others agree within 1 %, or by one
    in the last digit shown.
    """
    shown, printed = (" ".join(text.split()) for text in (shown, printed))
    pattern, numbers = "", list[str]()
    for part in re.split(rf"({re.escape(_ANYTHING)}|(?<![\w.]){_NUMBER}(?!\w))", shown):
        if part == _ANYTHING:
            pattern += ".*?"
        elif re.fullmatch(_NUMBER, part):
            pattern += f"({_NUMBER})"
            numbers.append(part)
        else:
            pattern += re.escape(part)
    match = re.fullmatch(pattern, printed)
    if match is None:
        return f"shown:   {shown}\nprinted: {printed}"
    wrong = [f"{a} is {b}" for a, b in zip(numbers, match.groups(), strict=True) if not _agree(a, b)]
    return ", ".join(wrong) + f"\nprinted: {printed}" if wrong else None


def _agree(shown: str, printed: str) -> bool:
    if not re.search(r"[.e]", shown):
        return shown == printed
    mantissa, _, exponent = shown.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    a, b = (float(number.replace(",", "")) for number in (shown, printed))
    return abs(a - b) <= max(1.001 * unit, _TOLERANCE * abs(a))


def ran(page: Path, session: Session, languages: Sequence[str]) -> list[tuple[Block, str]]:
    """Blocks of these languages, in order, with what they print."""
    chosen = [block for block in blocks(page.read_text(encoding="utf-8")) if block.language in languages]
    return [(block, session.run(block, page)) for block in chosen]
