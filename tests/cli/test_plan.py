"""`radixkv plan`: its figures, its pictures and what it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from radixkv.capacity import format_bytes, known_models, read_model
from radixkv.cli import main
from tests.capacity.test_capacity import FIELDS, gguf_bytes, llama


def run(capsys, *arguments):
    status = main(["plan", *map(str, arguments)])
    return (status, *capsys.readouterr())


def test_the_batch_of_the_textbook(capsys):
    status, out, err = run(capsys, "llama-3-8b", "--memory", "80GiB", "--weights", "16GiB", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["chosen"]["bytes_per_token"] == 131_072
    assert found["chosen"]["requests"] == 230
    assert [row["format"] for row in found["formats"]] == ["fp32", "bf16", "fp8", "int8", "k8v4", "int4"]
    assert [row["times_smaller"] for row in found["formats"]] == [0.5, 1.0, 2.0, 1.97, 2.61, 3.88]


def test_for_a_person(capsys):
    _, out, _ = run(capsys, "gpt-oss-20b", "--memory", "80GiB", "--length", "500", "--max-length", "4096")
    assert "49,152 B = 48 KiB" in out
    assert "window of 128" in out
    assert "87.8 %" in out
    assert "where windows alone are kept" in out
    assert "12.82 GiB of weights" in out


def test_latent_layers(capsys):
    """Beside their bytes those of K and V of every head, and only what a latent row can be stored as."""
    _, out, _ = run(capsys, "deepseek-v3")
    assert "70,272 B = 68.62 KiB\n            4,997,120 B where K and V of every head are stored instead" in out
    _, out, _ = run(capsys, "deepseek-v3", "--json")
    found = json.loads(out)
    assert found["bytes_per_token_expanded"] == 61 * 128 * (192 + 128) * 2
    assert [row["format"] for row in found["formats"]] == ["fp32", "bf16", "fp8"]
    status, _, err = run(capsys, "deepseek-v3", "--format", "int8")
    assert status != 0
    assert "latent layers, which are not stored as int8: use --format fp32, bf16, fp16 or fp8" in err
    assert "expanded" not in run(capsys, "llama-3-8b")[1]


def test_memory_for_a_hit_rate(capsys):
    arguments = ("llama-3-8b", "--trace", "chat", "--requests", "100", "--target", "0.5")
    _, out, _ = run(capsys, *arguments, "--json")
    need = json.loads(out)["trace"]
    assert need["hit_rate"] >= 0.5
    assert need["bytes"] == need["tokens"] * 131_072 == need["bytes_by_format"]["bf16"]
    _, out, _ = run(capsys, *arguments)
    assert "GiB in bf16" in out or "MiB in bf16" in out


def test_the_picture(capsys, tmp_path):
    file = tmp_path / "plan.svg"
    assert run(capsys, "deepseek-v3", "--svg", file)[0] == 0
    root = ElementTree.parse(file).getroot()
    bars = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if rect.get("class") == "bar"]
    assert len(bars) == 3, "fp32, bf16, fp8"
    assert float(bars[0].get("width")) == 2 * float(bars[1].get("width"))


def test_the_picture_says_what_the_traffic_needs(capsys, tmp_path):
    file = tmp_path / "plan.svg"
    arguments = ("llama-3-8b", "--trace", "chat", "--requests", "100", "--target", "0.5", "--svg", file, "--json")
    need = json.loads(run(capsys, *arguments)[1])["trace"]["bytes_by_format"]
    text = [element.text for element in ElementTree.parse(file).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert any("needs: for a hit rate of 50 % on chat" in words for words in text)
    for size in need.values():
        assert any(words.endswith(f"a token, needs {format_bytes(size)}") for words in text)


@pytest.mark.parametrize("name", known_models())
def test_every_known_model(capsys, name):
    status, out, err = run(capsys, name, "--memory", "1500GiB", "--weights", "auto", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["weight_bytes"] == read_model(name).weight_bytes
    for row in found["formats"]:
        assert row["requests"] == row["pages"] // (2048 // 16) > 100
        assert row["pages"] * row["bytes_per_page"] <= 0.9 * (1500 * 2**30 - found["weight_bytes"])
    assert run(capsys, name)[1].startswith("model       " + name)


def test_a_folder_and_a_gguf_file(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama(2, 4, 2, max_position_embeddings=1000)))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf_bytes(FIELDS))
    for source, token in ((tmp_path, 2 * 2 * 2 * 128 * 2), (file, 12 * 2 * 2 * 32 * 2)):
        found = json.loads(run(capsys, source, "--memory", "1GiB", "--json")[1])
        assert found["chosen"]["bytes_per_token"] == token
        assert found["weight_bytes"] in (1000, file.stat().st_size)
        assert found["reserved_length"] in (1000, 999)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-9",), "neither a file nor a known model"),
        (("deepseek-v3", "--memory", "80GiB"), "hold no page"),
        (("llama-3-8b", "--trace", "chat"), "--trace and --target go together"),
        (("llama-3-8b", "--trace", "chat", "--requests", "20", "--target", "1"), "the best is"),
        (("llama-3-8b", "--svg", "-", "--json"), "two outputs"),
    ],
)
def test_refusals(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert message in err


@pytest.mark.parametrize("arguments", [("--memory", "much"), ("--target", "90"), ("--format", "int3")])
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        run(capsys, "llama-3-8b", *arguments)
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err
