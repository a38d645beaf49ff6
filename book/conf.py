"""How the book is rendered.

`make book` shows outputs just made (_ext/fresh_outputs.py), sphinx-build alone the stored ones.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

# The one place to write the project's address once it has one, like "https://github.com/ORG/tekfac_edu":
# the buttons for the repository, for issues and for a live notebook appear with it.
REPOSITORY = ""

project = "tekfac_edu"
author = "The tekfac_edu authors"
project_copyright = "2026, the tekfac_edu authors"

extensions = [
    "myst_nb",
    "sphinx_proof",
    "sphinx_exercise",
    "sphinxcontrib.bibtex",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_togglebutton",
    # book/_ext
    "chapter_numbers",
    "fresh_outputs",
    "titled_boxes",
    "reader_notebooks",
]
exclude_patterns = ["_build", "_ipython", "**.ipynb_checkpoints"]

# Chapters ---------------------------------------------------------------------------------------
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
nb_execution_mode = "off"  # run_chapters.py executes
nb_merge_streams = True
nb_output_stderr = "severe"  # logged as an error, not shown
nb_ipywidgets_js = {}  # its default loads require.js and the widgets from elsewhere

# Numbers: figures, equations and exercises count by chapter; all boxes of the theorem kind share
# one count, so that "Lemma 4.3" is found between 4.2 and 4.4.
numfig = True
math_numfig = True
numfig_secnum_depth = 1
numfig_format = {"figure": "Figure %s", "table": "Table %s"}
prf_realtyp_to_countertyp = dict.fromkeys(
    ("lemma", "proposition", "corollary", "definition", "example", "remark"), "theorem"
)
exercise_style = "solution_follow_exercise"

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

# Pages ------------------------------------------------------------------------------------------
html_title = "From Fisher to TEKFAC"
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_sourcelink_suffix = ""
mathjax_path = "mathjax/tex-svg-full.js"  # vendored: a page needs no network
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    # The sidebar has the search box; the theme's default adds a second one.
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": "main",
        "path_to_docs": "book",
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": {
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
            "notebook_interface": "jupyterlab",
        },
    }
