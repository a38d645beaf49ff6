"""Pages made from chapters just executed, stored beside book/ and not in it.

`-D fresh_outputs=DIRECTORY` (seen from book/) names where `run_chapters.py --into` put them.
"""

from pathlib import Path

from sphinx.errors import ExtensionError


def read(app, docname, source):
    is_chapter = Path(app.env.doc2path(docname)).suffix == ".ipynb"
    if not (is_chapter and app.config.fresh_outputs):
        return
    executed = Path(app.srcdir) / app.config.fresh_outputs / f"{docname}.ipynb"
    if not executed.exists():
        raise ExtensionError(f"{docname} was not executed: there is no {executed}")
    source[0] = executed.read_text(encoding="utf-8")


def setup(app):
    app.add_config_value("fresh_outputs", "", "env")
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
