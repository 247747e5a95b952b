"""What mkdocs.yml calls while it builds the site: the pages from all over the repository, and the API's.

Documents are written for GitHub and for a checkout. The site has them under the same paths, so that links between them
work as they are; what is different in a site is changed here.
"""

import ast
import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "docs/*.md", "benchmarks/README.md", "benchmarks/results/*.md", "benchmarks/results/*.png")
# Modules that users import from, beside what the packages export.
MODULES = ("hf_megatron.errors", "hf_megatron.paper.recipe")
# What is defined under another name, and what models have in common, which is told once.
DEFINED_AS = {"hf_megatron.MegatronBertConfig": "hf_megatron.models.bert.configuration_bert.ParallelBertConfig"}
MODEL_BASE = "hf_megatron.models.pretrained.MegatronModelMixin"

_MARK = re.compile(r"^ *<!-- (?:run|not run: .*|python -m .*|end|file: (?P<name>\S+)) -->\n(?P<fence> *```\w+)?", re.M)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^]]*)\]\((?!\w+:|#)(?P<path>[^)#\s]+)[^)]*\)")
_NAMED = re.compile(r"`((?:docs/\w+|benchmarks/README|ARCHITECTURE|CONTRIBUTING)\.md)`(?!\])")


def exported() -> dict[str, list[str]]:
    """The names of each package's ``__all__`` by package, each name once: with the first package that has it."""
    found: dict[str, list[str]] = {}
    for root in (ROOT, ROOT / "conversion"):
        for file in sorted(root.glob("hf_megatron*/**/__init__.py"), key=lambda file: (len(file.parts), file)):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    seen = {name for names in found.values() for name in names}
                    names = [name for name in ast.literal_eval(node.value) if name not in {*seen, "__version__"}]
                    if names:
                        found[".".join(file.parent.relative_to(root).parts)] = names
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the API's pages in the navigation."""
    (reference,) = (entry["API reference"] for entry in config.nav or [] if "API reference" in entry)
    reference += [{name: f"api/{name}.md"} for name in sorted([*exported(), *MODULES])]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents, under their paths in the repository, and the API's pages."""
    for path in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for package, names in {**exported(), **{module: [] for module in MODULES}}.items():
        files.append(File.generated(config, f"api/{package}.md", content=reference(package, names)))
    return files


def reference(package: str, names: list[str]) -> str:
    """The page of a package: its docstring, and what it exports; of a module, all that it defines."""

    def entry(name: str, **options: object) -> str:
        return f"::: {name}\n    options: {json.dumps(options)}\n\n"

    hidden = {"show_root_heading": False, "show_root_toc_entry": False}
    text = f"# {package}\n\n" + entry(package, **hidden, **({"members": False} if names else {}))
    for name in names:
        is_model = package == "hf_megatron" and re.match("Megatron(GPT2|Bert)(?!Config)", name)
        options: dict[str, object] = {"heading": name, "toc_label": name}
        if is_model:
            options["inherited_members"] = ["forward"]
        if name.endswith("Config"):  # its base class, which is not installed here, makes fields into arguments
            options["docstring_options"] = {"warnings": False}
        text += entry(DEFINED_AS.get(f"{package}.{name}", f"{package}.{name}"), **options)
    return text + (entry(MODEL_BASE) if package == "hf_megatron" else "")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change what is different in a site: links to what has no page, marks of the tests, and indentation in lists."""
    here = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        """A link to a file that is in the repository and not in the site becomes its text; others stay."""
        path = posixpath.normpath(posixpath.join(here, match["path"]))
        return match["text"] if path not in files.src_uris and (ROOT / path).exists() else match[0]

    def mark(match: re.Match[str]) -> str:
        """Tests read these comments; of a block that is a file, the reader sees the name."""
        title = f' title="{match["name"]}"' if match["name"] else ""
        return (match["fence"] or "") + (title if match["fence"] else "")

    if page.file.src_uri.startswith("api/"):
        return markdown
    markdown = _MARK.sub(mark, _LINK.sub(link, markdown))
    markdown = _NAMED.sub(lambda match: f"[{match[0]}]({posixpath.relpath(match[1], here or '.')})", markdown)
    return indented(markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name what they refer to as Sphinx has it, ``:class:`Name` ``: the name is enough."""
    return re.sub(r":(?:attr|class|func|meth|mod):(?=<code>)", "", html)


def indented(markdown: str) -> str:
    """What belongs to an item of a list, indented by four columns, as Python-Markdown needs it and GitHub does not.

    An item after one of several paragraphs gets an empty line before it, for the same reason.
    """
    lines: list[str] = []
    is_in_item = has_paragraphs = False
    for line in markdown.split("\n"):
        if re.match(r"- |\d\. ", line):
            lines += [""] if has_paragraphs else []
            is_in_item, has_paragraphs = True, False
        elif line and not line.startswith("  "):
            is_in_item = has_paragraphs = False
        elif is_in_item:
            has_paragraphs |= not line
            line = re.sub(r"^ {2,3}(?=\S)|^ {2}", " " * 4, line)
        lines.append(line)
    return "\n".join(lines)
