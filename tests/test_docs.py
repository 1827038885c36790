"""The README tells the truth: its Python runs, its command lines parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

import jaxengine
from jaxengine.cli.main import COMMANDS, parse_args

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def command_lines() -> list[str]:
    """What follows the word `jaxengine` in the shell blocks."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = [re.search(r"(?:^|\brun )jaxengine (.*)", line) for line in lines]
    return [match[1].partition(" > ")[0] for match in found if match]


# What needs a server runs in tests/server.
OFFLINE = [index for index, block in enumerate(blocks("python")) if "import OpenAI" not in block]


@pytest.mark.parametrize("index", OFFLINE)
def test_python_snippets_run(index, smollm2, monkeypatch, capsys):
    def shared_llm(model=None, **engine_args):
        jaxengine.EngineArgs(model=model, **engine_args)
        return smollm2

    monkeypatch.setattr(jaxengine, "LLM", shared_llm, raising=False)
    exec(compile(blocks("python")[index], f"README.md, snippet {index}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_parse(line):
    assert parse_args(shlex.split(line)).command in COMMANDS


def test_the_two_commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert 'pip install uv && uv run jaxengine generate "The capital of France is"' in lines
    assert "uv run pytest" in lines


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_supported_family_is_named():
    """Whoever adds a family adds it to the README; architectures are named as people call them."""
    from jaxengine.models.registry import MODELS

    named = re.sub(r"[\s-]", "", README).lower()
    for architecture in MODELS:
        family = re.sub(r"(LMHeadModel|ForCausalLM)$", "", architecture).lower()
        assert family in named, architecture
