"""Model directories to score: checked, fingerprinted by the content of their weights, loaded from safetensors only."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.errors import DataError
from configs.files.atomic import MANIFEST, read_json, read_manifest, verify
from configs.run.directory import step_of
from eval.reference.set import ReferenceSet, tokenizer_fingerprint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names
# Kinds of model: transformers' class that makes one, and what people call it.
KINDS = {
    "causal": ("AutoModelForCausalLM", "causal LM"),
    "masked": ("AutoModelForMaskedLM", "masked LM"),
    "classify": ("AutoModelForSequenceClassification", "classifier"),
}
DEQUANTIZE = "dequantize the model and save it anew (transformers: model.dequantize(), then save_pretrained(DIR))"


def auto_model(kind: str) -> Any:
    """transformers' class that makes models of one of `KINDS`."""
    import transformers

    return getattr(transformers, KINDS[kind][0])


def makes(kind: str, model_type: str) -> bool:
    """Whether transformers has a model of one of `KINDS` for a config's `model_type`."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in auto_model(kind)._model_mapping


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's kind, shape and bytes; of any shape [...]."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    # A view as bytes has no dtype that numpy would lack (bf16), and copies nothing.
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_of_digests(digests: dict[str, str]) -> str:
    """Fingerprint of a set of weights, whatever files they are cut into."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face model directory: those that transformers would load.

    Raises:
        DataError: its index is damaged, or a file is missing.
    """
    if (directory / "model.safetensors").is_file():  # it takes this one also where there is an index
        return [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        described = read_json(index)
        weight_map = described.get("weight_map") if isinstance(described, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise DataError(f"{index}: does not say which tensor is in which file (weight_map)")
        files = sorted({directory / name for name in weight_map.values()})
        for file in files:
            if not file.is_file():
                raise DataError(f"{directory}: {file.name} is missing, and {index.name} names it")
        return files
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError(f"{directory}: has no *.safetensors weights (other formats are not loaded)")
    return files


def is_ours(directory: Path) -> bool:
    """Whether Vernier wrote this model directory: by its manifest, or by its place in a run."""
    in_run = directory.parent.name in ("snapshots", "ema") and (directory.parent.parent / "config.yaml").is_file()
    if in_run and step_of(directory.name) is not None:
        return True
    manifest = directory / MANIFEST
    return manifest.is_file() and isinstance(found := read_json(manifest), dict) and found.get("kind") == "snapshot"


def check_model(directory: Path) -> None:
    """Refuses a directory that is not a whole model: ours against its manifest's hashes, any by its files.

    Raises:
        DataError: says which file is wrong, and how; or that the weights are quantized.
    """
    if not directory.is_dir():
        raise DataError(f"model: {directory} is not a directory")
    files = verify(directory, "snapshot")["files"] if is_ours(directory) else None
    if not (directory / "config.json").is_file():
        raise DataError(f"{directory}: not a Hugging Face model directory (it has no config.json)")
    method = quantization(read_json(directory / "config.json"))
    if method is not None:
        raise DataError(
            f"{directory}: its config.json has a quantization_config ({method}), and quantized weights are neither "
            f"trained nor scored; {DEQUANTIZE}, or take the entry out if its weights are not quantized"
        )
    for file in weight_files(directory):
        if files is not None and file.name not in files:
            raise DataError(f"{directory}: {file.name} is not in its {MANIFEST}, so nothing tells whether it is whole")
        with _opened(file) as tensors:  # reads the header, which says how long the file must be
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if "weight" in name and (kind := tensors.get_slice(name).get_dtype()) not in FLOATS:
                    raise DataError(
                        f"{file}: {name} is of type {kind}: quantized weights, which are neither trained nor scored; "
                        f"{DEQUANTIZE}"
                    )


def quantization(config: Any) -> str | None:
    """The method by which a model's weights are quantized, by what its config says; None where they are not."""
    if not isinstance(config, dict):
        return None
    for key in ("quantization_config", "compression_config"):
        if found := config.get(key):
            by = found if isinstance(found, dict) else {}
            if by.get("load_in_4bit") or by.get("load_in_8bit"):
                return str(by.get("quant_method") or "bitsandbytes")
            return str(by.get("quant_method") or by.get("quant_type") or by.get("format") or "of an unnamed method")
    return next((found for part in config.values() if (found := quantization(part)) is not None), None)


def weights_fingerprint(directory: Path) -> str:
    """Fingerprint of the weights in a model directory: from our manifest, else from the tensors themselves."""
    if is_ours(directory):
        found = read_manifest(directory, "snapshot").get("weights")
        if isinstance(found, str):
            return found
    digests = {}
    if (directory / ADAPTER_CONFIG).is_file():
        digests["base"] = weights_fingerprint(adapter_base(directory))
    for file in weight_files(directory):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                digests[name] = tensor_digest(tensors.get_tensor(name))
    return fingerprint_of_digests(digests)


def snapshot_step(directory: Path) -> int | None:
    """The training step that a snapshot of ours was taken after."""
    step = read_manifest(directory, "snapshot").get("step")
    return int(step) if step is not None else None


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise DataError(f"{file}: missing, or no regular file")
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not readable as safetensors, perhaps cut short ({error})") from None


def settings_fingerprint(directory: Path) -> str:
    """Fingerprint of a foreign model's config.json, which makes losses as its weights do; "" for ours, whose manifest
    holds it."""
    if is_ours(directory):
        return ""
    return hashlib.sha256(json.dumps(read_json(directory / "config.json"), sort_keys=True).encode()).hexdigest()


def scored_fingerprint(source: str, dtype: str, settings: str = "") -> str:
    """Fingerprint of a model as scored: the weights of `source`, cast to `dtype`, under its settings."""
    return hashlib.sha256(f"{source} {dtype} {settings}".rstrip().encode()).hexdigest()


def why(error: BaseException) -> str:
    """In one line why transformers did not make a config or model, and what to do where it is clear."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in str(error):
        return "it is made by code of its own; read that code, then say --trust-remote-code"
    if isinstance(error, ImportError):
        return f"{said.partition(' You can')[0].rstrip('.')}; install what it asks for"
    return said


def check_fits(directory: Path, reference: ReferenceSet) -> None:
    """Refuses a model that cannot be scored on `reference`: another tokenizer, or too few positions or tokens."""
    config = read_json(directory / "config.json")
    text = config.get("text_config") or config
    vocabulary = text.get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary < reference.vocab_size:
        raise DataError(
            f"{directory}: its vocabulary has {vocabulary:,} entries, the reference set's tokenizer "
            f"{reference.vocab_size:,}; {_tokenize_again(directory, reference)}"
        )
    if (directory / "tokenizer.json").is_file():
        found = tokenizer_fingerprint(directory)
        if found != reference.tokenizer_fingerprint:
            raise DataError(
                f"{directory}: its tokenizer ({found[:8]}) is not the reference set's "
                f"({reference.tokenizer_fingerprint[:8]}); {_tokenize_again(directory, reference)}"
            )
    for key in ("max_position_embeddings", "n_positions"):
        longest = text.get(key)
        if isinstance(longest, int) and longest < reference.sequence_length:
            raise DataError(
                f"{directory}: takes {longest} tokens ({key}), the reference set's windows have "
                f"{reference.sequence_length}; prepare a reference set with sequence_length={longest} or less"
            )


def _tokenize_again(directory: Path, reference: ReferenceSet) -> str:
    return (
        "tokenize the same documents again: "
        f"vernier prepare --reference {reference.directory} --tokenizer {directory} --out NEW_DIR"
    )


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The Hugging Face config of a model directory.

    Raises:
        DataError: transformers does not know its type, or refuses what it says.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each config class raises its own kinds
        raise DataError(f"{directory}: transformers cannot read its config.json: {why(error)}") from error


def load_for_scoring(directory: Path, dtype: str, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """The model of a checked directory, in `dtype`, on `device`, without gradients.

    Raises:
        DataError: it is no causal LM, or its weights do not fit its config.
    """
    model = load_checked("causal", directory, dtype, trust_remote_code)
    check_causal(directory, model, lambda ids: model(input_ids=ids, use_cache=False).logits)
    return model.to(device)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it transformers and torch's fake tensors say nothing: what is wrong is said by us."""
    from transformers.utils import logging as of_transformers

    of_torch = logging.getLogger("torch._subclasses.fake_tensor")
    before, level = of_transformers.get_verbosity(), of_torch.level
    of_transformers.set_verbosity_error()
    of_torch.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        of_transformers.set_verbosity(before)
        of_torch.setLevel(level)


def load_checked(kind: str, directory: Path, dtype: str, trust_remote_code: bool) -> Any:
    """The model, of one of `KINDS`, in a directory, on the CPU, for inference.

    Raises:
        DataError: it is no such model, or its weights do not fit its config.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if (directory / ADAPTER_CONFIG).is_file():
        base = adapter_base(directory)
        return merged(load_checked(kind, base, dtype, trust_remote_code), directory)
    try:
        model, info = auto_model(kind).from_pretrained(
            directory,
            dtype=DTYPES[dtype],
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # each model class raises its own kinds
        raise DataError(f"{directory}: transformers cannot load it as a {KINDS[kind][1]}: {why(error)}") from error
    check_loaded(directory, info)
    return model.eval().requires_grad_(False)


def check_causal(
    directory: Path, model: Any, logits_of: Callable[[torch.Tensor], torch.Tensor], device: torch.device | None = None
) -> None:
    """Refuses a model whose prediction hangs on what comes after: tried, since an encoder loads as a causal LM too.

    Args:
        logits_of: logits [1, T, V] of ids [1, T].

    Raises:
        DataError: it does.
    """
    if sees_the_future(model, logits_of, device):
        raise DataError(
            f"{directory}: looks at what comes after a token, so it is no causal LM; use --objective masked or pll"
        )


@torch.no_grad()
def sees_the_future(
    model: Any, logits_of: Callable[[torch.Tensor], torch.Tensor], device: torch.device | None = None
) -> bool:
    """Whether another last token changes what is predicted before it.

    Args:
        logits_of: logits [1, T, V] of ids [1, T].
    """
    last = model.config.get_text_config().vocab_size - 1
    ids = torch.arange(1, 9, device=device)[None] % (last + 1)
    other = torch.cat([ids[:, :-1], torch.full_like(ids[:, :1], last)], dim=1)
    a, b = (logits_of(given)[0, :-1].float() for given in (ids, other))
    if not bool(torch.isfinite(a).all()):
        return False  # its losses will be refused
    return not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def adapter_base(directory: Path) -> Path:
    """The model that an adapter is to.

    Raises:
        DataError: it is not there, or its weights are others than those that the adapter was trained beside.
    """
    told = read_json(directory / ADAPTER_CONFIG)
    if not (directory / ADAPTER).is_file():  # peft would take a file that is unpickled
        raise DataError(f"{directory}: has no {ADAPTER} (other formats are not loaded)")
    base = Path(str(told.get("base_model_name_or_path")))
    check_model(base)
    wanted = read_manifest(directory, "snapshot").get("base") if is_ours(directory) else None
    if wanted is not None and weights_fingerprint(base) != wanted:
        raise DataError(
            f"{directory}: was trained beside weights with the fingerprint {str(wanted)[:8]}, and those in {base} have "
            "another; put the right ones there"
        )
    return base


def merged(model: Any, adapter: Path) -> Any:
    """A base model with an adapter in its weights. They are added up in fp32, then rounded to the model's own kind.

    Raises:
        DataError: peft is not installed, or the adapter does not fit.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise DataError(f"{adapter}: an adapter, which needs peft; pip install 'vernier-lm[lora]'") from None
    dtype = next(model.parameters()).dtype
    try:
        whole = PeftModel.from_pretrained(model.float(), str(adapter)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(f"{adapter}: does not fit its base model: {why(error)}") from None
    return whole.to(dtype).eval().requires_grad_(False)


def check_loaded(directory: Path, info: dict[str, Any], made_up: str = "") -> None:
    """Refuses a model some of whose weights transformers had to make up (`info`: its loading info).

    Args:
        made_up: pattern of names that may be.

    Raises:
        DataError: the first that is not there, or has another shape.
    """
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(str(one[0] if isinstance(one, tuple) else one) for one in info.get(what) or ())
        names = [name for name in names if not (made_up and re.match(made_up, name))]
        if names:
            raise DataError(f"{directory}: {what.replace('_', ' ')} in its weights: {names[0]}")
