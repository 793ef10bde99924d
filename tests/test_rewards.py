"""Rewards against direct computations, on small random models of the classes that are used."""

import io

import pytest
import torch
from PIL import Image

import rewards
import runs
from rewards import BertRecall, BertScore, ClipScore, check_reward_name, checked, load_reward

PROMPTS = ["a cat washing dishes", "a dog", "a cat washing dishes"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- CLIPScore


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random open_clip model of 32x32 pictures in a folder, as the tiny model keeps its own."""
    import json

    from open_clip import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = {"embed_dim": 16,
              "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8,
                             "head_width": 16},
              "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2,
                           "layers": 1}}  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    normal = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": normal})
    )
    save_file(CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_clip_score_is_the_cosine_of_the_embeddings_of_eight_bit_pictures(clip_folder):
    score = ClipScore(f"local-dir:{clip_folder}", None)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    got = score(images, PROMPTS)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        for image, prompt, value in zip(images, PROMPTS, got):
            x = ((image * 255).round() / 255 - mean) / std
            u = score.model.encode_image(x[None])[0]
            v = score.model.encode_text(score.tokenizer([prompt]))[0]
            assert value.item() == pytest.approx((u @ v / u.norm() / v.norm()).item(), abs=1e-5)
    assert got[0] != got[2] and set(score.text) == set(PROMPTS)
    raw = score.embed_images(images, normalize=False, batch=2)  # Eq. 9's features, any batch
    torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), score.embed_images(images))
    assert (raw.norm(dim=1) - 1).abs().min() > 0.01 and score.to("cpu") is score


def test_a_prompts_embedding_is_the_same_bits_in_any_company():
    """Or a resumed run, which embeds them in another order, would not repeat itself."""
    score = rewards.load_reward("clip", runs.HERE / "tiny", torch.device("cpu")).model
    prompts = runs.load_prompts(1)[0][:40]
    alone = torch.cat([score.embed_text([p]) for p in prompts])
    score.text.clear()
    assert torch.equal(score.embed_text(prompts), alone)


def test_eight_bit_pictures_are_rounded_not_cut():
    picture = rewards.to_pil(torch.full((1, 3, 2, 2), 0.9999))[0]
    assert picture.getpixel((0, 0)) == (255, 255, 255)


# ---------------------------------------------------------------- BERTScore


def write_deberta(folder, layers=3, seed=0):
    """A random DeBERTa with relative attention, as the xlarge has, and a byte-level tokenizer."""
    from transformers import DebertaConfig, DebertaModel, DebertaTokenizer

    torch.manual_seed(seed)
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    letters = [*"abcdefghijklmnopqrstuvwxyzTI.,", "Ġ", "th", "Ġc"]
    tokenizer = DebertaTokenizer(
        vocab={w: n for n, w in enumerate(special + letters)},
        merges=[("t", "h"), ("Ġ", "c")], model_max_length=64)  # fmt: skip
    config = DebertaConfig(
        vocab_size=len(special + letters), hidden_size=32, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=64, relative_attention=True, pad_token_id=3,
        pos_att_type=["c2p", "p2c"], position_biased_input=False, type_vocab_size=0,
        initializer_range=0.5)  # fmt: skip
    DebertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deberta_folder(tmp_path_factory):
    return write_deberta(tmp_path_factory.mktemp("deberta"))


ANSWERS = ["a cat washes the dishes in the kitchen", "", "the dog", " a cat ",
           "The image contains a cat"]  # fmt: skip
REFERENCES = [
    rewards.REFERENCE.format(p) for p in ("a cat", "a dog", "a cat on a bike", "cat", "a cat")
]


def test_bert_recall_is_the_mean_over_the_reference_of_the_best_match(deberta_folder):
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(deberta_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(deberta_folder)

    def embedded(sentence):  # layer 2 of 3
        ids = tokenizer(sentence.strip(), return_tensors="pt").input_ids
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[2][0].double()

    got = BertRecall(deberta_folder, 2)(ANSWERS, REFERENCES)
    for answer, reference, value in zip(ANSWERS, REFERENCES, got.tolist()):
        best = []
        for r in embedded(reference)[1:-1]:  # without [CLS] and [SEP]
            best.append(max((r @ a / r.norm() / a.norm()).item() for a in embedded(answer)))
        expected = sum(best) / len(best) if answer.strip() else 0.0
        assert value == pytest.approx(expected, abs=1e-5), answer
    assert got[4].item() == pytest.approx(1.0, abs=1e-5) and got[0] < 0.999
    assert not torch.allclose(BertRecall(deberta_folder, 3)(ANSWERS, REFERENCES), got, atol=1e-3)


def test_bert_recall_is_that_of_the_bert_score_package(deberta_folder, monkeypatch):
    """Where the package is there (pip install bert-score; it is not in requirements.txt)."""
    package = pytest.importorskip("bert_score", reason="the package bert-score is not installed")
    from transformers import PreTrainedTokenizerBase

    if not hasattr(PreTrainedTokenizerBase, "build_inputs_with_special_tokens"):
        # gone in transformers 5; bert-score 0.3.13 calls it for the empty answer
        monkeypatch.setattr(PreTrainedTokenizerBase, "build_inputs_with_special_tokens",
                            lambda self, ids: [self.cls_token_id, *ids, self.sep_token_id],
                            raising=False)  # fmt: skip
    scorer = package.BERTScorer(model_type=str(deberta_folder), num_layers=2, use_fast_tokenizer=True)
    _, recall, _ = scorer.score(ANSWERS, REFERENCES)
    got = BertRecall(deberta_folder, 2)(ANSWERS, REFERENCES)
    print("max difference", (got - recall).abs().max().item())
    torch.testing.assert_close(got, recall, atol=1e-5, rtol=0)


def test_bert_recall_does_not_depend_on_the_batch(deberta_folder):
    recall = BertRecall(deberta_folder, 2)
    alone = torch.cat([recall([a], [r]) for a, r in zip(ANSWERS, REFERENCES)])
    torch.testing.assert_close(recall(ANSWERS, REFERENCES), alone, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """A random LLaVA of 28x28 pictures, 4 patches, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig,
        LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast,
    )  # fmt: skip

    torch.manual_seed(0)
    words = ["<unk>", "<pad>", "</s>", "<image>", "USER", ":", "ASSISTANT", "a", "cat", "dog",
             "the", "is", "on", "bike"]  # fmt: skip
    plain = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        additional_special_tokens=["<image>"])  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                       num_attention_heads=2, image_size=28, patch_size=14),
        text_config=LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32,
                                num_hidden_layers=1, num_attention_heads=2, eos_token_id=2,
                                num_key_value_heads=2, pad_token_id=1, bos_token_id=0,
                                initializer_range=1.0),
        image_token_index=3, vision_feature_layer=-2,
        vision_feature_select_strategy="default")  # fmt: skip
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(pictures, tokenizer, patch_size=14, num_additional_image_tokens=1,
                   vision_feature_select_strategy="default").save_pretrained(folder)  # fmt: skip
    return folder


def test_bert_score_compares_llavas_answers_with_the_prompt(llava_folder, deberta_folder, images):
    score = BertScore(llava_folder, deberta_folder, 2, dtype=torch.float32, batch=2,
                      max_new_tokens=6)  # fmt: skip
    said = score.describe(images)
    assert len(said) == 3 and len(set(said)) > 1 and not any("USER" in s for s in said)
    alone = [score.describe(image[None])[0] for image in images]
    assert alone == said  # answers do not depend on the batch
    expected = score.recall(said, [f"The image contains {p}" for p in PROMPTS])
    got = checked(score, "bert")(images, PROMPTS)
    torch.testing.assert_close(got, expected)
    assert got.shape == (3,) and score.to("cpu") is score


def test_defaults_are_the_papers():
    assert rewards.LLAVA == "llava-hf/llava-1.5-7b-hf"
    assert rewards.DEBERTA == ("microsoft/deberta-xlarge-mnli", 40)
    assert rewards.CLIP_SD[0] == "ViT-H-14"
    assert rewards.QUESTION == "Answer concisely: what is going on in this image?"


# ---------------------------------------------------------------- JPEG


def test_jpeg_is_minus_the_size_that_pil_writes(images):
    flat = torch.cat([images, torch.full((1, 3, 40, 40), 0.5)])
    got = load_reward("jpeg")(flat, ["any"] * 4)
    for image, value in zip(flat, got):
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="JPEG", quality=95)
        assert value.item() == pytest.approx(-len(file.getvalue()) / 1000, abs=1e-6)
    assert got[3] > got[:3].max()  # a plain picture compresses best


# ---------------------------------------------------------------- your own, and bad input


OWN = """
from dataclasses import dataclass
import numpy as np

def score(images, prompts):
    return images.mean((1, 2, 3))

def as_list(images, prompts):
    return [len(p) for p in prompts]

def as_array(images, prompts):
    return np.arange(len(prompts))

def raises(images, prompts):
    return images.no_such_thing

def shape(images, prompts):
    return images.mean((2, 3))

def nothing(images, prompts):
    pass

def nan(images, prompts):
    out = images.mean((1, 2, 3))
    out[1] = float("nan")
    return out

number = 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "my_reward.py").write_text(OWN)
    return str(tmp_path / "my_reward.py")


def test_a_function_of_ones_own_file_is_a_reward(own, images):
    assert check_reward_name(f"{own}:score") is None
    torch.testing.assert_close(load_reward(f"{own}:score")(images, PROMPTS), images.mean((1, 2, 3)))
    assert load_reward(f"{own}:as_list")(images, PROMPTS).tolist() == [20, 5, 20]
    assert load_reward(f"{own}:as_array")(images, PROMPTS).tolist() == [0, 1, 2]


@pytest.mark.parametrize("function, words", [
    ("raises", ["raised AttributeError", "line 15"]), ("shape", ["shape (3, 3) for 3 pictures"]),
    ("nothing", ["returned a NoneType"]), ("nan", ["returned nan", repr(PROMPTS[1])]),
])  # fmt: skip
def test_a_bad_reward_is_named_and_told_apart(own, images, function, words):
    reward = load_reward(f"{own}:{function}")
    with pytest.raises(runs.Stop) as stop:
        reward(images, PROMPTS)
    for word in [f"reward {own}:{function}", *words]:
        assert word in str(stop.value)
    assert "\n" not in str(stop.value)


def test_checked_names_any_reward_that_raises(images):
    def broken(images, prompts):
        raise ValueError("no\nluck")

    with pytest.raises(runs.Stop, match="reward clip raised ValueError: no$"):
        checked(broken, "clip")(images, PROMPTS)
    with pytest.raises(runs.Stop, match="returned inf for the prompt 'a dog'"):
        checked(lambda x, p: [0.0, float("inf"), 1.0], "clip")(images, PROMPTS)


@pytest.mark.parametrize("name, words", [
    ("aesthetic", "one of clip, bert, jpeg"), ("missing.py:score", "there is no file missing.py"),
    ("{own}:", "is no function's name"), ("{own}", "or your own as file.py:function"),
])  # fmt: skip
def test_check_reward_name_refuses_without_loading(own, name, words, capsys):
    name = name.format(own=own)
    assert words in check_reward_name(name)
    with pytest.raises(SystemExit) as stop:
        load_reward(name)
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("name, words", [
    ("{own}:absent", "has no function absent"), ("{own}:number", "has no function number"),
])  # fmt: skip
def test_a_missing_function_ends_with_one_line(own, name, words, capsys):
    with pytest.raises(SystemExit):
        load_reward(name.format(own=own))
    assert words in capsys.readouterr().err


def test_a_file_that_does_not_run_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("import torch\n1 / 0\n")
    with pytest.raises(SystemExit):
        load_reward(f"{tmp_path}/bad.py:score")
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "line 2" in error and error.count("\n") == 1


def test_a_model_that_can_not_be_loaded_ends_with_one_line(capsys, monkeypatch):
    def no_hub(*args, **options):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(rewards, "ClipScore", no_hub)
    with pytest.raises(SystemExit):
        load_reward("clip")
    error = capsys.readouterr().err
    assert "cannot load the model of reward clip" in error and error.count("\n") == 1
