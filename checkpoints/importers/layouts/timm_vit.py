"""timm's ``vit_*``, ``deit_*`` and ``deit3_*``; facebookresearch's DINO, DINOv2 and DeiT files have the same names.

Queries, keys and values are one fused map there (``attn.qkv``), and so are gate and up of a gated block (``mlp.fc1``).
"""

from __future__ import annotations

import math
import re

from checkpoints.importers.layout import ImporterError, Layout, choose, depth, refuse
from checkpoints.importers.rules import LINEAR, Reshape, Rule, Split, conv2d, linear, norm
from zoo.nn.vit import ViT, ViTConfig

ARCHITECTURE = re.compile(
    r"(vit_(tiny|xsmall|small|medium|mediumd|betwixt|base|large|huge|giant|gigantic|wee|little|so150m|so150m2)_patch\d+"
    r"(_plus|_miil|_gap|_reg\d+|_clip|_quickgelu|_dinov2|_\d+)*"
    r"|deit3?_(tiny|small|medium|base|large|huge)(_distilled)?_patch\d+_\d+|flexivit_(small|base|large))(\..*)?"
)
"""Those of plain pre-norm blocks; not the parallel, differential, attention-pooled (SigLIP) or RADIO ones."""
ACTIVATION = {None: "gelu", **{name: name for name in ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")}}
POOL = {"token": "token", "avg": "mean", "": "none"}
HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Widths whose heads are not 64 wide."""
ARGUMENTS = (
    "img_size", "num_heads", "global_pool", "act_layer", "drop_path_rate", "proj_drop_rate", "pos_drop_rate",
    # shapes tell
    "patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "qk_norm", "init_values", "class_token",
    "no_embed_class", "reg_tokens", "pre_norm", "fc_norm", "num_classes", "pos_embed",
    # no matter
    "weight_init", "fix_init", "dynamic_img_size", "strict_img_size",
)  # fmt: skip


def configure(config, shapes):
    """Nearly all of it is read from shapes; the architecture's name tells heads, activation and epsilon."""
    config = config or {}
    architecture, args = config.get("architecture", ""), config.get("model_args") or {}
    if architecture and not ARCHITECTURE.fullmatch(architecture):
        raise ImporterError(
            f"config architecture = {architecture!r} is not supported; plain vit_*, deit_*, deit3_* are"
        )
    if unknown := sorted(set(args) - set(ARGUMENTS)):
        raise ImporterError(f"config model_args {unknown[0]} = {args[unknown[0]]!r} is not supported")
    refuse(args, pos_drop_rate=args.get("proj_drop_rate", 0.0))
    if "norm_pre.weight" in shapes and not architecture:
        raise ImporterError("a ViT with a norm before its blocks may use GELU or QuickGELU: give --config FILE")
    up = next(
        (shapes[f"blocks.0.mlp.{n}.weight"] for n in ("fc1", "w12") if f"blocks.0.mlp.{n}.weight" in shapes), None
    )
    down = next(
        (shapes[f"blocks.0.mlp.{n}.weight"] for n in ("fc2", "w3") if f"blocks.0.mlp.{n}.weight" in shapes), None
    )
    if up is None or down is None or ("norm.weight" in shapes) == ("fc_norm.weight" in shapes):
        raise ImporterError("the feed-forward part or the final norm of a plain ViT is not there")
    width, channels, *patch = shapes["patch_embed.proj.weight"].shape
    class_token, gated = "cls_token" in shapes, up.shape[0] == 2 * down.shape[1]
    image_size, positions = _positions(config, args, shapes, patch)
    scaled = {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(shapes)
    activation = "quick_gelu" if "quickgelu" in architecture else None
    pool = {"global_pool": config.get("global_pool", args.get("global_pool", "token" if class_token else "avg"))}
    return ViT(ViTConfig(
        image_size, tuple(patch), channels, width, depth(shapes, "blocks.{i}."),
        num_heads=args.get("num_heads") or _heads(architecture, width, class_token),
        mlp_width=down.shape[1],
        activation="silu" if gated else choose(args, "act_layer", ACTIVATION, activation),
        gated=gated,
        patch_bias="patch_embed.proj.bias" in shapes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        pre_norm="norm_pre.weight" in shapes,
        layer_scale=(args.get("init_values") or 1e-5) if scaled else None,
        class_token=class_token,
        distilled="dist_token" in shapes,
        registers=_registers(shapes),
        mask_token="mask_token" in shapes,
        positions=positions,
        pool=choose(pool, "global_pool", POOL, None),
        norm_after_pool="fc_norm.weight" in shapes,
        classes=shapes["head.weight"].shape[0] if "head.weight" in shapes else 0,
        epsilon=1e-5 if "_clip" in architecture else 1e-6,
        dropout=args.get("proj_drop_rate", 0.0),
        drop_path=args.get("drop_path_rate", 0.0),
    ))  # fmt: skip


def _heads(architecture, width, class_token):
    if architecture.startswith("vit_base_patch16_gap_224"):
        return 16
    # without a name: tiny, small, base and large with a class token have heads of 64 in every published file
    if (architecture and width % 64 == 0) or (class_token and width in (192, 384, 768, 1024)):
        return HEADS.get(width, width // 64)
    raise ImporterError(f"shapes do not tell the heads of a ViT of width {width}: give --config FILE with num_heads in "
                        "model_args")  # fmt: skip


def _registers(shapes):
    return next((shapes[n].shape[1] for n in ("reg_token", "register_tokens") if n in shapes), 0)


def _positions(config, args, shapes, patch):
    """The image size, and which tokens have positions: what makes the table's length come out."""
    others, registers = ("cls_token" in shapes) + ("dist_token" in shapes), _registers(shapes)
    # DINOv2's own files: class token and patches; timm: every token, or (no_embed_class) patches alone
    kinds = {"class": others} if "register_tokens" in shapes else {"all": others + registers}
    if kinds.get("all"):
        kinds["patches"] = 0
    size = args.get("img_size") or (config.get("pretrained_cfg") or {}).get("input_size", [])[1:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    length, fits = shapes["pos_embed"].shape[1] if "pos_embed" in shapes else None, {}
    if size:
        count = math.prod(s // p for s, p in zip(size, patch, strict=True))
        fits = {kind: size for kind, n in kinds.items() if count + n == length}
        fits = {"none": size} if length is None else fits
    if not fits and length:  # no config, or the table has been resized since it was written
        sides = {kind: math.isqrt(length - n) for kind, n in kinds.items() if length > n}
        fits = {k: (s * patch[0], s * patch[1]) for k, s in sides.items() if s * s + kinds[k] == length}
    if len(fits) != 1:
        raise ImporterError("the table of positions does not tell the image size: give --config FILE with model_args "
                            "img_size")  # fmt: skip
    ((kind, size),) = fits.items()
    return size, kind


def rules(module):
    """timm's name -> ours."""
    rows = Reshape((1, -1, module.config.width), (-1, module.config.width))
    token = Reshape((1, 1, -1), (-1,))
    qkv = [f"layer{{i}}/{name}" for name in ("query", "key", "value")]
    up = ["layer{i}/gate", "layer{i}/up"] if module.config.gated else ["layer{i}/up"]
    return (
        *conv2d("patch_embed.proj", "patches"),
        Rule("cls_token", "class_token", token),
        Rule("dist_token", "distillation_token", token),
        Rule("reg_token", "registers", rows),
        Rule("register_tokens", "registers", rows),
        Rule("mask_token", "mask_token", Reshape((1, -1), (-1,))),
        Rule("pos_embed", "positions", rows),
        *norm("norm_pre", "pre_norm"),
        *norm("blocks.{i}.norm1", "layer{i}/attention_norm"),
        *_fused("blocks.{i}.attn.qkv", qkv),
        *norm("blocks.{i}.attn.q_norm", "layer{i}/query_norm"),
        *norm("blocks.{i}.attn.k_norm", "layer{i}/key_norm"),
        *linear("blocks.{i}.attn.proj", "layer{i}/out"),
        Rule("blocks.{i}.ls1.gamma", "layer{i}/attention_scale"),
        Rule("blocks.{i}.gamma_1", "layer{i}/attention_scale"),
        *norm("blocks.{i}.norm2", "layer{i}/mlp_norm"),
        *_fused("blocks.{i}.mlp.fc1", up),
        *_fused("blocks.{i}.mlp.w12", up),
        *linear("blocks.{i}.mlp.fc2", "layer{i}/down"),
        *linear("blocks.{i}.mlp.w3", "layer{i}/down"),
        Rule("blocks.{i}.ls2.gamma", "layer{i}/mlp_scale"),
        Rule("blocks.{i}.gamma_2", "layer{i}/mlp_scale"),
        *norm("fc_norm" if module.config.norm_after_pool else "norm", "norm"),
        *linear("head", "head"),
        *linear("head_dist", "distilled_head"),
    )


def _fused(source, targets):
    n = len(targets)
    return (
        Rule(f"{source}.weight", tuple(f"{t}/kernel" for t in targets), (LINEAR, Split(1, n))),
        Rule(f"{source}.bias", tuple(f"{t}/bias" for t in targets), Split(0, n)),
    )


def to_config(module):
    """A hub config.json from which ``timm.create_model("local-dir:...")`` builds the same model."""
    c = module.config
    name = "vit_base_patch16_clip_224" if c.epsilon == 1e-5 else "vit_base_patch16_224"
    name = "vit_giant_patch14_dinov2" if c.gated else "deit_base_distilled_patch16_224" if c.distilled else name
    pool = {v: k for k, v in POOL.items()}.get(c.pool, "token")
    args = {
        "img_size": list(c.image_size), "patch_size": list(c.patch_size), "in_chans": c.channels,
        "embed_dim": c.width, "depth": c.depth, "num_heads": c.num_heads, "qkv_bias": c.qkv_bias,
        "mlp_ratio": ((1 + c.gated) * c.mlp_width + 0.25) / c.width,
        "qk_norm": c.qk_norm, "init_values": c.layer_scale, "class_token": c.class_token, "global_pool": pool,
        "no_embed_class": c.positions == "patches", "reg_tokens": c.registers, "pre_norm": c.pre_norm,
        "fc_norm": c.norm_after_pool,
        "pos_embed": "none" if c.positions == "none" else "learn", "act_layer": c.activation,
        "drop_path_rate": c.drop_path, "proj_drop_rate": c.dropout, "pos_drop_rate": c.dropout,
    }  # fmt: skip
    size = [c.channels, *c.image_size]
    return {"architecture": name, "num_classes": c.classes, "num_features": c.width, "global_pool": pool,
            "pretrained_cfg": {"input_size": size, "num_classes": c.classes}, "model_args": args}  # fmt: skip


def preprocessing(config, preprocessor):
    """From ``pretrained_cfg``; ``crop`` is the part of the shorter side that is kept."""
    found = (config or {}).get("pretrained_cfg") or {}
    if "mean" not in found:
        return None
    return {"size": tuple(found.get("input_size", (3, 224, 224))[1:]), "mean": tuple(found["mean"]),
            "std": tuple(found["std"]), "interpolation": found.get("interpolation", "bicubic"),
            "crop": found.get("crop_pct", 0.9)}  # fmt: skip


LAYOUT = Layout(
    name="timm-vit",
    title="ViT, DeiT, DINO and DINOv2 as timm and facebookresearch write them",
    configure=configure,
    rules=rules,
    model_types=("vit_", "deit_", "deit3_", "flexivit_"),
    signature=("patch_embed.proj.weight", "blocks.{i}.norm1.weight", "blocks.{i}.attn.qkv.weight"),
    prefixes=("backbone.", "module.backbone.", "teacher.backbone."),
    to_config=to_config,
    preprocessing=preprocessing,
)
