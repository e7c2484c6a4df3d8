"""The baseline that keeps of a text the keys and values of a few trained tokens behind it (gist tokens); with none of them, prompting that was trained."""

import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate, chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .formats import BadGenerator, refuse_foreign, save_tensors, whole_folder
from .models import fingerprint, last_tokens, load_lm, padded, window
from .tasks import question_prompt
from .training import RECIPES, Recipe, Source, answers, write_csv

NOTHING, TEXT, GIST, QUESTION = range(-1, 3)  # what a place of a row holds; the questions count on from QUESTION
LORA_RANK = 32
TOKENS, CARD = "gist.safetensors", "gist.json"

GISTS: dict[str, tuple[Recipe, int]] = {f"toy-gist-{count}": (RECIPES["toy"], count) for count in (1, 4, 16, 64)}
GISTS["tuned-prompting"] = (RECIPES["facts"], 0)


class Gist(nn.Module):
    """An LM with a trained LoRA that reads  text, gist tokens, questions,  where a question sees the gist tokens and itself alone.

    What is kept of a text are the keys and values of the gist tokens (Mu et al. 2023). With no gist tokens a question sees the text:
    prompting, with a LoRA that has learned how to answer.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Float[Tensor, "g h"]):
        super().__init__()
        self.lm, self.tokens = lm, nn.Parameter(tokens)
        self.tokenizer = tokenizer

    def read(self, texts: list[list[int]], asked: list[list[list[int]]]) -> tuple[Float[Tensor, "b n h"], Int[Tensor, "b n"]]:
        """The last hidden state of every place of every row, and what the place holds: a text, the gist tokens, all questions about it."""
        count = len(self.tokens)
        rows, holds, places = [], [], []
        for text, questions in zip(texts, asked, strict=True):
            begin = len(text) + count
            rows.append([*text, *[0] * count, *chain(*questions)])
            holds.append([TEXT] * len(text) + [GIST] * count + [n for n, tokens in enumerate(questions, QUESTION) for _ in tokens])
            places.append([*range(begin), *(begin + place for tokens in questions for place in range(len(tokens)))])
        device = self.tokens.device
        ids, holds, places = (padded(what, pad)[0].to(device) for what, pad in ((rows, 0), (holds, NOTHING), (places, 0)))
        embedded = self.lm.get_input_embeddings()(ids)
        embedded[holds == GIST] = self.tokens.repeat(len(rows), 1).to(embedded)

        to, of = holds[:, :, None], holds[:, None, :]
        seen = (to == of) | (to == GIST) & (of == TEXT) | (to >= QUESTION) & (of == (GIST if count else TEXT))
        seen &= torch.ones_like(seen[0]).tril()
        mask = torch.zeros_like(seen, dtype=embedded.dtype).masked_fill(~seen, torch.finfo(embedded.dtype).min)[:, None]
        backbone = self.lm.get_base_model().base_model
        return backbone(inputs_embeds=embedded, attention_mask=mask, position_ids=places, use_cache=False).last_hidden_state, holds

    def logits(self, hidden: Float[Tensor, "k h"]) -> Float[Tensor, "k v"]:
        """What comes after a place."""
        return self.lm.get_output_embeddings()(hidden).float()

    def forward(self, documents: list, rngs: list[random.Random], asked: int = 4) -> Float[Tensor, ""]:
        """The mean loss (nats a token) of answers about the documents, the recipe's objective `answers`."""
        texts = [self.tokenizer(document.text).input_ids for document in documents]
        targets = [answers(d, [ids], self.tokenizer, rng, asked)[0] for d, ids, rng in zip(documents, texts, rngs, strict=True)]
        hidden, holds = self.read(texts, [[target.tokens for target in of_document] for of_document in targets])
        said = [[place >= target.start for target in of_document for place in range(len(target.tokens))] for of_document in targets]
        rows, places = (holds >= QUESTION).nonzero().T
        wanted = torch.tensor([*chain(*said)], device=hidden.device)
        following = torch.tensor([t for of_document in targets for target in of_document for t in target.tokens], device=hidden.device)[wanted]
        return cross_entropy(self.logits(hidden[rows[wanted], places[wanted] - 1]), following)

    @torch.no_grad()
    def answer(self, text: str, questions: Sequence[str], new_tokens: int) -> list[str]:
        """Greedy answers to questions about a text, up to the first line break."""
        prompts, over = [self.tokenizer(question_prompt(question)).input_ids for question in questions], {*last_tokens(self.tokenizer)}
        room = window(self.lm) - len(self.tokens) - new_tokens - max(map(len, prompts))  # of a longer text, the end
        text_ids, said = self.tokenizer(text).input_ids[-room:], [[] for _ in prompts]
        for _ in range(new_tokens):
            asked = [prompt + tokens for prompt, tokens in zip(prompts, said, strict=True)]
            hidden, _ = self.read([text_ids], [asked])
            ends = torch.tensor([*accumulate(map(len, asked))]) + len(text_ids) + len(self.tokens) - 1
            for tokens, token in zip(said, self.logits(hidden[0, ends]).argmax(-1).tolist(), strict=True):
                if not over.intersection(tokens):
                    tokens.append(token)
            if all(over.intersection(tokens) for tokens in said):
                break
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip().split("\n")[0] for tokens in said]


def train_gist(name: str, out: str | Path, lm_name: str, steps: int) -> dict[str, float]:
    """Train gist tokens and LoRA on the documents and questions of a recipe for so many steps, and leave them in the folder `out`."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict  # takes seconds to import

    refuse_foreign(out, CARD)
    recipe, count = GISTS[name]
    accelerator = Accelerator()
    set_seed(recipe.seed)
    lm, tokenizer = load_lm(lm_name, getattr(torch, recipe.precision))
    begin = lm.get_input_embeddings().weight[torch.randint(len(tokenizer), (count,))].float()
    peft = get_peft_model(lm, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", fan_in_fan_out=lm.config.model_type == "gpt2"))
    gist = Gist(peft, tokenizer, begin)
    source, log = Source(recipe), []
    optimizer = torch.optim.AdamW([p for p in gist.parameters() if p.requires_grad], recipe.learning_rate, recipe.betas, weight_decay=recipe.weight_decay)
    gist, optimizer = accelerator.prepare(gist, optimizer)
    for step in (bar := tqdm(range(steps), desc=name, unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min((step + 1) / recipe.warmup, 1.0, 2 * (1.05 - step / steps))
        loss = gist(*source.batch(step), recipe.asked)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(gist.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step + 1, "contexts": (step + 1) * recipe.contexts, "loss": round(loss.item(), 4)})
        bar.set_postfix(log[-1])
    gist = accelerator.unwrap_model(gist)
    card = {"lm": {"name": lm_name, "fingerprint": fingerprint(lm)}, "recipe": name, "settings": asdict(recipe), "steps": steps}
    lora = gist.lm.peft_config["default"]
    lora.base_model_name_or_path = lm_name
    with whole_folder(out) as scratch:
        lora.save_pretrained(scratch)
        save_tensors({k: v.bfloat16() for k, v in get_peft_model_state_dict(gist.lm).items()}, scratch / "adapter_model.safetensors")
        save_tensors({"tokens": gist.tokens}, scratch / TOKENS)
        (scratch / CARD).write_text(json.dumps(card, indent=1) + "\n")
        write_csv(scratch / "log.csv", log)
    return log[-1]


def load_gist(folder: str | Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Gist:
    """A trained gist; the LM has its LoRA from then on, until `gist.lm.unload()`."""
    from peft import PeftModel

    folder = Path(folder)
    try:
        made_for = json.loads((folder / CARD).read_text())["lm"]
    except (OSError, ValueError, KeyError):
        raise BadGenerator(f"{folder}: no gist found there; name the folder that `train` wrote, by one of the recipes {[*GISTS]}") from None
    if made_for["fingerprint"] != fingerprint(lm):
        raise BadGenerator(f"{folder}: made for the LM {made_for['name']}, another one was given; load that, or train one for this")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about names within transformers, which peft still uses
        peft = PeftModel.from_pretrained(lm, folder)
    return Gist(peft, tokenizer, load_file(folder / TOKENS)["tokens"]).eval()


def count_tokens(folder: str | Path) -> int:
    """How many gist tokens a folder has."""
    return len(load_file(Path(folder) / TOKENS)["tokens"])
