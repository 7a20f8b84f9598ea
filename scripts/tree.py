"""Writes the file tree of README.md: every module with the first sentence of its docstring.

python3 scripts/tree.py            # after files came, went, or changed what they own
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("polytrace", "scheduling", "engine", "cluster", "api", "bench")
BEGIN, END = "<!-- the files: written by scripts/tree.py -->\n", "<!-- end of the files -->\n"
_MARKED = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)


def main() -> None:
    """Rewrites the marked part of README.md."""
    path = ROOT / "README.md"
    block = BEGIN + "```\n" + "".join(f"{line}\n" for line in lines()) + "```\n" + END
    path.write_text(_MARKED.sub(lambda found: block, path.read_text()))


def lines() -> Iterator[str]:
    """The tree, room by room."""
    for room in ROOMS:
        yield f"{room + '/':<24}{sentence(ROOT / room / '__init__.py')}"
        yield from below(ROOT / room, "  ")
    yield f"{'deploy/':<24}files to copy: one for each way to run a service on other people's machines"
    yield f"{'examples/':<24}four short programs to begin with, here or on a service"
    yield f"{'tests/':<24}mirrors the rooms"
    yield f"{'scripts/':<24}makes the environment that every command runs in; writes this tree"


def below(folder: Path, indent: str) -> Iterator[str]:
    """A folder's own modules, then its folders; one that is no package has no sentence."""
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield f"{indent + path.name:<23} {sentence(path)}"
    for inner in sorted({path.parent for path in folder.glob("*/*.py")}):
        package = inner / "__init__.py"
        yield f"{indent + inner.name + '/':<24}{sentence(package) if package.is_file() else ''}".rstrip()
        yield from below(inner, indent + "  ")


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    docstring = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[^.])\. |\.$|:$", docstring, maxsplit=1)[0]


if __name__ == "__main__":
    main()
