"""`:::{caution} A title` shows the title, as JupyterLab does; docutils would read it as text."""

from docutils.parsers.rst.directives.admonitions import Admonition

KINDS = ("attention", "caution", "danger", "hint", "important", "note", "tip", "warning")


class TitledBox(Admonition):
    required_arguments = 0
    optional_arguments = 1

    def run(self):
        self.arguments = self.arguments or [self.name.title()]
        self.options = {**self.options, "class": [self.name, *self.options.get("class", [])]}
        return super().run()


def setup(app):
    for kind in KINDS:
        app.add_directive(kind, TitledBox, override=True)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
