"""The schema of every job file: what may be set, of which type, within which bounds, and its default.

A job file is YAML. `load` resolves `extends:`, applies dotted overrides (`train.steps=50`) and validates; an
unknown key is an error that names the nearest one. Nothing here starts anything or imports torch, so a wrong
file is refused within a second.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from schemas.cron import is_time_zone, parse
from schemas.tasks import TASKS, Stream, Task

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


def _one_place(prompt: str) -> str:
    if prompt.count("{}") != 1 or "{" in prompt.replace("{}", ""):
        raise ValueError(f"prompt {prompt!r} must hold {{}} once, for the name of a class")
    return prompt


def _a_cron(expression: str) -> str:
    parse(expression)
    return expression


Prompts = Annotated[tuple[Annotated[str, AfterValidator(_one_place)], ...], Field(min_length=1)]


class Settings(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ------------------------------------------------------------------------------------------- the model


# X-Decoder says "background", which microscopy and many other corpora have as a class: two classes of one
# text share every probability.
NO_OBJECT = "no object"


class BackboneConfig(Settings):
    """A timm model with `features_only`, or "focal" or "focal_dw": the FocalNets of X-Decoder's weights.

    `out_indices` picks three or four feature maps, finest first.
    """

    name: str = "focalnet_tiny_srf"
    pretrained: bool = False
    out_indices: tuple[NonNegative, ...] = Field(default=(0, 1, 2, 3), min_length=3, max_length=4)
    options: dict[str, Any] = Field(
        default={}, description="passed to timm.create_model (e.g. channels) or to FocalNet (e.g. depths)"
    )


class TextConfig(Settings):
    """The causal text encoder (CLIP's)."""

    width: NonNegative = Field(
        default=0, description="0 is the model's; with another, texts name classes but are no queries"
    )
    layers: Positive = 12
    heads: Positive = 8
    context: Positive = Field(default=77, description="the longest text, in tokens, with start and end")
    norm_eps: float = Field(
        default=1e-5, gt=0, description="of the text encoder's norms; X-Decoder's weights know 1e-12"
    )
    clip: str = Field(
        default="", description="open_clip MODEL/TAG to start from, e.g. ViT-B-16-quickgelu/openai; downloads"
    )
    frozen: bool = Field(default=False, description="keep the weights as they start (ZegFormer)")


class QuirksConfig(Settings):
    """Accidents of the released X-Decoder that its weights have learned with: only for equality, all off.

    `jobs/recipes/xdecoder_original.yaml` and `python -m jobs import` turn them on.
    """

    masked_image_query: bool = Field(
        default=False,
        description="an index is off by one: the image query sees only the mask of its pooled latents, the "
        "first latent of a referring request sees everything",
    )
    image_query_segments: bool = Field(
        default=False, description="the image query, too, is read as a segment, though no loss teaches it"
    )
    padding_counts: bool = Field(
        default=False, description="there is no padding mask: padding of pictures and phrases is content"
    )
    phrases_together: bool = Field(
        default=False,
        description="the predictor asks all phrases of a picture at once, so they disturb another",
    )
    bicubic_masks: bool = Field(
        default=False, description="mask logits are resized bicubically, for attention and for answers"
    )


class ModelConfig(Settings):
    """The X-Decoder architecture. Defaults: Focal-T of the paper, with task tokens."""

    width: Positive = 512
    heads: Positive = 8
    ffn: Positive = 2048
    decoder_layers: NonNegative = 9
    decoder_levels: Annotated[int, Field(ge=1, le=3)] = Field(
        default=3, description="coarsest maps that the decoder's layers look at in turn (MaskFormer: 1)"
    )
    masked_attention: bool = Field(
        default=True, description="a latent looks inside its own mask alone (Mask2Former)"
    )
    pixel_decoder: Literal["fpn", "deformable"] = Field(
        default="fpn",
        description="fpn (MaskFormer, X-Decoder), or deformable (Mask2Former, OneFormer)",
    )
    encoder_layers: NonNegative = Field(
        default=6, description="transformer layers of the pixel decoder: coarsest map, or the three coarsest"
    )
    latents: Positive = Field(default=100, description="object queries; the image query comes on top")
    task_tokens: bool = Field(
        default=True, description="task token, task-guided query initialisation (OneFormer)"
    )
    init_layers: NonNegative = Field(default=2, description="layers of the task-guided query initialisation")
    mask_pooling: bool = Field(
        default=False,
        description="a query's meaning joins the features under its own mask: learns names sooner",
    )
    text_contexts: NonNegative = Field(
        default=16, description="learnable vectors in the query-text list (OneFormer N_ctx)"
    )
    classes: NonNegative = Field(
        default=0, description="0 names classes by their texts; else a closed linear classifier of so many"
    )
    prompts: Prompts = Field(
        default=("{}",), description="sentences around a class name; the meanings of all are averaged"
    )
    no_object: str | None = Field(
        default=NO_OBJECT, description="the words that mean no object; null is a learned vector (ZegFormer)"
    )
    output: Literal["masks", "pixels", "latents"] = Field(
        default="masks",
        description="(class, mask) pairs; or every pixel's class, by its features or by a latent a class",
    )
    backbone: BackboneConfig = BackboneConfig()
    text: TextConfig | None = Field(
        default=TextConfig(), description="null: the model knows no words; needs classes"
    )
    quirks: QuirksConfig = QuirksConfig()

    @property
    def context(self) -> int:
        """The longest text in tokens; start and end alone without a text encoder."""
        return self.text.context if self.text else 2

    @property
    def text_width(self) -> int:
        """Of a sentence's meaning; 0 without a text encoder."""
        return (self.text.width or self.width) if self.text else 0

    @property
    def text_queries(self) -> bool:
        """Whether words can be queries: phrases, captions, questions and the tasks that need them."""
        return self.text_width == self.width

    @property
    def able(self) -> tuple[Task, ...]:
        """What can be asked of this architecture. Words are queries where they have the model's width; where
        classes are columns and no texts, no text can be compared with what a query means.
        """
        masks: tuple[Task, ...] = ("semantic", "instance", "panoptic")
        if self.output != "masks":
            return masks[:1]
        if not self.text_queries:
            return masks
        return (*masks, "captioning") if self.classes else TASKS

    @model_validator(mode="after")
    def _divisible(self) -> "ModelConfig":
        pairs = [("heads", self.width, self.heads)]
        if self.text:
            pairs.append(("text.heads", self.text_width, self.text.heads))
        for what, width, heads in pairs:
            if width % heads:
                raise ValueError(f"width {width} cannot be divided by {what} {heads}")
        if self.width % 32:
            raise ValueError(f"width {self.width} must be a multiple of 32 (groups of the normalisation)")
        if self.text_contexts > self.latents:
            raise ValueError(f"text_contexts {self.text_contexts} exceeds latents {self.latents}")
        return self

    @model_validator(mode="after")
    def _words_where_they_are_needed(self) -> "ModelConfig":
        if self.text is None and not self.classes:
            raise ValueError("text: null needs classes: nothing else could name a class")
        if self.task_tokens and not self.text_queries:
            raise ValueError("task_tokens needs a text encoder of the model's width; set task_tokens: false")
        if self.no_object is None and self.classes:
            raise ValueError("a learned no_object goes with class names; a closed classifier has its own")
        if self.output == "latents" and self.classes != self.latents:
            raise ValueError(f"output latents needs classes = latents, not {self.classes} and {self.latents}")
        return self


class LossConfig(Settings):
    """Weights of the loss terms (a term without a weight is an error), and how they are computed."""

    class_ce: float = Field(default=2.0, ge=0)
    region_ce: float = Field(
        default=0.0,
        ge=0,
        description="names of the true regions by their looks alone; needs model.mask_pooling",
    )
    mask_bce: float = Field(default=5.0, ge=0)
    mask_focal: float = Field(
        default=0.0, ge=0, description="sigmoid focal loss in the place of mask_bce (MaskFormer: 20)"
    )
    mask_dice: float = Field(default=5.0, ge=0)
    query_text: float = Field(default=0.5, ge=0)
    grounding_ce: float = Field(default=0.4, ge=0)
    grounding_bce: float = Field(default=1.0, ge=0)
    grounding_dice: float = Field(default=1.0, ge=0)
    captioning: float = Field(default=2.0, ge=0)
    retrieval: float = Field(default=2.0, ge=0)
    retrieval_backbone: float = Field(default=8.0, ge=0)
    nouns: float = Field(
        default=0.0,
        ge=0,
        description="what captions speak of against the latents that mean it; learned with retrieval",
    )
    vqa: float = Field(default=2.0, ge=0)
    same_phrases: bool = Field(
        default=False,
        description="phrases of a picture with equal words share their targets and are read once (X-Decoder)",
    )
    pixel_ce: float = Field(default=1.0, ge=0, description="per-pixel classification (model.output)")
    no_object_weight: Fraction = Field(
        default=0.1, description="weight of the no-object column in the class loss"
    )
    matching: Literal["bipartite", "fixed"] = Field(
        default="bipartite", description="fixed: latent i answers for class i (MaskFormer, semantic alone)"
    )
    points: NonNegative = Field(
        default=12544, description="points sampled on each mask; 0 is every pixel (MaskFormer)"
    )
    oversample: float = Field(default=3.0, ge=1)
    importance: Fraction = 0.75
    top_layers: Positive = Field(
        default=3, description="captioning, retrieval, grounding: on this many last layers"
    )
    caption_negatives: NonNegative = Field(
        default=0, description="tokens drawn as rivals of a caption's words; 0 is the whole vocabulary"
    )
    class_layers: NonNegative = Field(
        default=0, description="class_ce: on this many last predictions; 0 is all of them, as in the papers"
    )

    @model_validator(mode="after")
    def _one_pixelwise_loss(self) -> "LossConfig":
        if self.mask_bce and self.mask_focal:
            raise ValueError("mask_bce and mask_focal are alternatives: set the weight of one to 0")
        return self

    @property
    def pixelwise(self) -> Literal["bce", "focal"]:
        """Which of the two alternatives masks are matched and taught by."""
        return "focal" if self.mask_focal else "bce"


# ------------------------------------------------------------------------------------------------ data


class DemoConfig(Settings):
    """The synthetic world, written in public formats; `python -m jobs demo DIR` writes the same."""

    root: str = Field(default="demo/corpora", description="relative to the store")
    seed: NonNegative = 0
    image_size: Annotated[int, Field(ge=32, le=1024)] = 64
    train_scenes: Positive = 3000
    val_scenes: Positive = 200
    train_pairs: Positive = 3000
    val_pairs: Positive = 200
    unseen: tuple[str, ...] = Field(
        default=("purple square", "yellow cross"),
        description="things without a mask in training; captions, questions and val show them all the same",
    )


Format = Literal[
    "coco_panoptic",
    "coco_instances",
    "index_maps",
    "cityscapes",
    "voc",
    "refcoco",
    "grounding",
    "visual_genome",
    "coco_captions",
    "karpathy",
    "captions_table",
    "webdataset",
    "vqa_v2",
    "dataset",
]


# What each format reads of a corpus, beside the settings that all have; anything else set is an error.
USES: dict[Format, tuple[str, ...]] = {
    "coco_panoptic": ("images", "annotations", "labels"),
    "coco_instances": ("images", "annotations"),
    "index_maps": ("images", "labels", "classes", "seen_only"),
    "cityscapes": ("images", "labels", "classes", "seen_only"),
    "voc": ("images", "annotations", "labels", "instances", "classes", "seen_only", "background"),
    "refcoco": ("images", "annotations", "instances", "parts"),
    "grounding": ("images", "annotations"),
    "visual_genome": ("images", "annotations", "questions", "regions"),
    "coco_captions": ("images", "annotations"),
    "karpathy": ("images", "annotations", "parts"),
    "captions_table": ("images", "annotations", "image_column", "caption_column"),
    "webdataset": ("annotations", "caption_column"),
    "vqa_v2": ("images", "annotations", "questions"),
    "dataset": ("parts",),
}


class CorpusConfig(Settings):
    """One corpus, or one split of it. Its reader (pipelines/corpora) says which paths its format needs."""

    name: Name
    format: Format
    split: Literal["train", "val"]
    root: str = Field(
        default=".",
        description="folder or URI; all other paths are relative to it and may not leave it; what lies at a "
        "URI is copied into the store before it is read",
    )
    images: str = Field(default="", description="folder of the images")
    annotations: str = Field(
        default="", description="annotation file; tars and tables may be a pattern, *.tar"
    )
    labels: str = Field(default="", description="folder of the label maps")
    instances: str = Field(default="", description="refcoco: instances.json; voc: folder of the object PNGs")
    questions: str = Field(default="", description="vqa_v2, visual_genome: questions JSON")
    parts: tuple[str, ...] = Field(
        default=(),
        description="the splits inside the file, e.g. [train, restval]; empty takes the split's name",
    )
    classes: str = Field(
        default="",
        description="index_maps: coco_stuff, ade150, ade847 or a YAML file of your own below the root",
    )
    seen_only: bool = Field(default=False, description="leave the pixels of the list's unseen classes void")
    background: bool = Field(default=False, description="voc: the background is a class")
    regions: Literal["captions", "referring"] = Field(
        default="captions", description="visual_genome: what a region is; referring takes its box as a mask"
    )
    image_column: str = Field(default="image", description="captions_table: path, or bytes, of the image")
    caption_column: str = Field(default="caption", description="captions_table; webdataset: key in the JSON")
    licence: str = Field(default="", description="of all its images, whatever its files state of them")
    image_ids: Name | Literal[""] = Field(
        default="",
        description="whose ids the images have, e.g. coco: one id in two corpora is one image; 42, "
        "000000000042.jpg and COCO_val2014_000000000042.jpg are one id",
    )
    limit: NonNegative = Field(default=0, description="at most this many images; 0 is all")

    @model_validator(mode="after")
    def _used(self) -> "CorpusConfig":
        special = {setting for settings in USES.values() for setting in settings}
        fields = type(self).model_fields
        given = {name for name in special if getattr(self, name) != fields[name].default}
        if unused := sorted(given - set(USES[self.format])):
            raise ValueError(
                f"corpus {self.name!r}: format {self.format} does not use {', '.join(unused)}; "
                f"it uses {', '.join(USES[self.format])}"
            )
        return self


def _pattern(expression: str) -> str:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{expression!r} is no regular expression: {error}") from None
    return expression


class CaptionRules(Settings):
    """Which captions of training splits are refused; 0 and empty refuse none."""

    min_words: NonNegative = 0
    max_words: NonNegative = 0
    min_characters: NonNegative = 0
    max_characters: NonNegative = 0
    scripts: tuple[Annotated[str, Field(pattern="^[a-z]+$")], ...] = Field(
        default=(), description="allowed ones by their Unicode names: latin, cyrillic, cjk, hangul ..."
    )
    min_script_share: Fraction = Field(default=0.5, description="least share of letters of those scripts")
    boilerplate: tuple[Annotated[str, AfterValidator(_pattern)], ...] = Field(
        default=(), description="regular expressions, of any case, found anywhere"
    )
    refuse_addresses: bool = Field(default=False, description="captions with a web or mail address")
    refuse_markup: bool = Field(default=False, description="captions with HTML tags or entities")
    max_repeats: NonNegative = Field(
        default=0, description="refuse what stands more often in its corpus, in all places; reads it twice"
    )

    @model_validator(mode="after")
    def _some_pass(self) -> "CaptionRules":
        for what in ("words", "characters"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if 0 < most < least:
                raise ValueError(f"min_{what} {least} is more than max_{what} {most}: no caption would pass")
        return self


class LicenceRules(Settings):
    """Which licences are kept, as patterns of the licence's name or address: "CC BY*", "*/by-nc*".

    Each is tried on both, as far as a corpus states them. Case does not matter.
    """

    allow: tuple[str, ...] = Field(default=(), description="empty allows all")
    deny: tuple[str, ...] = Field(default=(), description="goes before allow")
    unknown: Literal["keep", "reject"] = Field(default="keep", description="images that state none")


class CurateConfig(Settings):
    """What is kept of what could be read. Images of evaluation splits leave training whatever is set."""

    near_duplicates: Literal["keep", "reject"] = Field(
        default="keep", description="training images that look the same: marked, or all but one refused"
    )
    captions: CaptionRules = CaptionRules()
    licences: LicenceRules = LicenceRules()


class BuildConfig(Settings):
    num_workers: Positive = Field(
        default=2, description="concurrent Ray tasks; 1 works in the process of the job, without Ray"
    )
    shard_samples: Positive = 500
    shard_mb: Positive = 256
    max_reject_share: Fraction = Field(
        default=0.05,
        description="of faulty images, or of faulty annotations of images that stay; above it the build "
        "stops and publishes nothing",
    )
    max_pixels: Positive = Field(default=100_000_000, description="larger images are rejected unread")
    curate: CurateConfig = CurateConfig()
    cpus_per_task: float = Field(default=1, gt=0, description="CPUs that a task takes of the cluster's")
    memory_per_task_mb: NonNegative = Field(
        default=0, description="memory that a task reserves of the cluster's; 0 reserves none"
    )
    object_store_mb: NonNegative = Field(
        default=0, description="what the build may take of Ray's object store; 0 leaves it to Ray"
    )


class DatasetRef(Settings):
    name: Name = "demo"
    version: str = Field(default="current", description="a version id or 'current'")


class MixedDataset(DatasetRef):
    """One of the datasets that a stream draws from."""

    weight: float = Field(
        gt=0, description="in any unit, beside those of the others; rounded to 1/4096 of their sum"
    )


# -------------------------------------------------------------------------------------------- training


class BatchConfig(Settings):
    """Global batch of a step, over all ranks."""

    segmentation: Positive = 16
    image_text: Positive = 16


class AugmentConfig(Settings):
    image_size: Annotated[int, Field(ge=32)] = Field(
        default=1024, description="square side of the crop, pixels"
    )
    scale: tuple[float, float] = Field(default=(0.1, 2.0), description="large-scale jitter")
    flip: Fraction = 0.5
    colour: bool = Field(
        default=False, description="brightness, contrast, saturation and hue by chance (SSD, as Mask2Former)"
    )
    image_text_size: Annotated[int, Field(ge=32)] = 224


class OptimConfig(Settings):
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    backbone_scale: float = Field(default=0.1, ge=0, description="learning rate factor of the backbone")
    text_scale: float = Field(default=0.1, ge=0, description="learning rate factor of the text encoder")
    warmup_steps: NonNegative = 10
    schedule: Literal["multistep", "poly", "cosine", "constant"] = "multistep"
    milestones: tuple[Fraction, ...] = (0.88889, 0.96296)
    clip: float = Field(default=5.0, gt=0, description="L2 norm of all gradients")


class ValidationConfig(Settings):
    """Looks at held-out images during training, with the tasks and thresholds of `evaluate`."""

    every: NonNegative = Field(default=0, description="steps between them, a checkpoint each; 0 is none")
    limit: Positive = Field(default=32, description="at most this many images per stream")
    pictures: NonNegative = Field(default=2, description="overlay pictures of each task")
    metric: str = Field(
        default="", description="task/metric, higher is better, whose best checkpoint is kept: panoptic/PQ"
    )


class TrainConfig(Settings):
    steps: Positive = 1000
    seed: NonNegative = 0
    num_workers: Positive = Field(default=1, description="Ray Train workers (ranks)")
    cpus_per_worker: NonNegative = Field(
        default=0, description="0 shares the cluster's CPUs among the workers"
    )
    use_gpu: bool = False
    loader_workers: NonNegative = Field(default=0, description="processes of each rank that prepare batches")
    loader_threads: NonNegative = Field(
        default=0, description="threads of each rank that prepare batches where loader_workers is 0"
    )
    tars: dict[Stream, str] = Field(
        default={},
        description="glob, relative to the store, of tars of others (pictures with .txt captions) that take "
        "the place of a dataset; without an index they have neither exactly-once nor exact resume",
    )
    cache: str = Field(
        default="",
        description="folder on each machine that keeps shards of a store far away; empty reads them there",
    )
    cache_gb: float = Field(default=100.0, gt=0, description="its size, which the ranks of a machine share")
    min_workers: NonNegative = Field(
        default=0, description="elastic: fewer will do while machines are missing; 0 is num_workers"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="fsdp cuts weights, gradients and optimiser among the ranks (FSDP2)"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: Positive = Field(
        default=1,
        description="parts that a step's batch is worked through in; what is learned stays the same, to "
        "rounding, but for batch norms and for points and rivals drawn by chance",
    )
    activation_checkpointing: bool = Field(
        default=False, description="less memory for more time: blocks are computed again for their gradient"
    )
    compile: bool = Field(
        default=False, description="torch.compile of the repeated blocks; the first steps take minutes"
    )
    ema_decay: Fraction = Field(
        default=0.0, description="of an average of the weights over steps, e.g. 0.9999; 0 keeps none"
    )
    export: Literal["trained", "average"] = Field(
        default="trained", description="which weights become the model; average needs ema_decay"
    )
    tasks: tuple[Task, ...] = TASKS
    task_sampling: tuple[Fraction, Fraction, Fraction] = Field(
        default=(0.33, 0.33, 0.34), description="probability of semantic, instance, panoptic for each image"
    )
    shares: dict[Task, Fraction] = Field(
        default={}, description="probability that a task is trained on an image that can tell of it; 1"
    )
    max_phrases: Positive = Field(default=4, description="referring expressions of an image in a step")
    batch: BatchConfig = BatchConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    log_every: Positive = 20
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    validation: ValidationConfig = ValidationConfig()
    profile: tuple[NonNegative, NonNegative] | None = Field(
        default=None, description="trace the steps from .. to with torch.profiler, an artifact of the run"
    )
    max_failures: NonNegative = 3
    rewind: bool = Field(
        default=True,
        description="after a loss that is no number, go back to the last checkpoint once and pass over the "
        "samples since; the second time the training stops",
    )
    collective_timeout_s: Positive = Field(
        default=1800,
        description="a rank that does not come for so long ends the attempt; a validation must be shorter",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if not self.tasks:
            raise ValueError(f"tasks is empty; choose from {list(TASKS)}")
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} exceeds num_workers {self.num_workers}")
        for what in get_args(Literal["segmentation", "image_text"]):
            size = getattr(self.batch, what)
            for workers in range(self.min_workers or self.num_workers, self.num_workers + 1):
                if size % (workers * self.accumulate):
                    parts = f" in {self.accumulate} parts" if self.accumulate > 1 else ""
                    raise ValueError(f"batch.{what} {size} cannot be divided by {workers} workers{parts}")
        if self.profile and self.profile[0] >= self.profile[1]:
            raise ValueError(f"profile {list(self.profile)}: give the first step and the one after the last")
        if self.export == "average" and not self.ema_decay:
            raise ValueError("export: average needs ema_decay, e.g. 0.9999")
        if self.loss.matching == "fixed" and {"instance", "panoptic"} & set(self.tasks):
            raise ValueError("loss.matching=fixed has one latent a class: leave instance and panoptic out")
        if "segmentation" in self.tars:
            raise ValueError("tars hold pictures with captions: only image_text can draw from them")
        if abs(sum(self.task_sampling) - 1) > 1e-6:
            raise ValueError(f"task_sampling {self.task_sampling} must sum to 1")
        return self


# ------------------------------------------------------------------------------------------ evaluation


class CaptionConfig(Settings):
    """How captions are looked for; the defaults are greedy."""

    beams: Positive = Field(default=1, description="captions followed at a time; 5 in the paper's finetuning")
    length_penalty: float = Field(
        default=1.0, description="score is log-probability / tokens ** length_penalty; more favours long ones"
    )
    min_tokens: NonNegative = Field(default=0, description="no caption ends before it holds so many")
    no_repeat: NonNegative = Field(
        default=0, description="no run of so many tokens stands twice; 0 allows it"
    )


class ZeroShotConfig(Settings):
    """How classes without a mask in training are told (ZegFormer), where the taxonomy has such."""

    gamma: Fraction = Field(
        default=0.0, description="calibration: taken from the scores of seen classes (ZegFormer: 0.1)"
    )
    regions: Literal["off", "crop", "mask", "cropmask"] = Field(
        default="off", description="image branch: what of a region its encoder sees"
    )
    encoder: str = Field(
        default="", description="image branch: open_clip MODEL/TAG; empty is the model's own image embedding"
    )
    weight: Fraction = Field(default=2 / 3, description="lambda of the ensemble with the image branch")
    prompts: Prompts = Field(default=("{}",), description="image branch: sentences around a class name")


class EvaluateConfig(Settings):
    tasks: tuple[Task, ...] = TASKS
    split: Literal["train", "val"] = "val"
    batch: Positive = 16
    limit: NonNegative = Field(default=0, description="at most this many images per stream; 0 is all")
    image_size: NonNegative = Field(default=0, description="long side the model sees; 0 takes the training's")
    object_threshold: Fraction = Field(
        default=0.8, description="panoptic: least class score (Mask2Former on COCO)"
    )
    overlap_threshold: Fraction = Field(default=0.8, description="panoptic: least visible share of a mask")
    instances: Positive = Field(default=100, description="instance: kept per image")
    max_caption_tokens: Positive = 50
    caption: CaptionConfig = CaptionConfig()
    zeroshot: ZeroShotConfig = ZeroShotConfig()
    pictures: NonNegative = Field(default=8, description="overlay pictures logged")


class Rule(Settings):
    """One row of the promotion rules.

    The candidate may fall behind the champion by at most `tolerance` on this metric; where `must_improve`,
    its gain has to be positive with the `confidence` of promote by paired bootstrap over images.
    """

    task: Task
    metric: str
    direction: Literal["higher", "lower"] = "higher"
    tolerance: float = Field(default=0.0, ge=0, description="in the metric's own unit")
    must_improve: bool = False
    floor: float | None = Field(default=None, description="absolute bound, also for the first champion")
    min_examples: Positive = 1


class PromoteConfig(Settings):
    candidate: str = Field(
        default="latest",
        coerce_numbers_to_str=True,
        description="a version number of the registered model, or 'latest'",
    )
    require: bool = Field(default=False, description="a refusal is a non-zero status")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Positive = 1000
    rules: tuple[Rule, ...] = ()


# ------------------------------------------------------------------------------------------- job files


class Job(Settings):
    """What all job files share. A relative store is relative to the working directory."""

    store: str = Field(
        default="store",
        description="a folder, or a URI such as s3://bucket/prefix where datasets and checkpoints lie; "
        "XDECODER_STORE overrides it",
    )


class ScheduleConfig(Settings):
    """When the scheduler runs a job file: `python -m jobs schedule FILE.yaml`."""

    cron: Annotated[str, AfterValidator(_a_cron)] = Field(
        description="minute hour day month weekday, e.g. 0 3 * * *; a sixth field, in front, is the second"
    )
    time_zone: Annotated[str, AfterValidator(is_time_zone)] = Field(
        default="UTC", description="in which cron is read, e.g. Europe/Berlin"
    )
    grace_s: Positive = Field(
        default=43200,
        description="of the runs that nobody was there to start, the last one is made up if not older",
    )


class RebuildJob(Job):
    """corpora -> a new dataset version."""

    kind: Literal["rebuild"]
    dataset: Name = "demo"
    schedule: ScheduleConfig | None = Field(default=None, description="for `python -m jobs schedule`")
    on_success: tuple[str, ...] = Field(
        default=(),
        description="job files, relative to this one, run in turn once for every new version",
    )
    demo: DemoConfig | None = Field(
        default=None, description="write the demo corpora first; corpora may be empty then"
    )
    corpora: tuple[CorpusConfig, ...] = ()
    build: BuildConfig = BuildConfig()

    @model_validator(mode="after")
    def _has_corpora(self) -> "RebuildJob":
        if self.demo is None and not self.corpora:
            raise ValueError("nothing to build: give corpora, or a demo section")
        keys = [(c.name, c.split, c.root, c.images, c.annotations) for c in self.corpora]
        if len(set(keys)) < len(keys):
            raise ValueError("two corpora have the same name, split, root, images and annotations")
        return self


class PretrainJob(Job):
    """A dataset version -> a trained, registered model."""

    kind: Literal["pretrain"]
    name: Name = Field(
        default="demo", description="the run; submitting the same name and settings again resumes it"
    )
    registered_model: Name = "demo"
    dataset: DatasetRef = DatasetRef()
    datasets: dict[Stream, Annotated[tuple[MixedDataset, ...], Field(min_length=1)]] = Field(
        default={},
        description="what a stream draws from by weight; others draw from `dataset`, which is evaluated",
    )
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _regions_need_pooling(self) -> "PretrainJob":
        if self.train.loss.region_ce and not self.model.mask_pooling:
            raise ValueError("train.loss.region_ce needs model.mask_pooling=true")
        return self

    @model_validator(mode="after")
    def _tasks_fit_the_model(self) -> "PretrainJob":
        for what, tasks in (("train", self.train.tasks), ("evaluate", self.evaluate.tasks)):
            beyond = sorted(set(tasks) - set(self.model.able))
            if beyond:
                raise ValueError(
                    f"{what}.tasks: this model (model.output {self.model.output!r}, "
                    f"{'' if self.model.text_queries else 'no '}text queries, "
                    f"{'closed' if self.model.classes else 'open'} class list) cannot do {beyond}"
                )
        if self.train.loss.matching == "fixed" and self.model.classes > self.model.latents:
            raise ValueError(
                f"train.loss.matching=fixed needs a latent for each of model.classes {self.model.classes}, "
                f"there are {self.model.latents}"
            )
        return self

    @model_validator(mode="after")
    def _validation_measures_what_decides(self) -> "PretrainJob":
        validation = self.train.validation
        if validation.metric and not validation.every:
            raise ValueError("train.validation.metric needs train.validation.every")
        if validation.metric and validation.metric.partition("/")[0] not in self.evaluate.tasks:
            raise ValueError(
                f"train.validation.metric {validation.metric!r}: write task/metric with a task of "
                f"evaluate.tasks {list(self.evaluate.tasks)}"
            )
        return self

    @model_validator(mode="after")
    def _branch_has_an_encoder(self) -> "PretrainJob":
        zeroshot = self.evaluate.zeroshot
        if zeroshot.regions == "off":
            return self
        if self.model.output != "masks" or self.model.classes:
            raise ValueError("evaluate.zeroshot.regions needs model.output masks and classes told by names")
        if not zeroshot.encoder and not self.model.text_queries:
            raise ValueError(
                "evaluate.zeroshot.encoder: this model has no image embedding of its own; name a CLIP"
            )
        return self


class EvaluateJob(Job):
    """A registered model and a dataset version -> the table of results."""

    kind: Literal["evaluate"]
    registered_model: Name = "demo"
    version: str = Field(
        default="latest", coerce_numbers_to_str=True, description="a version number, an alias, or 'latest'"
    )
    dataset: DatasetRef = DatasetRef()
    evaluate: EvaluateConfig = EvaluateConfig()


class PromoteJob(Job):
    """The candidate against the champion, by the rules."""

    kind: Literal["promote"]
    registered_model: Name = "demo"
    dataset: DatasetRef = DatasetRef()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()


AnyJob = RebuildJob | PretrainJob | EvaluateJob | PromoteJob
_ADAPTER: TypeAdapter[AnyJob] = TypeAdapter(Annotated[AnyJob, Field(discriminator="kind")])
KINDS: dict[str, type[Job]] = {get_args(k.model_fields["kind"].annotation)[0]: k for k in get_args(AnyJob)}


class JobFileError(ValueError):
    """A job file that cannot be used: every problem on a line of its own, with the place and what to do."""


def load(path: str | Path, overrides: list[str] | None = None) -> AnyJob:
    """Read a job file, resolve `extends`, apply `a.b=value` overrides (values are YAML) and validate.

    Raises `JobFileError` that lists every problem.
    """
    document = _read(Path(path), ())
    for override in overrides or []:
        dotted, equals, value = override.partition("=")
        if not equals or not dotted:
            raise JobFileError(f"override {override!r}: write it as a.b=value")
        _assign(document, dotted.split("."), _parse(value, f"override {override!r}"), override)
    return validate(document, str(path))


def validate(document: dict[str, Any], where: str) -> AnyJob:
    """A plain document -> a job. Raises `JobFileError`."""
    kind = document.get("kind")
    if kind not in KINDS:
        near = _nearest(str(kind), KINDS)
        raise JobFileError(f"{where}: kind is {kind!r}; choose one of {sorted(KINDS)}{near}")
    try:
        return _ADAPTER.validate_python(document)
    except ValidationError as error:
        lines = [_explain(e, KINDS[kind]) for e in error.errors()]
        raise JobFileError("\n  ".join([f"{where}: {len(lines)} problem(s)", *lines])) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema of all job files, for editors."""
    return _ADAPTER.json_schema()


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise JobFileError(f"{path}: extends itself")
    if not path.is_file():
        raise JobFileError(f"{path}: no such job file")
    document = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(document, dict):
        raise JobFileError(f"{path}: a job file is a mapping, this is {type(document).__name__}")
    base = document.pop("extends", None)
    if base is None:
        return document
    return _merge(_read(path.parent / str(base), (*seen, path)), document)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobFileError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _assign(document: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    *parents, last = path
    for name in parents:
        document = document.setdefault(name, {})
        if not isinstance(document, dict):
            raise JobFileError(f"override {override!r}: {name} is a value, not a section")
    document[last] = value


def _explain(error: Any, job: type[Job]) -> str:
    # pydantic puts the discriminator's value first, and the union branch nowhere else in these schemas
    path = [str(p) for p in error["loc"][1:]]
    dotted = ".".join(path) or "(file)"
    if error["type"] == "extra_forbidden":
        known = _fields_at(job, path[:-1])
        return f"{dotted}: unknown key{_nearest(path[-1], known)}; known here: {', '.join(sorted(known))}"
    return f"{dotted}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r:.120})"


def _fields_at(model: type[BaseModel], path: list[str]) -> dict[str, Any]:
    for name in path:
        if name.isdigit():
            continue
        annotation = model.model_fields[name].annotation
        models = [
            a for a in (annotation, *_flatten(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not models:
            return {}
        model = models[0]
    return dict(model.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    inner = list(get_args(annotation))
    return inner + [x for a in inner for x in _flatten(a)]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
