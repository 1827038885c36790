"""The pages tell the truth: their Python runs, their command lines parse, their links lead somewhere."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import jaxengine
from jaxengine.cli.main import COMMANDS, parse_args

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [
    README,
    CONTRIBUTING,
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "sharding" / "README.md",
    *sorted((ROOT / "pallas_kernels").glob("*/README.md")),
]
MAX_README_LINES = 130


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def command_lines(page: Path) -> list[str]:
    """What follows the word `jaxengine` in a page's shell blocks."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    found = [re.search(r"(?:^|\brun )jaxengine (.*)", line) for line in lines]
    return [match[1].partition(" > ")[0] for match in found if match]


# What needs a server runs in tests/server; a part of a script does not run by itself.
SNIPPETS = [
    pytest.param(
        page,
        code,
        id=f"{name_of(page)}-{index}",
        marks=pytest.mark.slow if "AsyncLLM" in code or "load_model(" in code else (),
    )
    for page in (README, *sorted((ROOT / "docs").glob("*.md")))
    for index, code in enumerate(blocks(page, "python"))
    if "import OpenAI" not in code
]


@pytest.mark.parametrize(("page", "code"), SNIPPETS)
def test_python_snippets_run(page, code, request, monkeypatch, capsys):
    if "LLM()" in code:
        smollm2 = request.getfixturevalue("smollm2")

        def shared_llm(model=None, **engine_args):
            jaxengine.EngineArgs(model=model, **engine_args)
            return smollm2

        monkeypatch.setattr(jaxengine, "LLM", shared_llm, raising=False)
    exec(compile(code, name_of(page), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", [line for page in PAGES for line in command_lines(page)])
def test_command_lines_parse(line):
    assert parse_args(shlex.split(line, comments=True)).command in COMMANDS


def test_modules_that_are_run_are_there():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    modules = {module for text in texts for module in re.findall(r"python\s+-m\s+((?:jaxengine|tests)[\w.]*)", text)}
    assert modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module


def test_the_two_commands():
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    assert 'pip install uv && uv run jaxengine generate "The capital of France is"' in lines
    assert "uv run pytest" in lines


def test_the_readme_stays_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_reached_from_the_readme():
    linked: set[Path] = set()
    waiting = [README]
    while waiting:
        page = waiting.pop()
        if page in linked:
            continue
        linked.add(page)
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
        waiting += [path for target in targets if (path := (page.parent / target).resolve()).suffix == ".md"]
    assert set(PAGES) <= linked


def test_pages_name_files_that_are_there():
    """Those told in backticks with a folder; what a user or a cache has is not looked for."""
    for page in PAGES:
        for name in re.findall(
            r"`((?:tests|examples|docs|jaxengine|models|sharding)/[\w./]+\.(?:py|md))`", page.read_text()
        ):
            assert (ROOT / name).exists(), (name_of(page), name)
    for where in re.findall(r"^\*\*.+?\(`([\w/]+\.py)`", (ROOT / "docs" / "performance.md").read_text(), re.MULTILINE):
        assert (ROOT / where).exists() or (ROOT / "jaxengine" / where).exists(), where


def test_every_supported_family_is_named():
    """Whoever adds a family adds it to the README; architectures are named as people call them."""
    from jaxengine.models.registry import MODELS

    named = re.sub(r"[\s-]", "", README.read_text(encoding="utf-8")).lower()
    for architecture in MODELS:
        family = re.sub(r"(LMHeadModel|ForCausalLM)$", "", architecture).lower()
        assert family in named, architecture


def test_the_table_of_tensors():
    """Row by row of docs/models.md: each parameter of a model with one layer, its shape, and where it comes from."""
    from jaxengine.models.config import ModelConfig
    from jaxengine.models.llama import LlamaForCausalLM
    from jaxengine.models.weights import parameters

    sizes = {"V": 70, "D": 24, "F": 32, "N": 4, "K": 2, "H": 8}
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=1,
        hidden_size=sizes["D"],
        intermediate_size=sizes["F"],
        num_heads=sizes["N"],
        num_kv_heads=sizes["K"],
        head_dim=sizes["H"],
        vocab_size=sizes["V"],
        qk_norm="head",
        qkv_bias=True,
    )
    model = LlamaForCausalLM(config)
    expected = {path: (tuple(param.shape), model.weight_map()[path].names) for path, param in parameters(model).items()}
    told = {}
    for row in re.findall(r"^\| `[\w.]+\.(?:weight|bias)`.*$", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE):
        name, shape, tensors = row.strip("| ").split(" | ")
        products = re.sub(r"(?<=[\w)]) ?(?=[A-Z](?![a-z]))", "*", shape.strip("`[]"))
        numbers = eval(f"({products},)", {}, sizes)
        told[name.split("`")[1]] = numbers, tuple(re.findall(r"`([^`]+)`", tensors))
    assert told == expected
