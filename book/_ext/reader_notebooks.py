"""The notebooks behind the download button: they read well in any Jupyter, without MyST.

After the pages are built, each chapter is rewritten in plain Markdown: boxes become block quotes,
solutions fold, and every number, reference and citation is the text that Sphinx shows on the page
(asked from Sphinx, never counted again here). Whatever this file does not know is an error, so that
no raw markup reaches a reader.
"""

import copy
import re
from pathlib import Path

import nbformat
from docutils.frontend import get_default_settings
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.errors import ExtensionError
from sphinx.util.docutils import sphinx_domains

THEOREMS = ("theorem", "lemma", "proposition", "corollary", "definition", "example", "remark")
NOTES = ("attention", "caution", "danger", "hint", "important", "note", "seealso", "tip", "warning")
PLAIN = ("grid", "grid-item", "grid-item-card", "card", "tab-set", "tab-item", "div")

OPENING = re.compile(r"^(?P<indent>\s*)(?P<colons>:{3,})\{(?P<name>[\w:-]+)\}\s*(?P<title>.*?)\s*$")
OPTION = re.compile(r"^\s*:(?P<key>[\w-]+):\s*(?P<value>.*?)\s*$")
CODE_FENCE = re.compile(r"^\s*(```+|~~~+)")
TARGET = re.compile(r"^\([\w:.-]+\)=\s*$")
DISPLAY = re.compile(r"\$\$(?P<tex>.+?)\$\$(?:[ \t]*\((?P<label>[^)\s]+)\))?", re.DOTALL)
# A role, a link inside the book, or (kept as it is) a code span.
INLINE = re.compile(
    r"(?P<role>\{[a-zA-Z:_-]+\}`[^`]+`)"
    r"|(?P<link>\[[^\]]*\]\((?:#[^)\s]+|[\w./-]+\.(?:md|ipynb)(?:#[^)\s]*)?)\))"
    r"|(?P<code>(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`))",
    re.DOTALL,
)

FOLD, UNFOLD = ["<details>", "<summary>Solution</summary>", ""], ["", "</details>"]


class Numbers:
    """What Sphinx calls things: the text of a reference, the number of a box or figure."""

    def __init__(self, app, docname):
        self.app, self.env, self.docname = app, app.env, docname
        self.settings = get_default_settings(MystParser)
        self.settings.env = app.env

    def text_of(self, markup):
        """The text that the page shows for inline `markup`, like "Theorem 4.2"."""
        document = new_document(self.env.doc2path(self.docname), self.settings)
        self.env.prepare_settings(self.docname)
        with sphinx_domains(self.env):
            MystParser().parse(markup, document)
        # Resolving copies what parsing left here, and with it the whole environment.
        self.env.current_document.clear()
        self.env.resolve_references(document, self.docname, self.app.builder)
        return document.astext().strip()

    def _number(self, kind, label):
        try:
            parts = self.env.toc_fignumbers[self.docname][kind][label]
        except KeyError:
            raise ExtensionError(
                f"{self.docname}: Sphinx has no number for {kind} {label!r}"
            ) from None
        return ".".join(map(str, parts))

    def theorem(self, label):
        return self._number(self.env.proof_list[label]["countertype"], label)

    def exercise(self, label):
        return self._number("exercise", label)

    def equation(self, label):
        return self._number("displaymath", f"equation-{label}")

    def figure(self, name):
        return self._number("figure", name)


def join_title(head, title):
    return f"**{head} ({title}).**" if title else f"**{head}.**"


class Chapter:
    """Rewrites one chapter's cells."""

    def __init__(self, numbers):
        self.numbers = numbers
        self.in_solution = False

    def notebook(self, notebook):
        """A copy of `notebook` in plain Markdown."""
        result = copy.deepcopy(notebook)
        result.cells = []
        for cell in copy.deepcopy(notebook.cells):
            if cell.cell_type == "markdown":
                cell.source = self.markdown(cell.source)
                if cell.source:
                    result.cells.append(cell)
            else:
                result.cells += self.code_cell(cell)
        for count, cell in enumerate(result.cells, 1):
            cell.id = f"cell-{count}"
        return result

    def code_cell(self, cell):
        """The cell, folded where the page folds it, and its figure's caption."""
        folded = set(cell.metadata.get("tags", []))
        options = cell.metadata.pop("mystnb", {})
        if self.in_solution:
            cell.metadata["jupyter"] = {"source_hidden": True, "outputs_hidden": True}
        elif folded & {"hide-input", "hide-cell", "remove-input"}:
            cell.metadata["jupyter"] = {"source_hidden": True}
        figure = options.get("figure", {})
        if "name" not in figure:
            return [cell]
        caption = self.inline(figure.get("caption", ""))
        text = f"*Figure {self.numbers.figure(figure['name'])}.* {caption}".strip()
        return [cell, nbformat.v4.new_markdown_cell(text)]

    def markdown(self, source):
        """One cell's text. A solution that goes on over several cells folds cell by cell."""
        lines = FOLD if self.in_solution else []
        lines = [*lines, *self.blocks(source.splitlines())]
        lines += UNFOLD if self.in_solution else []
        return "\n".join(lines).replace("\n".join([*FOLD, *UNFOLD]), "").strip("\n")

    def blocks(self, lines):
        """Lines of MyST to lines of Markdown."""
        result, plain = [], []

        def flush():
            result.extend(self.inline("\n".join(plain)).split("\n") if plain else [])
            plain.clear()

        i = 0
        while i < len(lines):
            line = lines[i]
            if fence := CODE_FENCE.match(line):
                end = i + 1
                while end < len(lines) and not lines[end].strip().startswith(fence[1]):
                    end += 1
                flush()
                result += lines[i : end + 1]
                i = end + 1
            elif opening := OPENING.match(line):
                end, depth = i + 1, len(opening["colons"])
                closing = re.compile(rf"^\s*:{{{depth},}}\s*$")
                while end < len(lines) and not closing.match(lines[end]):
                    end += 1
                if end == len(lines):
                    raise ExtensionError(f"{self.numbers.docname}: box not closed: {line}")
                flush()
                result += self.box(opening, lines[i + 1 : end])
                i = end + 1
            else:
                if not TARGET.match(line):
                    plain.append(line)
                i += 1
        flush()
        return result

    def box(self, opening, lines):
        """The lines of a directive."""
        name, title = opening["name"], self.inline(opening["title"])
        options = {}
        while lines and (option := OPTION.match(lines[0])):
            options[option["key"]] = option["value"]
            lines = lines[1:]
        kind = name.removeprefix("prf:")
        label = options.get("label", "")
        if kind in ("solution-start", "solution-end"):
            self.in_solution = kind == "solution-start"
            return FOLD if self.in_solution else UNFOLD
        if kind == "bibliography":
            return []
        body = self.blocks(lines)
        if kind == "proof":
            return ["**Proof.**", "", *body]
        if kind in ("solution", "dropdown") or "dropdown" in options.get("class", ""):
            if kind == "solution":
                return [*FOLD, *body, *UNFOLD]
            return ["<details>", f"<summary>{title}</summary>", "", *body, *UNFOLD]
        if kind in PLAIN:
            return [*([f"**{title}**", ""] if title and kind not in ("grid", "div") else []), *body]
        if kind in THEOREMS and "nonumber" in options:
            head = join_title(kind.title(), title)
        elif kind in THEOREMS:
            head = join_title(f"{kind.title()} {self.numbers.theorem(label)}", title)
        elif kind == "exercise":
            head = join_title(f"Exercise {self.numbers.exercise(label)}", title)
        elif kind in (*NOTES, "admonition"):
            head = f"**{title or kind.title()}**"
        else:
            raise ExtensionError(
                f"{self.numbers.docname}: the reader notebook does not know the box {{{name}}}; "
                f"teach {Path(__file__).name} or use another"
            )
        return self.quote([head, "", *body])

    def quote(self, lines):
        """A block quote. Formulas on one line: Jupyter would take a `>` between two into them."""
        text = DISPLAY.sub(lambda m: "$$" + " ".join(m["tex"].split()) + "$$", "\n".join(lines))
        return [f"> {line}".rstrip() for line in text.strip("\n").split("\n")]

    def inline(self, text):
        """References to text, labels to \\tag{}."""

        def reference(match):
            if match["code"]:
                return match["code"]
            return self.numbers.text_of(match["role"] or match["link"])

        def display(match):
            if not match["label"]:
                return match[0]
            tag = self.numbers.equation(match["label"])
            return f"$${match['tex'].rstrip()}\n\\tag{{{tag}}}\n$$"

        return DISPLAY.sub(display, INLINE.sub(reference, text))


def write(app, exception):
    """Replace the copies of the chapters in _sources, from which the download button serves."""
    if exception is not None or app.builder.name != "html":
        return
    for docname in sorted(app.env.found_docs):
        executed = Path(app.outdir).parent / "jupyter_execute" / f"{docname}.ipynb"
        if Path(app.env.doc2path(docname)).suffix == ".ipynb":
            notebook = nbformat.read(executed, as_version=4)
            served = Path(app.outdir) / "_sources" / f"{docname}.ipynb"
            nbformat.write(Chapter(Numbers(app, docname)).notebook(notebook), served)


def setup(app):
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
