import pytest

from hf_bcd.card.escaping import code_block, escape_markdown, hub_link, link, shareable_command
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


SECRET = "marker-of-another-form"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data_dir", "/home/me/My data"], "--data_dir path/to/data_dir"),
        (["--data_dir", "data"], "--data_dir path/to/data_dir"),
        (["--data_dir=/home/me/x"], "--data_dir=path/to/data_dir"),
        (["--output_dir", "/home/me/runs/out"], "--output_dir out"),
        (["--student.weights", "~/w.safetensors"], "--student.weights path/to/weights"),
        (["--teacher={name_or_path: /home/me/t, revision: x}"], "'{name_or_path: path/to/teacher, revision: x}'"),
        (["--teacher", "{name_or_path: '../my teacher'}"], "path/to/teacher"),
        (["--teacher", "C:\\Users\\me\\t"], "--teacher path/to/teacher"),
        (["--teacher", "nvidia/mit-b0", "--seed", "3"], "--teacher nvidia/mit-b0 --seed 3"),
        (["--config", "/home/me/code/examples/recipes/a/b.yaml"], "--config examples/recipes/a/b.yaml"),
        (["--config", "/home/me/b.yaml"], "--config path/to/config"),
        (["--losses.bcd.radius", "5"], "--losses.bcd.radius 5"),
        (["--dataset_options.size", "[48, 64]"], "--dataset_options.size '[48, 64]'"),
        (["--run_name", f"x{SECRET}y"], "--run_name 'x<token>y'"),
        (["--run_name", "hf_" + "Aa0" * 11], "--run_name '<token>'"),
        (["--hub_token", "anything", "--seed", "1"], "run --seed 1"),
        (["--hub_token=anything", "--seed", "1"], "run --seed 1"),
        (["--max_steps", "-1", "--eval_strategy", "no"], "--max_steps -1 --eval_strategy no"),
    ],
)
def test_commands_name_no_path_and_no_token(arguments: list[str], expected: str) -> None:
    command = shareable_command("run", arguments, [SECRET])
    assert expected in command
    assert not any(private in command for private in ("/home", "Users", "my teacher", "My data", "anything", SECRET))


def test_commands_hide_relative_folders_that_exist(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "model").mkdir(parents=True)
    assert shareable_command("run", ["--teacher", "private/model"]) == "run --teacher path/to/teacher"
    assert shareable_command("run", ["--teacher", "public/model"]) == "run --teacher public/model"
