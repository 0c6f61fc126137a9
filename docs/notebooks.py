"""The notebooks of docs/notebooks: run as plain Python, and shown in the site, of which this is a hook.

    python docs/notebooks.py NAME [VARIABLE=VALUE ...]

runs one, its first cell's variables changed as told, and writes what it printed and drew into it.
"""

import ast
import base64
import io
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "notebooks"


def run(path: Path, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run a notebook's cells in one name space, those of `given` set after its first; its cells with their outputs.

    A cell's last line, where it is an expression, is shown: a figure as a picture, anything else as text.
    """
    cells, space, first = json.loads(path.read_text())["cells"], dict[str, Any](), True
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        tree, told = ast.parse("".join(cell["source"])), io.StringIO()
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with redirect_stdout(told):
            exec(compile(tree, path.name, "exec"), space)
            shown = eval(compile(ast.Expression(last.value), path.name, "eval"), space) if last else None
        if first:
            space |= given
            first = False
        text = told.getvalue()
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
        if hasattr(shown, "savefig"):
            file = io.BytesIO()
            shown.savefig(file, format="png", dpi=100)
            data = {"image/png": base64.b64encode(file.getvalue()).decode()}
            cell["outputs"].append({"output_type": "display_data", "data": data, "metadata": {}})
        elif shown is not None:
            cell["outputs"].append({"output_type": "display_data", "data": {"text/plain": repr(shown)}, "metadata": {}})
    return cells


def as_markdown(path: Path) -> str:
    """A notebook as a page."""
    parts = [f"[This page as a notebook]({path.name})"]
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{data['image/png']})")
            else:
                parts.append(f"```text\n{output.get('text') or data['text/plain']}\n```".replace("\n\n```", "\n```"))
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Give the site a page of each notebook."""
    from mkdocs.structure.files import File

    for path in sorted(HERE.glob("*.ipynb")):
        files.append(File.generated(config, f"docs/notebooks/{path.stem}.md", content=as_markdown(path)))
    return files


def main(name: str, *words: str) -> None:
    """Run one, and keep its outputs."""
    path = HERE / f"{name}.ipynb"
    given = {key: ast.literal_eval(value) for key, _, value in (word.partition("=") for word in words)}
    notebook = json.loads(path.read_text()) | {"cells": run(path, given)}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
