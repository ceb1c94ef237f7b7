from pathlib import Path

import pytest
import yaml

from hf_bcd.card.escaping import code_block, escape_markdown, hub_link, link, shareable_recipe
from hf_bcd.utils.text import one_line


HOSTILE = [
    "a|b`c`",
    "`````",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp;",
    "\n---\n# heading\n",
    "---",
    "# heading",
    "- item",
    "1. item",
    "2) item",
    "+ item",
    "> quote",
    "~~~",
    "===",
    '\'"quoted": {yaml: [1',
    "*bold* _it_ __b__ ~~s~~",
    "[l](http://evil.example)",
    "http://evil.example",
    "![i](javascript:x)",
    "{{ 7 * 7 }}{% raw %}",
    "$x$ @user #1",
    "\u202eevil\u2028line\x00\x1b[31m",
    "</details>",
    "-->",
    "\\",
    "\\|",
    "!!python/object/apply:os.system [ls]",
    "null",
    "3.0",
    "*anchor &a",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_the_text_and_nothing_else(text: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for before, after in (("", ""), ("- ", ""), ("# ", ""), ("say ", " so")):
        (inline,) = [token for token in parser.parse(before + escape_markdown(text) + after) if token.type == "inline"]
        kinds = {child.type for child in inline.children}
        assert kinds <= {"text", "text_special"}, kinds
        shown = "".join(child.content for child in inline.children)
        assert " ".join(shown.split()) == " ".join((before.strip("-# ") + " " + one_line(text) + after).split())
    table = parser.parse(f"| a | b |\n|---|---|\n| {escape_markdown(text)} | x |\n")
    cells = [token.content for token in table if token.type == "inline"]
    assert len(cells) == 4 and cells[-1] == "x", "the text has opened a cell of its own"


def test_markdown_of_ordinary_names_stays_readable() -> None:
    assert escape_markdown("car, auto (machine) 0.004 3-wheeler") == "car, auto (machine) 0.004 3-wheeler"


@pytest.mark.parametrize("text", HOSTILE)
def test_code_cannot_leave_its_block(text: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    code = f"print(1)\n{text}\nprint(2)"
    tokens = markdown_it.MarkdownIt("commonmark").parse(code_block(code, "python") + "\n\nafter\n")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content.startswith("print(1)\n") and tokens[0].content.endswith("print(2)\n")


def test_links_lead_only_where_they_say() -> None:
    assert hub_link("me/a_b") == "[me/a\\_b](https://huggingface.co/me/a_b)"
    assert hub_link("me/d", "datasets/") == "[me/d](https://huggingface.co/datasets/me/d)"
    assert link("x", "javascript:alert(1)") == "x"
    assert link("x", "https://a.example/) [y](https://b.example") == "x"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data_dir", "/home/me/My data", "path/to/data_dir"),
        ("data_dir", "data", "path/to/data_dir"),
        ("student", {"weights": "~/w.safetensors", "backbone": "resnet18"}, {"weights": "path/to/weights", "backbone": "resnet18"}),
        ("teacher", {"name_or_path": "/home/me/t", "revision": "x"}, {"name_or_path": "path/to/name_or_path", "revision": "x"}),
        ("teacher", "../my teacher", "path/to/teacher"),
        ("teacher", "C:\\Users\\me\\t", "path/to/teacher"),
        ("teacher", "private/model", "path/to/teacher"),  # which exists
        ("teacher", "nvidia/mit-b0", "nvidia/mit-b0"),
        ("dataset_options", {"size": [48, 64]}, {"size": [48, 64]}),
        ("ddp_backend", "hf_" + "Aa0" * 11, "<token>"),
        ("max_steps", -1, -1),
    ],
)  # fmt: skip
def test_recipes_name_no_path_and_no_token(
    key: str, value: object, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "model").mkdir(parents=True)
    private = {"hub_token": "a", "output_dir": "b", "run_name": "c", "push_to_hub": True, "hub_model_id": "d"}
    assert yaml.safe_load(shareable_recipe({key: value, **private})) == {key: expected}


def test_several_teachers_keep_the_names_by_which_losses_call_them() -> None:
    recipe = {
        "teacher": "/home/me/seg.a",
        "teacher_store": ["../stores/dino", "me/b"],
        "losses": {"seg.a": {"cwd": {}}},
    }
    kept = {"teacher": "path/to/seg.a", "teacher_store": ["path/to/dino", "me/b"]}
    assert yaml.safe_load(shareable_recipe(recipe)) == recipe | kept
    assert yaml.safe_load(shareable_recipe({"teacher": "/home/me/seg.a"})) == {"teacher": "path/to/teacher"}
