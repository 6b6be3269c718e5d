"""Tokenizer directories as Vernier uses them: a text has the same ids each time, told apart by what decides ids.

Encoding never cuts or pads, never adds special tokens and never makes one of text that merely looks like it. What draws
ids at random (dropout of merges, sampling of pieces) is switched off.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)
ROLES = ("bos_token", "eos_token", "cls_token", "sep_token", "mask_token", "pad_token")
RANDOM = ("dropout", "alpha", "nbest_size")  # of a model: BPE's leaves merges out, Unigram's two sample its pieces
TRIED = 16  # texts that `check_repeatable` encodes more than once
TRIED_CHARACTERS = 4000
ENCODE_BYTES = 4 << 20  # of text at once: enough to keep all cores busy, few enough results to hold


@dataclass(frozen=True)
class TextTokenizer:
    """An opened tokenizer.

    `vocab_size` is one more than the largest id, added tokens included. `eos_id` ends a document in the
    training stream (BOS where there is no EOS); `prefix_id` stands before a reference document (EOS where
    there is no BOS). Where there is neither, as in BERT's, they are SEP and CLS. `special` has the ids of the
    special tokens that the directory names, by role (`bos_token`, `mask_token`, …).
    """

    directory: Path
    fingerprint: str
    vocab_size: int
    eos_id: int
    prefix_id: int
    backend: Any
    special: Mapping[str, int] = field(default_factory=dict)
    switched_off: str = ""  # what its file asks for and would make ids random, for people

    def encode(
        self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.uint32]]:
        """Ids of each text, uint32 [tokens of it]. `progress` is told texts done and to do."""
        out: list[NDArray[np.uint32]] = []
        for start, stop in _portions(texts):
            found = self.backend.encode_batch_fast(texts[start:stop], add_special_tokens=False)
            out.extend(np.asarray(e.ids, dtype=np.uint32) for e in found)
            if progress is not None:
                progress(stop, len(texts))
        return out

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        """(ids, ends) of each text, [tokens of it]; `ends` counts characters up to and with a token.

        Ends never fall: the parts of one character all end with it, so the first of them takes its bytes.
        """
        out = []
        for start, stop in _portions(texts):
            for found in self.backend.encode_batch(texts[start:stop], add_special_tokens=False):
                ends = np.asarray([end for _, end in found.offsets], dtype=np.int64)
                out.append((np.asarray(found.ids, dtype=np.uint32), np.maximum.accumulate(ends)))
        return out


def _portions(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Consecutive (start, stop) of about ENCODE_BYTES characters each."""
    cuts, size = [0], 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= ENCODE_BYTES:
            cuts.append(index + 1)
            size = 0
    if cuts[-1] != len(texts):
        cuts.append(len(texts))
    return list(pairwise(cuts))


def open_tokenizer(directory: Path, setting: str = "tokenizer") -> TextTokenizer:
    """Opens a Hugging Face tokenizer directory. `setting` is what an error calls it.

    Raises:
        DataError: no `tokenizer.json`, not readable, or neither an EOS, a BOS, a CLS nor a SEP token.
    """
    names = _special_tokens(directory, setting)
    backend, switched_off = _backend(directory, setting, names)
    fingerprint = _fingerprint(backend)
    found = {role: backend.token_to_id(name) for role, name in names.items()}
    ids = {role: number for role, number in found.items() if number is not None}
    starts, ends = (
        ("bos_token", "eos_token", "cls_token", "sep_token"),
        ("eos_token", "bos_token", "sep_token", "cls_token"),
    )
    first, last = (next((ids[role] for role in roles if role in ids), None) for roles in (starts, ends))
    if first is None or last is None:
        raise DataError(
            f"{setting}: {directory} has neither an EOS nor a BOS token; "
            'add "eos_token" to its tokenizer_config.json (a token that its tokenizer.json knows)'
        )
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    return TextTokenizer(directory, fingerprint, largest + 1, last, first, backend, ids, switched_off)


def tokenizer_fingerprint(directory: Path) -> str:
    """SHA-256 over what decides the ids of a tokenizer; the same after transformers has saved it again.

    Raises:
        DataError: no `tokenizer.json`, or not readable.
    """
    return _fingerprint(_backend(directory, "tokenizer", _special_tokens(directory, "tokenizer"))[0])


def check_repeatable(tokenizer: TextTokenizer, texts: Sequence[str], setting: str = "tokenizer") -> None:
    """Refuses a tokenizer that gives a text other ids the next time, or in other company: some of `texts` are tried.

    Raises:
        DataError: it does.
    """
    tried = [text[:TRIED_CHARACTERS] for text in texts[:TRIED]]
    together = tokenizer.encode(tried)
    for others in (tokenizer.encode(tried[::-1])[::-1], [tokenizer.encode([text])[0] for text in tried]):
        if any(not np.array_equal(a, b) for a, b in zip(together, others, strict=True)):
            raise DataError(
                f"{setting}: {tokenizer.directory} gives one text other tokens each time, so that no two models could "
                "be compared by it; save it without what draws at random"
            )


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copies a tokenizer's files (and no weights beside them) into the folder `target`, made if need be.

    What would make ids random is null in the copy, as it was when the data was made: a copy goes into each snapshot.
    """
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = target / "tokenizer.json"
    if path.is_file():
        whole = json.loads(path.read_text(encoding="utf-8"))
        model = whole.get("model") or {}
        asked = [name for name in RANDOM if model.get(name)]
        if asked:
            model.update(dict.fromkeys(asked))
            path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")


def _backend(directory: Path, setting: str, names: Mapping[str, str]) -> tuple[Any, str]:
    """(the tokenizer, with all off that would make ids hang on more than the text; what of that drew at random)."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not directory.is_dir():
        raise DataError(f"{setting}: {directory} is no directory; give one with a Hugging Face tokenizer")
    if not path.is_file():
        raise DataError(
            f"{setting}: {directory} has no tokenizer.json; save it as a fast tokenizer "
            "(transformers: AutoTokenizer.from_pretrained(…).save_pretrained(DIR))"
        )
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not readable as a tokenizer ({error})") from None
    backend.no_truncation()  # a tokenizer.json may carry both from where it was used last
    backend.no_padding()
    _make_special(backend, set(names.values()))
    backend.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not the end of a document
    asked = {name: value for name in RANDOM if (value := getattr(backend.model, name, None))}
    for name in asked:
        setattr(backend.model, name, None)
    return backend, ", ".join(f"{name} {value:g}" for name, value in asked.items())


def _make_special(backend: Any, names: set[str]) -> None:
    """Makes those of a tokenizer's added tokens special that the directory gives a role and its file does not."""
    from tokenizers import AddedToken

    added = backend.get_added_tokens_decoder().values()
    plain = [token.content for token in added if token.content in names and not token.special]
    backend.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in plain])


def _special_tokens(directory: Path, setting: str) -> dict[str, str]:
    """Content of the special tokens in ROLES, as far as the directory names them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            mapping = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{setting}: {path} cannot be read as JSON ({error})") from None
        for role in ROLES:
            token = mapping.get(role)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                found[role] = content
    return found


def _fingerprint(backend: Any) -> str:
    # Through the library and back, so that older files and newly saved ones have the same fields.
    whole = json.loads(backend.to_str())
    normalizes = whole.get("normalizer") is not None
    added = sorted((t["id"], t["content"], *_matching(t, normalizes)) for t in whole.get("added_tokens") or ())
    parts = {name: _without_blanks(whole.get(name)) for name in ("model", "normalizer", "pre_tokenizer")}
    canonical = json.dumps({**parts, "added_tokens": added}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _matching(token: dict[str, Any], normalizes: bool) -> list[str]:
    """How an added token is found in text, as far as that is out of the ordinary; special ones are not looked for."""
    if token.get("special"):
        return []
    flags = ("lstrip", "rstrip", "single_word", *(("normalized",) if normalizes else ()))
    return [flag for flag in flags if token.get(flag)]


def _without_blanks(value: Any) -> Any:
    """`value` less the fields that are null, false or empty: other versions write them or leave them out."""
    if isinstance(value, dict):
        kept = {k: _without_blanks(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v is not None and v is not False and v != "" and v != {}}
    if isinstance(value, list):
        return [_without_blanks(v) for v in value]
    return value
