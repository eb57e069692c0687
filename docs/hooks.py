"""What mkdocs adds to docs/ for the site: README and other pages at the top of the clone, the examples, and pages of
reference, one for a group of modules, from their docstrings.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
STEMS = "conv_relu", "lrn", "max_pool", "conv_stage", "epilogue", "lpips_layer"
STEMS += "linear_relu", "linear_relu_dropout", "linear_int8"
REFERENCE = {
    "Operators": [f"ops.{stem}" for stem in (*STEMS, "augment")] + ["geometry"],
    "Models": [f"models.{name}" for name in ("alexnet", "variants", "weights", "lpips", "features")] + ["explain"],
    "Fusion": [f"nn.{name}" for name in ("fusion", "fused", "packed", "int8", "norm", "grouped")],
    "Training": ["graphs", "optim: SGD", "train.config", "data.transforms: Transform", "data.prepare: prepare"],
    "Backends": ["backends: backend, BackendError, report, Status, forget", "tuning: measured, pinned, forget"],
}
LINK = re.compile(r"(\]\()([^)#:]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {page: (ROOT / source).read_text() for source, page in PAGES.items()}
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text()
        head = ast.get_docstring(ast.parse(source)).partition("\n")[0]
        made[f"examples/{path.stem}.md"] = f"# {path.stem.replace('_', ' ')}\n\n{head}\n\n```python\n{source}```\n"
    for title, modules in REFERENCE.items():
        made[f"api/{title.lower()}.md"] = f"# {title}\n\n" + "".join(map(reference, modules))
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def reference(entry: str) -> str:
    """A module's place in the reference, with the members that ``entry`` names behind a colon, or else what its package
    offers of it, or all that is public where that is nothing."""
    module, _, named = entry.partition(": ")
    file = ROOT.joinpath("alexnet_fast", *module.split(".")).with_suffix(".py")
    packages = file.parent, ROOT / "alexnet_fast" / "ops"  # which offers what geometry.py defines
    offered = {name for package in packages for name in assigned(package / "__init__.py", "__all__")}
    own = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    members = named.split(", ") if named else [name for name in own if name in offered]
    options = f"    options:\n      members: {members}\n" if members else ""
    return f"::: alexnet_fast.{module}\n{options}\n"


def assigned(file: Path, name: str) -> list[str]:
    """The literal that a module assigns to ``name``."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    return []


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the clone lead to their pages; where a file has none, its name stays without a link."""
    own = page.file.src_uri
    source = next((name for name, made in PAGES.items() if made == own), f"docs/{own}")

    def led(match: re.Match[str]) -> str:
        named = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = "examples/fuse_your_net.md" if named == "examples" else PAGES.get(named, named.removeprefix("docs/"))
        if files.get_file_from_path(target) is None and (ROOT / named).exists():
            return f"](clone:{match[2]})"
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(own) or '.')}{match[3] or ''})"

    return re.sub(r"\[([^\]]*)\]\(clone:[^)]*\)", r"`\1`", LINK.sub(led, markdown))


def on_page_content(html: str, page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name things as Sphinx does, and begin a block of code by two colons."""
    html = re.sub(
        r":(?:class|mod|func|meth|data|attr):<code>~?([\w.]+)</code>",
        r'<autoref optional identifier="\1"><code>\1</code></autoref>',
        html,
    )
    return re.sub(r"::</p>\s*<div", ":</p><div", html)
