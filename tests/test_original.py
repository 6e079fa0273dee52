"""Ours computes what the original X-Decoder computed, and says so when it does not.

The golden file holds a tiny original: weights, inputs and everything it computed from them.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MODEL, TAXONOMY, model
from torch import Tensor

from jobs.__main__ import main as jobs
from schemas.jobs import (
    BackboneConfig,
    LossConfig,
    ModelConfig,
    PretrainJob,
    QuirksConfig,
    TextConfig,
)
from schemas.jobs import (
    load as load_job,
)
from xdecoder.inference.predictor import Predictor
from xdecoder.model.files import ModelCard
from xdecoder.model.original import QUIRKS, load, main, model_config, read, translate
from xdecoder.model.xdecoder import XDecoder
from xdecoder.replay import UNCOMPARED, replay
from xdecoder.training.losses import equal_phrases, grounding_loss

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden" / "xdecoder_seed0.pt"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs ../shared/golden")
HEAD = "sem_seg_head.predictor."
CARD = ModelCard(model=MODEL, taxonomy=TAXONOMY, answers=(), image_size=64, image_text_size=64)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    content: dict[str, Any] = read(GOLDEN)
    return content


# ------------------------------------------------------------------------------------------------ equality


@needs_golden
def test_every_stage_equals_the_original(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert "every stage is equal" in printed and "DIFFERS" not in printed
    stages = [line for line in printed.splitlines() if " of " in line and "e-0" in line or "e+0" in line]
    parts = (
        "backbone",
        "pixel decoder",
        "text",
        "segmentation",
        "referring",
        "captioning",
        "answers",
        "loss",
    )
    for part in (*parts, "retrieval", "greedy captions", "gradients"):
        assert any(line.startswith(part) for line in stages), part
    assert "Ours does otherwise, on purpose" in printed


# Records that no later stage starts from, and the stage that must notice each.
LEAVES: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "pixels": lambda g: g["batched"],
    "pixel decoder, encoder": lambda g: g["pixel_decoder"]["transformer_encoder_features"],
    "text, tokens": lambda g: g["text"]["token_emb"],
    "text, sentences of phrases": lambda g: g["grounding_eval_in"]["class_emb"],
    "segmentation, layer 2": lambda g: g["seg_eval_heads"][2]["outputs_mask"],
    "referring, layer 1": lambda g: g["grounding_eval_heads"][1]["outputs_caption"],
    "captioning, layer 3": lambda g: g["vlp_train_heads"][3]["outputs_captionting"],
    "captioning, outputs": lambda g: g["vlp_train"]["aux_outputs"][1]["pred_captionings"],
    "answers, semantic": lambda g: g["evaluate"][1]["sem_seg"],
    "retrieval, decoder": lambda g: g["retrieval_eval"]["image_embed_decoder"],
    "loss, mask_dice": lambda g: g["seg_losses_unweighted"]["loss_mask_dice_1"],
    "loss, captioning": lambda g: g["vlp_losses_unweighted"]["loss_captioning_0"],
    "gradient, nouns by the meanings": lambda g: g["grad_loss_caption_0_wrt_pred_captions"],
    "loss, weighted sum": lambda g: g["total_weighted_loss"],
    "gradients, decoder": lambda g: g["grads"][HEAD + "query_feat.weight"],
}


@needs_golden
def test_a_changed_record_is_noticed_at_its_stage_and_nowhere_else(golden: dict[str, Any]) -> None:
    content = copy.deepcopy({k: v for k, v in golden.items() if k != "state_dict"})
    for record in LEAVES.values():
        changed = record(content)
        more = torch.zeros(changed.numel())
        more[::7] = torch.linspace(0.5, 1, len(more[::7])) * (changed.abs().mean() + 0.1)
        changed += more.view(changed.shape)
    unequal = [s.name for s in replay(content | {"state_dict": golden["state_dict"]}) if not s.equal]
    also = ["answers from the picture, semantic", "beside phrases, layer 1"]  # they read the same records
    assert sorted(unequal) == sorted([*LEAVES, *also])


class Watched(dict[str, Any]):
    """A mapping that knows which of its keys were read, through those inside it, too."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({key: watched(value) for key, value in content.items()})
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self.read |= set(self)
        return super().items()

    def values(self) -> Any:
        self.read |= set(self)
        return super().values()

    def __or__(self, other: Any) -> Any:
        return dict(self.items()) | dict(other.items())

    def unread(self, place: str = "") -> list[str]:
        """Where something is recorded that nobody read."""
        found: list[str] = []
        for key, value in super().items():
            inner = value if isinstance(value, list) else [value]
            parts = [part for part in inner if isinstance(part, Watched)]
            found += [path for part in parts for path in part.unread(f"{place}{key}.")]
            nothing = all(part is None for part in inner)  # boxes, which there are none of
            if not parts and not nothing and key not in self.read:
                found.append(f"{place}{key}")
        return found


def watched(value: Any) -> Any:
    if isinstance(value, dict):
        return Watched(value)
    return [watched(part) for part in value] if isinstance(value, list) else value


@needs_golden
def test_what_is_recorded_is_read_or_listed_with_a_reason(golden: dict[str, Any]) -> None:
    content = Watched(golden)
    list(replay(content))
    unlisted = [path for path in content.unread() if not path.startswith(tuple(UNCOMPARED))]
    assert not unlisted
    assert content.unread()  # "image_sizes" is neither read nor compared: reading is noticed


@needs_golden
def test_a_changed_weight_and_a_nan_are_past_any_tolerance(
    golden: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(golden["state_dict"])
    state[HEAD + "class_embed"] = state[HEAD + "class_embed"].clone()
    state[HEAD + "class_embed"][0, 0] += 0.1
    heads = copy.deepcopy(golden["seg_eval_heads"])
    heads[0]["outputs_mask"][0, 0, 0, 0] = float("nan")
    torch.save(golden | {"state_dict": state, "seg_eval_heads": heads}, tmp_path / "changed.pt")
    assert main([str(tmp_path / "changed.pt")]) == 1
    printed = capsys.readouterr().out
    assert "NOT equal" in printed
    differing = [line for line in printed.splitlines() if "DIFFERS" in line]
    assert any(line.startswith("segmentation, layer 0") and "nan" in line for line in differing)
    assert any(line.startswith("segmentation, layer 4") for line in differing)


@needs_golden
def test_layers_that_cancel_out_and_a_layers_own_weight_are_noticed(golden: dict[str, Any]) -> None:
    shifted, weights = dict(golden["seg_losses_unweighted"]), dict(golden["weight_dict"])
    for layer, more in ((1, -0.01), (2, 0.01)):
        shifted[f"loss_mask_ce_{layer}"] = shifted[f"loss_mask_ce_{layer}"] + more
    weights["loss_mask_ce_3"] = 0.0
    stages = replay(golden | {"seg_losses_unweighted": shifted, "weight_dict": weights})
    unequal = [stage.name for stage in stages if not stage.equal]
    assert unequal == ["loss, class_ce", "loss, weights that differ between layers"]


@needs_golden
@pytest.mark.parametrize("quirk", ["masked_image_query", "padding_counts", "bicubic_masks"])
def test_without_a_quirk_ours_is_not_the_original(
    golden: dict[str, Any], quirk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xdecoder.model.original.QUIRKS", QUIRKS.model_copy(update={quirk: False}))
    assert any(not stage.equal for stage in replay(golden))


def test_quirks_of_the_predictor_are_what_they_say() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    phrases = ["a red square", "the grass"]
    plain = Predictor(model(task_tokens=False, mask_pooling=False), CARD)
    quirks = QuirksConfig(image_query_segments=True, phrases_together=True)
    odd = Predictor(model(task_tokens=False, mask_pooling=False, quirks=quirks), CARD)
    odd.model.load_state_dict(plain.model.state_dict())
    counts = []
    for predictor in (plain, odd):
        _, probs, masks, _ = next(iter(predictor._segments([picture], TAXONOMY, "panoptic")))
        assert len(probs) == len(masks)
        counts.append(len(probs))
    assert counts == [MODEL.latents, MODEL.latents + 1]
    asked: list[int] = []
    for predictor in (plain, odd):
        hook = predictor.model.decoder.register_forward_pre_hook(
            lambda _, args: asked.append(len(args[1].images))
        )
        assert predictor.refer(picture, phrases).masks.shape == (2, 64, 64)
        hook.remove()
    assert asked == [2, 1]


# ------------------------------------------------------------------------------------------------ refusals


@needs_golden
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda g: {k: v for k, v in g.items() if k != "seg_eval_heads"}, "seg_eval_heads is missing"),
        (lambda g: g["state_dict"], "no golden file of an X-Decoder: state_dict is missing"),
        (lambda g: [1, 2], "no golden file of an X-Decoder"),
        (lambda g: g | {"seg_loss_rand_log": g["seg_loss_rand_log"][::-1]}, "Sizes of tensors must match"),
        (lambda g: g | {"grads": {}}, "grads of backbone, caption_embed, decoder"),
        (lambda g: g | {"seg_eval_heads": [None] * 5}, "no golden file of an X-Decoder: TypeError"),
        (lambda g: g | {"backbone": {}}, "no golden file of an X-Decoder: IndexError"),
        (lambda g: g | {"vlp_losses_unweighted": {}}, "layers of loss_captioning are missing"),
    ],
)
def test_what_is_no_golden_file_is_one_clear_message(
    golden: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: Callable[[dict[str, Any]], Any],
    says: str,
) -> None:
    torch.save(content(golden), tmp_path / "other.pt")
    assert main([str(tmp_path / "other.pt")]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("error: ") == 1 and "Traceback" not in error


def test_a_file_that_holds_no_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pt").write_text("no tensors", encoding="utf-8")
    for arguments, says in (
        ([str(tmp_path / "text.pt")], "no file of tensors"),
        (["none.pt"], "no such file"),
    ):
        assert main(arguments) == 2
        assert says in capsys.readouterr().err
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


@needs_golden
def test_missing_unknown_and_ill_shaped_weights_are_listed(golden: dict[str, Any]) -> None:
    state = dict(golden["state_dict"])
    ours = XDecoder(model_config(state, heads=4, text_heads=4))
    del state[HEAD + "decoder_norm.weight"]
    state[HEAD + "query_feat.weight"] = state[HEAD + "query_feat.weight"][:-1]
    with pytest.raises(
        ValueError, match=r"missing: decoder.norm.weight; decoder.contents.weight is \[16, 64\]"
    ):
        load(ours, state)
    with pytest.raises(ValueError, match="no parameters of an X-Decoder: vqa_classifier.0.weight"):
        translate(golden["state_dict"] | {"vqa_classifier.0.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="not the weights of an X-Decoder: .*class_embed is missing"):
        model_config({"conv1.weight": torch.zeros(2)})


# ------------------------------------------------------------------------------------------------ import


@pytest.fixture
def checkpoint(golden: dict[str, Any], tmp_path: Path) -> Path:
    """The golden weights as an official file, prefixed as a training state is."""
    path = tmp_path / "original.pt"
    torch.save({"module": {f"model.{name}": t for name, t in golden["state_dict"].items()}}, path)
    return path


@needs_golden
def test_imported_weights_predict_what_the_original_predicted(
    golden: dict[str, Any], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "import",
        str(checkpoint),
        "--out",
        str(tmp_path / "model"),
        "--heads",
        "4",
        "--text-heads",
        "4",
    ]
    assert jobs([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept in"] == str(tmp_path / "model")
    loaded = Predictor.load(tmp_path / "model")
    classes = loaded.vocabulary.taxonomy
    assert len(classes.categories) == 133 and len(classes.things) == 80
    picture = golden["images_uint8"][1].permute(1, 2, 0).to(torch.uint8).numpy()
    card = loaded.card.model_copy(update={"image_size": max(picture.shape)})  # as it was recorded
    _, probs, masks, _ = next(iter(Predictor(loaded.model, card)._segments([picture], classes, "panoptic")))
    assert probs.shape == (17, 134)  # the image query among them
    torch.testing.assert_close(
        masks.sigmoid(), golden["seg_eval"]["pred_masks"][1].sigmoid(), atol=1e-4, rtol=0
    )
    assert jobs(command) == 2
    assert "is not empty" in capsys.readouterr().err


@needs_golden
def test_what_is_no_checkpoint_is_refused_and_leaves_nothing(
    golden: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = {k: v for k, v in golden["state_dict"].items() if "level_embed" not in k}
    state = golden["state_dict"]
    cases = [
        (lacking, "missing: decoder.level_embed.weight"),
        ({"a": 1}, "backbone_proj is missing"),
        ({1: torch.zeros(2), "backbone_proj": torch.zeros(3, 3)}, "backbone_proj is missing, or not all"),
        ({"module": [1, 2]}, "backbone_proj is missing"),
        (state | {HEAD + "class_embed": torch.tensor(1.0)}, "class_embed is missing, or has no sides"),
        (state | {"backbone_proj": state["backbone_proj"] * torch.nan}, "backbone_proj holds NaN"),
    ]
    for content, says in cases:
        torch.save(content, tmp_path / "other.pt")
        out = tmp_path / "out"
        assert jobs(["import", str(tmp_path / "other.pt"), "--out", str(out), "--heads", "4"]) == 2
        assert says in capsys.readouterr().err
        assert not out.exists()


@needs_golden
def test_the_head_of_vqa_is_left_out_and_what_was_found_is_said(
    golden: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {HEAD + f"vqa_classifier.{i}.weight": torch.zeros(4, 4) for i in (0, 3)}
    more[HEAD + "query_feat_caping.weight"] = torch.zeros(16, 64)
    shallow = {n: t for n, t in golden["state_dict"].items() if "resblocks.1" not in n}
    torch.save(shallow | more, tmp_path / "vqa.pt")
    command = ["import", str(tmp_path / "vqa.pt"), "--out", str(tmp_path / "model"), "--json"]
    assert jobs([*command, "--heads", "4", "--text-heads", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["left out"] == list(more)
    assert said["found"] == {"text layers": 1, "decoder layers": 4, "encoder layers": 2, "latents": 16}


# ------------------------------------------------------------------------------------------------ names


def _official(
    embed: int, depths: tuple[int, ...], levels: int, queries: int, *, dw: bool
) -> dict[str, Tensor]:
    """Names and shapes of an official checkpoint, written down from X-Decoder, 6; no memory behind them."""
    shapes: dict[str, tuple[int, ...]] = {"backbone_proj": (8 * embed, 512), "criterion.empty_weight": (134,)}

    def add(name: str, *shape: int, bias: int = 0) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = (bias,)

    add("backbone.patch_embed.proj", embed, 3, 7, 7, bias=embed)
    add("backbone.patch_embed.norm", embed, bias=embed)
    for s, depth in enumerate(depths):
        c = embed * 2**s
        for b in range(depth):
            block = f"backbone.layers.{s}.blocks.{b}."
            shapes |= {block + "gamma_1": (c,), block + "gamma_2": (c,)}
            for i in (1, 2):
                add(f"{block}norm{i}", c, bias=c)
                if dw:
                    add(f"{block}dw{i}", c, 1, 3, 3, bias=c)
            add(block + "modulation.f", 2 * c + levels + 1, c, bias=2 * c + levels + 1)
            add(block + "modulation.h", c, c, 1, 1, bias=c)
            add(block + "modulation.proj", c, c, bias=c)
            for level in range(levels):
                add(f"{block}modulation.focal_layers.{level}.0", c, 1, 3 + 2 * level, 3 + 2 * level)
            add(block + "mlp.fc1", 4 * c, c, bias=4 * c)
            add(block + "mlp.fc2", c, 4 * c, bias=c)
        add(f"backbone.norm{s}", c, bias=c)
        if s < 3:
            add(f"backbone.layers.{s}.downsample.proj", 2 * c, c, 3, 3, bias=2 * c)
            add(f"backbone.layers.{s}.downsample.norm", 2 * c, bias=2 * c)

    def attention(name: str) -> None:
        shapes[f"{name}.in_proj_weight"], shapes[f"{name}.in_proj_bias"] = (1536, 512), (1536,)
        add(f"{name}.out_proj", 512, 512, bias=512)

    pixel = "sem_seg_head.pixel_decoder."
    add(pixel + "input_proj", 512, 8 * embed, 1, 1, bias=512)
    for k in (1, 2, 3):
        add(f"{pixel}adapter_{k}", 512, embed * 2 ** (k - 1), 1, 1)
        add(f"{pixel}adapter_{k}.norm", 512, bias=512)
    for k in (1, 2, 3, 4):
        add(f"{pixel}layer_{k}", 512, 512, 3, 3)
        add(f"{pixel}layer_{k}.norm", 512, bias=512)
    add(pixel + "mask_features", 512, 512, 3, 3, bias=512)
    for i in range(6):
        layer = f"{pixel}transformer.encoder.layers.{i}."
        attention(layer + "self_attn")
        add(layer + "linear1", 2048, 512, bias=2048)
        add(layer + "linear2", 512, 2048, bias=512)
        add(layer + "norm1", 512, bias=512)
        add(layer + "norm2", 512, bias=512)
    for name in ("class_embed", "caping_embed", "lang_encoder.lang_proj"):
        shapes[HEAD + name] = (512, 512)
    shapes[HEAD + "self_attn_mask"] = (1, queries + 77, queries + 77)
    shapes[HEAD + "lang_encoder.logit_scale"] = ()
    add(HEAD + "query_feat", queries, 512)
    add(HEAD + "query_embed", queries, 512)
    add(HEAD + "level_embed", 3, 512)
    add(HEAD + "pos_embed_caping", 77, 512)
    add(HEAD + "decoder_norm", 512, bias=512)
    for i in range(3):
        add(f"{HEAD}mask_embed.layers.{i}", 512, 512, bias=512)
    for i in range(9):
        for kind, part in (("cross", "multihead_attn"), ("self", "self_attn")):
            attention(f"{HEAD}transformer_{kind}_attention_layers.{i}.{part}")
            add(f"{HEAD}transformer_{kind}_attention_layers.{i}.norm", 512, bias=512)
        add(f"{HEAD}transformer_ffn_layers.{i}.linear1", 2048, 512, bias=2048)
        add(f"{HEAD}transformer_ffn_layers.{i}.linear2", 512, 2048, bias=512)
        add(f"{HEAD}transformer_ffn_layers.{i}.norm", 512, bias=512)
    text = HEAD + "lang_encoder.lang_encoder."
    add(text + "token_embedding", 49408, 512)
    shapes[text + "positional_embedding"] = (77, 512)
    add(text + "ln_final", 512, bias=512)
    for i in range(12):
        block = f"{text}resblocks.{i}."
        attention(block + "attn")
        add(block + "ln_1", 512, bias=512)
        add(block + "ln_2", 512, bias=512)
        add(block + "mlp.c_fc", 2048, 512, bias=2048)
        add(block + "mlp.c_proj", 512, 2048, bias=512)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


# entries and millions of parameters as the reference counted them
@pytest.mark.parametrize(
    ("official", "entries", "millions"),
    [
        (_official(96, (2, 2, 6, 2), 3, 101, dw=True), 726, 164.49),
        (_official(192, (2, 2, 18, 2), 4, 201, dw=False), None, 341.6),
    ],
    ids=["Focal-T", "Focal-L"],
)
def test_every_official_name_has_one_place_in_ours(
    official: dict[str, Tensor], entries: int | None, millions: float
) -> None:
    assert entries is None or len(official) == entries
    config = model_config(official)
    with torch.device("meta"):
        ours = XDecoder(config)
    load(ours, official)
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert (config.heads, config.decoder_layers, config.encoder_layers, config.text.layers) == (8, 9, 6, 12)


def test_the_recipe_is_the_model_that_official_weights_fill() -> None:
    job = load_job(ROOT / "jobs" / "recipes" / "xdecoder_original.yaml")
    assert isinstance(job, PretrainJob)
    imported = model_config(_official(96, (2, 2, 6, 2), 3, 101, dw=True))
    options = imported.backbone.options | {"drop_path": 0.3}  # of training, no weights
    backbone = imported.backbone.model_copy(update={"options": {k: _plain(v) for k, v in options.items()}})
    bare = {
        "prompts": imported.prompts,
        "init_layers": imported.init_layers,
    }  # of task tokens: off
    ours = job.model.model_copy(update=bare)
    assert ours == imported.model_copy(update={"backbone": backbone})


def test_an_imported_model_is_asked_with_the_sentences_of_the_original() -> None:
    prompts = model_config(_official(96, (2, 2, 6, 2), 3, 101, dw=True)).prompts
    assert len(set(prompts)) == 81 and {"{}.", "a photo of a {}."} < set(prompts)
    assert all(prompt.endswith(".") for prompt in prompts)
    assert model(prompts=prompts).class_texts(["dog"]).rows == (81, 81)  # and so is no object


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------ settings


def test_what_exists_only_for_equality_is_off() -> None:
    assert set(QuirksConfig().model_dump().values()) == {False}
    assert set(QUIRKS.model_dump().values()) == {True}
    assert ModelConfig().quirks == QuirksConfig() and not LossConfig().same_phrases
    assert TextConfig().norm_eps == 1e-5
    for section, field in ((QuirksConfig, None), (LossConfig, "same_phrases"), (TextConfig, "norm_eps")):
        fields = section.model_fields
        assert all(fields[name].description for name in ([field] if field else fields))


def test_a_focal_net_names_stages_that_do_not_fit() -> None:
    wrong = BackboneConfig(name="focal", out_indices=(0, 1, 2, 3), options={"depths": (1, 1)})
    with pytest.raises(ValueError, match=r"depths \[1, 1\].*out_indices \[0, 1, 2, 3\]"):
        XDecoder(ModelConfig(backbone=wrong))


def test_equal_phrases_share_their_targets() -> None:
    ids = torch.tensor([[1, 2, 0], [1, 3, 0], [1, 2, 0], [4, 4, 4]])
    same = equal_phrases(ids, (3, 1))
    assert same[0].tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    assert same[1].tolist() == [[True]]
    logits = torch.randn(1, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    queries, targets = torch.tensor([1, 2, 4]).numpy(), torch.tensor([2, 0, 1]).numpy()
    log_p = logits[0, 0].log_softmax(0)
    # phrases 0 and 2 are matched to latents 2 and 1, phrase 1 to latent 4
    shared = -(log_p[[1, 2], 0].mean() + log_p[4, 1] + log_p[[1, 2], 2].mean()) / 3
    alone = -(log_p[2, 0] + log_p[4, 1] + log_p[1, 2]) / 3
    pairs = [(queries, targets)]
    torch.testing.assert_close(grounding_loss(logits, pairs, same[:1]), shared)
    torch.testing.assert_close(grounding_loss(logits, pairs), alone)
