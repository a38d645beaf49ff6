"""What every chapter must be, rule by rule. A rule yields complaints; a good chapter gets none."""

import ast
import copy
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))

_spec = importlib.util.spec_from_file_location("run_chapters", ROOT / "book" / "run_chapters.py")
run_chapters = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_chapters)

MAX_COLUMNS = 76  # beyond it the page shows a scroll bar
TAGS = {"hide-input", "hide-output", "hide-cell", "raises-exception"}
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:home|tmp|root|Users|work|mnt|opt|usr|var)/|site-packages"
    r"|\b[A-Z]:\\+(?:Users|Windows|Program|Temp)"
)
BOX = re.compile(r"^:{3,}\{(?P<name>[\w:-]+)\}[ \t]*(?P<title>.*)\n(?P<options>(?::.*\n)*)", re.M)
THEOREMS = ("prf:theorem", "prf:lemma", "prf:proposition", "prf:corollary")


def number_of(path):
    """A chapter's number, 11 for 11_convolutions.ipynb: two digits at the start of its name."""
    return int(re.match(r"(\d\d)_", path.name)[1])


def cells_of(notebook, kind):
    """(position, cell) of the cells of a kind, positions counted from 1 in the notebook."""
    return [(i, c) for i, c in enumerate(notebook.cells, 1) if c.cell_type == kind]


def text_of(notebook):
    return "\n\n".join(cell.source for _, cell in cells_of(notebook, "markdown"))


def boxes(source):
    """(name, title, options) of each directive in a cell's text."""
    for box in BOX.finditer(source + "\n"):
        options = dict(re.findall(r"^:([\w-]+):[ \t]*(.*)$", box["options"], re.M))
        yield box["name"], box["title"].strip(), options


def tags_of(cell):
    return set(cell.metadata.get("tags", []))


def printed(cell):
    """What the cell wrote on standard output."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def calls(source):
    """Names of the functions a cell calls outside of its own definitions."""
    pending = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Call):
            yield getattr(node.func, "id", None) or getattr(node.func, "attr", None)
        pending.extend(ast.iter_child_nodes(node))


# Outputs ----------------------------------------------------------------------------------------


def executed_from_top_to_bottom(notebook):
    counts = [cell.execution_count for _, cell in cells_of(notebook, "code")]
    if not counts or counts != list(range(1, len(counts) + 1)):
        yield f"execution counts {counts}, not 1, 2, 3, ..."


def outputs_are_stored(notebook):
    for i, cell in cells_of(notebook, "code"):
        speaks = {"print", "check", "show", "display"} & set(calls(cell.source))
        last = (ast.parse(cell.source).body or [None])[-1]
        value = last.value if isinstance(last, ast.Expr) else None
        shows = value is not None and not isinstance(value, ast.Call | ast.Constant)
        if (speaks or shows) and not cell.outputs:
            yield f"cell {i} has no stored output"


def nothing_on_standard_error(notebook):
    for i, cell in cells_of(notebook, "code"):
        if any(o.output_type == "stream" and o.name == "stderr" for o in cell.outputs):
            yield f"cell {i} stores standard error: a warning the reader cannot use"


def no_machine_path(notebook):
    for i, cell in enumerate(notebook.cells, 1):
        # A long string of base64 would match anything sooner or later.
        outputs = re.sub(r"'image/png': '[^']*'", "", str(cell.get("outputs", "")))
        if found := MACHINE_PATH.search(cell.source + outputs):
            yield f"cell {i} names a place on one machine: {found[0]}"


def errors_only_on_purpose(notebook):
    for i, cell in cells_of(notebook, "code"):
        failed = any(output.output_type == "error" for output in cell.outputs)
        if failed != ("raises-exception" in tags_of(cell)):
            yield f"cell {i}: an error and the tag raises-exception go together"


def figures_are_described(notebook):
    for i, cell in cells_of(notebook, "code"):
        pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        options = cell.metadata.get("mystnb", {})
        described = [options.get("figure", {}).get(key) for key in ("caption", "name")]
        described.append(options.get("image", {}).get("alt"))
        if pictures > 1:
            yield f"cell {i} draws {pictures} figures: one each, for a number and a caption each"
        if pictures and not all(described):
            yield f"cell {i}: a figure needs mystnb figure.caption, figure.name and image.alt"
        if any(described) and not pictures:
            yield f"cell {i} has a caption and no figure"


# Code -------------------------------------------------------------------------------------------


def no_way_round_the_checks(notebook):
    for i, cell in enumerate(notebook.cells, 1):
        if extra := tags_of(cell) - TAGS:
            yield f"cell {i}: tags {sorted(extra)} are not among {sorted(TAGS)}"
        if cell.cell_type == "code" and "NBVAL" in cell.source:
            yield f"cell {i}: an NBVAL comment hides what the cell does"


def code_fits_the_page(notebook):
    for i, cell in cells_of(notebook, "code"):
        lines = cell.source.splitlines()
        if longest := max((len(line) for line in lines if len(line) > MAX_COLUMNS), default=0):
            yield f"cell {i}: a line of {longest} > {MAX_COLUMNS} columns"
        if lines and lines[-1].rstrip().endswith(";"):
            yield f"cell {i} ends with ';', which does not silence a cell outside of Jupyter"


def theorems_are_checked(notebook):
    for i, cell in cells_of(notebook, "markdown"):
        for name, title, options in boxes(cell.source):
            if name not in THEOREMS:
                continue
            label = options.get("label")
            if not label:
                yield f"cell {i}: {name} {title!r} has no label"
                continue
            passed = (
                f'check("{label}"' in later.source
                and re.search(rf"^✓ {re.escape(label)}(?!\S)", printed(later), re.M)
                for later in notebook.cells[i:]
                if later.cell_type == "code" and "raises-exception" not in tags_of(later)
            )
            if not any(passed):
                yield f'cell {i}: no later cell runs check("{label}", ...)'


# Text -------------------------------------------------------------------------------------------


def opens_with_aims(notebook):
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not re.match(r"(?:\(.*\)=\n+)?# \S", first.source):
        yield "the first cell is not a title"
    for line in (r"\*You will be able to\*: \S", r"\*Before\*: \S", r"\*Runs in\*: .*\d+ s\b"):
        if not re.search(f"^{line}", first.source, re.M):
            yield f"the first cell has no line {line}"


def has_a_mistake_to_learn_from(notebook):
    if not any(name == "caution" for name, _, _ in boxes(text_of(notebook))):
        yield "no {caution} box"
    if not any("raises-exception" in tags_of(cell) for cell in notebook.cells):
        yield "no cell that fails on purpose (raises-exception)"


def has_exercises_with_solutions(notebook):
    found = list(boxes(text_of(notebook)))
    exercises = [options.get("label") for name, _, options in found if name == "exercise"]
    solutions = [title for name, title, _ in found if name in ("solution", "solution-start")]
    if not 3 <= len(exercises) <= 6:
        yield f"{len(exercises)} exercises, not 3 to 6"
    if None in exercises:
        yield "an exercise has no label"
    if sorted(map(str, exercises)) != sorted(solutions):
        yield f"exercises {exercises} and solutions to {solutions} do not match"
    for name, title, options in found:
        if name.startswith("solution") and name != "solution-end":
            if "dropdown" not in options.get("class", ""):
                yield f"the solution to {title} is not folded (:class: dropdown)"


def closes_with_summary_and_outlook(notebook):
    for heading in ("## Cheat sheet", "## The next obstacle"):
        count = len(re.findall(rf"^{heading}\s*$", text_of(notebook), re.M))
        if count != 1:
            yield f"{count} sections {heading!r}, not 1"


def shows_the_map(notebook):
    drawn = (set(calls(cell.source)) for _, cell in cells_of(notebook, "code"))
    if not any("method_map" in names for names in drawn):
        yield "the map of the methods (method_map) is not shown"


def boxes_survive_jupyter(notebook):
    for i, cell in cells_of(notebook, "markdown"):
        if re.search(r"^\s*(```+|~~~+)\{", cell.source, re.M):
            yield f"cell {i}: write :::{{...}}, as Jupyter shows ```{{...}} as code"
        if re.search(r"\\(?:new|renew)command|\\def\\", cell.source):
            yield f"cell {i} defines a TeX macro, which other viewers do not know"


def in_normal_form(notebook):
    if run_chapters.normalize(copy.deepcopy(notebook)) != notebook:
        yield "not as run_chapters.py leaves it (make run, or run_chapters.py --no-execute)"


RULES = (
    executed_from_top_to_bottom,
    outputs_are_stored,
    nothing_on_standard_error,
    no_machine_path,
    errors_only_on_purpose,
    figures_are_described,
    no_way_round_the_checks,
    code_fits_the_page,
    theorems_are_checked,
    opens_with_aims,
    has_a_mistake_to_learn_from,
    has_exercises_with_solutions,
    closes_with_summary_and_outlook,
    shows_the_map,
    boxes_survive_jupyter,
    in_normal_form,
)
