"""If this fails, a page or a downloaded notebook is broken, misnumbered, or needs the network."""

import importlib
import re
import subprocess
import sys
from collections import Counter

import nbformat
import pytest
from bs4 import BeautifulSoup
from chapter_rules import CHAPTERS, ROOT, number_of, run_chapters
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sphinx.errors import ExtensionError

NUMBERED = re.compile(
    r"\b(?:Theorem|Lemma|Proposition|Corollary|Definition|Example|Remark|Exercise|Figure)"
    r"\s+\d+\.\d+\b|\(\d+\.\d+\)"
)
RAW_MYST = re.compile(r":::|\{[a-z:_-]+\}`|\$\$[ \t]*\([a-z]|^\([\w-]+\)=$|^:[\w-]+:", re.M)
# Elements and attributes through which a page loads something when it is opened.
LOADING = ("src", "srcset", "data", "poster", "background")
CSS_FROM_ELSEWHERE = re.compile(r"url\(\s*['\"]?(?:https?:)?//|@import\s+['\"](?:https?:)?//")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The book as rendered from the stored outputs, by Sphinx at its strictest."""
    return render(ROOT / "book", tmp_path_factory.mktemp("site") / "html")


def render(source, out):
    """Render `source` with the book's settings into `out`; returns `out`."""
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", "html"]
    command += ["-c", str(ROOT / "book"), "-d", str(out.parent / "doctrees")]
    done = subprocess.run([*command, str(source), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def page_of(site, path):
    return BeautifulSoup((site / f"{path.stem}.html").read_text(encoding="utf-8"), "html.parser")


def reader_of(site, path):
    return nbformat.read(site / "_sources" / path.name, as_version=4)


def prose_of(page):
    """The text of a page's article without its code and what the code printed."""
    article = page.find("article")
    for element in article.select("div.highlight, a.headerlink"):
        element.decompose()
    return article.get_text()


def numbers_in(text):
    """Numbers of boxes, figures and equations in a text, and of all that refers to them."""
    return Counter(" ".join(number.split()) for number in NUMBERED.findall(text))


def markdown_of(reader):
    """The text of a reader notebook, written as the page shows it."""
    text = "\n".join(c.source for c in reader.cells if c.cell_type == "markdown")
    return re.sub(r"\\tag\{([\d.]+)\}", r"(\1)", text).replace("*", "")


def sidebar_of(page):
    """Number -> page, as the sidebar shows it beside the chapters' titles."""
    entries = page.select("nav.bd-docs-nav a")
    return {a.get_text().split(". ")[0]: a["href"] for a in entries if a.get_text()[0].isdigit()}


def loaded_from_elsewhere(page):
    """What an HTML page would fetch from another place when it is opened."""
    for element in page.find_all(True):
        for attribute in LOADING:
            if re.search(r"(?:https?:)?//", element.get(attribute, "").split("base64,")[0]):
                yield f"<{element.name} {attribute}={element[attribute]}>"
        if element.name == "link" and not {"canonical", "license"} & set(element.get("rel", [])):
            if re.match(r"(?:https?:)?//", element.get("href", "")):
                yield f"<link href={element['href']}>"
        if element.name == "style" and CSS_FROM_ELSEWHERE.search(element.get_text()):
            yield "<style> with an address"
        if CSS_FROM_ELSEWHERE.search(element.get("style", "")):
            yield f"<{element.name} style={element['style']}>"
        if element.name == "script" and not element.get("src"):
            if re.search(r"['\"](?:https?:)?//\w", element.get_text()):
                yield f"inline script with an address: {element.get_text()[:200]}"


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<img src="//cdn.example/x.png">',
        '<img srcset="https://cdn.example/x.png 2x">',
        '<link rel="stylesheet" href="https://cdn.example/x.css">',
        '<link rel="preconnect" href="https://cdn.example">',
        "<style>@import 'https://cdn.example/x.css';</style>",
        "<style>a { background: url(https://cdn.example/x.png) }</style>",
        '<p style="background: url(//cdn.example/x.png)">',
        '<script>import("https://cdn.example/x.js")</script>',
        '<iframe src="https://cdn.example"></iframe>',
    ],
)
def test_address_of_elsewhere_is_caught(html):
    assert list(loaded_from_elsewhere(BeautifulSoup(html, "html.parser")))


def test_links_and_own_files_may_stay():
    html = '<a href="https://doi.org/1"></a><img src="_images/a.png"><script src="_static/b.js">'
    assert not list(loaded_from_elsewhere(BeautifulSoup(html, "html.parser")))


def test_no_page_loads_anything_from_elsewhere(site):
    found = []
    for path in sorted(site.rglob("*.html")):
        page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        found += [f"{path.name}: {what}" for what in loaded_from_elsewhere(page)]
    for path in sorted(site.rglob("*.css")):
        if CSS_FROM_ELSEWHERE.search(path.read_text(encoding="utf-8")):
            found.append(f"{path.name} loads from elsewhere")
    assert not found, "\n".join(found)


def test_mathematics_is_rendered_by_our_own_copy(site):
    for path in CHAPTERS:
        scripts = [s["src"].split("?")[0] for s in page_of(site, path).find_all("script", src=True)]
        assert [s for s in scripts if "athjax" in s] == ["_static/mathjax/tex-svg-full.js"]
    assert (site / "_static/mathjax/tex-svg-full.js").stat().st_size > 1_000_000
    assert "Apache License" in (site / "_static/mathjax/LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_numbers_carry_the_chapter(site, path):
    page = page_of(site, path)
    assert page.select_one("h1 > span.section-number").get_text() == f"{number_of(path)}. "
    boxes = [span.get_text().split()[-1] for span in page.select("span.caption-number")]
    assert boxes
    assert {number.split(".")[0] for number in boxes} == {str(number_of(path))}


def test_sidebar_has_every_chapter_under_its_number(site):
    links = {str(number_of(path)): f"{path.stem}.html" for path in CHAPTERS}
    assert sidebar_of(page_of(site, ROOT / "book" / "index.md")) == links


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_reader_notebook_has_the_numbers_of_the_page(site, path):
    shown = numbers_in(prose_of(page_of(site, path)))
    assert shown
    assert numbers_in(markdown_of(reader_of(site, path))) == shown


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_reader_notebook_needs_no_myst(site, path):
    reader = reader_of(site, path)
    nbformat.validate(reader)
    for cell in reader.cells:
        if cell.cell_type == "markdown":
            assert not RAW_MYST.search(cell.source), cell.source
            assert cell.source.count("<details>") == cell.source.count("</details>")
            # Jupyter takes the quote's ">" into a formula that goes over several lines.
            for line in cell.source.splitlines():
                assert not line.startswith(">") or line.count("$$") % 2 == 0, line
    code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.source for c in reader.cells if c.cell_type == "code"] == code
    assert any("<details>" in cell.source for cell in reader.cells)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_download_button_gives_the_reader_notebook(site, path):
    links = [a["href"] for a in page_of(site, path).select("a.btn-download-source-button")]
    assert links == [f"_sources/{path.name}"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_figures_have_alternative_text(site, path):
    images = page_of(site, path).select("article img")
    assert images
    assert all(image.get("alt", "").strip() for image in images)
    assert not any(re.search(r"\.png|_images", image["alt"]) for image in images)


# A book with gaps -------------------------------------------------------------------------------

GAPS = {2: 11, 11: 13, 13: 2}  # chapter -> the chapter it refers to
STUB = """(chap-%(here)d)=
# Stub

:::{prf:theorem} Sums
:label: thm-%(here)d
$$1 + 1 = 2$$ (eq-%(here)d)
:::

:::{prf:lemma} Smaller sums
:label: lem-%(here)d
$0 + 1 = 1$.
:::

:::{exercise} Larger sums, pencil
:label: ex-%(here)d
Add.
:::

Elsewhere, {numref}`Chapter {number} <chap-%(there)d>`: {prf:ref}`thm-%(there)d`,
{prf:ref}`lem-%(there)d`, {numref}`ex-%(there)d`, {numref}`fig-%(there)d`, {eq}`eq-%(there)d`."""
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


def stub(here, there):
    figure = {"caption": "A dot.", "name": f"fig-{here}"}
    drawn = new_code_cell(
        "dot()",
        metadata={"mystnb": {"figure": figure, "image": {"alt": "A dot."}}},
        outputs=[new_output("display_data", data={"image/png": DOT})],
    )
    text = new_markdown_cell(STUB % {"here": here, "there": there})
    return run_chapters.normalize(new_notebook(cells=[text, drawn]))


@pytest.fixture(scope="module")
def gapped(tmp_path_factory):
    """Three stub chapters whose numbers do not follow each other, in the book's own table."""
    book = tmp_path_factory.mktemp("gapped") / "book"
    book.mkdir()
    index = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    toctree = re.search(r"^```\{toctree\}\n.*?^```$", index, re.DOTALL | re.MULTILINE)[0]
    (book / "index.md").write_text(f"# Stubs\n\n{toctree}\n", encoding="utf-8")
    (book / "references.bib").touch()
    for here, there in GAPS.items():
        nbformat.write(stub(here, there), book / f"{here:02d}_stub.ipynb")
    return render(book, book.parent / "html")


@pytest.mark.parametrize(("here", "there"), GAPS.items())
def test_number_is_that_of_the_file_where_chapters_are_missing(gapped, here, there):
    path = gapped / f"{here:02d}_stub.ipynb"
    page = page_of(gapped, path)
    assert page.select_one("h1 > span.section-number").get_text() == f"{here}. "
    assert page.title.get_text().startswith(f"{here}. ")
    boxes = [span.get_text().split()[-1] for span in page.select("span.caption-number")]
    assert sorted(boxes) == sorted(f"{here}.{n}" for n in (1, 2, 1, 1))
    names = ("Theorem {}.1", "Lemma {}.2", "Exercise {}.1", "Figure {}.1", "({}.1)")
    expected = {name.format(chapter) for name in names for chapter in (here, there)}
    for text in (prose_of(page), markdown_of(reader_of(gapped, path))):
        assert set(numbers_in(text)) == expected
        assert f"Chapter {there}:" in text


def test_sidebar_and_neighbours_where_chapters_are_missing(gapped):
    links = {str(n): f"{n:02d}_stub.html" for n in GAPS}
    assert sidebar_of(page_of(gapped, gapped / "index.md")) == links
    footer = page_of(gapped, gapped / "11_stub.ipynb").select("p.prev-next-title")
    assert [title.get_text() for title in footer] == ["2. Stub", "13. Stub"]


def test_page_in_the_numbered_table_needs_a_number(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    chapter_numbers = importlib.import_module("chapter_numbers")
    with pytest.raises(ExtensionError, match="name it NN_preface"):
        chapter_numbers.chapter_of("preface")
