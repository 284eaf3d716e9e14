"""weights_digest: equal for the same model wherever it lies, different for whatever changes its K and V."""

import copy

import pytest
import torch

from radixkv.hf import engine_for, weights_digest
from radixkv.tiers import TierOptions
from tests.hf.helpers import tiny, transformers


def test_the_same_model_from_another_folder_has_the_same_digest(tmp_path):
    model = tiny()
    digest = weights_digest(model)
    assert len(bytes.fromhex(digest)) == 16
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        assert weights_digest(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)) == digest
    model.set_attn_implementation("sdpa")
    assert weights_digest(model) == digest


def test_a_bit_of_any_weight_a_buffer_and_the_configuration_change_it():
    model = tiny()
    seen = {weights_digest(model)}
    for name, parameter in model.named_parameters():
        other = copy.deepcopy(model)
        flat = other.get_parameter(name).data.reshape(-1).view(torch.int32)
        flat[parameter.numel() // 2] ^= 1
        seen.add(weights_digest(other))
    names = len(list(model.named_parameters()))
    assert len(seen) == 1 + names
    for name, _ in model.named_buffers():
        other = copy.deepcopy(model)
        other.get_buffer(name).add_(1)
        seen.add(weights_digest(other))
    buffers = len(list(model.named_buffers()))
    assert buffers > 0
    assert len(seen) == 1 + names + buffers
    other = copy.deepcopy(model)
    other.config.rms_norm_eps *= 2
    assert weights_digest(other) not in seen
    assert weights_digest(copy.deepcopy(model).to(torch.bfloat16)) not in seen


def test_another_transformers_is_another_model(monkeypatch):
    model = tiny()
    before = weights_digest(model)
    monkeypatch.setattr(transformers, "__version__", "0")
    assert weights_digest(model) != before


@pytest.mark.parametrize("weights", [None, "mine"])
def test_engine_for_names_the_weights(tmp_path, weights):
    model = tiny()
    options = TierOptions(weights=weights, disk=tmp_path, disk_capacity="1MiB", threads=0)
    with engine_for(model, num_pages=8, tiers=options) as engine:
        assert engine.tiers is not None
        (meta,) = tmp_path.rglob("meta.json")
        assert (weights or weights_digest(model)) in meta.read_text()
