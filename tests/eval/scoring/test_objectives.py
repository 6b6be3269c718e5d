"""What is asked of a model: masked tokens, the same of each, or a response to a prompt; with transformers' losses."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, vernier
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from configs.errors import DataError
from eval.reference.set import ReferenceSet, build_reference, load_reference, read_documents
from eval.reference.tokenizer import open_tokenizer
from eval.scoring.losses import IGNORED
from eval.scoring.masked import (
    MaskedScorer,
    SpecialIds,
    _chosen,
    make_scorer,
    masked_batch,
    masked_counts,
    pll_rows,
    special_ids,
)
from eval.tables import read_table
from trainer.data.shards import Windows

L = 24
CPU = torch.device("cpu")
SHARED = " ".join(f"rule{n}" for n in range(40))  # a prompt of more than 50 tokens
SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}


def texts(count: int, longest: int = 60) -> list[str]:
    draw = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("ka", "Li", "mo", "ru", "st") for b in ("per", "ta", "no", "Bä", "x")]
    return [f"{n} " + " ".join(draw.choice(words, draw.integers(1, longest))) for n in range(count)]


def tokenizer_at(directory: Path) -> Path:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts(50), trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    return directory


def reference_at(directory: Path, tokenizer: Path, documents: list[str], **changes: Any) -> ReferenceSet:
    settings = {"sequence_length": L, "batch": 5, "block_samples": 20, "max_windows": 1000, **changes}
    sources = [str(n) for n in range(len(documents))]
    build_reference(directory, sources, documents, open_tokenizer(tokenizer), name="r", **settings)
    return load_reference(directory)


def model_at(directory: Path, seed: int, kind: str = "bert", **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": L + 2, "initializer_range": 0.3, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    AutoModelForMaskedLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    tokenizer_at(folder / "tokenizer")
    reference_at(folder / "r", folder / "tokenizer", texts(16))
    model_at(folder / "a", 1)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> ReferenceSet:
    return load_reference(folder / "r")


def scorer_of(folder: Path, objective: str, reference: ReferenceSet, model: str = "a") -> MaskedScorer:
    return make_scorer(objective, folder / model, "fp32", reference, CPU)


def whole_rows(reference: ReferenceSet, sample: int) -> list[int]:
    return reference.input_ids[reference.offsets[sample] : reference.offsets[sample + 1]].tolist()


def test_every_model_and_every_cut_into_batches_is_asked_for_the_same(folder: Path, reference: ReferenceSet) -> None:
    special = special_ids(folder / "tokenizer")

    def asked(found: ReferenceSet, order: list[int]) -> dict[int, tuple[list[int], list[int]]]:
        out = {}
        for batch in order:
            fed = masked_batch(found, batch, special, seed_of=reference.tokens_fingerprint)
            for row, sample in enumerate(fed.samples.tolist()):
                length = int(fed.attention[row].sum())
                assert not fed.attention[row, length:].any()
                assert (fed.ids[row, length:] == special.pad).all()
                assert (fed.target[row, length:] == IGNORED).all()
                out[sample] = fed.ids[row, :length].tolist(), fed.target[row, :length].tolist()
        return out

    first = asked(reference, list(range(reference.batch_count)))
    other = reference_at(folder / "cut otherwise", folder / "tokenizer", texts(16), batch=3, block_samples=40)
    assert asked(other, list(range(other.batch_count))[::-1]) == first
    for sample, (ids, target) in first.items():
        before = whole_rows(reference, sample)
        at = [place for place, wanted in enumerate(target) if wanted != IGNORED]
        assert (ids[0], ids[-1], len(ids)) == (special.cls, special.sep, len(before) + 1)
        assert all(target[place] == before[place] for place in at)
        assert all(ids[place] == before[place] for place in set(range(1, len(before))) - set(at))
        assert min(at) >= reference.labels_from[sample]
        assert len(at) == masked_counts(reference.tokens)[sample] == max(1, int(0.15 * reference.tokens[sample] + 0.5))
    model_at(folder / "b", 2, hidden_act="relu")
    one, two = (scorer_of(folder, "masked", reference, name).score_batch(reference, 1) for name in "ab")
    assert torch.equal(one.position_tokens, two.position_tokens)
    assert not torch.equal(one.loss, two.loss)
    fed = masked_batch(reference, 1, special, seed_of="another set")
    assert not np.array_equal(
        fed.target, masked_batch(reference, 1, special, seed_of=reference.tokens_fingerprint).target
    )


def test_the_choice_stays_as_it_was_first_made() -> None:
    """Tables of one objective are compared over years: another choice would need another objective's name."""
    special = SpecialIds(cls=1, sep=2, mask=3, pad=0, ordinary=np.arange(4, 200))
    places, shown = _chosen(np.arange(100, 141), 1, 41, special, "a set 7")
    assert places.tolist() == [6, 15, 26, 30, 35, 40]
    assert shown.tolist() == [3, 3, 116, 3, 3, 167]


def test_of_the_chosen_80_percent_are_masked_10_random_and_10_as_they_were(folder: Path) -> None:
    found = reference_at(folder / "large", folder / "tokenizer", texts(2000), sequence_length=64, batch=50)
    special = special_ids(folder / "tokenizer")
    masked = other = kept = 0
    strange = set()
    for batch in range(found.batch_count):
        fed = masked_batch(found, batch, special, seed_of=found.tokens_fingerprint)
        at = fed.target != IGNORED
        shown, was = fed.ids[at], fed.target[at]
        masked += int((shown == special.mask).sum())
        kept += int((shown == was).sum())
        other += int(((shown != special.mask) & (shown != was)).sum())
        strange |= set(shown[shown != was].tolist()) - {special.mask}
    total = masked + other + kept
    assert total == masked_counts(found.tokens).sum()
    assert total / found.tokens.sum() == pytest.approx(0.15, abs=0.005)
    for share, wanted in ((masked, 0.8), (other, 0.1), (kept, 0.1)):
        assert share / total == pytest.approx(wanted, abs=0.01)
    assert not strange & {special.cls, special.sep, special.mask, special.pad}
    assert strange == set(special.ordinary.tolist())


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "distilbert"])
def test_each_samples_loss_is_that_of_a_plain_transformers_forward(
    kind: str, folder: Path, reference: ReferenceSet
) -> None:
    from transformers import AutoModelForMaskedLM

    own: dict[str, Any] = {
        "roberta": {"max_position_embeddings": L + 3},  # it counts positions from behind the padding's
        "modernbert": {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    }
    directory = model_at(folder / f"plain {kind}", 3, kind, **own.get(kind, {}))
    scorer = scorer_of(folder, "masked", reference, directory.name)
    assert scorer.encoder is not None
    model = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    whole = scorer_of(folder, "masked", reference, directory.name)
    whole.encoder = None
    seen = 0
    for batch in range(reference.batch_count):
        fed = masked_batch(reference, batch, scorer.special, seed_of=reference.tokens_fingerprint)
        found, slow = scorer.score_batch(reference, batch), whole.score_batch(reference, batch)
        for row, sample in enumerate(fed.samples.tolist()):
            ids = torch.from_numpy(fed.ids[row, fed.attention[row]])
            target = torch.from_numpy(fed.target[row, fed.attention[row]])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].double()
            loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
            asked = target != IGNORED
            assert float(found.loss[row]) == pytest.approx(float(loss), rel=1e-5)
            assert float(slow.loss[row]) == pytest.approx(float(loss), rel=1e-5)
            assert int(found.correct[row]) == int((logits.argmax(-1)[asked] == target[asked]).sum())
            assert int(found.position_tokens[row].sum()) == scorer.tokens_of(reference)[sample]
            assert float(found.position_loss[row].sum()) == pytest.approx(float(loss), rel=1e-5)
            seen += 1
    assert seen == len(reference.sample)
    assert not scorer.bytes_of(reference).any()


def test_pseudo_log_likelihood_is_the_sum_over_tokens_masked_one_at_a_time(
    folder: Path, reference: ReferenceSet
) -> None:
    from transformers import BertForMaskedLM

    scorer = scorer_of(folder, "pll", reference)
    special = scorer.special
    model = BertForMaskedLM.from_pretrained(folder / "a").eval()
    assert np.array_equal(scorer.tokens_of(reference), reference.tokens)
    assert np.array_equal(scorer.bytes_of(reference), reference.bytes)
    for batch in range(reference.batch_count)[::4]:
        found = scorer.score_batch(reference, batch)
        for row, sample in enumerate(reference.batch_samples(batch).tolist()):
            before = [special.cls, *whole_rows(reference, sample)[1:], special.sep]
            total, right = 0.0, 0
            for place in range(int(reference.labels_from[sample]), len(before) - 1):
                one = torch.tensor([before])
                one[0, place] = special.mask
                with torch.no_grad():
                    log_p = model(input_ids=one).logits[0, place].double().log_softmax(-1)
                total -= float(log_p[before[place]])
                right += int(log_p.argmax()) == before[place]
            assert float(found.loss[row]) == pytest.approx(total, rel=1e-5)
            assert int(found.correct[row]) == right
            assert int(found.position_tokens[row].sum()) == reference.tokens[sample]


def test_the_command_scores_masked_models_alike_on_any_number_of_ranks(
    folder: Path, reference: ReferenceSet, tmp_path: Path
) -> None:
    found = {}
    for nproc in (1, 2):
        options = [
            "--reference",
            folder / "r",
            "--objective",
            "masked",
            "--nproc",
            nproc,
            "--out",
            tmp_path / f"{nproc}",
        ]
        vernier("eval", folder / "a", *options)
        found[nproc] = read_table(tmp_path / f"{nproc}" / "a@masked.fp32.parquet")
    assert np.array_equal(found[1].loss, found[2].loss)
    assert found[1].meta["objective"] == "masked"
    assert np.array_equal(found[1].tokens, masked_counts(reference.tokens))
    assert not found[1].bytes.any()


def test_every_token_is_masked_once_over_the_windows_of_a_long_document(folder: Path, reference: ReferenceSet) -> None:
    special = special_ids(folder / "tokenizer")
    stored = open_tokenizer(folder / "tokenizer").encode(texts(16))
    for document, ids in enumerate(stored):
        rows = [pll_rows(reference, int(s), special) for s in np.flatnonzero(reference.document == document)]
        assert np.concatenate([one.target for one in rows]).tolist() == ids.tolist()
        for one in rows:
            assert ((one.ids == special.mask).sum(1) == 1).all()
            assert one.ids.shape[1] <= L + 2


def test_prompts_are_seen_and_never_masked(folder: Path) -> None:
    prompts = [f"ask {n} " + "kata " * (n % 40) for n in range(20)]
    found = reference_at(folder / "prompted", folder / "tokenizer", texts(20), prompts=prompts)
    special = special_ids(folder / "tokenizer")
    assert found.objective == "prompt"
    for batch in range(found.batch_count):
        fed = masked_batch(found, batch, special, seed_of=found.tokens_fingerprint)
        for row, sample in enumerate(fed.samples):
            assert (fed.target[row, : found.labels_from[sample]] == IGNORED).all()
            assert (fed.target[row] != IGNORED).any()


def test_what_cannot_be_scored_so_is_refused_in_one_line(folder: Path, reference: ReferenceSet, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, BertModel

    def refused(model: Path, why: str, found: ReferenceSet = reference, objective: str = "masked") -> None:
        with pytest.raises(DataError, match=why) as error:
            make_scorer(objective, model, "fp32", found, CPU)
        assert "\n" not in str(error.value)

    refused(folder / "a", r"'mask' is none of masked, pll", objective="mask")
    shutil.copytree(folder / "tokenizer", tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"cls_token": "[CLS]", "sep_token": "[SEP]"}))
    plain = reference_at(tmp_path / "r", tmp_path / "t", texts(5))
    refused(folder / "a", r"has no mask token; .* vernier prepare --reference", plain, "pll")
    short = rf"takes {L + 1} tokens, .* up to {L + 2} with CLS and SEP; .*--sequence-length {L - 1} "
    refused(model_at(tmp_path / "short", 0, max_position_embeddings=L + 1), short)
    refused(model_at(tmp_path / "short roberta", 0, "roberta"), short)
    BertModel(AutoConfig.from_pretrained(folder / "a")).save_pretrained(tmp_path / "headless")
    refused(tmp_path / "headless", "missing keys in its weights")
    llama = AutoConfig.for_model(
        "llama", vocab_size=120, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(llama).save_pretrained(tmp_path / "llama")
    refused(tmp_path / "llama", "cannot load it as a masked LM")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """(data prepared from prompts and responses, the pairs)."""
    folder = tmp_path_factory.mktemp("conversations")
    draw = np.random.default_rng(5)
    words = [f"word{n}" for n in range(400)]
    pairs = [
        (f"Q{n}: " + " ".join(draw.choice(words, draw.integers(1, 60))), f" A: {' '.join(draw.choice(words, 30))}")
        for n in range(100)
    ]
    pairs += [(SHARED, f" {n} {' '.join(draw.choice(words, 20))}") for n in range(6)]
    rows = [{"question": prompt, "answer": answer} for prompt, answer in pairs]
    rows += [rows[0], {"question": "nobody knows", "answer": ""}, {"question": "another", "answer": pairs[1][1]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["data.text_field=answer", "data.prompt_field=question"]
    source = f"data.source={folder / 'rows.jsonl'}"
    vernier("prepare", TINY, f"data.dir={folder / 'data'}", source, *columns)
    return folder, [*pairs, ("another", pairs[1][1])]


def test_only_responses_are_trained_on_and_scored(conversations: tuple[Path, list[tuple[str, str]]]) -> None:
    folder, pairs = conversations
    facts = json.loads((folder / "data" / "dataset.json").read_text())
    assert (facts["read"]["documents_empty"], facts["read"]["documents_duplicate"]) == (1, 1)
    opened = open_tokenizer(folder / "data" / "tokenizer")
    prompts, answers = (opened.encode(list(texts)) for texts in zip(*pairs, strict=True))
    whole = {(*p, *a): len(p) for p, a in zip(prompts, answers, strict=True)}

    data = Windows(folder / "data", 64)
    ids, scored = data.rows(np.arange(len(data)))
    assert scored is not None
    flat, mask = ids[:, 1:].flatten().tolist(), scored.flatten().tolist()
    ends = [place for place, number in enumerate(flat) if number == opened.eos_id]
    for before, end in pairwise(ends):
        document = flat[before + 1 : end]
        prompt = whole[tuple(document)]
        assert mask[before + 1 : end + 1] == [False] * prompt + [True] * (len(document) - prompt + 1)
    assert facts["train"]["documents"] + facts["reference"]["documents"] == len(pairs)
    assert facts["train"]["scored_tokens"] < facts["train"]["tokens"]

    found = load_reference(folder / "data" / "reference")
    for document in range(found.documents):
        mine = np.flatnonzero(found.document == document)
        targets = [t for s in mine for t in whole_rows(found, int(s))[found.labels_from[s] :]]
        assert targets in [answer.tolist() for answer in answers]
    assert found.tokens.sum() == facts["reference"]["tokens"]


def test_documents_that_share_a_long_prompt_stay_on_one_side(
    conversations: tuple[Path, list[tuple[str, str]]],
) -> None:
    folder, _ = conversations
    facts = json.loads((folder / "data" / "dataset.json").read_text())
    _, _, prompts = read_documents(folder / "data" / "reference")
    assert prompts.count(SHARED) in (0, 6)
    assert facts["decontamination"]["largest_family"] == 6
    assert facts["decontamination"]["shared_runs_across"] == 0


def test_a_trained_models_loss_on_responses_is_that_of_transformers(
    conversations: tuple[Path, list[tuple[str, str]]],
) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = conversations
    columns = ["data.text_field=answer", "data.prompt_field=question", f"data.source={folder / 'rows.jsonl'}"]
    short = ["steps=4", "nproc=1", "eval.placement=none", "schedule.warmup_steps=1"]
    vernier("train", TINY, f"data.dir={folder / 'data'}", f"run.dir={folder / 'run'}", *columns, *short)
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    assert 0 < steps[-1]["tokens"] < 4 * 16 * 64  # scored targets, not all that was fed
    snapshot = folder / "run" / "snapshots" / "step-00000004"
    vernier("eval", snapshot, "--reference", folder / "data" / "reference", "--out", folder / "tables")
    (path,) = (folder / "tables").glob("*.parquet")
    table, found = read_table(path), load_reference(folder / "data" / "reference")
    assert table.meta["objective"] == "prompt"
    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32).eval()
    for sample in range(len(table)):
        ids = torch.tensor(whole_rows(found, sample))
        with torch.no_grad():
            logits = model(input_ids=ids[None, :-1]).logits[0].double()
        first = int(found.labels_from[sample])
        loss = torch.nn.functional.cross_entropy(logits[first - 1 :], ids[first:], reduction="sum")
        assert float(table.loss[sample]) == pytest.approx(float(loss), rel=1e-5)
        assert table.tokens[sample] == len(ids) - first


def test_a_prompt_column_that_is_not_there_is_named_in_one_line(
    conversations: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    folder, _ = conversations
    source = [f"data.source={folder / 'rows.jsonl'}", "data.text_field=answer", f"data.dir={tmp_path / 'data'}"]
    done = vernier("prepare", TINY, *source, "data.prompt_field=body", code=2)
    assert "data.prompt_field: " in done.stderr
    assert "has no column 'body'; its columns are: answer, question" in done.stderr
    done = vernier("prepare", TINY, f"data.dir={tmp_path / 'data'}", "data.prompt_field=text", code=2)
    assert "data.prompt_field: 'text' is data.text_field as well" in done.stderr
