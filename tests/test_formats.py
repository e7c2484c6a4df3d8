"""minigen.formats: what is saved comes back, what is broken is refused in one line, and nothing is ever half-written."""

import json
import os
import re
import signal
import subprocess
import sys
from errno import ENOSPC
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minigen import formats
from minigen.formats import (
    CARD,
    OFFICIAL_NAMES,
    WEIGHTS,
    BadGenerator,
    import_official,
    load_generator,
    save_generator,
    save_peft,
    whole_file,
    whole_folder,
)
from minigen.generator import AdapterGenerator, weight_matrix
from minigen.models import fingerprint

ROOT = Path(__file__).parent.parent


@pytest.fixture
def saved(llama, generator_for, tmp_path):
    """A generator's folder, made for the tiny Llama."""
    folder = tmp_path / "generator"
    save_generator(folder, generator_for(llama), llama, "tiny", {"steps": 3})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------ there and back


def test_a_generator_comes_back_rounded_to_bf16(llama, generator_for, saved, tokens):
    generator, loaded = generator_for(llama), load_generator(saved, llama)
    assert (loaded.config, loaded.layers) == (generator.config, generator.layers)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    for (name, ours), (same_name, theirs) in zip(generator.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == same_name and theirs.dtype == torch.float32
        assert torch.equal(ours.bfloat16().float(), theirs)
    ids = tokens(1, 19)
    assert torch.equal(loaded.read(llama, ids).S, load_generator(saved).read(llama, ids).S)


def test_the_card_says_what_it_is(llama, saved):
    card = json.loads((saved / CARD).read_text())
    assert card["lm"] == {"name": "tiny", "fingerprint": fingerprint(llama)}
    assert card["config"]["p"] == 16 and card["layers"][0]["name"] == "model.layers.0.self_attn.o_proj" and card["provenance"] == {"steps": 3}
    assert content(saved).keys() == {CARD, WEIGHTS} and saved.stat().st_mode & 0o055 == 0o055


# ------------------------------------------------------------------------------------------------------ refused


def change_card(change):
    def damage(folder):
        card = json.loads((folder / CARD).read_text())
        change(card)
        (folder / CARD).write_text(json.dumps(card))

    return damage


def change_weights(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def drop_last_layer(tensors):
    for name in [name for name in tensors if name.startswith("by_layer.2.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CARD).unlink(), f"{CARD} is missing; name a folder"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing; name a folder"),
        (lambda folder: (folder / CARD).write_text('{"lm": '), f"{CARD}: not a generator's card"),
        (lambda folder: (folder / CARD).write_text("[]"), f"{CARD}: not a generator's card"),
        (lambda folder: (folder / CARD).write_bytes(b"\xff"), f"{CARD}: not a generator's card"),
        (change_card(lambda card: card.pop("layers")), f"{CARD}: not a generator's card .'layers'"),
        (change_card(lambda card: card["config"].update(colour="red")), f"{CARD}: not a generator's card .*colour"),
        (change_card(lambda card: card["config"].update(norm="new")), f"{CARD}: .*norm='new' asked"),
        (truncate, f"{WEIGHTS}: truncated or not safetensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: truncated or not safetensors"),
        (lambda folder: (folder / WEIGHTS).write_text("no tensors here"), f"{WEIGHTS}: truncated or not safetensors"),
        (lambda folder: save_file({"lm_head.weight": torch.zeros(2)}, folder / WEIGHTS), f"{WEIGHTS}: .* the settings ask for"),
        (change_weights(lambda t: t.update({"by_layer.1.A2": torch.zeros(32, 16)})), r"by_layer.1.A2 is \(32, 16\), the settings ask for \(16, 32\)"),
        (change_weights(drop_last_layer), r"by_layer.2.A1 is missing, the settings ask for \(32, 16\)"),
        (
            change_weights(lambda t: t.update({"by_layer.3.A1": torch.zeros(32, 16)})),
            r"by_layer.3.A1 is \(32, 16\), the settings ask for no such tensor",
        ),
        (change_card(lambda card: card["layers"].pop()), r"by_layer.2.A1 is \(32, 16\), the settings ask for no such tensor"),
        (change_weights(lambda t: t["by_layer.1.B2"].__setitem__((3, 5), torch.nan)), "by_layer.1.B2 holds NaN or infinite"),
        (change_weights(lambda t: t["by_layer.0.norm"].__setitem__(0, torch.inf)), "by_layer.0.norm holds NaN or infinite"),
    ],
)
def test_a_damaged_folder_is_refused(damage, message, saved, llama):
    load_generator(saved, llama)
    damage(saved)
    with pytest.raises(BadGenerator, match=message) as refusal:
        load_generator(saved, llama)
    assert str(saved) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(BadGenerator, match=f"nowhere: {CARD} is missing; name a folder made by `minigen train`"):
        load_generator(tmp_path / "nowhere")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gpt2"])
def test_another_lm_is_refused(family, saved, tiny_lm, llama):
    with pytest.raises(BadGenerator, match=f"made for tiny .{fingerprint(llama)}.*use --lm tiny"):
        load_generator(saved, tiny_lm(family))


def test_the_fingerprint_tells_lms_apart_but_not_dtypes(any_lm, tiny_lm):
    family = any_lm.config.model_type
    original = fingerprint(any_lm)
    assert original == fingerprint(tiny_lm(family)) == fingerprint(tiny_lm(family).bfloat16())
    assert [original] == [f for f in map(fingerprint, map(tiny_lm, ["llama", "mistral", "qwen2", "gpt2"])) if f == original]
    any_lm.get_input_embeddings().weight[0, 0] += 1
    assert fingerprint(any_lm) != original


# ---------------------------------------------------------------------------------------------- never half-written


def full_disk(tensors, path, **kwargs):
    Path(path).write_bytes(b"the first")
    raise OSError(ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_generator(saved, llama, generator_for, monkeypatch):
    before = content(saved)
    monkeypatch.setattr(formats, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_generator(saved, generator_for(llama), llama, "other", {})
    assert content(saved) == before and list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("raised", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("whole", [whole_folder, whole_file])
def test_an_exception_leaves_what_was_there(whole, raised, existing, tmp_path):
    target, folder = tmp_path / "target", whole is whole_folder

    def write(path: Path, text: str) -> None:
        (path / "file" if folder else path).write_text(text)

    if existing:
        with whole(target) as scratch:
            write(scratch, "old")
    with pytest.raises(raised), whole(target) as scratch:
        write(scratch, "new")
        raise raised
    assert list(tmp_path.iterdir()) == [target] * existing
    if existing:
        assert (target / "file" if folder else target).read_text() == "old"
        with whole(target) as scratch:
            write(scratch, "new")
        assert (target / "file" if folder else target).read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_an_exception_while_folders_are_swapped_leaves_the_old_one(saved, llama, generator_for, monkeypatch):
    before, replace = content(saved), os.replace

    def fails_on_the_way_in(source, target):
        if Path(target) == saved and Path(source).name != saved.name:
            raise OSError(ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_on_the_way_in)
    with pytest.raises(OSError, match="No space left"):
        save_generator(saved, generator_for(llama), llama, "other", {})
    assert saved.is_dir() and content(saved) == before


KILLED = """
import os, signal, sys
from minigen import formats
with formats.whole_folder(sys.argv[1]) as folder, formats.whole_file(sys.argv[2]) as file:
    (folder / "generator.json").write_text("new, half")
    file.write_text("new, half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_a_killed_process_leaves_the_old_content(saved, llama, tmp_path):
    before, file = content(saved), tmp_path / "result.json"
    file.write_text("old")
    process = subprocess.run([sys.executable, "-c", KILLED, str(saved), str(file)], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    assert content(saved) == before and file.read_text() == "old"
    load_generator(saved, llama)


# ------------------------------------------------------------------------------------------------------ PEFT


@pytest.fixture
def adapter(tiny_lm, generator_for, tokens):
    """A function: an LM and a batch size -> adapters of random contexts."""

    def write(lm, batch=1, **settings):
        generator: AdapterGenerator = generator_for(lm, **settings)
        return generator.write(generator.read(lm, tokens(batch, 19)))

    return write


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ("self_attn.o_proj",)), ("llama", ("mlp.down_proj", "q_proj")), ("gpt2", ("attn.c_proj",)), ("gpt2", ("mlp.c_proj",))],
)
def test_peft_gives_the_logits_of_the_hooked_lm(family, targets, tiny_lm, adapter, tokens, tmp_path):
    lm, query = tiny_lm(family), tokens(2, 7)
    one = adapter(lm, targets=targets)
    save_peft(one, tmp_path / "lora", lm)
    with one.applied_to(lm):
        hooked = lm(query).logits
    assert (hooked - lm(query).logits).abs().max() > 0.1

    loaded = peft.PeftModel.from_pretrained(tiny_lm(family), tmp_path / "lora")
    assert_close(loaded(query).logits, hooked, atol=1e-4, rtol=0)
    merged = loaded.merge_and_unload()
    assert_close(merged(query).logits, hooked, atol=1e-4, rtol=0)
    for name in one.down:
        assert_close(weight_matrix(merged.get_submodule(name)), weight_matrix(lm.get_submodule(name)) + one.delta(name)[0])


def test_the_loras_of_two_texts_add_up_in_peft(llama, tiny_lm, adapter, tokens, tmp_path):
    both, query = adapter(llama, batch=2), tokens(2, 7)
    save_peft(both[[0]], tmp_path / "first", llama)
    save_peft(both[[1]], tmp_path / "second", llama)
    with both[[0]].applied_to(llama), both[[1]].applied_to(llama):
        hooked = llama(query).logits
    loaded = peft.PeftModel.from_pretrained(tiny_lm("llama"), tmp_path / "first", adapter_name="first")
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    loaded.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type="cat")
    loaded.set_adapter("both")
    assert loaded.peft_config["both"].r == 2 * loaded.peft_config["first"].r
    assert_close(loaded(query).logits, hooked, atol=1e-4, rtol=0)


def test_a_lora_folder_is_laid_out_as_servers_read_it(llama, adapter, tmp_path):
    """What vLLM's --enable-lora looks at: two files, rank and alpha, and names that end in the modules' own."""
    save_peft(adapter(llama), tmp_path / "lora", llama)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and not config.get("use_dora") and not config.get("modules_to_save")
    modules = {name for name, _ in llama.named_modules()}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        module, side = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name).groups()
        assert module in modules and tensor.shape[side == "lora_B"] == config["r"] <= 128
    assert len(tensors) == 2 * len(config["target_modules"])


def test_a_batch_of_two_is_no_lora_folder(llama, adapter, tmp_path):
    two = adapter(llama, batch=2)
    with pytest.raises(ValueError, match=r"one adapter, this holds 2; choose a row first: adapter\[\[0\]\]"):
        save_peft(two, tmp_path / "lora", llama)
    assert not (tmp_path / "lora").exists()
    save_peft(two[[1]], tmp_path / "lora", llama)


def test_a_lora_folder_never_replaces_other_peoples_files(llama, adapter, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    with pytest.raises(OSError):
        save_peft(adapter(llama), tmp_path / "mine", llama)
    assert (tmp_path / "mine" / "thesis.txt").exists()


# ------------------------------------------------------------------------------------- the authors' checkpoints

TARGETS = ("self_attn.o_proj", "mlp.down_proj")
SETTINGS = {
    "peft_type": "FASTLORA",
    "base_model_name_or_path": "somewhere/base",
    "fastlora_arch": "aassbb",
    "fastlora_merge": "pre-norm-sum",
    "fastlora_gist_len": 0,
    "lora_r": 0,
    "fastlora_param": list(TARGETS),
    "fastlora_r": 12,
    "fastlora_inter_size": 16,
    "fastlora_max_rank": 5,
    "fastlora_alpha": 6,
    "fastlora_norm": "svd",
    "fastlora_window": 8,
}
WITHOUT_RANK = {name: value for name, value in SETTINGS.items() if name != "fastlora_max_rank"}
ONE = "base_model.model.model.layers.1.base_layer.mlp.down_proj.fastlora_A3.weight"


@pytest.fixture
def mistral(tiny_lm):
    return tiny_lm("mistral")


@pytest.fixture
def reference(mistral, generator_for):
    """A generator of two targets with sides of different sizes, read in chunks of 8 tokens one after the other."""
    return generator_for(mistral, targets=TARGETS, p=12, q=16, rank=5, alpha=6.0, encode="sequential", chunk=8)


@pytest.fixture
def official(reference, tmp_path):
    """The same generator as the authors' code would have saved it."""
    folder, theirs = tmp_path / "official", {ours: theirs for theirs, ours in OFFICIAL_NAMES.items()}
    folder.mkdir()
    tensors = {}
    for layer, parameters in zip(reference.layers, reference.by_layer, strict=True):
        at = f"base_model.model.{layer.block}.base_layer.{layer.name.removeprefix(layer.block + '.')}"
        for name, value in parameters.named_parameters():
            tensors[f"{at}.fastlora_{theirs[name]}.weight"] = (value.T if name == "B1" else value).detach().contiguous()
    assert ONE in tensors
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    return folder


def test_an_official_checkpoint_is_the_generator_that_it_was(official, reference, mistral, tokens):
    imported = import_official(official, mistral)
    assert (imported.config, imported.layers) == (reference.config, reference.layers)
    assert all(torch.equal(value, imported.state_dict()[name]) for name, value in reference.state_dict().items())
    ids = tokens(2, 21)
    ours, theirs = (generator.write(generator.read(mistral, ids)) for generator in (imported, reference))
    for layer in reference.layers:
        assert_close(ours.delta(layer.name), theirs.delta(layer.name))


def settings(**changes):
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | changes))


def stored(change):
    def damage(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


REFUSED = {
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "settings are no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not a checkpoint of the authors"),
    "a LoRA": (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "not a checkpoint of the authors.*fastlora_arch"),
    "another method": (settings(fastlora_merge="mean"), "fastlora_merge is 'mean', 'pre-norm-sum' is needed"),
    "an unknown norm": (settings(fastlora_norm="cubic"), "settings that cannot be used.*cubic.*only"),
    "no rank": (lambda folder: (folder / "adapter_config.json").write_text(json.dumps(WITHOUT_RANK)), "cannot be used .'fastlora_max_rank'"),
    "a rank above the state": (settings(fastlora_max_rank=13), "rank=13 asked of a 12 x 16 state"),
    "an unknown layer": (settings(fastlora_param=["mlp.magic"]), "mlp.magic.*has none"),
    "sides swapped": (settings(fastlora_r=16, fastlora_inter_size=12), r"by_layer.0.A1 is \(32, 12\), the settings ask for \(32, 16\)"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "truncated weights": (lambda folder: os.truncate(folder / "adapter_model.safetensors", 500), "truncated or not safetensors"),
    "a pickle": (lambda folder: (folder / "adapter_model.bin").write_bytes(b""), "adapter_model.bin is a pickle.*only safetensors"),
    "a parameter missing": (stored(lambda tensors: tensors.pop(ONE)), r"by_layer.3.A2 is missing"),
    "a target too many": (settings(fastlora_param=["mlp.down_proj"]), "self_attn.o_proj.*has no place for"),
    "a target too few": (settings(fastlora_param=[*TARGETS, "q_proj"]), "by_layer.0.A1 is missing"),
    "a layer too many": (stored(lambda tensors: tensors.update({ONE.replace("layers.1", "layers.9"): torch.ones(12, 32)})), "layers.9.*has no place for"),
    "an unknown parameter": (stored(lambda tensors: tensors.update({ONE.replace("A3", "A7"): torch.ones(2)})), "fastlora_A7.*has no place for"),
    "NaN": (stored(lambda tensors: tensors[ONE].fill_(torch.nan)), "by_layer.3.A2 holds NaN"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_checkpoint_is_refused(damage, message, official, mistral):
    damage(official)
    with pytest.raises(BadGenerator, match=message) as refusal:
        import_official(official, mistral)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_for_an_lm_with_more_blocks_or_other_widths_is_refused(official, mistral):
    for change in ({"num_hidden_layers": 4}, {"num_hidden_layers": 2}, {"hidden_size": 64, "head_dim": 8}):
        another = type(mistral)(type(mistral.config)(**mistral.config.to_dict() | change))
        with pytest.raises(BadGenerator):
            import_official(official, another)
