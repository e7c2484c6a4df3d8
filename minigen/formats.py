"""What leaves and enters: generator folders (safetensors and JSON), PEFT LoRA folders, the authors' checkpoints. Nothing is ever half-written."""

import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from errno import EEXIST
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .generator import AdaptedLayer, Adapter, AdapterGenerator, GeneratorConfig
from .models import fingerprint

WEIGHTS, CARD = "generator.safetensors", "generator.json"


class BadGenerator(ValueError):
    """A generator folder that cannot be used; its message says what was found and what to do."""


@contextmanager
def whole_folder(target: str | Path):
    """A scratch folder that replaces `target` when the block ends well, and disappears when it does not (full disk, kill)."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            try:
                os.replace(target, replaced / target.name)
                os.replace(scratch, target)
            finally:
                if not target.exists():
                    os.replace(replaced / target.name, target)
                shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_file(target: str | Path):
    """A scratch file that replaces `target` when the block ends well, and disappears when it does not."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        yield scratch
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def refuse_foreign(folder: str | Path, mark: str) -> None:
    """FileExistsError for a folder that would be replaced whole, and holds files, but not the one by which an earlier result is known."""
    folder = Path(folder)
    if folder.exists() and not (folder / mark).exists() and (folder.is_file() or any(folder.iterdir())):
        raise FileExistsError(EEXIST, f"holds other files; name a new folder, or one with an earlier result ({mark}) to replace", str(folder))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file; a full disk is an OSError, as everywhere else."""
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from None


def save_generator(
    folder: str | Path, generator: AdapterGenerator, lm: PreTrainedModel, lm_name: str, provenance: dict, dtype: torch.dtype = torch.bfloat16
) -> None:
    """A generator folder: its weights, and a card with its settings, its layers, its LM's fingerprint and where it came from."""
    card = {
        "lm": {"name": lm_name, "fingerprint": fingerprint(lm)},
        "config": asdict(generator.config),
        "layers": [asdict(layer) for layer in generator.layers],
        "provenance": provenance,
    }
    refuse_foreign(folder, CARD)
    with whole_folder(folder) as scratch:
        save_tensors({k: v.to(dtype) for k, v in generator.state_dict().items()}, scratch / WEIGHTS)
        (scratch / CARD).write_text(json.dumps(card, indent=1) + "\n")


def load_generator(folder: str | Path, lm: PreTrainedModel | None = None) -> AdapterGenerator:
    """The generator in a folder, in fp32.   lm: if given, checked to be the one that it was made for.

    Raises BadGenerator for a missing, truncated or foreign file, shapes that do not fit, weights that are not finite, another LM.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / CARD).read_text())
        config = GeneratorConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in card["config"].items()})
        layers = [AdaptedLayer(**layer) for layer in card["layers"]]
        made_for = card["lm"]
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise BadGenerator(f"{folder}: {Path(error.filename or WEIGHTS).name} is missing; name a folder made by `minigen train`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadGenerator(f"{folder / CARD}: not a generator's card ({error}); name a folder made by `minigen train`") from None
    except SafetensorError as error:
        raise BadGenerator(f"{folder / WEIGHTS}: truncated or not safetensors ({error}); fetch or train it again") from None
    generator = AdapterGenerator(config, layers)
    check_weights(folder / WEIGHTS, generator, weights)
    generator.load_state_dict({k: v.float() for k, v in weights.items()})
    if lm is not None and fingerprint(lm) != made_for["fingerprint"]:
        raise BadGenerator(
            f"{folder}: made for {made_for['name']} ({made_for['fingerprint']}), but the LM given is another one ({fingerprint(lm)}); "
            f"use --lm {made_for['name']}, or a generator trained for this LM"
        )
    return generator.eval().requires_grad_(False)


OFFICIAL_NAMES = {"A1": "B2", "A2": "B1", "A3": "A2", "B": "A1", "hidden_state_norm": "norm"}  # theirs -> the paper's
OFFICIAL_KEY = re.compile(r"base_model\.model\.(.+?\.\d+)\.base_layer\.(.+)\.fastlora_(\w+)\.weight")
OFFICIAL_METHOD = {"peft_type": "FASTLORA", "fastlora_arch": "aassbb", "fastlora_merge": "pre-norm-sum", "fastlora_gist_len": 0, "lora_r": 0}
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def official_config(folder: str | Path) -> dict:
    """The settings of a checkpoint of the authors, refused where they are of another method or its weights are pickled."""
    folder = Path(folder)
    try:
        found = json.loads((folder / "adapter_config.json").read_text())
        odd = [name for name, value in OFFICIAL_METHOD.items() if found[name] != value]
        if not isinstance(base := found["base_model_name_or_path"], str):
            raise TypeError(f"base_model_name_or_path is {base!r}")
    except FileNotFoundError:
        raise BadGenerator(f"{folder}: adapter_config.json is missing; name the folder of one of the authors' checkpoints") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadGenerator(f"{folder / 'adapter_config.json'}: not a checkpoint of the authors ({error}); name the folder of one") from None
    if odd:
        raise BadGenerator(f"{folder}: {odd[0]} is {found[odd[0]]!r}, {OFFICIAL_METHOD[odd[0]]!r} is needed; this is another method's checkpoint")
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED):
        raise BadGenerator(f"{folder}: {pickled[0]} is a pickle, which can run code when opened; only safetensors are read, so take it out of the folder")
    return found


def import_official(folder: str | Path, lm: PreTrainedModel) -> AdapterGenerator:
    """A checkpoint of the authors as a generator for its LM, in the dtype of the checkpoint.

    Their A1, A2, A3, B are the paper's B2, B1^T, A2, A1; r = d_r stands for p, the inter size for q, the maximal rank for the rank kept.
    Chunks are read in sequence, as in their training and evaluation.

    Raises BadGenerator for pickled weights, another method, another LM, a layer too few or too many, shapes that contradict the settings.
    """
    folder, settings = Path(folder), official_config(folder)
    try:
        config = GeneratorConfig(
            targets=tuple(settings["fastlora_param"]),
            p=settings["fastlora_r"],
            q=settings["fastlora_inter_size"],
            rank=settings["fastlora_max_rank"],
            alpha=float(settings["fastlora_alpha"]),
            norm=settings["fastlora_norm"],
            encode="sequential",
            chunk=settings["fastlora_window"],
        )
        generator = AdapterGenerator.for_lm(lm, config)
        stored = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError:
        raise BadGenerator(f"{folder}: adapter_model.safetensors is missing; fetch it again") from None
    except SafetensorError as error:
        raise BadGenerator(f"{folder / 'adapter_model.safetensors'}: truncated or not safetensors ({error}); fetch it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadGenerator(f"{folder / 'adapter_config.json'}: settings that cannot be used ({error}); fetch it again") from None
    place = {layer.name: n for n, layer in enumerate(generator.layers)}
    weights = {}
    for key, value in stored.items():
        parts = OFFICIAL_KEY.fullmatch(key)
        layer = place.get(f"{parts[1]}.{parts[2]}") if parts else None
        if layer is None or parts[3] not in OFFICIAL_NAMES:
            raise BadGenerator(f"{folder}: holds {key}, which {config.targets} of this {type(lm).__name__} has no place for; is it for another LM?")
        weights[f"by_layer.{layer}.{OFFICIAL_NAMES[parts[3]]}"] = value.T if parts[3] == "A2" else value
    check_weights(folder / "adapter_model.safetensors", generator, weights)
    generator.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return generator.eval().requires_grad_(False)


def check_weights(path: Path, generator: AdapterGenerator, weights: dict[str, Tensor]) -> None:
    """BadGenerator where a tensor is missing, superfluous, of another shape, or not finite."""
    wanted = {k: tuple(v.shape) for k, v in generator.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in weights.items()}
    if wanted != found:
        odd = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))[0]
        raise BadGenerator(f"{path}: {odd} is {found.get(odd, 'missing')}, the settings ask for {wanted.get(odd, 'no such tensor')}; fetch it again")
    if bad := [k for k, v in weights.items() if not v.isfinite().all()]:
        raise BadGenerator(f"{path}: {bad[0]} holds NaN or infinite values; fetch or train it again")


def save_peft(adapter: Adapter, folder: str | Path, lm: PreTrainedModel) -> None:
    """One adapter as a PEFT LoRA folder:   lora_A = down (r x i), lora_B = up (o x r), lora_alpha / r = scale"""
    if adapter.batch != 1:
        raise ValueError(f"a LoRA folder holds one adapter, this holds {adapter.batch}; choose a row first: adapter[[0]]")
    refuse_foreign(folder, "adapter_config.json")
    rank = next(iter(adapter.down.values())).shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.config.name_or_path,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(type(lm.get_submodule(name)).__name__ == "Conv1D" for name in adapter.down),
        "target_modules": list(adapter.down),
        "inference_mode": True,
    }
    tensors = {}
    for name in adapter.down:
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.down[name][0]
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.up[name][0]
    with whole_folder(folder) as scratch:
        save_tensors(tensors, scratch / "adapter_model.safetensors")
        (scratch / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
