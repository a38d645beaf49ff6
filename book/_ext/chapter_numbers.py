"""A chapter's number is the one that its file name starts with.

Sphinx counts the entries of a numbered toctree. As long as chapters 9 and 10 are not written, it
would call 11_*.ipynb chapter 9; once they are, every number quoted from it would change. So the
count is replaced as soon as Sphinx has made it, and Sphinx numbers the figures again. Boxes,
equations, exercises, references, the sidebar and the reader notebooks ask Sphinx, and follow.
"""

import re
from pathlib import PurePosixPath

from docutils import nodes
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.errors import ExtensionError


def chapter_of(docname):
    """The number at the start of a file name: 11 for "11_convolutions"."""
    digits = re.match(r"\d+", PurePosixPath(docname).name)
    if not digits:
        raise ExtensionError(f"{docname} stands in a numbered toctree: name it NN_{docname}")
    return int(digits[0])


def renumber(app, env):
    for docname, sections in env.toc_secnumbers.items():
        chapter = chapter_of(docname)
        for anchor, number in sections.items():
            sections[anchor] = (chapter, *number[1:]) if number else ()
        # The same numbers again, for the sidebar and for links to neighbouring pages.
        for node in (env.titles[docname], *env.tocs[docname].findall(nodes.reference)):
            if number := node.get("secnumber"):
                node["secnumber"] = [chapter, *number[1:]]
    return TocTreeCollector().assign_figure_numbers(env)


def setup(app):
    # Sphinx's own numbering is connected with the default priority, 500.
    app.connect("env-get-updated", renumber, priority=501)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
