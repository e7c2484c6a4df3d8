"""minigen.bench: what is measured is what was meant. No test asserts a time."""

from dataclasses import replace

import pytest
import torch

from minigen.bench import TRICKS, bench_norms, bench_training, peak_memory, tensor_memory
from minigen.evaluation import Reader
from minigen.models import load_lm
from minigen.training import RECIPES


@pytest.fixture(scope="module")
def small(lm_folder, generator_for):
    lm, tokenizer = load_lm(str(lm_folder))
    return Reader(lm, tokenizer, generator_for(lm), wording="plain")


def test_bench_norms_measures_error_and_time_of_each(small):
    rows = bench_norms(small, "The lamp is red. Ada sells tea in Oslo. Nobody saw the boat.", shapes=[(2, 48, 8)], repeats=1)
    by_spectrum = {}
    for row in rows:
        by_spectrum.setdefault(row["sizes"]["spectrum"], {})[row["name"]] = row
    assert len(by_spectrum) == 4
    for found in by_spectrum.values():
        assert found["svd / svd"]["ratio"] == 1 and found["svd / svd"]["error"] < 1e-3 > found["polar / svd"]["error"] / 2
        assert found["svd_lowrank 1 / svd"]["error"] > found["svd_lowrank 16 / svd"]["error"]
        assert found["polar backward / svd backward"]["numerator"] > 0 and "error" not in found["polar backward / svd backward"]


def test_bench_training_takes_away_one_trick_at_a_time():
    recipe = replace(RECIPES["toy"], contexts=2, config=replace(RECIPES["toy"].config, blocks=(1, 2)))
    rows = bench_training("toy", recipe, repeats=1)
    assert [row["name"].removeprefix("contexts a minute, with / without ") for row in rows] == [*TRICKS]
    assert len({row["numerator"] for row in rows}) == 1 and all(row["denominator"] > 0 for row in rows)


def test_peak_memory_sees_what_is_let_go_again():
    size = 2**26
    before = peak_memory(lambda: None, torch.device("cpu"))
    assert peak_memory(lambda: torch.ones(size, dtype=torch.uint8).sum(), torch.device("cpu")) - before > 0.9 * size


def test_tensor_memory_is_the_most_that_was_held_at_a_time():
    given = torch.ones(1000)

    def work():
        first = given + 1  # 4,000 bytes
        second = (first * 2).view(10, 100).T  # views cost nothing
        first = first.add_(1)[:1]  # nor what is done in place
        del second
        return torch.cat([first, given, given, given])  # 12,004 bytes beside the first

    assert tensor_memory(work) == 16_004
    assert tensor_memory(lambda: given[None].T) == 0


def test_of_a_longer_stream_nothing_is_held_but_its_tokens(small):
    hidden_state = 4 * small.lm.config.hidden_size  # bytes a token

    def held(length: int) -> int:
        return tensor_memory(lambda: small.generator.read(small.lm, torch.ones(1, length, dtype=torch.long)))

    assert held(512) - held(16) < (512 - 16) * hidden_state / 3
