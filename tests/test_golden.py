"""The contract: the same numbers as the authors' code on a tiny Mistral (tests/golden/README.md)."""

import json
from itertools import accumulate
from operator import add
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from minigen import generator as method
from minigen.generator import AdapterGenerator, GeneratorConfig

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
CASES = INDEX["cases"]
TOLERANCE = 1e-4


def largest_difference(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "recorded.safetensors")


@pytest.fixture(scope="module")
def lm(recorded):
    model = MistralForCausalLM(MistralConfig(**INDEX["base_config"])).eval().requires_grad_(False)
    model.load_state_dict({key.removeprefix("base/"): value for key, value in recorded.items() if key.startswith("base/")})
    return model


def parameters(case, recorded) -> dict[str, torch.Tensor]:
    return {name: recorded[f"generator/{CASES[case]['generator']}/{name}"] for name in ("norm", "A1", "A2", "B1", "B2")}


def theirs(case, recorded) -> dict[str, torch.Tensor]:
    """What a case has recorded, and the update of each layer that follows from it (as one product, not as factors)."""
    values = {name: recorded[key] for name, key in CASES[case]["tensors"].items()}
    config, layer = CASES[case]["config"], parameters(case, recorded)
    return values | {"delta": config["alpha"] / config["p"] * layer["A1"] @ values["norm_S"] @ layer["B2"]}


def ours(case, lm, recorded) -> dict[str, torch.Tensor]:
    """The same quantities, computed by this package."""
    config = CASES[case]["config"]
    generator = AdapterGenerator.for_lm(lm, GeneratorConfig(**config | {"targets": tuple(config["targets"])})).requires_grad_(False)
    for i, layer in enumerate(generator.by_layer):
        layer.load_state_dict({name: value[i] for name, value in parameters(case, recorded).items()})

    prefixes = list(accumulate(generator.read_chunks(lm, torch.tensor([CASES[case]["context"]])), add))
    state = prefixes[-1]
    left, right = method.NORMS[config["norm"]](state.S, config["rank"])
    adapter = generator.write(state)
    with adapter.applied_to(lm):
        logits = lm(torch.tensor([INDEX["query"]])).logits[0]
    return {
        "S": state.S[:, 0],
        "S_prefixes": torch.stack([prefix.S[:, 0] for prefix in prefixes[:2]]),
        "norm_S": (left @ right.mT)[:, 0],
        "delta": torch.stack([adapter.delta(layer.name)[0] for layer in generator.layers]),
        "logits": logits,
    }


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_the_authors_code(case, lm, recorded):
    computed = ours(case, lm, recorded)
    differences = {name: largest_difference(computed[name], value) for name, value in theirs(case, recorded).items()}
    assert max(differences.values()) < TOLERANCE, differences


def test_same_base_model_and_every_adapter_moves_it(lm, recorded):
    base = recorded["base_logits"]
    assert largest_difference(lm(torch.tensor([INDEX["query"]])).logits[0], base) < TOLERANCE
    assert min(largest_difference(theirs(case, recorded)["logits"], base) for case in CASES) > 1000 * TOLERANCE


def swapped_sides(*H_and_weights, right=method.outer_products):
    return right(*H_and_weights).mT


def smallest_directions(S, rank):
    U, _, Vh = torch.linalg.svd(S)
    return U[..., -rank:], Vh.mT[..., -rank:]


MISTAKES = {
    "sides of S swapped": (vars(method), "outer_products", swapped_sides),
    "hidden states not normed": (vars(method), "rms_norm", lambda H, weight: H),
    "svd dropped": (method.NORMS, "svd", method.no_norm),
    "frobenius dropped": (method.NORMS, "frobenius", method.no_norm),
    "smallest directions kept": (method.NORMS, "svd", smallest_directions),
}


@pytest.mark.parametrize(
    ("mistake", "case"),
    [
        ("sides of S swapped", "svd_8_tokens"),
        ("sides of S swapped", "svd_3_chunks_sequential"),
        ("sides of S swapped", "frobenius_8_tokens"),
        ("hidden states not normed", "svd_24_tokens"),
        ("svd dropped", "svd_8_tokens"),
        ("svd dropped", "svd_full_rank"),
        ("frobenius dropped", "frobenius_3_chunks_sequential"),
        ("smallest directions kept", "svd_24_tokens"),
        ("smallest directions kept", "svd_state_16_by_12"),
    ],
)
def test_a_mistake_in_the_maths_breaks_parity(mistake, case, lm, recorded, monkeypatch):
    monkeypatch.setitem(*MISTAKES[mistake])
    computed, expected = ours(case, lm, recorded), theirs(case, recorded)
    for name in ("delta", "logits"):
        assert largest_difference(computed[name], expected[name]) > 100 * TOLERANCE, name
