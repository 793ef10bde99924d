"""Rewards against direct computations, on small random models of the classes that are used."""

import io
import itertools
import json

import huggingface_hub.utils as hub
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import rewards
from rewards import BertRecall, BertScore, ClipScore, checked, load_reward
from support.command import Stop

PROMPTS = ["a cat washing dishes", "a dog", "a cat washing dishes"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- CLIPScore


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random open_clip model of 32x32 pictures in a folder, as the tiny model keeps its own."""
    from open_clip import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
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
    score = load_reward("clip", ROOT / "tiny", torch.device("cpu")).model
    words = itertools.product(["a cat", "two red balls", "a dog and"], ["", " ", " on the bike"])
    prompts = [first + then + "x" * n for first, then in words for n in range(4)]
    alone = torch.cat([score.embed_text([p]) for p in prompts])
    score.text.clear()
    assert torch.equal(score.embed_text(prompts), alone)


def test_eight_bit_pictures_are_rounded_not_cut():
    values = torch.linspace(-0.1, 1.1, 2 * 3 * 50 * 40)
    images = values.reshape(2, 3, 50, 40).requires_grad_()  # with numbers outside, too
    for picture, image in zip(rewards.to_pil(images), images.detach(), strict=True):
        expected = (image.clamp(0, 1).double().permute(1, 2, 0).numpy() * 255).round()
        assert picture.mode == "RGB" and picture.size == (40, 50)
        assert (np.asarray(picture) == expected).all()


def test_loading_leaves_the_bars_of_downloads_on(clip_folder, deberta_folder):
    """They are the only sign of life while gigabytes arrive."""
    hub.enable_progress_bars()
    ClipScore(f"local-dir:{clip_folder}", None)
    BertRecall(deberta_folder, 2)
    assert not hub.are_progress_bars_disabled()


# ---------------------------------------------------------------- BERTScore


def write_deberta(folder, layers=3, seed=0):
    """A random DeBERTa with relative attention, as the xlarge has, and a byte-level tokenizer."""
    from transformers import DebertaConfig, DebertaModel, DebertaTokenizer

    torch.manual_seed(seed)
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    letters = [*"abcdefghijklmnopqrstuvwxyzTI.,", "Ġ", "th", "Ġc"]
    tokenizer = DebertaTokenizer(
        vocab={w: n for n, w in enumerate(special + letters)},
        merges=[("t", "h"), ("Ġ", "c")],
        model_max_length=64,
    )
    config = DebertaConfig(
        vocab_size=len(special + letters),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        relative_attention=True,
        pad_token_id=3,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        type_vocab_size=0,
        initializer_range=0.5,
    )
    DebertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deberta_folder(tmp_path_factory):
    return write_deberta(tmp_path_factory.mktemp("deberta"))


ANSWERS = [
    "a cat washes the dishes in the kitchen",
    "",
    "the dog",
    " a cat ",
    "The image contains a cat",
]
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
        monkeypatch.setattr(
            PreTrainedTokenizerBase,
            "build_inputs_with_special_tokens",
            lambda self, ids: [self.cls_token_id, *ids, self.sep_token_id],
            raising=False,
        )
    scorer = package.BERTScorer(
        model_type=str(deberta_folder), num_layers=2, use_fast_tokenizer=True
    )
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
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    words = [
        "<unk>",
        "<pad>",
        "</s>",
        "<image>",
        "USER",
        ":",
        "ASSISTANT",
        "a",
        "cat",
        "dog",
        "the",
        "is",
        "on",
        "bike",
    ]
    plain = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=2,
            num_key_value_heads=2,
            pad_token_id=1,
            bos_token_id=0,
            initializer_range=1.0,
        ),
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def greedy_answer(score, image, tokens):
    """LLaVA's answer about one picture, token by token."""
    text = "USER: <image>\nAnswer concisely: what is going on in this image? ASSISTANT:"
    inputs = score.processor(images=rewards.to_pil(image[None])[0], text=text, return_tensors="pt")
    ids, pixels, answer = inputs["input_ids"], inputs["pixel_values"], []
    while len(answer) < tokens:
        logits = score.llava(input_ids=ids, pixel_values=pixels).logits[0, -1]
        answer.append(logits.argmax().item())
        if answer[-1] == score.processor.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([answer[-1:]])], 1)
    return score.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_bert_score_compares_llavas_answers_with_the_prompt(llava_folder, deberta_folder, images):
    score = BertScore(llava_folder, (deberta_folder, 2), dtype=torch.float32)
    score.batch, score.max_new_tokens = 2, 6
    said = score.describe(images)
    assert len(said) == 3 and len(set(said)) > 1 and not any("USER" in s for s in said)
    assert said == [greedy_answer(score, image, tokens=6) for image in images]
    expected = score.recall(said, [f"The image contains {p}" for p in PROMPTS])
    got = checked(score, "bert")(images, PROMPTS)
    torch.testing.assert_close(got, expected)
    assert got.shape == (3,) and score.to("cpu") is score


def test_defaults_are_the_papers():
    assert rewards.LLAVA == "llava-hf/llava-1.5-7b-hf"
    assert rewards.DEBERTA == ("microsoft/deberta-xlarge-mnli", 40)
    assert rewards.CLIP_SD == ("ViT-H-14", "laion2b_s32b_b79k")
    assert (BertScore.batch, BertScore.max_new_tokens) == (16, 64)
    assert rewards.REFERENCE == "The image contains {}"
    assert rewards.QUESTION == "Answer concisely: what is going on in this image?"
    assert rewards.REWARDS == ("clip", "bert", "jpeg")


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


# ---------------------------------------------------------------- any reward, checked


def test_a_reward_gets_copies_and_its_answer_is_copied(images):
    """Else a reward could change the round's pictures, or the scores of an earlier batch."""
    answer, pictures, prompts = torch.arange(3.0), images.clone(), list(PROMPTS)

    def careless(images, prompts):
        images.zero_()
        prompts.clear()
        answer.add_(1)
        return answer

    first = checked(careless, "x")(pictures, prompts)
    second = checked(careless, "x")(pictures, prompts)
    assert first.tolist() == [1, 2, 3] and second.tolist() == [2, 3, 4]
    assert torch.equal(pictures, images) and prompts == PROMPTS


@pytest.mark.parametrize(
    "answer",
    [
        [3, 5, 7],
        (3.0, 5.0, 7.0),
        np.array([3, 5, 7], np.uint8),
        torch.tensor([3.0, 5.0, 7.0]).half(),
        torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64, requires_grad=True),
        range(3, 9, 2),
        [torch.tensor(3), torch.tensor(5), torch.tensor(7)],
        # any shape that holds three numbers, and (scores, info) of the common DDPO trainers
        [[3], [5], [7]],
        torch.tensor([[3.0, 5.0, 7.0]]),
        np.array([3.0, 5.0, 7.0]).reshape(1, 3, 1),
        np.array([3.0, 0, 5.0, 0, 7.0])[::2],
        (np.array([3, 5, 7]), {}),
        ([[3], [5], [7]], {"seconds": [1, 2, 3, 4]}),
    ],
)
def test_an_answer_may_be_any_list_of_numbers(images, answer):
    scores = checked(lambda x, p: answer, "x")(images, PROMPTS)
    assert scores.tolist() == [3, 5, 7] and scores.dtype == torch.float32
    assert not scores.requires_grad and scores.device.type == "cpu"


@pytest.mark.parametrize(
    "answer, words",
    [
        (None, "a NoneType:"),
        (1.0, "a float of torch.float32, shape ():"),
        ("abc", "a str:"),
        ({"a": 1}, "a dict:"),
        ({}, "a dict:"),
        (([1, 2], {}), "a list of torch.int64, shape (2,):"),
        (([1, 2, 3], {}, {}), "a tuple:"),
        (([1, 2, 3], [4, 5, 6]), "a tuple of torch.int64, shape (2, 3):"),
        (torch.ones(3, 2), "a Tensor of torch.float32, shape (3, 2):"),
        (["a", "b", "c"], "a list:"),
        ([1, 2], "shape (2,):"),
        ((n for n in range(3)), "a generator:"),
        ([1j, 2, 3], "of torch.complex64, shape (3,):"),
        (torch.ones(3, dtype=torch.complex64), "of torch.complex64"),
        ([2**70] * 3, "a list:"),
        (torch.ones(3, device="meta"), "a Tensor"),
        (torch.ones(3).to_sparse(), "a Tensor"),
        (np.array(["a", "b", "c"]), "a ndarray:"),
        ([None] * 3, "a list:"),
        ([], "shape (0,):"),
    ],
)
def test_an_answer_of_another_kind_is_told_in_one_line(images, answer, words, recwarn):
    with pytest.raises(Stop) as stop:
        checked(lambda x, p: answer, "x.py:f")(images, PROMPTS)
    assert str(stop.value).startswith("reward x.py:f returned a ") and words in str(stop.value)
    assert "it must return 3 numbers" in str(stop.value) and "\n" not in str(stop.value)
    assert not recwarn.list


@pytest.mark.parametrize(
    "answer, words",
    [
        ([0, float("inf"), 1], "inf"),
        ([0, -float("inf"), np.nan], "-inf"),
        ([0, 1e60, 1], "inf"),
        ([0, np.nan, 1], "nan"),
        (([[0], [np.nan], [1]], {}), "nan"),
        (torch.tensor([0, 1e30, 0]), "1.0000000150474662e\\+30"),  # sums must be finite, too
    ],
)
def test_a_number_that_is_not_finite_names_its_prompt(images, answer, words):
    with pytest.raises(Stop, match=f"^reward x returned {words} for the prompt 'a dog'$"):
        checked(lambda x, p: answer, "x")(images, PROMPTS)


def test_large_numbers_below_that_are_fine(images):
    assert checked(lambda x, p: [9e29, -9e29, 0], "x")(images, PROMPTS).isfinite().all()


@pytest.mark.parametrize("answer", [2, 2.0, torch.tensor(2.0), [[2]], (np.array(2), {})])
def test_one_picture_may_have_one_number(images, answer):
    assert checked(lambda x, p: answer, "x")(images[:1], PROMPTS[:1]).tolist() == [2]


def test_no_pictures_have_no_numbers(images):
    assert checked(lambda x, p: [], "x")(images[:0], []).shape == (0,)


def test_a_pair_of_scores_is_no_scores_with_info(images):
    assert checked(lambda x, p: (3, 5), "x")(images[:2], PROMPTS[:2]).tolist() == [3, 5]


def test_a_reward_that_raises_is_named(images, capsys):
    """Of ours, in a line: the traceback is for a user's own code."""

    def broken(images, prompts):
        raise ValueError("no\nluck")

    with pytest.raises(Stop, match="^reward clip raised ValueError: no$"):
        checked(broken, "clip")(images, PROMPTS)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_ctrl_c_and_out_of_memory_stay_themselves(images, kind, monkeypatch):
    def end(*args, **options):
        raise kind

    with pytest.raises(kind):
        checked(end, "clip")(images, PROMPTS)
    monkeypatch.setattr(rewards, "ClipScore", end)
    with pytest.raises(kind):
        load_reward("clip")


def test_a_checked_reward_can_be_moved(images):
    layer = torch.nn.Linear(1, 1)
    reward = checked(layer, "x")
    assert reward.model is layer and reward.to("meta") is layer and layer.weight.is_meta
    assert checked(jpeg := rewards.jpeg_reward, "jpeg").to("meta") is jpeg


def test_llava_runs_in_half_precision_on_cuda_alone(monkeypatch):
    made = lambda device, dtype: lambda images, prompts: [device, dtype]
    monkeypatch.setattr(rewards, "BertScore", made)
    for device, dtype in (("cpu", torch.float32), ("cuda:0", torch.float16)):
        assert load_reward("bert", None, device).model([], []) == [device, dtype]


def test_a_model_that_can_not_be_loaded_ends_with_one_line(
    clip_folder, tmp_path, capsys, monkeypatch
):
    def no_hub(*args, **options):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(rewards, "ClipScore", no_hub)
    with pytest.raises(SystemExit) as stop:
        load_reward("clip")
    error = capsys.readouterr().err
    assert "cannot load the model of reward clip" in error and error.count("\n") == 1
    assert stop.value.code == 2
    monkeypatch.undo()
    (tmp_path / "clip").mkdir()  # damaged: JSON that is none, then no safetensors
    for config in ("{", (clip_folder / "open_clip_config.json").read_text()):
        (tmp_path / "clip/open_clip_config.json").write_text(config)
        (tmp_path / "clip/open_clip_model.safetensors").write_bytes(b"0" * 100)
        with pytest.raises(SystemExit):
            load_reward("clip", tmp_path)
        error = capsys.readouterr().err
        assert "cannot load the model of reward clip" in error and error.count("\n") == 1
