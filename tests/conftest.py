"""For all tests: no network, one thread, tiny random language models, and the shapes that minigen.generator announces, enforced."""

# ruff: noqa: E402   the hook has to come before the imports it checks
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping

jaxtyping.install_import_hook("minigen.generator", "beartype.beartype")  # before anything imports minigen

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config

from minigen.generator import AdapterGenerator, GeneratorConfig
from minigen.tasks import DATA

torch.set_num_threads(1)
hypothesis.settings.register_profile("deterministic", derandomize=True, database=None, deadline=None, max_examples=50)
hypothesis.settings.load_profile("deterministic")

VOCABULARY = 61
LLAMA_LIKE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)
FAMILIES = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "mistral": MistralConfig(**LLAMA_LIKE),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3),
}


@pytest.fixture
def tiny_lm():
    """A function: the name of a family -> a tiny LM of it with random weights, the same ones each time."""

    def build(family: str):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(FAMILIES[family]).eval().requires_grad_(False)

    return build


@pytest.fixture
def llama(tiny_lm):
    return tiny_lm("llama")


@pytest.fixture(params=FAMILIES)
def any_lm(request, tiny_lm):
    """A tiny LM of each family in turn."""
    return tiny_lm(request.param)


@pytest.fixture(scope="session")
def generator_for():
    """A function: an LM and settings -> a generator with random weights, as if trained (A1 is not zero)."""

    def build(lm, **settings) -> AdapterGenerator:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            generator = AdapterGenerator.for_lm(lm, GeneratorConfig(**{"p": 16, "q": 12, "rank": 4, "alpha": 16.0, "chunk": 8} | settings))
            for layer in generator.by_layer:
                torch.nn.init.normal_(layer.norm, mean=1.0, std=0.1)
                torch.nn.init.normal_(layer.A1, std=0.2)
                if layer.gate is not None:
                    torch.nn.init.normal_(layer.gate, std=0.3)
        return generator.requires_grad_(False)

    return build


@pytest.fixture
def random():
    """A function: sizes -> a random tensor (randn), the same sequence in every test."""
    source = torch.Generator().manual_seed(2)
    return lambda *sizes, **kwargs: torch.randn(*sizes, generator=source, **kwargs)


@pytest.fixture
def tokens():
    """A function: sizes -> random token ids, the same sequence in every test."""
    source = torch.Generator().manual_seed(3)
    return lambda *sizes: torch.randint(VOCABULARY, sizes, generator=source)


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory):
    """A folder that load_lm takes: a tiny Llama with random weights, a window of 256 tokens, and a byte-level BPE of 400 tokens."""
    folder = tmp_path_factory.mktemp("lm")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator((DATA / "documents" / "dev.jsonl").read_text("utf-8").splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(vocab_size=400, num_hidden_layers=2, max_position_embeddings=256, initializer_range=0.1)
        AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_LIKE | sizes)).save_pretrained(folder)
    return folder
