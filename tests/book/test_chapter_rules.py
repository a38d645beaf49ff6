"""If this fails, a rule for chapters has gone blind: a broken chapter would be published unseen."""

import copy

import nbformat
import pytest
from chapter_rules import RULES, run_chapters
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

OPENING = """# A chapter

*You will be able to*: add.

*Before*: counting.

*Runs in*: 2 s."""

THEOREM = """:::{prf:theorem} Sums
:label: thm-sum
$1 + 1 = 2$.
:::"""

CAUTION = """:::{caution} Where this goes wrong
Sums are not products.
:::"""

EXERCISES = "\n\n".join(
    f""":::{{exercise}} Number {n}, pencil
:label: ex-{n}
Add.
:::

:::{{solution}} ex-{n}
:class: dropdown
Done.
:::"""
    for n in (1, 2, 3)
)

CLOSING = "## Cheat sheet\n\nAdd.\n\n## The next obstacle\n\nMultiplication."

(TITLE_CELL, CHECK_CELL, FIGURE_CELL, MISTAKE_CELL, EXERCISE_CELL, CLOSING_CELL) = (
    0,
    2,
    3,
    5,
    6,
    7,
)


def stdout(text):
    return new_output("stream", name="stdout", text=text)


@pytest.fixture
def chapter():
    """A smallest chapter without fault, as run_chapters.py would leave it."""
    figure = {"caption": "The map.", "name": "fig-map"}
    cells = [
        new_markdown_cell(OPENING),
        new_markdown_cell(THEOREM),
        new_code_cell('check("thm-sum", 1 + 1, 2)', outputs=[stdout("✓ thm-sum  (rtol=1e-09)\n")]),
        new_code_cell(
            "method_map()",
            metadata={"mystnb": {"figure": figure, "image": {"alt": "A table."}}},
            outputs=[new_output("display_data", data={"image/png": "iVBORw0K"})],
        ),
        new_markdown_cell(CAUTION),
        new_code_cell(
            'check("wrong", 1 * 1, 2)',
            metadata={"tags": ["raises-exception"]},
            outputs=[new_output("error", ename="AssertionError", evalue="", traceback=[])],
        ),
        new_markdown_cell(EXERCISES),
        new_markdown_cell(CLOSING),
    ]
    return chapter_of(cells)


def chapter_of(cells):
    """The cells, numbered as if executed, in the normal form."""
    notebook = new_notebook(cells=cells)
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    return run_chapters.normalize(notebook)


def objections(notebook):
    return {rule.__name__ for rule in RULES if list(rule(notebook))}


def test_good_chapter_passes(chapter):
    assert objections(chapter) == set()


def strip_outputs(cells):
    for cell in cells:
        if cell.cell_type == "code":
            cell.outputs = []


def unexecute(cells):
    cells[CHECK_CELL].execution_count = None


def run_out_of_order(cells):
    cells[CHECK_CELL].execution_count, cells[FIGURE_CELL].execution_count = 2, 1


def store_a_warning(cells):
    cells[CHECK_CELL].outputs.append(new_output("stream", name="stderr", text="UserWarning"))


def print_a_home(cells):
    cells[CHECK_CELL].outputs.append(stdout("/home/someone/book\n"))


def open_a_windows_path(cells):
    cells[CHECK_CELL].source += '\nopen("C:\\\\Users\\\\someone\\\\x")'


def show_a_traceback_into_a_package(cells):
    cells[MISTAKE_CELL].outputs[0].traceback = ["File .../site-packages/numpy/x.py"]


def fail_unannounced(cells):
    cells[MISTAKE_CELL].metadata = nbformat.from_dict({})


def announce_a_failure_that_does_not_come(cells):
    cells[MISTAKE_CELL].outputs = [stdout("✓ wrong\n")]


def skip_in_nbval(cells):
    cells[CHECK_CELL].metadata["tags"] = ["nbval-skip"]


def ignore_output_in_nbval(cells):
    cells[CHECK_CELL].metadata["tags"] = ["nbval-ignore-output"]


def ignore_output_by_comment(cells):
    cells[CHECK_CELL].source = "# NBVAL_IGNORE_OUTPUT\n" + cells[CHECK_CELL].source


def end_with_semicolon(cells):
    cells[FIGURE_CELL].source += ";"


def write_a_long_line(cells):
    cells[CHECK_CELL].source += "  # " + 60 * "x"


def rename_the_check(cells):
    cells[CHECK_CELL].source = 'check("thm-other", 1 + 1, 2)'


def check_before_the_theorem(cells):
    cells[1], cells[2] = cells[2], cells[1]


def check_that_did_not_run(cells):
    cells[CHECK_CELL].outputs = []


def check_where_failure_is_allowed(cells):
    cells[CHECK_CELL].metadata["tags"] = ["raises-exception"]


def drop_the_label(cells):
    cells[1].source = THEOREM.replace(":label: thm-sum\n", "")


def drop_the_caption(cells):
    del cells[FIGURE_CELL].metadata["mystnb"]["figure"]["caption"]


def drop_the_alt_text(cells):
    del cells[FIGURE_CELL].metadata["mystnb"]["image"]


def draw_two_in_one(cells):
    cells[FIGURE_CELL].outputs *= 2


def caption_nothing(cells):
    cells[FIGURE_CELL].outputs = [stdout("no figure\n")]


def drop_the_aims(cells):
    cells[TITLE_CELL].source = OPENING.replace("*You will be able to*", "Aims")


def drop_the_run_time(cells):
    cells[TITLE_CELL].source = OPENING.replace("2 s", "no time")


def drop_the_mistake(cells):
    del cells[MISTAKE_CELL]


def drop_the_caution(cells):
    cells[4].source = "Sums are not products."


def drop_an_exercise(cells):
    cells[EXERCISE_CELL].source = EXERCISES.rpartition(":::{exercise}")[0]


def drop_a_solution(cells):
    cells[EXERCISE_CELL].source = EXERCISES.replace("{solution} ex-2", "{note}")


def unfold_a_solution(cells):
    cells[EXERCISE_CELL].source = EXERCISES.replace(":class: dropdown\n", "", 1)


def drop_the_cheat_sheet(cells):
    cells[CLOSING_CELL].source = CLOSING.replace("## Cheat sheet", "## Summary")


def drop_the_next_obstacle(cells):
    cells[CLOSING_CELL].source = CLOSING.replace("## The next obstacle", "## End")


def drop_the_map(cells):
    cells[FIGURE_CELL].source = "show()"


def fence_with_backticks(cells):
    cells[4].source = CAUTION.replace(":::", "```")


def define_a_macro(cells):
    cells[4].source += "\n\n$\\newcommand{\\R}{\\mathbb{R}}$"


def keep_execution_times(cells):
    cells[CHECK_CELL].metadata["execution"] = {"iopub.execute_input": "2026"}


def keep_a_random_id(cells):
    cells[CHECK_CELL].id = "f3a0"


@pytest.mark.parametrize(
    ("mutate", "rule"),
    [
        (strip_outputs, "outputs_are_stored"),
        (unexecute, "executed_from_top_to_bottom"),
        (run_out_of_order, "executed_from_top_to_bottom"),
        (store_a_warning, "nothing_on_standard_error"),
        (print_a_home, "no_machine_path"),
        (open_a_windows_path, "no_machine_path"),
        (show_a_traceback_into_a_package, "no_machine_path"),
        (fail_unannounced, "errors_only_on_purpose"),
        (announce_a_failure_that_does_not_come, "errors_only_on_purpose"),
        (skip_in_nbval, "no_way_round_the_checks"),
        (ignore_output_in_nbval, "no_way_round_the_checks"),
        (ignore_output_by_comment, "no_way_round_the_checks"),
        (end_with_semicolon, "code_fits_the_page"),
        (write_a_long_line, "code_fits_the_page"),
        (rename_the_check, "theorems_are_checked"),
        (check_before_the_theorem, "theorems_are_checked"),
        (check_that_did_not_run, "theorems_are_checked"),
        (check_where_failure_is_allowed, "theorems_are_checked"),
        (drop_the_label, "theorems_are_checked"),
        (drop_the_caption, "figures_are_described"),
        (drop_the_alt_text, "figures_are_described"),
        (draw_two_in_one, "figures_are_described"),
        (caption_nothing, "figures_are_described"),
        (drop_the_aims, "opens_with_aims"),
        (drop_the_run_time, "opens_with_aims"),
        (drop_the_mistake, "has_a_mistake_to_learn_from"),
        (drop_the_caution, "has_a_mistake_to_learn_from"),
        (drop_an_exercise, "has_exercises_with_solutions"),
        (drop_a_solution, "has_exercises_with_solutions"),
        (unfold_a_solution, "has_exercises_with_solutions"),
        (drop_the_cheat_sheet, "closes_with_summary_and_outlook"),
        (drop_the_next_obstacle, "closes_with_summary_and_outlook"),
        (drop_the_map, "shows_the_map"),
        (fence_with_backticks, "boxes_survive_jupyter"),
        (define_a_macro, "boxes_survive_jupyter"),
        (keep_execution_times, "in_normal_form"),
        (keep_a_random_id, "in_normal_form"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_chapter_is_caught(chapter, mutate, rule):
    broken = copy.deepcopy(chapter)
    mutate(broken.cells)
    assert rule in objections(broken)
